"""How a problem is framed as the text a model continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension

from steer.errors import SteerError, one_line, shown
from steer.prompt import PromptSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("steer")

# What a model is asked: the text of a problem, or the messages of a chat, each with `role` and `content`.
Question = str | Sequence[Mapping[str, str]]

_STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."
_SLOT, _WORKED = "{problem}", "{answer}"
DEFAULT_PROMPT = PromptSpec()


class Template(NamedTuple):
    """One way to ask a problem.

    `instruction` holds `{problem}` where the problem goes; in a chat, one without that slot is a system turn.
    """

    instruction: str
    chat: bool  # whether the tokenizer's own chat template lays the turns out
    description: str
    example: str = ""  # of a template that is not a chat: a worked example, before the problem's own turn


TEMPLATES: dict[str, Template] = {
    "boxed": Template(
        _STEP_BY_STEP,
        True,
        r"chat: a system turn asks for steps and a \boxed{} answer, the user turn is the problem",
    ),
    "boxed_short": Template(
        _SLOT + r" Give the answer as $\boxed{answer}$.",
        True,
        r"chat: one user turn that asks for \boxed{answer} and no steps, no system text; for tiny models",
    ),
    "qwen_math": Template(
        f"<|im_start|>system\n{_STEP_BY_STEP}<|im_end|>\n<|im_start|>user\n{_SLOT}<|im_end|>\n"
        "<|im_start|>assistant\n",
        False,
        "plain text in the format of the Qwen-Math models, whatever the tokenizer's chat template",
        f"<|im_start|>user\n{_SLOT}<|im_end|>\n<|im_start|>assistant\n{_WORKED}<|im_end|>\n",
    ),
    "plain": Template(
        f"{_SLOT}\nAnswer:",
        False,
        "plain text: the problem, then 'Answer:'",
        f"{_SLOT}\nAnswer: {_WORKED}\n\n",
    ),
    "think": Template(
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User "
        "with the answer. The reasoning process is enclosed within <think> </think> and the answer within "
        "<answer> </answer> tags, i.e., <think> reasoning process here </think> <answer> answer here "
        "</answer>. Inside the answer tags, put the final answer within \\boxed{}.\n"
        f"User: {_SLOT}\nAssistant: <think>",
        False,
        r"plain text: the R1-Zero conversation with <think> and <answer> tags, the answer still in \boxed{}",
        f"User: {_SLOT}\nAssistant: <think> {_WORKED} </think>\n",
    ),
}


def question(row: Mapping[str, Any]) -> Question:
    """What a problem in the record form of `steer.tasks.data` asks: its chat, else its text."""
    return row.get("messages") or str(row["problem"])


def format_prompt(
    problem: Question, tokenizer: PreTrainedTokenizerBase, prompt: PromptSpec | None = None
) -> str:
    """
    The full prompt text, to be tokenized with `add_special_tokens=False`; ends where the model writes on.

    The text opens with the special tokens that `tokenizer` would put before a text by itself, most often BOS
    or none, or with the BOS token that its chat template writes. A chat template that refuses or drops the
    system turn gets the system text as the opening of the user turn.

    Args:
        problem: the problem's text; or the messages of a chat, which the tokenizer's chat template lays out
            as they are, whatever the template.
        tokenizer: a tokenizer of transformers.
        prompt: how the problem is put, such as `vectors.config.prompt`; None for the default.

    Raises:
        SteerError: an unknown template; a chat template asked of a tokenizer that has none; a system text or
            `chat_template_kwargs` for a template that is not a chat; a variable that the chat template never
            reads; a chat template that fails, or whose text lacks the problem or the instruction.
    """
    prompt = prompt or DEFAULT_PROMPT
    template = prompt.template
    if template not in TEMPLATES:
        raise SteerError(f"unknown prompt template {template!r}; expected one of {', '.join(TEMPLATES)}")
    chosen = TEMPLATES[template]
    chats = ", ".join(name for name, other in TEMPLATES.items() if other.chat)
    chat = chosen.chat or not isinstance(problem, str)
    if prompt.system and not chat:
        raise SteerError(f"prompt template {template!r} has no turn for a system text; use one of {chats}")
    if prompt.chat_template_kwargs and not chat:
        raise SteerError(
            f"chat_template_kwargs={shown(prompt.chat_template_kwargs)} are for the tokenizer's chat "
            f"template, and prompt template {template!r} is not a chat; leave them out, or use one of {chats}"
        )
    text = (
        _plain_text(problem, chosen, prompt.examples)
        if isinstance(problem, str) and not chosen.chat
        else chat_turns(problem, tokenizer, prompt)[1]
    )
    # Many chat templates write BOS themselves, some after white space: the model knows one BOS, at the start.
    opening = _opening(tokenizer)
    text = text.lstrip() if _opens(text.lstrip(), opening, tokenizer) else opening.text + text
    return text + prompt.prefix


def formatter(prompt: PromptSpec, tokenizer: PreTrainedTokenizerBase) -> Callable[[Question], str]:
    """`format_prompt` with this prompt and tokenizer."""
    return lambda problem: format_prompt(problem, tokenizer, prompt)


def with_changes(
    prompt: PromptSpec,
    template: str | None = None,
    prefix: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptSpec:
    """
    The prompt with what is given here; None keeps what there is. A template that is not a chat leaves out the
    system text and the `chat_template_kwargs` of a chat.
    """
    changed = replace(
        prompt,
        template=prompt.template if template is None else template,
        prefix=prompt.prefix if prefix is None else prefix,
    )
    if changed.template in TEMPLATES and not TEMPLATES[changed.template].chat:
        changed = replace(changed, system="", chat_template_kwargs=None)
    if chat_template_kwargs is not None:
        changed = replace(changed, chat_template_kwargs=chat_template_kwargs)
    return changed


def agreed_prompt(trained: Mapping[str, PromptSpec | None], default: PromptSpec) -> PromptSpec:
    """The prompt that all sets of vectors which name one were trained with; `default` where there is none."""
    known = [prompt for prompt in trained.values() if prompt is not None]
    return known[0] if known and all(prompt == known[0] for prompt in known) else default


def choose_prompt(
    trained: Mapping[str, PromptSpec | None],
    default: PromptSpec = DEFAULT_PROMPT,
    template: str | None = None,
    prefix: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    label: str = "prompt",
) -> PromptSpec:
    """
    The prompt that sets of vectors are asked with. Logs in one line which it is and why, and warns in another
    of the sets that were trained with another.

    Args:
        trained: the prompt of each set, by its name; None where it names none.
        default: where the sets name no prompt, or different ones.
        template: what the user asks for; None for as in training.
        prefix: likewise.
        chat_template_kwargs: likewise.
        label: what the line calls the prompt.

    Returns:
        The prompt of the sets, or `default`, with what the user asks for.
    """
    known = {name: prompt for name, prompt in trained.items() if prompt is not None}
    chosen = with_changes(agreed_prompt(known, default), template, prefix, chat_template_kwargs)
    if known and all(prompt == chosen for prompt in known.values()):
        why = "as the vectors were trained with"
    elif any(value is not None for value in (template, prefix, chat_template_kwargs)):
        why = "as asked for"
    elif known:
        why = "since the vectors were trained with different ones"
    else:
        why = "the default, since the vectors name none" if trained else "the default"
    log.info("%s: %s (%s)", label, chosen, why)
    others = [f"{name} ({prompt})" for name, prompt in known.items() if prompt != chosen]
    if others:
        log.warning("warning: %s differs from what vectors were trained with: %s", label, "; ".join(others))
    return chosen


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """
    Token ids of prompts as text, of `format_prompt` or of a data set. The special tokens that the tokenizer
    puts before a text go before them, unless all open with these or with the BOS text already. Those that it
    puts after a text are left out: the model writes on there.
    """
    rows = tokenizer(text=list(texts), add_special_tokens=False)["input_ids"]
    opening = _opening(tokenizer)
    if all(_opens(text, opening, tokenizer) for text in texts):
        return rows
    return [[*opening.ids, *row] for row in rows]


# What rendering a faulty template raises: jinja2's errors, and those of Python's operators and methods in it.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


def _plain_text(problem: str, template: Template, examples: Sequence[tuple[str, str]]) -> str:
    opening, _, rest = template.example.partition(_SLOT)
    between, _, end = rest.partition(_WORKED)
    # where the problem's own turn begins, which is where an example begins
    start = template.instruction.rindex(opening + _SLOT)
    head, turn = template.instruction[:start], template.instruction[start:]
    worked = "".join(f"{opening}{example}{between}{answer}{end}" for example, answer in examples)
    return head + worked + turn.replace(_SLOT, problem)


def chat_turns(
    problem: Question, tokenizer: PreTrainedTokenizerBase, prompt: PromptSpec
) -> tuple[list[dict[str, str]], str]:
    """
    The turns of a chat that put a problem, in a form that the chat template takes, and their text.

    Args:
        problem: text, or the messages of a chat.
        tokenizer: a tokenizer of transformers, with a chat template.
        prompt: its prefix is not among the turns.

    Raises:
        SteerError: as `format_prompt`.
    """
    template, examples, variables = prompt.template, prompt.examples, prompt.chat_template_kwargs or {}
    of_template = isinstance(problem, str)
    what = f"prompt template {template!r}" if of_template else "a conversational prompt"
    without = ", ".join(name for name, other in TEMPLATES.items() if not other.chat)
    instead = f"use one of {without}" if of_template else "give the problem as text in column problem"
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise SteerError(f"{what} needs a chat template and tokenizer {name!r} has none; {instead}")
    if variables:
        check_chat_template_kwargs(tokenizer, variables)
    instruction = TEMPLATES[template].instruction if isinstance(problem, str) else _SLOT
    form = instruction if _SLOT in instruction else _SLOT
    # an empty system turn keeps the default text out that some chat templates put there
    system = prompt.system if _SLOT in instruction else f"{prompt.system}\n{instruction}".lstrip("\n")
    asked: list[dict[str, str]] = []
    if isinstance(problem, str):
        asked.append({"role": "user", "content": form.replace(_SLOT, problem)})
    else:
        asked += [dict(turn) for turn in problem]
        if asked[0]["role"] == "system":
            own = asked.pop(0)["content"]
            system = f"{prompt.system}\n{own}" if prompt.system else own
    dialogue = []
    for example, answer in examples:
        dialogue.append({"role": "user", "content": form.replace(_SLOT, example)})
        dialogue.append({"role": "assistant", "content": answer})
    dialogue += asked
    opening, *later = dialogue
    user = dialogue[-1]["content"]
    worked = [turn["content"] for turn in dialogue[:-1]]
    in_user_turn = f"{system}\n\n{opening['content']}" if system else opening["content"]
    told = ""
    ways = [
        [{"role": "system", "content": system}, *dialogue],
        [{"role": "user", "content": in_user_turn}, *later],
    ]
    if not of_template and not system:  # a chat as it is
        ways = [dialogue]
    for turns in ways:
        try:
            text = str(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables)
            )
        except TEMPLATE_ERRORS as error:
            told = told or one_line(error)
            continue
        lost = [part for part in (user, system, *worked) if not _holds(text, part)]
        if not lost:
            if turns[0]["role"] != "system" and system:
                _tell(f"the chat template of {name} has no system turn: its text opens the user turn instead")
            if "strftime_now" in tokenizer.get_chat_template() and not variables:
                _tell(
                    f"the chat template of {name} may write today's date into the prompts, which then "
                    "differ from day to day; set the date in chat_template_kwargs where it has a variable"
                )
            return turns, text
        told = told or f"it leaves out {shown(lost[0])}"
    raise SteerError(
        f"the tokenizer's chat template refused {what} ({told}); correct the chat template, or {instead}"
        + (", or no examples (--examples 0)" if examples else "")
    )


def _holds(text: str, part: str) -> bool:
    """Whether `part` is in `text`, white space aside: templates strip and join what they are given."""
    return " ".join(part.split()) in " ".join(text.split())


@cache
def _tell(message: str) -> None:
    """Log `message`, once for all prompts it is true of."""
    log.info("%s", message)


def check_chat_template_kwargs(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """
    Check that the tokenizer's chat template reads each of `variables`; one that it never reads would be
    ignored.

    Raises:
        SteerError: names the first that it does not read, and those that it does.
    """
    known = chat_template_variables(tokenizer.get_chat_template())
    for variable in variables:
        if variable not in known:
            reads = f"reads {', '.join(sorted(known))}" if known else "reads no settings at all"
            raise SteerError(
                f"chat_template_kwargs names {variable!r}, which the tokenizer's chat template never reads; "
                f"it {reads}: leave {variable!r} out ('{{}}' for none)"
            )


class _Generation(Extension):
    """The tag `generation` of transformers' chat templates, as the plain block that it is in a prompt."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def chat_template_variables(template: str) -> frozenset[str]:
    """
    The variables that a chat template reads and that its user may set: not the turns, the special tokens and
    what transformers provides.
    """
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    provided = ("raise_exception", "strftime_now", "messages", "add_generation_prompt")
    try:
        tree = environment.parse(template)
    except jinja2.TemplateError as error:
        raise SteerError(f"the tokenizer's chat template cannot be read: {one_line(error)}") from error
    # A name that the template sets itself is the user's only where the template asks whether it was given.
    asks: list[nodes.Test | nodes.Filter] = [
        test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined", "none")
    ]
    asks += [use for use in tree.find_all(nodes.Filter) if use.name in ("default", "d")]
    asked = {ask.node.name for ask in asks if isinstance(ask.node, nodes.Name)}
    targets: list[nodes.Node] = [a.target for a in tree.find_all(nodes.Assign)]
    targets += [block.target for block in tree.find_all(nodes.AssignBlock)]
    targets += [argument for macro in tree.find_all(nodes.Macro) for argument in macro.args]
    own = {target.name for target in targets if isinstance(target, nodes.Name)} - asked
    variables = meta.find_undeclared_variables(tree) - own
    return frozenset(name for name in variables if name not in provided and not name.endswith("_token"))


class _Opening(NamedTuple):
    """The special tokens that a tokenizer puts before a text by itself."""

    ids: list[int]
    text: str


def _opening(tokenizer: PreTrainedTokenizerBase) -> _Opening:
    bare, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    found = (i for i in range(len(ids)) if bare and ids[i : i + len(bare)] == bare)
    before = next(found, int(ids[:1] == [getattr(tokenizer, "bos_token_id", None)]))
    return _Opening(ids[:before], "".join(tokenizer.convert_ids_to_tokens(ids[:before])))


def _opens(text: str, opening: _Opening, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has its special tokens already: those of the tokenizer, or BOS."""
    starts = (opening.text, getattr(tokenizer, "bos_token", None))
    return text.startswith(tuple(start for start in starts if start))

"""How a problem is framed as the text a model continues."""

from __future__ import annotations

from typing import Any, NamedTuple

from steer.errors import SteerError

_STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."
_SLOT = "{problem}"


class Template(NamedTuple):
    """One way to frame a problem.

    `instruction` holds `{problem}` where the problem goes; in a chat, one without that slot is a system turn.
    """

    instruction: str
    chat: bool  # whether the tokenizer's own chat template lays the turns out
    description: str


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
    ),
    "plain": Template(f"{_SLOT}\nAnswer:", False, "plain text: the problem, then 'Answer:'"),
    "think": Template(
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User "
        "with the answer. The reasoning process is enclosed within <think> </think> and the answer within "
        "<answer> </answer> tags, i.e., <think> reasoning process here </think> <answer> answer here "
        "</answer>. Inside the answer tags, put the final answer within \\boxed{}.\n"
        f"User: {_SLOT}\nAssistant: <think>",
        False,
        r"plain text: the R1-Zero conversation with <think> and <answer> tags, the answer still in \boxed{}",
    ),
}


def render(problem: str, tokenizer: Any, template: str = "boxed", prefix: str = "", system: str = "") -> str:
    """The full prompt text, to be tokenized with `add_special_tokens=False`; ends where the model writes on.

    The text opens with the BOS token when `tokenizer` would put one before a text by itself. `prefix` is a
    forced opening of the model's own turn, such as "To" or "Step". `system` is a constant system text, before
    the template's own where it has one.
    Raises SteerError for an unknown template, a chat template asked of a tokenizer that has none, a system
    text for a template that is no chat, and when the tokenizer's chat template refuses the turns (some have
    no system role).
    """
    if template not in TEMPLATES:
        raise SteerError(f"unknown prompt template {template!r}; expected one of {', '.join(TEMPLATES)}")
    chosen = TEMPLATES[template]
    if system and not chosen.chat:
        chats = ", ".join(name for name, other in TEMPLATES.items() if other.chat)
        raise SteerError(f"prompt template {template!r} has no turn for a system text; use one of {chats}")
    text = (
        _chat_text(problem, tokenizer, template, system)
        if chosen.chat
        else chosen.instruction.replace(_SLOT, problem)
    )
    bos = _own_bos(tokenizer)
    # many chat templates write BOS themselves, and a second one is a prompt the model never saw
    if not text.startswith(bos):
        text = bos + text
    return text + prefix


def _chat_text(problem: str, tokenizer: Any, template: str, constant: str) -> str:
    without = ", ".join(name for name, other in TEMPLATES.items() if not other.chat)
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise SteerError(
            f"prompt template {template!r} needs a chat template and tokenizer {name!r} has none; "
            f"use one of {without}"
        )
    instruction = TEMPLATES[template].instruction
    if _SLOT in instruction:
        # an empty system turn keeps the default text out that some chat templates put there
        system, user = constant, instruction.replace(_SLOT, problem)
    else:
        system, user = f"{constant}\n{instruction}".lstrip("\n"), problem
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # a chat template without a system role does not miss an empty one
            if system:
                raise
            text = tokenizer.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2's TemplateError and whatever a custom template raises
        reason = " ".join(str(error).split())
        raise SteerError(
            f"the tokenizer's chat template refused prompt template {template!r} ({reason}); "
            f"use boxed_short (no system turn) or one of {without}"
        ) from error
    return str(text)


def _own_bos(tokenizer: Any) -> str:
    """The BOS text that `tokenizer(text)` would prepend by itself, "" when it prepends none."""
    bos = getattr(tokenizer, "bos_token", None)
    if not bos:
        return ""
    ids = tokenizer("a")["input_ids"]
    return str(bos) if ids and ids[0] == tokenizer.bos_token_id else ""

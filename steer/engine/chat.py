"""How the server puts the question of a chat request: as the vectors that answer it were trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from steer.errors import SteerError, one_line, shown
from steer.prompt import PromptSpec
from steer.tasks.prompts import DEFAULT_PROMPT, TEMPLATE_ERRORS, TEMPLATES, chat_turns, with_changes

# The value of `steer serve --template` that leaves all requests as they are.
AS_SENT = "none"


def served_prompt(trained: PromptSpec | None, template: str | None) -> tuple[PromptSpec | None, str]:
    """
    The prompt of a set of vectors on the server.

    Args:
        trained: that of training; None where nobody knows.
        template: the template that the user asks for, `AS_SENT` for none; None for as in training.

    Returns:
        The prompt, None where requests stay as they are; and one line that says so and why.

    Raises:
        SteerError: `template` is none of a chat.
    """
    if template == AS_SENT:
        return None, "requests are answered as sent (--template none)"
    chats = [name for name, known in TEMPLATES.items() if known.chat]
    if template is not None and template not in chats:
        raise SteerError(
            f"--template {template!r} lays out no chats; give one of {', '.join(chats)}, or none"
        )
    if template is None and trained is None:
        return None, "requests are answered as sent: the vectors name no prompt (--template sets one)"
    chosen = with_changes(trained or DEFAULT_PROMPT, template)
    if chosen.template not in chats:
        return None, f"requests are answered as sent: template {chosen.template} is for plain text, not chats"
    why = "as in training" if chosen == trained else f"trained with {trained}" if trained else "--template"
    return chosen, f"a chat of one question is put with {chosen} ({why})"


def agreed_prompt(prompts: Mapping[str, PromptSpec | None]) -> PromptSpec | None:
    """
    The prompt that a sum of sets is asked with.

    Args:
        prompts: of each set, by name; sets of None take any prompt.

    Raises:
        SteerError: two sets have different ones.
    """
    known = {name: prompt for name, prompt in prompts.items() if prompt is not None}
    if not known:
        return None
    (first, one), *others = known.items()
    for name, prompt in others:
        if prompt != one:
            raise SteerError(
                f"{first} was trained with {one} and {name} with {prompt}: choose with "
                f'"steering": {{"sets": [...], "prompt": "{first}"}}, or "none" for the chat as it is sent'
            )
    return one


def is_question(request: Mapping[str, Any]) -> bool:
    """Whether the body of a chat request is one question, without a system turn or an answer begun."""
    return _question(request) is not None


def _question(request: Mapping[str, Any]) -> str | None:
    """The text of the question that the request is; None where it is another."""
    turns = request.get("messages")
    if not isinstance(turns, list) or len(turns) != 1 or request.get("continue_final_message"):
        return None
    (turn,) = turns
    if not isinstance(turn, dict) or turn.get("role") != "user":
        return None
    content = turn.get("content")
    if isinstance(content, list) and content and all(map(_is_text, content)):
        return "\n".join(part["text"] for part in content)  # as vLLM joins them
    return content if isinstance(content, str) else None


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def put(request: Mapping[str, Any], prompt: PromptSpec, tokenizer: Any) -> dict[str, Any]:
    """
    A chat request whose one turn is a question, with that question put as `prompt` says. Other requests, with
    a system turn or a dialogue of their own, come back as they are.

    Args:
        request: the body of a request for `/v1/chat/completions`. Variables of the chat template that it sets
            go before those of the prompt.
        prompt: for a template that is a chat.
        tokenizer: that of the model which is served.

    Raises:
        SteerError: the chat template takes neither the turns nor the variables, or puts the prefix elsewhere
            than training did.
    """
    question = _question(request)
    if question is None:
        return dict(request)
    variables = {**(prompt.chat_template_kwargs or {}), **(request.get("chat_template_kwargs") or {})}
    asked, text = chat_turns(question, tokenizer, replace(prompt, chat_template_kwargs=variables))
    changed: dict[str, Any] = {**request, "messages": asked}
    if variables:
        changed["chat_template_kwargs"] = variables
    if prompt.prefix:  # the opening of the model's own turn, which it goes on with
        changed["messages"] = [*asked, {"role": "assistant", "content": prompt.prefix}]
        changed |= {"add_generation_prompt": False, "continue_final_message": True}
        _check_opening(changed["messages"], text, prompt.prefix, tokenizer, variables)
    return changed


def _check_opening(
    turns: Sequence[Mapping[str, str]], text: str, prefix: str, tokenizer: Any, variables: Mapping[str, Any]
) -> None:
    """
    SteerError unless `turns`, which end with `prefix`, are the text of training: `text`, then `prefix`. The
    chat template of Qwen3 puts an empty thought before an answer that is there, and none where one begins.
    """
    trained = text + prefix
    try:
        begun = str(
            tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True, **variables)
        )
    except TEMPLATE_ERRORS as error:
        told = one_line(error)
    else:
        if begun == trained:
            return
        same = len(os.path.commonprefix([begun, trained]))  # noqa: RUF071  # characters are meant
        told = f"it writes {shown(begun[same:])} where training had {shown(trained[same:])}"
    raise SteerError(
        f"the vectors were trained with the prefix {shown(prefix)}, and the chat template puts it elsewhere "
        f"({told}): send the text of steer.tasks.prompts.format_prompt to /v1/completions with "
        'add_special_tokens=false, or choose "prompt": "none" in steering (--template none for all requests)'
    )

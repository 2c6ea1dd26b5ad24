"""
Contrasts: texts that have a property and texts that do not.

A file of contrasts is JSON lines with `positive`, `negative`, or both: each a text, or a chat as a list of
messages. Where a line has a `prompt` too (a text or a chat that ends with the user's turn), `positive` and
`negative` are texts that follow it.

    {"positive": "I love rain.", "negative": "I hate rain."}
    {"prompt": "How was the film?", "positive": " Wonderful.", "negative": " Dreadful."}
    {"positive": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, friend!"}]}
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from steer.errors import SteerError, shown
from steer.extract.rows import Row
from steer.files import json_lines
from steer.prompt import PromptSpec
from steer.tasks.columns import conversation
from steer.tasks.prompts import DEFAULT_PROMPT, format_prompt, prompt_ids

SIDES = ("positive", "negative")
_KEYS = (*SIDES, "prompt")


@dataclass(frozen=True)
class Contrast:
    """
    Texts of two kinds.

    Args:
        positive: texts that the vectors lead to.
        negative: texts that they lead away from.
        pairs: indices (positive, negative) of texts that differ in the property alone.
        source: what the card says of them.
        prompt: how the problems were put, where these are answers to problems.

    Raises:
        SteerError: texts of one kind only.
    """

    positive: list[Row]
    negative: list[Row]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    source: Mapping[str, Any] = field(default_factory=dict)
    prompt: PromptSpec | None = None

    def __post_init__(self) -> None:
        for name, other in (SIDES, SIDES[::-1]):
            if not getattr(self, name):
                have = len(getattr(self, other))
                where = f"{self.source['from']}: " if "from" in self.source else ""
                raise SteerError(
                    f"{where}there are {have} {other} texts and no {name} one; a direction needs both"
                )


def read_contrast(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Contrast:
    """
    The contrasts in a file of JSON lines.

    Args:
        path: the file; the docstring of this module has its form.
        tokenizer: puts its own special tokens before plain texts, and its chat template around chats.
        chat_template_kwargs: variables of the chat template.

    Returns:
        The texts; a line with both sides is a pair.

    Raises:
        SteerError: names the line that cannot be read, the key that is unknown, or what is missing; variables
            of the chat template where no line is a chat.
    """
    file = Path(path)
    prompt = replace(DEFAULT_PROMPT, chat_template_kwargs=chat_template_kwargs)
    sides: dict[str, list[Row]] = {side: [] for side in SIDES}
    pairs = []
    chats = False
    for number, record in enumerate(json_lines(file), 1):
        if record is None:
            continue
        where = f"{file.name}, line {number}"
        _check_keys(record, where)
        chats = chats or any(isinstance(value, list) for value in record.values())
        for side in SIDES:
            if side in record:
                sides[side].append(_row(record, side, tokenizer, prompt, where))
        if all(side in record for side in SIDES):
            pairs.append((len(sides["positive"]) - 1, len(sides["negative"]) - 1))
    if not any(sides.values()):
        raise SteerError(f"{file} is empty; write one JSON object a line, with 'positive' and 'negative'")
    if chat_template_kwargs and not chats:
        raise SteerError(
            f"chat_template_kwargs have no effect: {file.name} holds plain texts, no chats; leave them out, "
            "or write chats as lists of messages"
        )
    source = {
        "from": f"contrasts in {file.name}",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
    }
    return Contrast(sides["positive"], sides["negative"], pairs, source)


def _check_keys(record: Any, where: str) -> None:
    form = "expected an object with 'positive', 'negative' or both, and optionally 'prompt'"
    if not isinstance(record, dict):
        raise SteerError(f"{where} is a JSON {type(record).__name__}; {form}")
    for key in record:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else form
            raise SteerError(f"{where} has the key {shown(key)}; {hint}")
    if not any(side in record for side in SIDES):
        raise SteerError(f"{where} has neither 'positive' nor 'negative'; {form}")


def _row(
    record: Mapping[str, Any],
    side: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptSpec,
    where: str,
) -> Row:
    text, opening = record[side], record.get("prompt")
    if isinstance(text, list) and opening is None:
        turns = _turns(text, f"{where}, {side!r}")
        if turns[-1]["role"] == "assistant":
            opening, text = turns[:-1], turns[-1]["content"]
        else:
            opening, text = turns, ""
        opening = _question(opening, f"{where}, {side!r}")
    elif isinstance(opening, list):
        opening = _question(opening, where)
    if not isinstance(text, str) or not isinstance(opening, (str, list, type(None))):
        name, value = (side, text) if not isinstance(text, str) else ("prompt", opening)
        kind = (
            "a text" if side == name and record.get("prompt") is not None else "a text or a list of messages"
        )
        raise SteerError(f"{where}: {name!r} is {shown(value)}; expected {kind}")
    if opening is None:
        ids = tokenizer(text)["input_ids"]
        if not text.strip():
            raise SteerError(f"{where}: {side!r} is empty; give a text")
        return Row(tuple(ids), len(ids))
    if isinstance(opening, str):
        first = prompt_ids(tokenizer, [opening])[0]
    else:
        laid_out = format_prompt(opening, tokenizer, prompt)
        first = tokenizer(laid_out, add_special_tokens=False)["input_ids"]
    after = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return Row((*first, *after), len(first))


def _turns(value: list[Any], where: str) -> list[dict[str, str]]:
    for turn in value:
        fine = isinstance(turn, dict) and set(turn) == {"role", "content"}
        if not fine or not all(isinstance(text, str) for text in turn.values()):
            raise SteerError(
                f'{where} has the message {shown(turn)}; expected {{"role": "user", "content": "text"}} alone'
            )
    if not value:
        raise SteerError(f"{where} is a chat without messages; give at least the user's")
    return value


def _question(turns: list[Any], where: str) -> list[dict[str, str]]:
    return conversation(turns, where) or []

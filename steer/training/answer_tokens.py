"""Examples with given answers, as the tokens that supervised training and DPO take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.stop_tokens import end_of_turn
from steer.tasks.prompts import prompt_ids

log = logging.getLogger("steer")


class Example(NamedTuple):
    """
    A prompt with one answer, and with a worse one in a pair, which its limit may have cut off. `chat`: the
    tokenizer's chat template laid the prompt out.
    """

    prompt: str
    answer: str
    worse: str | None = None
    cut: bool = False
    chat: bool = False


def tokens(
    made: Sequence[Example], tokenizer: PreTrainedTokenizerBase, method: str
) -> list[dict[str, list[int]]]:
    """
    Each example as a row of trl's trainers: its prompt, and its answers with the token that ends them.

    Raises:
        SteerError: the tokenizer has no such token.
    """
    turn = end_of_turn(tokenizer)
    turn = tokenizer.eos_token_id if turn is None else turn
    rows: list[dict[str, list[int]]] = []
    for one in made:
        end = turn if one.chat else tokenizer.eos_token_id
        if end is None:
            raise SteerError("the tokenizer has no token that ends a text (eos_token); set one on it")
        (first,) = prompt_ids(tokenizer, [one.prompt])
        better, worse = (
            list(tokenizer(text or "", add_special_tokens=False)["input_ids"]) for text in one[1:3]
        )
        better.append(end)
        if not one.cut:
            worse.append(end)
        if method == "sft":
            rows.append({"input_ids": first + better, "labels": [-100] * len(first) + better})
        else:
            rows.append({"prompt_ids": first, "chosen_ids": better, "rejected_ids": worse})
    return rows


def fitting(
    rows: list[dict[str, list[int]]], max_length: int | None, context: int | None
) -> list[dict[str, list[int]]]:
    """
    The rows that are no longer than `max_length` and the model's context; how many are not is logged.

    Raises:
        SteerError: there is none.
    """

    def length(row: dict[str, list[int]]) -> int:
        if "input_ids" in row:
            return len(row["input_ids"])
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    most = min((limit for limit in (max_length, context) if limit is not None), default=None)
    if most is None:
        return rows
    kept = [row for row in rows if length(row) <= most]
    why = f"max_length={max_length} and the model's context of {context} tokens"
    if not kept:
        shortest = min(map(length, rows))
        raise SteerError(f"no example fits {why}: the shortest has {shortest} tokens; raise max_length")
    if len(kept) < len(rows):
        log.warning("%d of %d examples do not fit %s", len(rows) - len(kept), len(rows), why)
    return kept

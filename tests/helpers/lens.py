"""Shared by the tests of the lens: tiny models with vectors in them, texts, and a grader without workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers.steering import fill
from transformers import PreTrainedModel

import steer
from steer.lens.subject import Row, Subject
from steer.prompt import PromptSpec

PROBLEMS = [
    {"problem": "1 + 2?", "answer": "3"},
    {"problem": "What is 12 * 3?", "answer": "36"},
    {"problem": "4?", "answer": "4"},
]


def subject_of(model: PreTrainedModel, tokenizer: Any, std: float = 0.5, **fields: Any) -> Subject:
    """
    A subject whose vectors are random and large; `fields` are those of the steering config and the subject.
    """
    own = {k: fields.pop(k) for k in ("batch_size", "padding_side", "max_new_tokens") if k in fields}
    vectors = fill(steer.attach(model, steer.SteeringConfig(**fields)), std)
    return Subject(
        vectors, tokenizer, **{"prompt": PromptSpec("plain"), "max_new_tokens": 4, "batch_size": 64, **own}
    )


def texts(lengths: Sequence[tuple[int, int]] = ((5, 4), (9, 2), (3, 6)), seed: int = 0) -> list[Row]:
    """Random rows of (prompt, completion) tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [Row(tuple(torch.randint(3, 97, (p + c,), generator=generator).tolist()), p) for p, c in lengths]


class Even:
    """A grader by whose lights half of all texts are right, whoever wrote them."""

    def check(self, completions: Sequence[str], answers: Sequence[str]) -> list[Any]:
        from steer.tasks.grading import Verdict

        return [Verdict(sum(map(ord, text)) % 2 == 0, text, "even") for text in completions]


class Exact:
    """
    Grades like `steer.tasks.grading.MathGrader`, without its workers: the text must be the answer, or one of
    several.
    """

    def check(self, completions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> list[Any]:
        from steer.tasks.grading import Verdict

        golds = [[answer] if isinstance(answer, str) else answer for answer in answers]
        pairs = zip(completions, golds, strict=True)
        return [Verdict(text in some, text or None, "exact") for text, some in pairs]

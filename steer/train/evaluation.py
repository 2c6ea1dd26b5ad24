"""
Greedy accuracy on held-out problems, for a before/after table. Benchmarks with sampling live in `evals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.grading import Checker
from steer.train import cpu
from steer.train.rollout import Sampling, rollout

BATCH = 64


@dataclass(frozen=True)
class Answered:
    """One problem with what the model wrote and what became of it; `given` is the extracted answer."""

    problem: str
    answer: str
    completion: str
    given: str | None
    correct: bool
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Score:
    """Share of right answers with its 95 % Wilson interval, and what else decides how to read it."""

    accuracy: float
    low: float
    high: float
    problems: int
    answered: float
    finished: float
    mean_tokens: float


def answer_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any]],
    frame: Callable[[str], str],
    checker: Checker,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    label: str = "evaluating",
) -> list[Answered]:
    """The most likely completion of each problem as `frame` puts it, graded. Deterministic on one machine."""
    sampling = Sampling(max_new_tokens, tuple(eos_token_ids), temperature=0.0)
    was_training = model.training
    model.eval()
    answered: list[Answered] = []
    with tqdm(total=len(problems), desc=label, unit="problem") as bar:
        for start in range(0, len(problems), BATCH):
            batch = problems[start : start + BATCH]
            prompts = [
                tokenizer(frame(row["problem"]), add_special_tokens=False)["input_ids"] for row in batch
            ]
            with cpu.grouped(model):
                ids = rollout(model, prompts, sampling).ids
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            verdicts = checker.check(texts, [row["answer"] for row in batch])
            for row, text, verdict, tokens in zip(batch, texts, verdicts, ids, strict=True):
                ended = tokens[-1] in sampling.eos_token_ids
                answered.append(
                    Answered(
                        row["problem"],
                        row["answer"],
                        text,
                        verdict.answer,
                        verdict.correct,
                        len(tokens),
                        ended,
                    )
                )
            bar.update(len(batch))
    model.train(was_training)
    return answered


def score(answered: Sequence[Answered]) -> Score:
    """Accuracy over the problems, with the Wilson score interval (Wilson 1927) at 95 %."""
    n = len(answered)
    p = sum(a.correct for a in answered) / n
    z = 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Score(
        accuracy=p,
        low=round(max(0.0, centre - half), 6),
        high=round(min(1.0, centre + half), 6),
        problems=n,
        answered=sum(a.given is not None for a in answered) / n,
        finished=sum(a.finished for a in answered) / n,
        mean_tokens=sum(a.tokens for a in answered) / n,
    )

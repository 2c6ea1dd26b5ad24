"""
Accuracy on held-out problems, for a before/after table and for sweeps. Benchmarks live in `evals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.grading import Checker
from steer.stats import wilson
from steer.train.rollout import Sampling, rollout, uniforms

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
    return answer(model, tokenizer, problems, frame, checker, max_new_tokens, eos_token_ids, label)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any]],
    frame: Callable[[str], str],
    checker: Checker,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    label: str = "evaluating",
    temperature: float = 0.0,
    numbers: Sequence[int] | None = None,
) -> list[Answered]:
    """
    One completion of each problem as `frame` puts it, graded; a problem that is there several times is read
    once. `numbers` (default: 0, 1, ...) tell the random numbers of one row from another's where the
    temperature is not 0.
    """
    sampling = Sampling(max_new_tokens, tuple(eos_token_ids), temperature)
    numbers = range(len(problems)) if numbers is None else numbers
    was_training = model.training
    model.eval()
    answered: list[Answered] = []
    with tqdm(total=len(problems), desc=label, unit="problem") as bar:
        for start in range(0, len(problems), BATCH):
            batch = problems[start : start + BATCH]
            prompts = [
                tokenizer(frame(row["problem"]), add_special_tokens=False)["input_ids"] for row in batch
            ]
            noise = uniforms(numbers[start : start + BATCH], max_new_tokens, 0, 0) if temperature else None
            ids = rollout(model, prompts, sampling, noise).ids
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
    right = sum(a.correct for a in answered)
    low, high = wilson(right, n)
    return Score(
        accuracy=right / n,
        low=round(low, 6),
        high=round(high, 6),
        problems=n,
        answered=sum(a.given is not None for a in answered) / n,
        finished=sum(a.finished for a in answered) / n,
        mean_tokens=sum(a.tokens for a in answered) / n,
    )

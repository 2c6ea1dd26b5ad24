"""
Accuracy on held-out problems, for a before/after table and for sweeps. Benchmarks are `steer eval`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.generation.sampler import Sampling, rollout, uniforms
from steer.prompt import PromptSpec
from steer.stats import wilson
from steer.tasks.elicited import Example, constant_answer, fitting, longer
from steer.tasks.grading import MathGrader
from steer.tasks.lenient import extract_lenient
from steer.tasks.prompts import formatter, question

log = logging.getLogger("steer")

BATCH = 64


@dataclass(frozen=True)
class Answered:
    """
    One problem with what the model wrote and what became of it. `given` is the boxed answer and `correct` its
    verdict; `lenient` is the verdict on the answer in whatever form it is given (`steer.tasks.lenient`), None
    in the files of older runs.
    """

    problem: str
    answer: str
    completion: str
    given: str | None
    correct: bool
    tokens: int
    finished: bool
    lenient: bool | None = None


@dataclass(frozen=True)
class Score:
    """
    Share of right answers with its 95 % Wilson interval, boxed (`accuracy`) and read leniently (`lenient`;
    None in the files of older runs), and what else decides how to read it.
    """

    accuracy: float
    low: float
    high: float
    problems: int
    answered: float
    finished: float
    mean_tokens: float
    lenient: float | None = None
    lenient_low: float | None = None
    lenient_high: float | None = None


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any]],
    format_problem: Callable[[Any], str],
    grader: MathGrader,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    label: str = "evaluating",
    temperature: float = 0.0,
    numbers: Sequence[int] | None = None,
    leave: bool = True,
) -> list[Answered]:
    """
    One completion of each problem as `format_problem` puts it, graded; a problem that is there several times
    is read once. `numbers` (default: 0, 1, ...) tell the random numbers of one row from another's where the
    temperature is not 0. The progress bar stays when it is full if `leave` is set.
    """
    sampling = Sampling(max_new_tokens, tuple(eos_token_ids), temperature)
    numbers = range(len(problems)) if numbers is None else numbers
    was_training = model.training
    model.eval()
    answered: list[Answered] = []
    with tqdm(total=len(problems), desc=label, unit="problem", leave=leave) as bar:
        for start in range(0, len(problems), BATCH):
            batch = problems[start : start + BATCH]
            prompts = [
                tokenizer(format_problem(question(row)), add_special_tokens=False)["input_ids"]
                for row in batch
            ]
            noise = uniforms(numbers[start : start + BATCH], max_new_tokens, 0, 0) if temperature else None
            written = rollout(model, prompts, sampling, noise, share_beginning=True)
            texts = tokenizer.batch_decode([one.ids for one in written], skip_special_tokens=True)
            golds = [row.get("golds") or row["answer"] for row in batch]
            verdicts = grader.check(texts, golds)
            lenient = grader.check(texts, golds, extract_lenient)
            for row, text, verdict, free, one in zip(batch, texts, verdicts, lenient, written, strict=True):
                answered.append(
                    Answered(
                        row["problem"],
                        row["answer"],
                        text,
                        verdict.answer,
                        verdict.correct,
                        len(one.ids),
                        one.finished,
                        free.correct,
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
    known = all(a.lenient is not None for a in answered)
    freely = sum(bool(a.lenient) for a in answered)
    lenient_low, lenient_high = wilson(freely, n) if known else (None, None)
    return Score(
        accuracy=right / n,
        low=low,
        high=high,
        problems=n,
        answered=sum(a.given is not None for a in answered) / n,
        finished=sum(a.finished for a in answered) / n,
        mean_tokens=sum(a.tokens for a in answered) / n,
        lenient=freely / n if known else None,
        lenient_low=lenient_low,
        lenient_high=lenient_high,
    )


def constant(problems: Sequence[dict[str, Any]], grader: MathGrader) -> dict[str, Any]:
    """The score of the best constant answer to `problems`, as a run's results hold it."""
    given = constant_answer(str(row["answer"]) for row in problems)
    golds = [row.get("golds") or str(row["answer"]) for row in problems]
    verdicts = grader.check([rf"\boxed{{{given}}}"] * len(problems), golds)
    right = sum(verdict.correct for verdict in verdicts)
    low, high = wilson(right, len(problems))
    share = right / len(problems)
    return {
        **{"answer": given, "accuracy": share, "low": low, "high": high, "problems": len(problems)},
        **{"lenient": share, "lenient_low": low, "lenient_high": high},
    }


def ways(
    prompts: PromptSpec,
    limit: int,
    examples: Sequence[Example],
    problems: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> dict[str, tuple[PromptSpec, int]]:
    """
    How each stage of a run asks the held-out problems: the prompts and the limit on the answers in tokens.

    Args:
        prompts: the run's own, of the stages "before" and "after".
        limit: the run's own limit on an answer, in tokens, of these stages.
        examples: those of the stage "elicited"; none leave the stages "longer" and "elicited" out.
        problems: the held-out problems.
        context: tokens that the model can read; None for any number. Examples that do not fit are left out.
    """
    prompted = {"before": (prompts, limit), "after": (prompts, limit)}
    if not examples:
        return prompted

    def longest(some: Sequence[Example]) -> int:
        format_problem = formatter(replace(prompts, examples=tuple(some)), tokenizer)
        texts = [format_problem(question(row)) for row in problems]
        return max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])

    wide = longer(limit)
    if context is not None:
        wide = max(limit, min(wide, context - longest(())))
    if wide > limit:
        prompted["longer"] = (prompts, wide)
    fitted = fitting(examples, longest, wide, context)
    if len(fitted) < len(examples):
        log.info(
            "%d of %d worked examples fit the model's context of %d tokens",
            len(fitted),
            len(examples),
            context,
        )
    if fitted:
        prompted["elicited"] = (replace(prompts, examples=fitted), wide)
    return prompted

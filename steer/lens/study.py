"""What the sections of a report share: the answers they measure on, and the report that they fill."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steer.card import is_score
from steer.errors import SteerError
from steer.lens import findings as rules
from steer.lens.conditions import BASE, steered
from steer.lens.controls import mean_difference, random_vectors, shuffled_layers, values
from steer.lens.findings import Finding
from steer.lens.results import Result, plain
from steer.lens.sampling import complete, graded
from steer.lens.subject import Row, Subject
from steer.prompt import PromptSpec, recorded
from steer.stats import wilson
from steer.tasks.elicited import best_base
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import DEFAULT_PROMPT

Record = dict[str, Any]
SINGLE = 4  # texts that single vectors and controls of paths are measured on, all tokens of the answer


@dataclass
class Report:
    """
    `results` by section name, `numbers` that the findings were judged by, and `findings`. `accuracy` has, by
    condition, (accuracy, low, high) with the 95 % Wilson interval over `problems`.
    """

    subject: Subject
    problems: int
    accuracy: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    numbers: dict[str, float | None] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What was found, without the larger tensors: accuracies, numbers and findings."""
        config = self.subject.vectors.config
        vectors = {
            k: getattr(config, k)
            for k in ("base_model_name_or_path", "kind", "layers", "site", "positions", "scale")
        }
        return {
            "vectors": vectors,
            "problems": self.problems,
            "accuracy": {
                k: dict(zip(("accuracy", "low", "high"), v, strict=True)) for k, v in self.accuracy.items()
            },
            "numbers": plain(self.numbers),
            "findings": rules.to_dict(self.findings),
            "notes": self.notes,
        }


class Study:
    """One artifact on some problems, and the report of it."""

    def __init__(
        self,
        subject: Subject,
        problems: Sequence[Record],
        grader: MathGrader,
        checkpoints: Sequence[str | os.PathLike[str]] = (),
        seed: int = 0,
    ):
        self.subject, self.problems, self.grader = subject, list(problems), grader
        self.checkpoints, self.seed = list(checkpoints), seed
        self.report = Report(subject, len(problems))
        self.last = subject.decoder.num_hidden_layers - 1
        self.random = random_vectors(subject.vectors, seed)
        self.rows: list[Row] = []  # the steered model's greedy answers
        self.base: list[Row] = []  # the base model's
        self.right: list[Row] = []  # those of them that are right
        self.few = max(SINGLE, len(problems) // 5)

    def answer(self) -> None:
        """Accuracies with and without the vectors and with controls; leaves the greedy answers."""
        subject, report = self.subject, self.report
        rows = subject.rows(self.problems)
        self.base, self.rows = complete(subject, rows, [BASE, steered(subject)], label="greedy answers")
        self._score("base", graded(subject, self.base, self.problems, self.grader))
        right = graded(subject, self.rows, self.problems, self.grader)
        self._score("steered", right)
        report.notes.append(_elicited(subject.vectors.config.provenance))
        self.right = [row for row, ok in zip(self.rows, right.tolist(), strict=True) if ok]
        for row, plain_row, problem in list(zip(self.rows, self.base, self.problems, strict=True))[:3]:
            texts = subject.answers([plain_row, row])
            report.samples.append({"problem": problem["problem"], "base": texts[0], "steered": texts[1]})
        controls: list[tuple[str, Callable[[], dict[str, torch.Tensor]]]] = [
            ("random vectors of equal length", lambda: self.random),
            ("layers shuffled", lambda: shuffled_layers(subject.vectors, self.seed)),
            ("mean-difference vectors", lambda: mean_difference(subject, self.rows, self.base, "means")),
        ]
        for name, make in controls:
            try:
                with values(subject.vectors, make()):
                    (written,) = complete(subject, rows, [steered(subject)], label=name)
            except SteerError as error:
                report.notes.append(f"Control left out: {name} ({error}).")
                continue
            self._score(name, graded(subject, written, self.problems, self.grader))
        trained = (subject.prompt or DEFAULT_PROMPT).template
        plain = "plain" if trained != "plain" else "qwen_math"
        other = replace(subject, prompt=PromptSpec(plain))
        title = f"template {plain} instead of {trained}"
        try:
            asked = other.rows(self.problems)
        except SteerError as error:  # its prompts do not fit into the model
            report.notes.append(f"Control left out: {title} ({error}).")
            asked = []
        if asked:
            both = complete(other, asked, [BASE, steered(other)], label="another template")
            for name, some in zip(("base", "steered"), both, strict=True):
                self._score(f"{name}, {title}", graded(other, some, self.problems, self.grader))
        random = report.accuracy["random vectors of equal length"][0]
        self.note(
            base_interval_top=report.accuracy["base"][2],
            steered_interval_bottom=report.accuracy["steered"][1],
        )
        self.note(random_vectors_accuracy=random)

    def _score(self, name: str, right: torch.Tensor) -> None:
        hits = int(right.sum())
        self.report.accuracy[name] = (hits / len(right), *wilson(hits, len(right)))

    def note(self, **numbers: float | None) -> None:
        """Numbers that the findings are judged by."""
        self.report.numbers.update(numbers)


def _elicited(provenance: dict[str, Any] | None) -> str:
    """What the run that trained the vectors found of its base, asked and read as well as can be."""
    scores = {name: score for name, score in recorded(provenance, "results").items() if is_score(score)}
    best = best_base(scores)
    if best is None:
        return (
            "The base was not elicited (worked examples, a longer limit, lenient reading) where these "
            "vectors were trained: part of the gain over it may be form alone."
        )
    name, score = best
    return (
        f"The best elicited base of the training run is {name}: {score['lenient']:.3f} of "
        f"{score['problems']} problems, read leniently. A gain over the base that is above that is not form."
    )

"""What the sections of a report share: the answers they measure on, and the report that they fill."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from steer.card import is_score
from steer.errors import SteerError
from steer.lens import findings as rules
from steer.lens.composition import likelihoods
from steer.lens.conditions import BASE, Condition, steered
from steer.lens.controls import directions, mean_difference, random_vectors, shuffled_layers, values
from steer.lens.findings import Finding
from steer.lens.random_sets import ONE_SIDED_DRAWS, Null
from steer.lens.results import Result, plain
from steer.lens.sampling import complete, graded
from steer.lens.subject import Row, Subject, chunks
from steer.prompt import recorded
from steer.stats import wilson
from steer.tasks.elicited import best_base
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import DEFAULT_PROMPT, with_changes

Record = dict[str, Any]
TEXTS = 24  # that every number is measured on, all tokens of the answer; with fewer it is untestable


@dataclass
class Report:
    """
    `results` by section name, `numbers` that the findings were judged by, `nulls`, what random vectors give
    for them, `missing`, why some were not measured, and `findings`. `accuracy` has, by condition, (accuracy,
    low, high) with the 95 % Wilson interval over `problems`.
    """

    subject: Subject
    problems: int
    accuracy: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    numbers: dict[str, float | None] = field(default_factory=dict)
    nulls: dict[str, Null] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
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
            "null": {name: list(null.values) for name, null in self.nulls.items()},
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
        self.half = self.problems[: max(TEXTS, len(problems) // 2)]
        # Random vectors of equal length, as values and as directions of a condition; the first for figures.
        self.draws = [random_vectors(subject.vectors, seed + draw) for draw in range(ONE_SIDED_DRAWS)]
        self.directions = [directions(subject.vectors, drawn) for drawn in self.draws]
        self.random = self.draws[0]
        self.rows: list[Row] = []  # the steered model's greedy answers
        self.base: list[Row] = []  # the base model's
        self.solved: list[bool] = []  # which of the steered model's are right
        self.right: list[Row] = []  # `TEXTS` right ones, see `choose_right`; none where there are fewer
        self.alone: dict[int, torch.Tensor] = {}  # by layer: likelihood of those, own vector and draws

    def answer(self) -> None:
        """Accuracies with and without the vectors and with controls; leaves the greedy answers."""
        subject, report = self.subject, self.report
        rows = subject.rows(self.problems)
        self.base, self.rows = complete(subject, rows, [BASE, steered(subject)], label="greedy answers")
        base = graded(subject, self.base, self.problems, self.grader)
        self._score("base", base)
        right = graded(subject, self.rows, self.problems, self.grader)
        self._score("steered", right)
        self.solved = right.tolist()
        report.notes.append(_elicited(subject.vectors.config.provenance))
        self.note(
            base_interval_top=report.accuracy["base"][2],
            steered_interval_bottom=report.accuracy["steered"][1],
        )
        drawn = self._solve_randomly(rows, right)
        self.choose_right([_those(self.base, base), _those(self.rows, right), *drawn])
        self.gain()
        for row, plain_row, problem in list(zip(self.rows, self.base, self.problems, strict=True))[:3]:
            texts = subject.answers([plain_row, row])
            report.samples.append({"problem": problem["problem"], "base": texts[0], "steered": texts[1]})
        controls: list[tuple[str, Callable[[], dict[str, torch.Tensor]]]] = [
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
        prompt = subject.prompt or DEFAULT_PROMPT
        trained = prompt.template
        plain = "plain" if trained != "plain" else "qwen_math"
        other = replace(subject, prompt=with_changes(prompt, template=plain))
        title = f"template {plain} instead of {trained}"
        asked: list[Row] = []
        try:
            if any(problem.get("messages") for problem in self.problems):
                raise SteerError("chats are put as they are, whatever the template")
            asked = other.rows(self.problems)
        except SteerError as error:  # or its prompts do not fit into the model
            report.notes.append(f"Control left out: {title} ({error}).")
        if asked:
            both = complete(other, asked, [BASE, steered(other)], label="another template")
            for name, some in zip(("base", "steered"), both, strict=True):
                self._score(f"{name}, {title}", graded(other, some, self.problems, self.grader))

    def _solve_randomly(self, rows: Sequence[Row], right: torch.Tensor) -> list[list[Row | None]]:
        """
        All random draws answer the problems; their accuracies are the null distribution of the vectors'.
        Returns the right answers of each. right: which problems the vectors solve.
        """
        answers: list[list[Row]] = []
        for _, some in chunks(self.random_conditions(self.subject.layers), self.subject.batch_size):
            answers += complete(self.subject, rows, some, label="random vectors")
        solved = torch.stack([graded(self.subject, one, self.problems, self.grader) for one in answers])
        self._score(f"random vectors of equal length ({ONE_SIDED_DRAWS} draws)", solved)
        self.compare("vectors_accuracy", right.double().mean().item(), solved.double().mean(1).tolist())
        return [_those(*pair) for pair in zip(answers, solved, strict=True)]

    def choose_right(self, writers: Iterable[Sequence[Row | None]]) -> None:
        """
        Leave `TEXTS` right answers in `right`, one for each of the first problems that any of `writers`
        solved, drawn among their different answers to it. writers: by problem, the right answer or None.

        A text is likelier with the vectors that wrote it. So all random draws are among the writers, and
        random vectors in the place of the trained ones would be no likelier to have written the texts.
        """
        rng = random.Random(self.seed)
        found = [list(dict.fromkeys(row for row in some if row)) for some in zip(*writers, strict=True)]
        chosen = [rng.choice(some) for some in found if some]
        self.right = chosen[:TEXTS] if len(chosen) >= TEXTS else []
        if not self.right:
            self.lack(
                f"Only {len(chosen)} problems were solved, {TEXTS} are needed; try more (--problems).",
                *("likelihood_gain", "layers_that_help", "layers_that_solve", "forced_likelihood"),
                *("pair_gain", "pair_accuracy"),
            )

    def gain(self) -> None:
        """The gain in likelihood of right answers, the vectors' and that of every draw."""
        if not self.right:
            return
        conditions = [BASE, steered(self.subject), *self.random_conditions(self.subject.layers)]
        base, own, *drawn = likelihoods(self.subject, self.right, conditions, "likelihood").tolist()
        self.compare("likelihood_gain", own - base, (one - base for one in drawn))

    def _score(self, name: str, right: torch.Tensor) -> None:
        """right: (problems,), or (draws, problems), whose draws are averaged: they are the same problems."""
        count = right.shape[-1]
        accuracy = right.double().mean().item()
        self.report.accuracy[name] = (accuracy, *wilson(accuracy * count, count))

    def random_conditions(self, layers: Collection[int]) -> list[Condition]:
        """The vectors of `layers` replaced by random ones, a condition for each draw."""
        return [Condition(frozenset(layers), directions=drawn) for drawn in self.directions]

    def note(self, **numbers: float | None) -> None:
        """Numbers that the findings are judged by; what is not finite is none."""
        known = {name: None if x is None or not math.isfinite(x) else float(x) for name, x in numbers.items()}
        self.report.numbers.update(known)

    def compare(self, name: str, value: float, draws: Iterable[float], larger: bool = True) -> None:
        """A number, and what random draws give for it; `larger` says which side the effect is on."""
        self.note(**{name: value})
        self.report.nulls[name] = Null.of(draws, larger)

    def lack(self, reason: str, *names: str) -> None:
        """Why the numbers `names` are not measured."""
        self.report.missing.update(dict.fromkeys(names, reason))


def _those(rows: Sequence[Row], right: torch.Tensor) -> list[Row | None]:
    """The rows that are right, None for the others."""
    return [row if ok and row.completion else None for row, ok in zip(rows, right.tolist(), strict=True)]


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
        f"{score['problems']} problems, read leniently. What the vectors solve beyond that is not form alone."
    )

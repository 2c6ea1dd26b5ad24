"""Whether the vectors act at uncertain or at certain tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.lens.entropy import SHIFTS, EntropyShift, entropy_shift
from steer.lens.random_sets import TWO_SIDED_DRAWS
from steer.lens.results import Result
from steer.lens.sections.base import Block, Section, Table
from steer.lens.study import Report, Study

TEXTS = 4


class Entropy(Section):
    step = "entropy"
    captions: ClassVar[dict[str, str]] = {
        "entropy": (
            "How far the vectors move the next-token distribution against the entropy of the base model’s, a "
            f"dot a generated token of {TEXTS} answers; means of the quarters of tokens, with random vectors "
            "beside."
        ),
    }

    def measure(self, study: Study) -> None:
        study.report.results["entropy"] = entropy_shift(
            study.subject, study.rows[:TEXTS], draws=TWO_SIDED_DRAWS, seed=study.seed, label="entropy"
        )

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results[name]
        _, rho, mean, least, most, _ = result.correlations()[0]
        if rho != rho or mean != mean:
            return []
        return [
            f"Spearman’s correlation of the base model’s entropy with the total variation is {rho:+.2f} over "
            f"{len(result.entropy)} tokens (random sets: {mean:+.2f}, {least:+.2f} to {most:+.2f})."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        assert isinstance(result, EntropyShift)
        head = ("shift", "Spearman with the entropy", "random sets: mean", "least", "largest", "p")
        rows = [(SHIFTS[kind], *map(_number, rest)) for kind, *rest in result.correlations()]
        parts = ("entropy of the base model, nats", "total variation", "random", "change of entropy")
        quarters = [tuple(f"{x:.3f}" for x in row) for row in result.quarters()]
        return [Table(head, rows), Table(parts, quarters)]


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"

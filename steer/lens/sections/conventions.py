"""The same analyses as the published code has them."""

from __future__ import annotations

from typing import ClassVar

from steer.lens.conventions import (
    LensConventions,
    PersistenceConventions,
    lens_conventions,
    persistence_conventions,
)
from steer.lens.results import Result, spread
from steer.lens.sections.base import Block, Section, Table
from steer.lens.study import Report, Study
from steer.lens.words import quoted

SOURCES, TEXTS = 4, 4
DRAWS = 10


class Conventions(Section):
    step = "conventions"
    heading = "By the published code’s conventions"
    captions: ClassVar[dict[str, str]] = {
        "logit lens, conventions": (
            "Share of the most promoted tokens that the logit lens without the final norm’s gain has in "
            "common with the one through it, by dot product and by cosine."
        ),
        "persistence, conventions": (
            "Diff-Diff cosine of single vectors by both conventions: one mean over all texts without the "
            "first token, or each text’s own mean with it, along what each vector writes alone. "
            f"On {TEXTS} texts."
        ),
    }

    def measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        results["logit lens, conventions"] = lens_conventions(subject, draws=DRAWS, seed=study.seed)
        some = spread([layer for layer in subject.layers if layer < study.last], SOURCES)
        if some:
            results["persistence, conventions"] = persistence_conventions(
                subject, study.rows[:TEXTS], some, seed=study.seed, label="persistence, conventions"
            )

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "logit lens, conventions":
            return []
        return [
            "The logit lens above goes through the final norm’s gain; the published code leaves it out. "
            "Diff-Diff above has one mean over all texts; the published code has one a text."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        if isinstance(result, LensConventions):
            last = [quoted(tokens[-1][:3]) for tokens in result.tokens]
            rows = [
                (name, tokens, f"{own:.2f}", f"{mean:.2f}")
                for (name, own, mean, *_), tokens in zip(result.rows(), last, strict=True)
            ]
            layer = f"layer {result.layers[-1]} promotes"
            return [Table(("convention", layer, "in common", "random sets"), rows)]
        assert isinstance(result, PersistenceConventions)
        head = ("convention, layers above", "Diff-Diff", "random", "Diff-Vector", "random")
        cosines = [
            (name, *("–" if x is None else f"{x:.2f}" for pair in pairs for x in pair))
            for name, pairs in result.rows()
        ]
        return [Table(head, cosines)]

"""Whether the layers' vectors are one direction or many."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.lens.results import Result
from steer.lens.sections.base import Block, Section, Table
from steer.lens.spectrum import SetSpectrum, set_spectrum
from steer.lens.study import Report, Study

TEXTS = 24  # that the residual norms are measured on
DRAWS = 100


class Spectrum(Section):
    step = "singular values"
    captions: ClassVar[dict[str, str]] = {
        "singular values": (
            "Singular values of the set of vectors in units of the largest: as trained, and each divided by "
            "the length of the residual stream at its layer. Grey: random sets of equal length."
        ),
    }

    def measure(self, study: Study) -> None:
        if len(study.subject.layers) > 1:
            found = set_spectrum(study.subject, study.rows[:TEXTS], draws=DRAWS, seed=study.seed)
            study.report.results["singular values"] = found

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results[name]
        (_, raw, random, *_), (_, scaled, random_scaled, *_) = result.rows()
        if raw != raw:
            return []
        return [
            f"The {len(result.layers)} vectors have a stable rank of {raw:.1f} (random sets {random:.1f}), "
            f"in units of the residual stream {scaled:.1f} (random sets {random_scaled:.1f})."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        assert isinstance(result, SetSpectrum)
        head = ("vectors", "stable rank", "random sets: mean", "least", "largest", "p")
        names = {"raw": "as trained", "scaled": "divided by the residual norm"}
        rows = [
            (names[kind], *("–" if x != x else f"{x:.2f}" for x in rest)) for kind, *rest in result.rows()
        ]
        return [Table(head, rows)]

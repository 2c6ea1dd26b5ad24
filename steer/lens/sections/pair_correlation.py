"""What goes with a good pair of layers."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.lens.composition import compose
from steer.lens.controls import values
from steer.lens.pair_correlation import FEWEST, PairCorrelations, pair_correlations
from steer.lens.results import Result
from steer.lens.sections.base import Block, Note, Section, Table
from steer.lens.study import Report, Study

TEXTS = 4  # right answers that the random vectors' pairs are measured on


class PairCorrelation(Section):
    step = "pair correlations"
    captions: ClassVar[dict[str, str]] = {
        "pair correlations": (
            "What a second layer adds to the better of two, against the cosine of their vectors and the "
            "distance of the layers."
        ),
        "pair correlations, random": (
            f"The same for random vectors of equal length, on {TEXTS} of the right answers."
        ),
    }

    def measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        composed: Any = results.get("composition")
        if composed is None or len(composed.layers) * (len(composed.layers) - 1) < 2 * FEWEST:
            return
        results["pair correlations"] = pair_correlations(composed, subject.vectors.effective())
        with values(subject.vectors, study.random):
            control = compose(subject, [], None, composed.layers, study.right[:TEXTS], "random pairs")
            random = subject.vectors.effective()
        control.joint = None  # random vectors were not trained at all
        results["pair correlations, random"] = pair_correlations(control, random)

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results[name]
        cosine, distance = (c for c in result.correlations if c.measure == "gain")
        if name != "pair correlations" or cosine.rho != cosine.rho or distance.rho != distance.rho:
            return []
        return [
            f"Over {cosine.n} pairs, what the second layer adds has a Spearman correlation of "
            f"{cosine.rho:+.2f} with the cosine of the vectors (p by layers {cosine.p_layers:.2f}) and of "
            f"{distance.rho:+.2f} with the distance of the layers (p by layers {distance.p_layers:.2f})."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        assert isinstance(result, PairCorrelations)
        head = ("pairs of layers", "with", "Spearman’s correlation")
        text = "p by layers: permuting the layers, since pairs that share one are not independent."
        return [Table(head, result.rows()), Note(text)]

"""What two layers do together."""

from __future__ import annotations

from itertools import combinations
from typing import Any, ClassVar

from steer.lens.composition import compose
from steer.lens.controls import values
from steer.lens.results import spread
from steer.lens.sections.base import Section
from steer.lens.study import SINGLE, Report, Study
from steer.lens.words import known_mean, percent


class Composition(Section):
    step = "composition"
    heading = "Together, and at other scales"
    captions: ClassVar[dict[str, str]] = {
        "composition": "Log-probability of right answers with one layer’s vector (diagonal) and with two.",
    }

    def measure(self, study: Study) -> None:
        subject, rows = study.subject, study.right[:SINGLE]
        if len(subject.layers) < 2 or not rows:
            return
        some = spread(subject.layers, 6)
        result = compose(subject, [], None, some, rows, "pairs of layers")
        study.report.results["composition"] = result
        with values(subject.vectors, study.random):
            control = compose(subject, [], None, some, rows, "pairs of layers, random")
        control.joint = result.joint  # random vectors were not trained at all
        study.note(pair_gain=known_mean(result.score), random_pair_gain=known_mean(control.score))

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results.get("composition")
        if result is None:
            return []
        pairs = list(combinations(range(len(result.layers)), 2))
        missing = [result.told(i, j) for i, j in pairs if result.told(i, j).startswith("undefined")]
        told = [f"The pair score is {missing[0]} ({len(missing)} of {len(pairs)} pairs)."] if missing else []
        score, control = report.numbers.get("pair_gain"), report.numbers.get("random_pair_gain")
        if score is not None:
            random = "undefined" if control is None else percent(control)
            told.append(
                f"Adding a second layer to the better of two covers {percent(score)} of the way to the "
                f"jointly trained set on average (random vectors: {random})."
            )
        return told

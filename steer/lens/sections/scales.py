"""The vectors at other scales, and the scales that adaptive ones choose."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from steer.lens.composition import scale_sweep
from steer.lens.controls import random_readouts, values
from steer.lens.random_sets import ONE_SIDED_DRAWS
from steer.lens.results import Result
from steer.lens.scale_maps import ScaleMaps, scale_maps
from steer.lens.sections.base import Block, Note, Section, Strip
from steer.lens.study import TEXTS, Report, Study
from steer.lens.words import known_mean, percent


class Scales(Section):
    step = "scale sweep"
    captions: ClassVar[dict[str, str]] = {
        "scale sweep": "Greedy accuracy with all vectors multiplied; the band is the 95 % Wilson interval.",
        "scale maps": "How much of its vector each layer gives to each token of the first text.",
    }

    def measure(self, study: Study) -> None:
        subject = study.subject
        study.report.results["scale sweep"] = scale_sweep(subject, study.half, study.grader, label="scale")
        if subject.vectors.config.kind == "adaptive":
            rows, drawn = study.rows[:TEXTS], []
            maps = scale_maps(subject, rows)
            study.report.results["scale maps"] = maps
            for draw in range(ONE_SIDED_DRAWS):
                with values(subject.vectors, random_readouts(subject.vectors, study.seed + draw)):
                    drawn.append(_mean_spread(scale_maps(subject, rows, texts=0)))
            study.compare("adaptive_spread", _mean_spread(maps), drawn)

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "scale sweep":
            return []
        result: Any = report.results["scale sweep"]
        pairs = list(zip(result.accuracy.tolist(), result.scales, strict=True))
        most, best = max(pairs, key=lambda pair: (pair[0], -abs(pair[1] - 1)))
        return [f"Of the scales tried {best:g} is best, with {percent(most)} solved."]

    def below(self, name: str, result: Result) -> list[Block]:
        """Each text with its tokens shaded by how much of all layers' vectors they get."""
        if not isinstance(result, ScaleMaps):
            return []
        blocks: list[Block] = []
        for one in result.maps[:3]:
            size = one.coefficients.abs().mean(0)
            most = max(
                size[1:].max().item(), 1e-30
            )  # the first token is an attention sink, out of proportion
            shades = [min(1.0, value / most) for value in size.tolist()]
            hints = [f"mean size of the coefficient {value:.3g}" for value in size.tolist()]
            blocks.append(Strip(one.tokens, one.prompt, shades, hints))
        text = "Shade: size of the coefficient, averaged over layers. A bar marks the first generated token."
        return [*blocks, Note(text)]


def _mean_spread(maps: ScaleMaps) -> float:
    """The spread of the coefficients over tokens, in units of their mean, averaged over layers."""
    mean = known_mean(maps.spread)
    return math.nan if mean is None else mean

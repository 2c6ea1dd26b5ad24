"""How far the attention maps move."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.errors import SteerError
from steer.lens.attention import attention_distance
from steer.lens.sections.base import Section
from steer.lens.study import TEXTS, Report, Study


class AttentionMaps(Section):
    step = "attention maps"
    heading = "Attention maps"
    captions: ClassVar[dict[str, str]] = {
        "attention maps": (
            "Jensen–Shannon distance of the steered model’s attention maps from the base model’s (0: equal, "
            "1: no key in common), mean over heads and tokens of the steered answers. The band goes from the "
            "lowest to the highest of the random draws."
        ),
    }

    def measure(self, study: Study) -> None:
        try:
            study.report.results["attention maps"] = attention_distance(
                study.subject, study.rows[:TEXTS], seed=study.seed, label="attention maps"
            )
        except SteerError as error:
            study.report.notes.append(f"Attention maps left out: {error}.")

    def sentences(self, name: str, report: Report) -> list[str]:
        found: Any = report.results[name]
        means = found.random.mean(1)
        most = int(found.distance.argmax())
        told = [
            f"The attention maps move by {found.mean:.3f} on average over the layers, most in layer "
            f"{found.layers[most]} ({found.distance[most].item():.3f}); with random vectors of equal length "
            f"by {means.mean().item():.3f} ({means.min().item():.3f} to {means.max().item():.3f} in "
            f"{len(means)} draws)."
        ]
        if found.left_out:
            told.append(f"Layers without attention maps are left out: {', '.join(map(str, found.left_out))}.")
        return told

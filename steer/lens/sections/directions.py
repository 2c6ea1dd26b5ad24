"""How long the vectors are, and how their directions agree."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from steer.artifact import Artifact
from steer.errors import SteerError
from steer.lens.directions import directions
from steer.lens.sections.base import Section
from steer.lens.study import Report, Study
from steer.lens.words import mean


class Directions(Section):
    step = "directions"
    heading = "The vectors themselves"
    captions: ClassVar[dict[str, str]] = {
        "directions": "Lengths of the vectors by layer and checkpoint; cosines between the layers’ vectors.",
    }

    def measure(self, study: Study) -> None:
        now = Artifact(study.subject.vectors.config, study.subject.vectors.tensors())
        # A checkpoint of another run or kind has nothing to say here.
        try:
            study.report.results["directions"] = directions([*study.checkpoints, now])
        except SteerError as error:
            study.report.notes.append(f"Checkpoints left out: {error}.")
            study.report.results["directions"] = directions([now])
        study.report.results["directions"].names[-1] = "these vectors"  # type: ignore[attr-defined]

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results["directions"]
        now = result.norms[-1].tolist()
        low, high = min(now), max(now)
        told = [
            f"The vectors are {low:.2f} to {high:.2f} long; the longest is that of layer "
            f"{result.layers[now.index(high)]}."
        ]
        if len(result.layers) > 1:
            neighbours = mean(result.between_layers.diagonal(1))
            apart = mean(result.between_layers[~torch.eye(len(result.layers), dtype=torch.bool)])
            told.append(
                f"Neighbouring layers have a cosine of {neighbours:.2f} on average, any two {apart:.2f}."
            )
        if len(result.names) > 1:
            first = result.names[0]
            told.append(
                f"At {first} they were {mean(result.norms[0]) / mean(result.norms[-1]):.0%} as long, and "
                f"their cosine with the final ones was {mean(result.to_last[0]):.2f}: training mostly "
                "lengthens directions that are there early."
                if mean(result.to_last[0]) > 0.7
                else f"At {first} their cosine with the final ones was {mean(result.to_last[0]):.2f}."
            )
        return told

"""Whether the change of a token keeps its direction in the layers above."""

from __future__ import annotations

from typing import ClassVar

import torch

from steer.lens.controls import values
from steer.lens.persistence import persistence
from steer.lens.results import spread
from steer.lens.sections.base import Section
from steer.lens.study import SINGLE, Report, Study
from steer.lens.words import known_mean, number


class Persistence(Section):
    step = "persistence"
    heading = "Whether the change persists"
    captions: ClassVar[dict[str, str]] = {
        "persistence, all vectors": (
            "Cosine of each token’s change with the layer’s mean change (left) and with the vector trained "
            "at that layer (right), all vectors on."
        ),
        "persistence, single vectors": "The same averaged over tokens, one vector on at a time.",
    }

    def measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        rows = study.rows[: study.few]
        results["persistence, all vectors"] = persistence(subject, rows, label="persistence")
        some = spread([layer for layer in subject.layers if layer < study.last], 6)
        if not some:
            return
        sources = {str(layer): [layer] for layer in some}
        own = persistence(subject, rows[:SINGLE], sources, label="persistence of single vectors")
        results["persistence, single vectors"] = own
        above = torch.arange(study.last + 1)[None, :] > torch.tensor(some)[:, None]
        study.note(diff_diff=known_mean(own.diff_diff[above]), diff_vector=known_mean(own.diff_vector[above]))
        with values(subject.vectors, study.random):
            control = persistence(subject, rows[:SINGLE], sources, label="persistence, random")
        study.note(random_diff_diff=known_mean(control.diff_diff[above]))
        if len(subject.layers) > 1:
            trained = subject.vectors.effective()
            order = subject.layers[1:] + subject.layers[:1]
            moved = {layer: trained[other] for layer, other in zip(subject.layers, order, strict=True)}
            shuffled = persistence(subject, rows[:SINGLE], sources, vectors=moved, label="layers shuffled")
            study.note(shuffled_diff_vector=known_mean(shuffled.diff_vector[above]))
        else:
            study.report.numbers["diff_vector"] = None

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "persistence, all vectors":
            return []
        if "diff_diff" not in report.numbers:
            return []
        told = [
            "One vector on at a time, the change of a token has a cosine of "
            f"{number(report, 'diff_diff'):.2f} with the mean change in the layers above "
            f"(random vectors: {number(report, 'random_diff_diff'):.2f})."
        ]
        if report.numbers.get("diff_vector") is not None:
            told.append(
                "With the vectors that were trained up there it has one of "
                f"{number(report, 'diff_vector'):.2f} (layers shuffled: "
                f"{number(report, 'shuffled_diff_vector'):.2f})."
            )
        return told

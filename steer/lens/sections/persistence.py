"""Whether the change of a token keeps its direction in the layers above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from steer.lens.persistence import persistence
from steer.lens.random_sets import ONE_SIDED_DRAWS
from steer.lens.results import spread
from steer.lens.sections.base import Section
from steer.lens.study import TEXTS, Report, Study
from steer.lens.subject import Row
from steer.lens.words import known_mean, null_range, number

SOURCES = 3  # layers whose vectors are followed one at a time


def random_diff_diff(
    study: Study, rows: Sequence[Row], layers: Sequence[int], above: torch.Tensor
) -> list[float]:
    """The mean Diff-Diff cosine of single random vectors of `layers` in the layers above them, by draw."""
    cosines = []
    for layer in layers:
        draws = dict(zip(map(str, range(ONE_SIDED_DRAWS)), study.random_conditions([layer]), strict=True))
        found = persistence(study.subject, rows, draws, label=f"persistence, random, layer {layer}")
        cosines.append(found.diff_diff)
    by_draw = torch.stack(cosines, 1)  # (draws, layers of the vector, num_hidden_layers)
    means = [known_mean(one[above]) for one in by_draw]
    return [mean for mean in means if mean is not None]


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
        rows = study.rows[:TEXTS]
        results["persistence, all vectors"] = persistence(subject, rows, label="persistence")
        some = spread([layer for layer in subject.layers if layer < study.last], SOURCES)
        if not some:
            return
        sources = {str(layer): [layer] for layer in some}
        own = persistence(subject, rows, sources, label="persistence of single vectors")
        results["persistence, single vectors"] = own
        above = torch.arange(study.last + 1)[None, :] > torch.tensor(some)[:, None]
        study.note(diff_vector=known_mean(own.diff_vector[above]) if len(subject.layers) > 1 else None)
        measured = known_mean(own.diff_diff[above])
        if measured is not None:
            study.compare("diff_diff", measured, random_diff_diff(study, rows, some, above))

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "persistence, all vectors":
            return []
        if "diff_diff" not in report.numbers:
            return []
        told = [
            "One vector on at a time, the change of a token has a cosine of "
            f"{number(report, 'diff_diff'):.2f} with the mean change in the layers above "
            f"(random vectors: {null_range(report, 'diff_diff')})."
        ]
        if report.numbers.get("diff_vector") is not None:
            told.append(
                "With the vectors that were trained up there it has one of "
                f"{number(report, 'diff_vector'):.2f}."
            )
        return told

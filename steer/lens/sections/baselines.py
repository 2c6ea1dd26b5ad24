"""Directions from activations alone, as long as suits them."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.errors import SteerError
from steer.lens.baselines import tuned_baselines
from steer.lens.results import Result, spread
from steer.lens.sections.base import Block, Section, Table
from steer.lens.study import Report, Study
from steer.lens.words import joined

LAYERS = 3
LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
DRAWS = 2


class TunedBaselines(Section):
    step = "tuned baselines"
    heading = "Directions from activations alone"
    captions: ClassVar[dict[str, str]] = {
        "tuned baselines": (
            "What one direction adds to the log-probability of right answers that the steered model wrote: "
            "the trained vector’s, the mean difference between steered and base answers, the normal of a "
            "linear support vector machine between the two, and random directions. All but the trained have "
            "the length that suits them best on other problems."
        ),
    }

    def measure(self, study: Study) -> None:
        try:
            study.report.results["tuned baselines"] = tuned_baselines(
                study.subject,
                study.base,
                study.rows,
                study.solved,
                layers=spread(study.subject.layers, LAYERS),
                lengths=LENGTHS,
                draws=DRAWS,
                seed=study.seed,
                label="tuned baselines",
            )
        except SteerError as error:
            study.report.notes.append(f"Tuned baselines left out: {error}.")

    def sentences(self, name: str, report: Report) -> list[str]:
        found: Any = report.results[name]
        parts = [
            f"the {method} {gain[-1].item():.2f} (at the trained length "
            f"{found.untuned[method][-1].item():.2f})"
            for method, gain in found.gain.items()
        ]
        return [
            f"In layers {joined(list(map(str, found.layers)))} together, the trained vectors bring "
            f"{found.trained[-1].item():.2f} nats a token, "
            f"{joined(parts)}, random directions {found.random[:, -1].max().item():.2f} at best."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        found: Any = result
        head = ["", "trained", *(f"{method}, tuned" for method in found.gain)]
        head += [*(f"{method}, untuned" for method in found.gain), "random, highest"]
        rows = []
        for n, row in enumerate(found.names):
            values = [found.trained, *found.gain.values(), *found.untuned.values()]
            rows.append((row, *(f"{value[n].item():.3f}" for value in (*values, found.random.max(0).values))))
        return [Table(head, rows)]

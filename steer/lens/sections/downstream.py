"""Which tokens single vectors promote by way of all later layers."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.lens.downstream import Downstream as Reading
from steer.lens.downstream import downstream
from steer.lens.results import Result, spread
from steer.lens.sections.base import Block, Section, Table
from steer.lens.study import Report, Study
from steer.lens.words import quoted

DRAWS = 3  # each costs as much as the vectors themselves
SOURCES = 6
TEXTS = 4


class Downstream(Section):
    step = "last layer's state"
    captions: ClassVar[dict[str, str]] = {
        "through later layers": (
            "The tokens that one layer’s vector promotes by way of all later layers: the mean change of the "
            f"last layer’s state, through the final norm’s scale and the unembedding. On {TEXTS} answers."
        ),
    }

    def measure(self, study: Study) -> None:
        layers = spread(study.subject.layers, SOURCES)
        study.report.results["through later layers"] = downstream(
            study.subject,
            study.rows[:TEXTS],
            layers,
            draws=DRAWS,
            seed=study.seed,
            label="last layer's state",
        )

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results[name]
        layer, tokens, pairs = result.rows()[0]
        (agreement, random), *_ = pairs
        return [
            f"By way of all later layers, the vector of layer {layer} promotes {quoted(tokens[:3])}; the "
            f"tokens’ changes agree to {agreement:.2f} (random vectors: {random:.2f}; 1 is one direction)."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        assert isinstance(result, Reading)
        head = ("layer", "promotes", "agreement", "random", "peak", "random", "overlap", "random")
        rows = [
            (str(layer), quoted(tokens[:3]), *(f"{x:.2f}" for pair in pairs for x in pair))
            for layer, tokens, pairs in result.rows()
        ]
        return [Table(head, rows)]

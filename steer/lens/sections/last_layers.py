"""How single vectors act, and that of the last layer but one above all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.errors import SteerError
from steer.lens.attention_inputs import PARTS
from steer.lens.conditions import Condition, EffectPath
from steer.lens.controls import values
from steer.lens.input_routes import input_routes
from steer.lens.patching import ROUTES, by_layer, group_routes, head_routes, kept, patch
from steer.lens.results import Result, spread
from steer.lens.sections.base import Block, Section
from steer.lens.sections.paths import ADDED, Paths, solved_table
from steer.lens.study import TEXTS, Report, Study
from steer.lens.subject import Row
from steer.lens.words import null_range, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class PathsByLayer(Result):
    """
    Share of the logit difference that each path recovers, for each layer's vector alone: (layers,) a
    path.
    """

    layers: list[int]
    shares: dict[str, torch.Tensor]

    def figure(self) -> Figure:
        from steer.lens import plots

        return plots.lines(
            {name: share.clamp(-0.5, 1.5) for name, share in self.shares.items()},
            x=self.layers,
            xlabel="layer of the vector",
            ylabel="share of the effect",
            title="Path patching of single vectors (cut at -0.5 and 1.5)",
            level=("the whole effect", 1.0),
        )


def compare_penultimate(study: Study, rows: Sequence[Row]) -> None:
    """What the vector of the last layer but one keeps without the last MLP, and what random ones keep."""
    layer = [study.last - 1]
    ends = [Condition(frozenset(layer)), *study.random_conditions(layer)]
    own, *drawn = kept(study.subject, rows, ROUTES["all but MLP"], ends, "penultimate layer, random")
    study.compare("penultimate_without_mlp", own, drawn, larger=False)


class LastLayers(Section):
    step = "path patching, the last layers"
    heading = "The last layers"
    captions: ClassVar[dict[str, str]] = {
        "penultimate layer": (
            "The vector of the last layer but one, by itself, through the last layer’s parts."
        ),
        "heads of the last layer": (
            "That vector through one query head of the last attention, or one key-value group."
        ),
        "inputs of the last attention": (
            "That vector through the queries, keys or values of single heads or groups of the last "
            "attention; all others are computed from the input without it."
        ),
        "paths by layer": "Single vectors: what passes through attention, MLPs or the residual stream alone.",
    }

    def measure(self, study: Study) -> None:
        try:
            self._measure(study)
        except SteerError as error:
            study.report.notes.append(f"Path patching of the last layers left out: {error}.")

    def _measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        rows = study.rows[:TEXTS]
        before = study.last - 1
        if before in subject.layers:
            result = patch(subject, rows, layers=[before], label="penultimate layer")
            with values(subject.vectors, study.random):
                control = patch(subject, rows, layers=[before], label="penultimate layer, random")
            results["penultimate layer"] = Paths({ADDED: result, "random vector, added": control})
            study.note(penultimate_without_attention=result["all but attention"])
            compare_penultimate(study, rows)
            effect_paths = {**head_routes(subject, study.last), **group_routes(subject, study.last)}
            heads = patch(subject, rows, effect_paths, layers=[before], label="heads")
            results["heads of the last layer"] = heads
            try:
                inputs: dict[str, EffectPath] = {}
                for part in PARTS:
                    inputs |= input_routes(subject, study.last, part)
                own = patch(subject, rows, inputs, layers=[before], label="inputs of the last attention")
                results["inputs of the last attention"] = own
            except SteerError as error:
                study.report.notes.append(f"Inputs of the last attention left out: {error}.")
        some = spread([layer for layer in subject.layers if layer < study.last], 6)
        routes = {name: ROUTES[name] for name in ("attention only", "MLP only", "residual only")}
        if some:
            each = by_layer(subject, rows, some, effect_paths=routes, label="path patching by layer")
            shares = {name: torch.tensor([done[name] for done in each]) for name in routes}
            results["paths by layer"] = PathsByLayer(some, shares)

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "penultimate layer":
            return []
        paths: Any = report.results["penultimate layer"]
        trained, random = paths.parts.values()
        return [
            f"The vector of the last layer but one keeps {percent(trained['all but attention'])} of its "
            f"effect without the last attention and {percent(trained['all but MLP'])} without the last MLP "
            f"(a random vector: {percent(random['all but attention'])} and {percent(random['all but MLP'])}; "
            f"without the last MLP {null_range(report, 'penultimate_without_mlp', percent)})."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        return solved_table(result)

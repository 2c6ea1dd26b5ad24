"""Through which components the vectors act, all of them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.errors import SteerError
from steer.lens.controls import values
from steer.lens.decomposition import decompose
from steer.lens.patching import Patching, frozen_routes, patch
from steer.lens.results import Result
from steer.lens.sections.base import Block, Section, Table
from steer.lens.study import TEXTS, Report, Study
from steer.lens.words import joined, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADDED = "added to the base run"


@dataclass
class Paths(Result):
    """The same paths for several changes, the first of which is that of the trained vectors; by label."""

    parts: dict[str, Patching]

    @property
    def first(self) -> Patching:
        return next(iter(self.parts.values()))

    def figure(self) -> Figure:
        """Bars of the share of the logit difference that each path recovers."""
        from steer.lens import plots

        layers = self.first.layers
        what = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        shares = {label: part.recovered() for label, part in self.parts.items()}
        title = f"Path patching, vectors of {what}: share of the logit difference"
        return plots.grouped_bars(self.first.names, shares, ylabel="share of the effect", title=title)


@dataclass
class Frozen(Result):
    """
    Share of the logit difference that is there when all layers after one are held at what they give in the
    base run, for the trained and for random vectors: (layers,).
    """

    layers: list[int]
    share: torch.Tensor
    random: torch.Tensor

    def figure(self) -> Figure:
        from steer.lens import plots

        return plots.lines(
            {"trained": self.share.clamp(-0.5, 1.5), "random, equal length": self.random.clamp(-0.5, 1.5)},
            x=self.layers,
            xlabel="last layer that is not frozen",
            ylabel="share of the effect",
            title="Later layers frozen, all vectors on",
            level=("the whole effect", 1.0),
        )


class PathPatching(Section):
    step = "path patching"
    heading = "Through which components"
    in_abstract = True
    captions: ClassVar[dict[str, str]] = {
        "path patching": (
            "All vectors, allowed through some components alone; the others give what they give in the base "
            "run. “Everything” is the steered run, “nothing” the base run. Taken out of the steered run "
            "along the same routes; and random vectors of equal length, as shares of their own effect."
        ),
        "later layers frozen": (
            "All vectors on; attention and MLP of all layers after the one given are held at what they give "
            "in the base run."
        ),
        "decomposition": (
            "The change of the last residual stream at the tokens that predict the answer, as an exact sum: "
            "each part’s projection on the whole."
        ),
    }

    def measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        rows = study.rows[:TEXTS]
        problems = study.problems[:TEXTS]
        try:
            added = patch(subject, rows, problems=problems, grader=study.grader, label="path patching, add")
            taken = patch(subject, rows, direction="remove", label="path patching, remove")
        except SteerError as error:
            study.report.notes.append(f"Path patching of all vectors at once left out: {error}.")
        else:
            effect_paths = frozen_routes(subject, min(subject.layers))
            own = patch(subject, rows, effect_paths, label="later layers frozen")
            with values(subject.vectors, study.random):
                random = patch(subject, rows, label="path patching, random")
                control = patch(subject, rows, effect_paths, label="later layers frozen, random")
            parts = {ADDED: added, "taken out of the steered run": taken, "random vectors, added": random}
            results["path patching"] = Paths(parts)
            ends = [int(name.split()[-1]) for name in effect_paths]
            results["later layers frozen"] = Frozen(ends, own.recovered(), control.recovered())
        try:
            results["decomposition"] = decompose(subject, study.rows[:TEXTS], label="decomposition")
        except SteerError as error:
            study.report.notes.append(f"Decomposition left out: {error}.")

    def sentences(self, name: str, report: Report) -> list[str]:
        if name == "later layers frozen":
            return _frozen(report)
        return _paths(report) if name == "path patching" else []

    def caption(self, name: str, report: Report) -> str:
        text = super().caption(name, report)
        if name != "decomposition":
            return text
        result: Any = report.results[name]
        told = ", ".join(f"{part} {percent(value)}" for part, value in result.totals.items())
        error = f"Largest error of the sum at any token: {result.error:.1e} of the change."
        return f"{text} In all: {told}. {error}"

    def below(self, name: str, result: Result) -> list[Block]:
        return solved_table(result)


def solved_table(result: Result) -> list[Block]:
    """The problems that the model solves when it writes along each path, where that was tried."""
    if not isinstance(result, Paths) or (solved := result.first.accuracy) is None:
        return []
    rows = [(name, percent(a)) for name, a in zip(result.first.names, solved.tolist(), strict=True)]
    return [Table(("path along which the model writes", "problems solved"), rows)]


def _paths(report: Report) -> list[str]:
    paths: Any = report.results["path patching"]
    trained, random = paths.first, list(paths.parts.values())[-1]
    names = ("residual only", "attention only", "MLP only")
    words = [f"{name.removesuffix(' only')} {percent(trained[name])}" for name in names]
    control = [percent(random[name]) for name in names]
    told = [
        "Of the effect on the logits, one path alone recovers: "
        f"{joined(words)} (random vectors: {joined(control)}); all but the residual stream "
        f"{percent(trained['all but residual'])}."
    ]
    if trained.accuracy is not None:
        solved = dict(zip(trained.names, trained.accuracy.tolist(), strict=True))
        told.append(
            "Writing along a path, the model solves "
            + joined(
                [f"{percent(solved[n])} ({n})" for n in ("all but residual", "MLP only", "residual only")]
            )
            + f", with everything {percent(solved['everything'])}."
        )
    return told


def _frozen(report: Report) -> list[str]:
    result: Any = report.results["later layers frozen"]
    half = next((layer for layer, s in zip(result.layers, result.share, strict=True) if s >= 0.5), None)
    if half is None:
        return []
    return [f"Half of the effect is there once the layers up to {half} may react, the later ones frozen."]

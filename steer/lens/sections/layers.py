"""What each layer adds and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.lens.composition import accuracies, leave_one_out, likelihoods
from steer.lens.conditions import BASE, Condition
from steer.lens.results import Result, spread
from steer.lens.sections.base import Section
from steer.lens.study import Report, Study
from steer.lens.words import joined, null_range, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LAYERS = 5  # tried one at a time, and twice as many left out in turn


def pair_layers(layers: Sequence[int]) -> list[int]:
    """Three of the layers that are tried alone, to be paired; not the first where there are enough."""
    some = spread(layers, LAYERS)
    return spread(some[1:] if len(some) > 3 else some, 3)


@dataclass
class SingleLayers(Result):
    """
    What each layer's vector alone adds to the likelihood of right answers, in nats a token: `gain` (layers,),
    of random vectors `random` (draws, layers). `accuracy` (layers,) with that vector alone, `base_accuracy`
    without, on `problems`.
    """

    layers: list[int]
    gain: torch.Tensor
    random: torch.Tensor
    accuracy: torch.Tensor
    base_accuracy: float
    problems: int

    def figure(self) -> Figure:
        from steer.lens import plots

        random, bands = plots.draws_line(self.random, "equal length")
        return plots.lines(
            {"trained": self.gain, **random},
            x=self.layers,
            bands=bands,
            xlabel="layer of the vector",
            ylabel="nats a token",
            title="One vector alone: likelihood of right answers",
            level=("nothing", 0.0),
        )


def single_layers(study: Study, layers: list[int]) -> SingleLayers:
    """Each of `layers` by itself, and as many random vectors in its place as there are draws."""
    single = [Condition(frozenset([layer])) for layer in layers]
    conditions = [BASE, *single]
    for layer in layers:
        conditions += study.random_conditions([layer])
    base, *scores = likelihoods(study.subject, study.right, conditions, "single layers").tolist()
    own, drawn = torch.tensor(scores[: len(layers)]), torch.tensor(scores[len(layers) :])
    drawn = drawn.unflatten(0, (len(layers), -1))
    study.alone = {layer: torch.cat([own[n : n + 1], drawn[n]]) for n, layer in enumerate(layers)}
    gain, random = own - base, drawn.T - base
    accuracy = accuracies(study.subject, study.half, [BASE, *single], study.grader, "single layers")
    helps = [(one > 0.05).double().mean(-1).tolist() for one in (gain, random)]
    study.compare("layers_that_help", *helps)
    study.note(layers_that_solve=(accuracy[1:] > accuracy[0]).double().mean().item())
    return SingleLayers(layers, gain, random, accuracy[1:], accuracy[0].item(), len(study.half))


class Layers(Section):
    step = "single layers and leave-one-out"
    heading = "Layer by layer"
    captions: ClassVar[dict[str, str]] = {
        "leave one out": (
            "What is lost when one layer’s vector is left out: log-probability of right answers."
        ),
        "single layers": (
            "What one layer’s vector alone adds to the log-probability of right answers. The band goes from "
            "the lowest to the highest of the random draws."
        ),
    }

    def measure(self, study: Study) -> None:
        subject = study.subject
        rows = study.right
        if len(subject.layers) < 2 or not rows:
            return
        study.report.results["leave one out"] = leave_one_out(
            subject, study.problems, None, rows, "leave one out", spread(subject.layers, 2 * LAYERS)
        )
        study.report.results["single layers"] = single_layers(study, spread(subject.layers, LAYERS))

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "leave one out":
            return []
        out: Any = report.results["leave one out"]
        single: Any = report.results["single layers"]
        lost = (out.whole_likelihood - out.likelihood).tolist()
        worst = sorted(range(len(lost)), key=lambda n: -lost[n])[:3]
        gains, scores = single.gain.tolist(), single.accuracy.tolist()
        best = max(range(len(gains)), key=lambda n: gains[n])
        return [
            "Left out, "
            + joined([f"layer {out.layers[n]} costs {lost[n]:.2f}" for n in worst])
            + f" nats a token; the set as a whole brings {out.whole_likelihood - out.base_likelihood:.2f}.",
            f"By itself the best of {len(gains)} layers, {single.layers[best]}, brings {gains[best]:.2f} "
            f"(best random vector: {single.random.max().item():.2f}) and solves {percent(scores[best])} of "
            f"{single.problems} problems (base: {percent(single.base_accuracy)}); "
            f"{percent(number(report, 'layers_that_help'))} of the layers raise the likelihood (random: "
            f"{null_range(report, 'layers_that_help', percent)}), "
            f"{percent(number(report, 'layers_that_solve'))} raise accuracy.",
        ]

"""What each layer adds and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.lens.composition import leave_one_out, likelihoods
from steer.lens.conditions import BASE, Condition
from steer.lens.controls import values
from steer.lens.results import Result
from steer.lens.sections.base import Section
from steer.lens.study import SINGLE, Report, Study
from steer.lens.words import joined, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class SingleLayers(Result):
    """What each layer's vector alone adds to the likelihood of right answers, in nats a token: (layers,)."""

    layers: list[int]
    gain: torch.Tensor
    random: torch.Tensor

    def figure(self) -> Figure:
        from steer.lens import plots

        return plots.lines(
            {"trained": self.gain, "random, equal length": self.random},
            x=self.layers,
            xlabel="layer of the vector",
            ylabel="nats a token",
            title="One vector alone: likelihood of right answers",
            level=("nothing", 0.0),
        )


class Layers(Section):
    step = "single layers and leave-one-out"
    heading = "Layer by layer"
    captions: ClassVar[dict[str, str]] = {
        "leave one out": (
            "What is lost when one layer’s vector is left out: log-probability of right answers."
        ),
        "single layers": "What one layer’s vector alone adds to the log-probability of right answers.",
    }

    def measure(self, study: Study) -> None:
        subject = study.subject
        rows = study.right[:SINGLE]
        if len(subject.layers) < 2 or not rows:
            return
        study.report.results["leave one out"] = leave_one_out(
            subject, study.problems, None, rows, "leave one out"
        )
        conditions = [BASE, *(Condition(frozenset([layer])) for layer in subject.layers)]
        own = likelihoods(subject, rows, conditions, "single layers")
        with values(subject.vectors, study.random):
            control = likelihoods(subject, rows, conditions, "single layers, random")
        study.report.results["single layers"] = SingleLayers(
            subject.layers, own[1:] - own[0], control[1:] - control[0]
        )
        study.note(layers_that_help=(own[1:] - own[0] > 0.05).double().mean().item())
        study.note(random_layers_that_help=(control[1:] - control[0] > 0.05).double().mean().item())

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "leave one out":
            return []
        out: Any = report.results["leave one out"]
        single: Any = report.results["single layers"]
        lost = (out.whole_likelihood - out.likelihood).tolist()
        worst = sorted(range(len(lost)), key=lambda n: -lost[n])[:3]
        gains, randoms = single.gain.tolist(), single.random.tolist()
        best = max(range(len(gains)), key=lambda n: gains[n])
        return [
            "Left out, "
            + joined([f"layer {out.layers[n]} costs {lost[n]:.2f}" for n in worst])
            + f" nats a token; the set as a whole brings {out.whole_likelihood - out.base_likelihood:.2f}.",
            f"By itself the best layer, {single.layers[best]}, brings {gains[best]:.2f} (best random vector: "
            f"{max(randoms):.2f}); {percent(number(report, 'layers_that_help'))} of the layers help (random: "
            f"{percent(number(report, 'random_layers_that_help'))}).",
        ]

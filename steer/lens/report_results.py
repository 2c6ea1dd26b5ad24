"""
Results that only a report has: one analysis of several changes or single layers, beside its control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from steer.lens.patching import Patching
from steer.lens.results import Result


@dataclass
class Paths(Result):
    """The same paths for several changes, the first of which is that of the trained vectors; by label."""

    parts: dict[str, Patching]

    @property
    def first(self) -> Patching:
        return next(iter(self.parts.values()))

    def figure(self) -> Any:
        """Bars of the share of the logit difference that each path recovers."""
        from steer.lens import plots

        layers = self.first.layers
        what = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        shares = {label: part.recovered() for label, part in self.parts.items()}
        title = f"Path patching, vectors of {what}: share of the logit difference"
        return plots.grouped_bars(self.first.names, shares, ylabel="share of the effect", title=title)


@dataclass
class PathsByLayer(Result):
    """
    Share of the logit difference that each path recovers, for each layer's vector alone: (layers,) a
    path.
    """

    layers: list[int]
    shares: dict[str, torch.Tensor]

    def figure(self) -> Any:
        from steer.lens import plots

        return plots.lines(
            {name: share.clamp(-0.5, 1.5) for name, share in self.shares.items()},
            x=self.layers,
            xlabel="layer of the vector",
            ylabel="share of the effect",
            title="Path patching of single vectors (cut at -0.5 and 1.5)",
            level=("the whole effect", 1.0),
        )


@dataclass
class Frozen(Result):
    """
    Share of the logit difference that is there when all layers after one are held at what they give in the
    base run, for the trained and for random vectors: (layers,).
    """

    layers: list[int]
    share: torch.Tensor
    random: torch.Tensor

    def figure(self) -> Any:
        from steer.lens import plots

        return plots.lines(
            {"trained": self.share.clamp(-0.5, 1.5), "random, equal length": self.random.clamp(-0.5, 1.5)},
            x=self.layers,
            xlabel="last layer that is not frozen",
            ylabel="share of the effect",
            title="Later layers frozen, all vectors on",
            level=("the whole effect", 1.0),
        )


@dataclass
class SingleLayers(Result):
    """What each layer's vector alone adds to the likelihood of right answers, in nats a token: (layers,)."""

    layers: list[int]
    gain: torch.Tensor
    random: torch.Tensor

    def figure(self) -> Any:
        from steer.lens import plots

        return plots.lines(
            {"trained": self.gain, "random, equal length": self.random},
            x=self.layers,
            xlabel="layer of the vector",
            ylabel="nats a token",
            title="One vector alone: likelihood of right answers",
            level=("nothing", 0.0),
        )

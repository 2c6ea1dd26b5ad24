"""
Singular values and stable rank of a set of vectors, one row a layer: whether the layers' vectors are one
direction or many. As trained, and each divided by the length of the residual stream it is added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import SteerError
from steer.lens.conditions import BASE
from steer.lens.passes import streams
from steer.lens.random_sets import TWO_SIDED_DRAWS, two_sided_p, with_random_sets
from steer.lens.results import Result, plain
from steer.lens.subject import Row, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class SetSpectrum(Result):
    """
    `raw` and `scaled` (layers,): singular values, the largest first, of the matrix of vectors (layers,
    hidden_size), and of the same with each row divided by `residual` (layers,), the base model's mean
    residual norm after that layer. `random_raw` and `random_scaled` (draws, layers) are those of random
    directions of equal length.
    """

    layers: list[int]
    residual: torch.Tensor
    raw: torch.Tensor
    scaled: torch.Tensor
    random_raw: torch.Tensor
    random_scaled: torch.Tensor

    def rows(self) -> list[tuple[str, float, float, float, float, float]]:
        """By scaling: its name, stable rank, the random sets' mean, least and largest, and the p-value."""
        found = []
        for name in ("raw", "scaled"):
            own = stable_rank(getattr(self, name)).item()
            null = stable_rank(getattr(self, f"random_{name}"))
            ends = null.mean().item(), null.min().item(), null.max().item()
            found.append((name, own, *ends, two_sided_p(own, null.tolist())))
        return found

    def to_dict(self) -> dict[str, Any]:
        names = ("scaling", "stable_rank", "random_mean", "random_min", "random_max", "p")
        ranks = [dict(zip(names, plain(row), strict=True)) for row in self.rows()]
        return {**super().to_dict(), "stable_ranks": ranks}

    def figure(self) -> Figure:
        """Singular values in units of the largest, against the random sets."""
        from steer.lens import plots

        figure, axes = plots.panels(8.6, 3.0, 1, 2, sharey=True)
        for axis, name, own in zip(axes, ("raw", "scaled"), (self.raw, self.scaled), strict=True):
            for line in getattr(self, f"random_{name}"):
                axis.plot(plots.as_array(line / line[0]), color=plots.COLOURS[5], alpha=0.3, linewidth=0.8)
            axis.plot(plots.as_array(own / own[0].clamp(min=1e-30)), color=plots.COLOURS[0], marker="o")
            title = "vectors" if name == "raw" else "vectors / residual norm"
            plots.finish(axis, f"Singular values, {title} (grey: random)", "index", "of the largest")
            axis.set_ylim(bottom=0)
        figure.tight_layout()
        return figure


def stable_rank(singular: torch.Tensor) -> torch.Tensor:
    """
    Sum of the squared singular values over the largest squared; 1 for one direction, the number of rows for
    orthogonal rows of equal length. `singular` (..., n) gives (...); NaN where all are 0.
    """
    squares = singular.double().square()
    return squares.sum(-1) / squares.amax(-1)


def residual_norms(subject: Subject, rows: Sequence[Row], layers: Sequence[int]) -> torch.Tensor:
    """
    Mean length of the base model's residual stream after each of `layers`, over all tokens of `rows` but
    each one's first, which models use as an attention sink: (layers,).
    """
    total = dict.fromkeys(layers, 0.0)

    def seen(layer: int, stream: torch.Tensor, batch: Sequence[Row], starts: list[int]) -> None:
        for i, row in enumerate(batch):
            states = stream[0, i, starts[i] + 1 : starts[i] + len(row.ids)]
            total[layer] += states.float().norm(dim=-1).double().sum().item()

    streams(subject, rows, [BASE], seen, layers=layers, label="residual norms")
    count = sum(len(row.ids) - 1 for row in rows)
    return torch.tensor([total[layer] for layer in layers], dtype=torch.float64) / max(1, count)


def set_spectrum(
    subject: Subject, rows: Sequence[Row], *, draws: int = TWO_SIDED_DRAWS, seed: int = 0
) -> SetSpectrum:
    """
    Singular values of the subject's vectors, beside those of `draws` random sets.

    Args:
        rows: Texts on which the residual norms are measured.

    Raises:
        SteerError: The subject has vectors in fewer than two layers.
    """
    layers = subject.layers
    if len(layers) < 2:
        raise SteerError(f"the rank of a set needs vectors in two layers or more, got layers {layers}")
    residual = residual_norms(subject, rows, layers)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        own = subject.vectors.added()
        matrix = torch.stack([own[layer].double().cpu() for layer in layers])
        svd = torch.linalg.svdvals
        return svd(matrix), svd(matrix / residual[:, None].clamp(min=1e-30))

    raw, scaled = both()
    null = with_random_sets(subject.vectors, both, draws, seed)
    random_raw, random_scaled = (torch.stack(part) for part in zip(*null, strict=True))
    return SetSpectrum(list(layers), residual, raw, scaled, random_raw, random_scaled)

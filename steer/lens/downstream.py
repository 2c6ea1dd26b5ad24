"""
What a single layer's vector promotes by way of all later layers: the mean change of the last layer's state,
read through the unembedding (arXiv 2509.06608, the single-layer vectors). The logit lens of the vector itself
skips those layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import SteerError
from steer.lens.conditions import BASE, Condition
from steer.lens.logit_lens import LogitLens, lens_scores, logit_lens
from steer.lens.passes import streams
from steer.lens.random_sets import with_random_sets
from steer.lens.results import Result
from steer.lens.subject import Row, Subject, chunks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCES = 8  # layers whose vectors run side by side
STATISTICS = ("agreement", "peak", "overlap")


@dataclass
class Downstream(Result):
    """
    By source layer, whose vector alone is on: `lens`, the reading of the mean change of the last layer's
    state; `tokens`, the number of tokens it is the mean of. `statistics` (3, layers) and `random` (3, draws,
    layers), for random vectors of equal length, are in the order of `STATISTICS`: agreement, the length of
    the mean change over the mean length of the changes (1: every token changes alike); peak, the top token's
    score in standard deviations above the mean; overlap, the share of the most promoted tokens that the
    logit lens of the vector itself has too.
    """

    lens: LogitLens
    tokens: int
    top: int
    statistics: torch.Tensor
    random: torch.Tensor

    def rows(self) -> list[tuple[int, list[str], list[tuple[float, float]]]]:
        """By source layer: its most promoted tokens, and each statistic beside the random vectors' mean."""
        means = self.random.double().mean(1)
        return [
            (
                layer,
                self.lens.top_tokens[n],
                list(zip(self.statistics[:, n].tolist(), means[:, n].tolist(), strict=True)),
            )
            for n, layer in enumerate(self.lens.layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        for name in ("statistics", "random"):
            found[name] = dict(zip(STATISTICS, found[name], strict=True))
        return found

    def figure(self) -> Figure:
        """The heatmap of the logit lens, for the mean changes."""
        figure = self.lens.figure()
        axes = figure.axes[0]
        axes.set_title("The last layer's mean change, through the unembedding", fontsize=10)
        axes.set_ylabel("layer of the vector", fontsize=9)
        return figure


def downstream(
    subject: Subject,
    rows: Sequence[Row],
    layers: Sequence[int] | None = None,
    *,
    top: int = 50,
    draws: int = 5,
    seed: int = 0,
    label: str | None = None,
) -> Downstream:
    """
    Read the mean change of the last layer's state, one vector on at a time, through the final norm's gain
    and the unembedding.

    Args:
        rows: Texts; the mean is over the tokens that predict their completions (of a prompt alone, its last).
        layers: Source layers; all that have a vector by default.
        top: Most promoted tokens that are named and compared.
        draws: Random sets beside.

    Raises:
        SteerError: A layer has no vector.
    """
    layers = subject.layers if layers is None else sorted(layers)
    if missing := sorted(set(layers) - set(subject.layers)):
        raise SteerError(f"layers {missing} have no vector; the artifact has {subject.layers}")
    model = subject.model

    def measure() -> tuple[torch.Tensor, torch.Tensor]:
        mean, length = mean_changes(subject, rows, layers, label)
        own = subject.vectors.added()
        direct = lens_scores(model, {layer: own[layer] for layer in layers})
        through = lens_scores(model, dict(zip(layers, mean, strict=True)))
        known = min(len(subject.tokenizer), through.shape[1])
        best = [scores[:, :known].topk(min(top, known)).indices for scores in (through, direct)]
        shared = [len(set(a) & set(b)) / len(a) for a, b in zip(*(i.tolist() for i in best), strict=True)]
        peak = (through[:, :known].amax(1) - through.mean(1)) / through.std(1).clamp(min=1e-30)
        agreement = mean.norm(dim=1) / length.clamp(min=1e-30)
        return mean, torch.stack([agreement, peak, torch.tensor(shared)])

    mean, statistics = measure()
    null = with_random_sets(subject.vectors, lambda: measure()[1], draws, seed)
    lens = logit_lens(model, subject.tokenizer, dict(zip(layers, mean, strict=True)), top=top)
    tokens = sum(len(row.predicting) for row in rows)
    return Downstream(lens, tokens, lens.top.shape[1], statistics, torch.stack(null, 1))


def mean_changes(
    subject: Subject, rows: Sequence[Row], layers: Sequence[int], label: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean change of the last layer's state that each layer's vector alone makes, (layers, hidden_size), and
    the mean length of the changes, (layers,), over the tokens that predict the completions of `rows`.
    """
    last = subject.decoder.num_hidden_layers - 1
    means, lengths = [], []
    for _, some in chunks(layers, min(SOURCES, max(1, subject.batch_size - 1))):
        total = torch.zeros(len(some), subject.decoder.hidden_size, dtype=torch.float64)
        length = torch.zeros(len(some), dtype=torch.float64)

        def seen(
            layer: int,
            stream: torch.Tensor,
            batch: Sequence[Row],
            starts: list[int],
            total: torch.Tensor = total,
            length: torch.Tensor = length,
        ) -> None:
            for i, row in enumerate(batch):
                at = row.predicting
                states = stream[:, i, starts[i] + at.start : starts[i] + at.stop].float()
                change = (states[1:] - states[:1]).double().cpu()
                total += change.sum(1)
                length += change.norm(dim=-1).sum(1)

        conditions = [BASE, *(Condition(frozenset([layer])) for layer in some)]
        streams(subject, rows, conditions, seen, layers=[last], label=label)
        means.append(total)
        lengths.append(length)
    count = sum(len(row.predicting) for row in rows)
    return (torch.cat(means) / count).float(), (torch.cat(lengths) / count).float()

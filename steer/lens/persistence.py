"""
Persistence: does the change that vectors make survive the layers above (arXiv 2509.06608, the single-layer
vectors)?

Diff-Diff cosine: between each token's change of the hidden state and the mean change at that layer.
Diff-Vector cosine: between the change and the vector that was trained at that layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from steer.lens.conditions import BASE, Condition
from steer.lens.passes import streams
from steer.lens.results import Result
from steer.lens.subject import Row, Subject, chunks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("diff_diff", "diff_vector", "size", "diff_diff_at", "diff_vector_at")
SOURCES = 8  # sets of vectors that run, and whose sums are kept, side by side


@dataclass
class Persistence(Result):
    """
    `diff_diff`, `diff_vector` and `size` (sources, num_hidden_layers): mean over tokens of the two cosines
    and of the change's length in units of the stream's, after each layer; NaN where nothing has changed, or
    the layer has no vector. `diff_diff_at` and `diff_vector_at` (sources, num_hidden_layers, positions) are
    the same by token position. `offsets` (positions,) counts positions from the first generated token, which
    is 0.
    """

    sources: list[str]
    diff_diff: torch.Tensor
    diff_vector: torch.Tensor
    size: torch.Tensor
    diff_diff_at: torch.Tensor
    diff_vector_at: torch.Tensor
    offsets: list[int]
    tokens: int

    def figure(self) -> Figure:
        """Two heatmaps, sources by layers; for one source alone, layers by token position."""
        from steer.lens import plots

        if len(self.sources) > 1:
            maps = {"Diff-Diff cosine": self.diff_diff, "Diff-Vector cosine": self.diff_vector}
            return plots.heatmaps(maps, xlabel="after layer", ylabel="vectors on", rows=self.sources)
        seen = ~self.diff_diff_at[0].isnan().all(0)  # positions that some text has
        both = {"Diff-Diff cosine": self.diff_diff_at[0], "Diff-Vector cosine": self.diff_vector_at[0]}
        offsets = [offset for offset, one in zip(self.offsets, seen.tolist(), strict=True) if one]
        return plots.heatmaps(
            {name: values[:, seen] for name, values in both.items()},
            xlabel="token (0: the first generated)",
            ylabel="after layer",
            columns=offsets,
        )


@torch.no_grad()
def persistence(
    subject: Subject,
    rows: Sequence[Row],
    sources: Mapping[str, Collection[int] | Condition] | None = None,
    *,
    window: int = 32,
    label: str | None = None,
) -> Persistence:
    """
    Both cosines for each of `sources`, which name sets of layers whose vectors are on, or conditions; by
    default all vectors together.

    window: positions on either side of the first generated token that are told apart; the means take in every
    token but the first, which models use as an attention sink. One pass: mean_t cos(d_t, m) = (sum_t d_t /
    |d_t|) . m / (n |m|), so sums of changes and of unit changes are all that is kept for any number of texts.
    """
    chosen = {"all": subject.layers} if sources is None else sources
    compared = subject.vectors.added()
    parts = []
    for _, some in chunks(list(chosen.values()), min(SOURCES, max(1, subject.batch_size - 1))):
        conditions = [one if isinstance(one, Condition) else Condition(frozenset(one)) for one in some]
        parts.append(_some(subject, rows, conditions, compared, window, label))
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    return Persistence(
        sources=list(chosen),
        **dict(zip(MEASURES, joined, strict=True)),
        offsets=list(range(-window, window)),
        tokens=sum(len(row.ids) - 1 for row in rows),
    )


def _some(
    subject: Subject,
    rows: Sequence[Row],
    sources: Sequence[Condition],
    compared: Mapping[int, torch.Tensor],
    window: int,
    label: str | None,
) -> list[torch.Tensor]:
    """The five tensors of a `Persistence`, for a few sources that run side by side."""
    conditions = [BASE, *sources]
    first = min((layer for source in sources for layer in source.layers), default=0)
    num_hidden_layers, hidden_size, slots = (
        subject.decoder.num_hidden_layers,
        subject.decoder.hidden_size,
        2 * window,
    )
    shape = (
        len(sources),
        num_hidden_layers,
        slots + 1,
        hidden_size,
    )  # the last slot: tokens outside the window
    sums, units = torch.zeros(shape), torch.zeros(shape)
    count = torch.zeros(shape[:3])
    size = torch.zeros(len(sources), num_hidden_layers, dtype=torch.float64)

    def seen(layer: int, stream: torch.Tensor, batch: Sequence[Row], starts: list[int]) -> None:
        at, slot = [], []
        for i, row in enumerate(batch):
            for n in range(1, len(row.ids)):
                offset = n - row.prompt + window
                at.append((i, starts[i] + n))
                slot.append(offset if 0 <= offset < slots else slots)
        rows_, columns = torch.tensor(at, dtype=torch.long).reshape(-1, 2).T.to(stream.device)
        place = torch.tensor(slot, dtype=torch.long)
        base = stream[0][rows_, columns].float().cpu()
        for source in range(len(sources)):
            change = stream[source + 1][rows_, columns].float().cpu() - base
            length = change.norm(dim=-1)
            moved = (length > 1e-6 * base.norm(dim=-1)).float()  # below that it is rounding
            sums[source, layer].index_add_(0, place, change * moved[:, None])
            units[source, layer].index_add_(0, place, normalize(change, dim=-1) * moved[:, None])
            count[source, layer].index_add_(0, place, moved)
            size[source, layer] += (length / base.norm(dim=-1).clamp(min=1e-30)).double().sum()

    # below their first layer they change nothing
    streams(subject, rows, conditions, seen, layers=range(first, num_hidden_layers), share=True, label=label)
    tokens = sum(len(row.ids) - 1 for row in rows)
    total = count.sum(2)
    mean = normalize(sums.sum(2), dim=-1)  # (sources, num_hidden_layers, hidden_size)
    own = torch.zeros(num_hidden_layers, hidden_size)
    for layer, vector in compared.items():
        own[layer] = normalize(vector.float(), dim=0)
    known = torch.tensor([1.0 if own[layer].any() else torch.nan for layer in range(num_hidden_layers)])
    some = torch.where(total > 0, 1.0, torch.nan)
    at_some = torch.where(count > 0, 1.0, torch.nan)
    return [
        (units.sum(2) * mean).sum(-1) / total.clamp(min=1) * some,
        (units.sum(2) * own).sum(-1) / total.clamp(min=1) * some * known,
        size / max(tokens, 1),
        ((units * mean[:, :, None]).sum(-1) / count.clamp(min=1) * at_some)[..., :slots],
        ((units * own[:, None]).sum(-1) / count.clamp(min=1) * at_some * known[:, None])[..., :slots],
    ]

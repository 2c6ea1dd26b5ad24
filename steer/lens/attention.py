"""
Attention maps of the steered and the base model: how far apart they are, layer by layer and head by head,
with random vectors of equal length beside them (arXiv 2509.06608: attention stays "largely intact").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from steer.compat import eager_attention
from steer.errors import SteerError
from steer.hooks import hooked
from steer.lens.conditions import BASE, Condition, steered
from steer.lens.controls import random_vectors, values
from steer.lens.passes import run
from steer.lens.results import Result
from steer.lens.subject import Padded, Row, Subject, chunks
from steer.sites import find_sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 20
MAX_NUMBERS = 1 << 27  # numbers in the base model's maps that are held at a time: half a gigabyte


@dataclass
class AttentionDistance(Result):
    """
    Mean Jensen-Shannon distance of the steered model's attention maps from the base model's: 0 where they are
    equal, 1 where they have no key in common (logarithms to base 2). A map is what one head gives to the keys
    of one query token; the mean is over heads and over all tokens but the first of each text, which has one
    key.

    Args:
        layers: those with attention maps.
        left_out: layers without: no attention, or one that computes no map.
        distance: (layers,).
        random: (draws, layers), of random vectors of equal length.
        heads: by layer, the distance of each query head.
        random_heads: the same for random vectors, mean over the draws.
        first_token: by run ("base", "steered"), the share of attention that goes to the first token of the
            text and to a learned sink, where the model has one: (layers,) each.
        texts: number of texts.
        tokens: number of query tokens.
        eager_error: largest difference of the last logits, in units of their standard deviation, between
            eager attention, which gives the maps, and the model's usual attention.
    """

    layers: list[int]
    left_out: list[int]
    distance: torch.Tensor
    random: torch.Tensor
    heads: list[torch.Tensor]
    random_heads: list[torch.Tensor]
    first_token: dict[str, torch.Tensor]
    texts: int
    tokens: int
    eager_error: float

    @property
    def mean(self) -> float:
        """The distance, mean over the layers."""
        return self.distance.mean().item()

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "mean": self.mean, "random_mean": self.random.mean(1).tolist()}

    def figure(self) -> Figure:
        """The distance over the layers, with a band from the lowest to the highest of the random draws."""
        from steer.lens import plots

        random, bands = plots.draws_line(self.random, "equal length")
        return plots.lines(
            {"trained": self.distance, **random},
            x=self.layers,
            xlabel="attention of layer",
            ylabel="Jensen–Shannon distance",
            title="Attention maps, steered against base",
            bands=bands,
        )

    def lines(self) -> Iterator[str]:
        """A table with a line for each layer."""
        count = len(self.random)
        yield (
            f"Jensen-Shannon distance of attention maps (0 equal, 1 disjoint), steered against base; "
            f"{self.texts} texts, {self.tokens} tokens"
        )
        head = f"{'layer':8}  trained"
        if count:
            head += "  random mean    low   high  draws below"
        yield head + "  most moved head  on the first token: base  steered"
        for n, layer in enumerate(self.layers):
            line = f"{layer:5}     {self.distance[n].item():7.4f}"
            if count:
                draws = self.random[:, n]
                below = int((draws < self.distance[n]).sum())
                line += f"  {draws.mean().item():11.4f} {draws.min().item():6.4f} {draws.max().item():6.4f}"
                line += f"  {f'{below} of {count}':>11}"
            most = int(self.heads[n].argmax())
            told = f"{most}: {self.heads[n][most].item():.4f}"
            base, on = (self.first_token[name][n].item() for name in ("base", "steered"))
            yield f"{line}  {told:>15}  {base:24.3f}  {on:7.3f}"
        mean = f"mean over layers {self.mean:.4f}"
        if count:
            means = self.random.mean(1)
            mean += (
                f"; random vectors of equal length {means.mean().item():.4f} "
                f"({means.min().item():.4f} to {means.max().item():.4f})"
            )
        yield mean
        if self.left_out:
            yield f"layers without attention maps, left out: {', '.join(map(str, self.left_out))}"


def attention_distance(
    subject: Subject,
    rows: Sequence[Row],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    label: str | None = None,
) -> AttentionDistance:
    """
    Compare the attention maps with the vectors on to those with the vectors off, along `rows`.

    The maps are those of transformers' eager attention, which is set meanwhile. Grouped queries have a map
    for each query head. Keys outside a sliding window have weight 0 in both maps. Where a model has a learned
    attention sink, what goes to it counts as one more key.

    Args:
        subject: the model with vectors.
        rows: the texts, of two tokens or more each.
        draws: sets of random vectors of equal length.
        seed: of the first draw.
        label: of the progress bar; None for none.

    Raises:
        SteerError: a model without attention maps, and one whose eager attention computes something else than
            the attention it usually runs with; texts of one token.
    """
    if min(len(row.ids) for row in rows) < 2:
        raise SteerError("an attention map needs texts of two tokens or more; give longer texts")
    sets = [None, *(random_vectors(subject.vectors, seed + n) for n in range(draws))]
    longest = max(rows, key=lambda row: len(row.ids))
    usual = attention_maps(subject, [longest], BASE).logits
    with eager_attention(subject.model):
        first = attention_maps(subject, [longest], BASE)
        error = _check_eager(subject, first.logits, usual)
        if not (layers := sorted(first.maps)):
            raise SteerError(
                f"{type(subject.model).__name__} gives no attention maps: none of its layers has an "
                "attention that computes one; take another analysis of `steer lens`"
            )
        held = sum(part.numel() for part in first.maps.values())
        sums = [{layer: _Sums() for layer in layers} for _ in range(len(sets) + 1)]  # the last: base
        with tqdm(
            total=len(rows) * len(sets), desc=label, unit="text", leave=False, disable=label is None
        ) as bar:
            for _, batch in chunks(rows, min(subject.batch_size, MAX_NUMBERS // held)):
                base = attention_maps(subject, batch, BASE)
                for layer in layers:
                    sums[-1][layer].add(base.maps[layer], base.maps[layer], base.padded, batch)
                for n, tensors in enumerate(sets):
                    with values(subject.vectors, tensors) if tensors else nullcontext():
                        on = attention_maps(subject, batch, steered(subject))
                    for layer in layers:
                        sums[n][layer].add(base.maps[layer], on.maps.pop(layer), base.padded, batch)
                    bar.update(len(batch))
    tokens = sum(len(row.ids) - 1 for row in rows)
    heads = [[one[layer].distance / tokens for layer in layers] for one in sums[:-1]]
    by_layer = torch.stack([torch.stack([part.mean() for part in one]) for one in heads])
    return AttentionDistance(
        layers=layers,
        left_out=[n for n in range(subject.decoder.num_hidden_layers) if n not in layers],
        distance=by_layer[0],
        random=by_layer[1:],
        heads=heads[0],
        random_heads=[torch.stack(parts).mean(0) for parts in zip(*heads[1:], strict=True)],
        first_token={
            name: torch.stack([one[layer].first / tokens for layer in layers])
            for name, one in (("base", sums[-1]), ("steered", sums[0]))
        },
        texts=len(rows),
        tokens=tokens,
        eager_error=error,
    )


class Pass(NamedTuple):
    """Attention maps (rows, heads, queries, keys) by layer, and the logits of the last column."""

    maps: dict[int, torch.Tensor]
    logits: torch.Tensor
    padded: Padded


@torch.no_grad()
def attention_maps(subject: Subject, rows: Sequence[Row], condition: Condition) -> Pass:
    """
    What the attention modules return beside their output in one pass: with eager attention, their maps.
    Layers whose attention returns none are missing. A learned sink has the last key.
    """
    padded = subject.padded(rows)
    columns = padded.ids.shape[1]
    maps: dict[int, torch.Tensor] = {}

    def keep(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        for part in output[1:] if isinstance(output, (tuple, list)) else ():
            if isinstance(part, torch.Tensor) and _is_map(part, len(rows), columns):
                maps[layer] = _with_sink(part)

    with hooked() as handles:
        for layer in range(subject.decoder.num_hidden_layers):
            with suppress(SteerError):  # a layer without attention
                (place,) = find_sites(subject.decoder, [layer], "attn_out")
                handles.append(place.module.register_forward_hook(partial(keep, layer)))
        last = torch.arange(columns - 1, columns, device=subject.device)
        logits = run(subject, padded, rows, [condition], last)
    return Pass(maps, logits.cpu(), padded)


def jensen_shannon(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """
    Jensen-Shannon distance of distributions along the last dimension, from 0 to 1 (logarithms to base 2).

    With m the mean of the two and d half their difference over m, the divergence is the sum of
    m ((1 + d) log(1 + d) + (1 - d) log(1 - d)) / 2: terms that are not negative, so that distributions
    that hardly differ do not drown in rounding.
    """
    mean = (one + other) / 2
    d = ((one - other) / 2 / mean.clamp(min=torch.finfo(mean.dtype).tiny)).clamp(-1, 1)
    terms = torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d)
    return ((mean * terms).sum(-1) / (2 * log(2))).clamp(0, 1).sqrt()


class _Sums:
    """Of one layer, over query tokens: distance of each head, and what goes to the first token or a sink."""

    def __init__(self) -> None:
        self.distance = torch.zeros((), dtype=torch.float64)  # (heads,) once a batch was added
        self.first = torch.zeros((), dtype=torch.float64)

    def add(self, base: torch.Tensor, on: torch.Tensor, padded: Padded, rows: Sequence[Row]) -> None:
        for index, (row, start) in enumerate(zip(rows, padded.start.tolist(), strict=True)):
            queries = slice(start + 1, start + len(row.ids))
            one, other = base[index, :, queries], on[index, :, queries]
            self.distance = self.distance + jensen_shannon(one, other).cpu().double().sum(-1)
            self.first = self.first + (other[..., start] + other[..., -1]).cpu().double().mean(0).sum()


def _is_map(part: torch.Tensor, rows: int, columns: int) -> bool:
    """Whether these are weights of keys for each query: linear attention returns states in their place."""
    if part.ndim != 4 or part.shape[0] != rows or part.shape[2] != columns or part.shape[3] < columns:
        return False
    return bool((part >= 0).all() and (part.sum(-1) < 1.01).all())


def _with_sink(part: torch.Tensor) -> torch.Tensor:
    """The map in float32 with one more key, which has what is left of 1: what a learned sink takes."""
    rounding = 1e-4 if part.dtype in (torch.float32, torch.float64) else 0.01
    part = part.float()
    left = (1 - part.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([part, torch.where(left < rounding, 0, left)], -1)


def _check_eager(subject: Subject, eager: torch.Tensor, usual: torch.Tensor) -> float:
    """The largest difference, in units of the logits' standard deviation; SteerError where it is large."""
    error = ((eager - usual).abs().max() / usual.std()).item()
    if error <= (1e-3 if usual.dtype in (torch.float32, torch.float64) else 0.05):
        return error
    raise SteerError(
        f"{type(subject.model).__name__} in {usual.dtype}: the logits with eager attention, which gives the "
        f"maps, differ from the usual ones by up to {error:.2g} of their standard deviation; load the model "
        "in float32, or with attn_implementation='eager' where that is the right one (as for Gemma 2)"
    )

"""
Adaptive scale maps: how much of its vector each layer gives to each token of a text, for `adaptive` vectors
(arXiv 2509.06608, appendix S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.hooks import hooked
from steer.lens.conditions import steered
from steer.lens.passes import run
from steer.lens.results import Result
from steer.lens.scripts import script
from steer.lens.subject import Row, Subject, chunks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Types of tokens, in prompts and in completions.
TYPES = ("words", "digits", "punctuation", "space", "special")
_NAMES = {"code": "punctuation", **{name: name for name in TYPES}}  # by script; all others are words


@dataclass
class ScaleMap:
    """
    One text: `coefficients` (layers, tokens), what the token's vector is multiplied with, the scale included.
    """

    tokens: list[str]
    prompt: int
    coefficients: torch.Tensor


@dataclass
class ScaleMaps(Result):
    """
    `maps`, one a text, and their statistics by layer over all tokens but each text's first: `mean`, `std` and
    `on_prompt`, the mean size on prompts divided by that on completions (NaN without completions); (layers,).
    `by_type` (layers, types): the mean at tokens of each type ("prompt digits", "answer words", ...), NaN for
    a type that no token has. `explained` (layers,): the share of the variance over tokens that lies between
    the types, 0 to 1, NaN where there is no variance.
    """

    layers: list[int]
    maps: list[ScaleMap]
    mean: torch.Tensor
    std: torch.Tensor
    on_prompt: torch.Tensor
    types: list[str]
    by_type: torch.Tensor
    explained: torch.Tensor

    @property
    def spread(self) -> torch.Tensor:
        """The standard deviation over tokens divided by the size of the mean: (layers,)."""
        return self.std / self.mean.abs().clamp(min=1e-12)

    @property
    def apart(self) -> torch.Tensor:
        """
        (types,): distance of each type's mean from the mean over all tokens, in standard deviations, averaged
        over the layers that have any; NaN for a type that no token has.
        """
        std = torch.where(self.std > 0, self.std, torch.nan)
        return ((self.by_type - self.mean[:, None]) / std[:, None]).abs().nanmean(0)

    def figure(self) -> Figure:
        """The first text as a heat strip: layers by tokens."""
        from steer.lens import plots

        first = self.maps[0]
        return plots.strip(first.coefficients, first.tokens, self.layers, first.prompt)


def check_adaptive(config: SteeringConfig) -> None:
    """SteerError for vectors that are not adaptive: those give every token the same."""
    if config.kind != "adaptive":
        raise SteerError(
            f"scale maps need adaptive vectors; {config.kind} ones give every token the same amount"
        )


@torch.no_grad()
def scale_maps(subject: Subject, rows: Sequence[Row], *, texts: int = 8) -> ScaleMaps:
    """
    The coefficients (x . readout) * scale of every layer at every token of `rows`, in the steered run; the
    first `texts` of them are kept whole. SteerError for vectors that are not adaptive: those give every token
    the same.
    """
    check_adaptive(subject.vectors.config)
    layers, decoder = subject.layers, subject.decoder
    now: dict[int, torch.Tensor] = {}

    def note(layer: int, module: Any, args: tuple, output: torch.Tensor) -> None:
        given = module.coefficient(args[1]) * module.state.scale
        mask = module.state.mask
        now[layer] = (given if mask is None else given * mask[..., 0]).float().cpu()

    maps: list[ScaleMap] = []
    counts = [0, 0]
    types = [f"{part} {name}" for part in ("prompt", "answer") for name in TYPES]
    zeros = partial(torch.zeros, dtype=torch.float64)
    total, square, sizes = zeros(len(layers)), zeros(len(layers)), zeros(2, len(layers))
    by_type, of_type = zeros(len(layers), len(types)), zeros(len(types))
    modules = [decoder.layers[layer].get_submodule("steering") for layer in layers]
    with hooked(*(m.register_forward_hook(partial(note, n)) for n, m in enumerate(modules))):
        for _, batch in chunks(rows, subject.batch_size):
            padded = subject.padded(batch)
            last = torch.tensor([padded.ids.shape[1] - 1], device=subject.device)
            run(subject, padded, batch, [steered(subject)], last)
            stack = torch.stack([now[n] for n in range(len(layers))])  # (layers, rows, columns)
            for i, row in enumerate(batch):
                start = int(padded.start[i])
                line = stack[:, i, start : start + len(row.ids)]
                if len(maps) < texts:
                    maps.append(ScaleMap(subject.tokens(row.ids), row.prompt, line.clone()))
                line = line.double()
                total += line[:, 1:].sum(1)
                square += line[:, 1:].square().sum(1)
                for part, piece in enumerate((line[:, 1 : row.prompt], line[:, row.prompt :])):
                    sizes[part] += piece.abs().sum(1)
                    counts[part] += piece.shape[1]
                kinds = torch.tensor([_type(subject, row, at) for at in range(1, len(row.ids))])
                by_type.index_add_(1, kinds, line[:, 1:])
                of_type += kinds.bincount(minlength=len(types))
    n = max(1, sum(counts))
    mean = total / n
    on = [size / count if count else size * torch.nan for size, count in zip(sizes, counts, strict=True)]
    variance = (square / n - mean.square()).clamp(min=0)
    by_type /= of_type  # NaN for a type without tokens
    between = ((by_type - mean[:, None]).square() * of_type).nansum(1) / n
    variance[variance < 1e-12 * mean.square()] = 0  # rounding
    explained = torch.where(variance > 0, between / variance, torch.nan)
    found = mean, variance.sqrt(), on[0] / on[1], by_type, explained
    mean, std, on_prompt, by_type, explained = (one.float() for one in found)
    return ScaleMaps(layers, maps, mean, std, on_prompt, types, by_type, explained)


def _type(subject: Subject, row: Row, at: int) -> int:
    """The index in `ScaleMaps.types` of token `at` of a row."""
    name = _NAMES.get(script(subject.token(row.ids[at])), "words")
    return TYPES.index(name) + len(TYPES) * (at >= row.prompt)

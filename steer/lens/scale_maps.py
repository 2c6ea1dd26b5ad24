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
from steer.lens.subject import Row, Subject, chunks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """

    layers: list[int]
    maps: list[ScaleMap]
    mean: torch.Tensor
    std: torch.Tensor
    on_prompt: torch.Tensor

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
    total, square, sizes = torch.zeros(len(layers)), torch.zeros(len(layers)), torch.zeros(2, len(layers))
    counts = [0, 0]
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
                total += line[:, 1:].sum(1)
                square += line[:, 1:].square().sum(1)
                for part, piece in enumerate((line[:, 1 : row.prompt], line[:, row.prompt :])):
                    sizes[part] += piece.abs().sum(1)
                    counts[part] += piece.shape[1]
    n = max(1, sum(counts))
    mean = total / n
    on = [size / count if count else size * torch.nan for size, count in zip(sizes, counts, strict=True)]
    return ScaleMaps(layers, maps, mean, (square / n - mean.square()).clamp(min=0).sqrt(), on[0] / on[1])

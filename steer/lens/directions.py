"""
Norms and directions of the vectors themselves: between layers, and along the checkpoints of a training run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from steer import artifact
from steer.artifact import Artifact
from steer.errors import SteerError
from steer.lens.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Directions(Result):
    """
    `norms` (checkpoints, layers); `between_layers` (layers, layers): cosines of the last checkpoint's
    vectors; `to_last` (checkpoints, layers): cosine with the last checkpoint's vector of that layer.
    """

    names: list[str]
    layers: list[int]
    norms: torch.Tensor
    between_layers: torch.Tensor
    to_last: torch.Tensor

    def figure(self) -> Figure:
        """Norms over the layers, a line a checkpoint, and the cosines between layers."""
        from steer.lens import plots

        figure, (left, right) = plots.panels(8.6, 3.4, 1, 2, width_ratios=[5, 4])
        for n, name in enumerate(self.names):
            shade = 0.35 + 0.65 * (n + 1) / len(self.names)
            left.plot(
                self.layers,
                self.norms[n],
                color=plots.COLOURS[0],
                alpha=shade,
                marker="o",
                markersize=3,
                label=name,
            )
        left.set_ylim(bottom=0)
        plots.whole_ticks(left, self.layers)
        plots.finish(left, "Length of each layer's vector", "layer", "norm")
        left.legend(frameon=False, fontsize=8)
        image = right.imshow(
            plots.as_array(self.between_layers), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
        )
        for setter in (right.set_xticks, right.set_yticks):
            plots.thin_ticks(setter, self.layers)
        plots.finish(right, "Cosine between layers", "layer", "layer")
        figure.colorbar(image, ax=right, fraction=0.046, pad=0.03)
        figure.tight_layout()
        return figure


def directions(sources: Sequence[str | os.PathLike[str] | Artifact]) -> Directions:
    """
    Of artifacts of one model, in the order of training. Adaptive vectors count with the norm of their
    read-out. SteerError when they do not steer the same layers.
    """
    artifacts = [source if isinstance(source, Artifact) else artifact.read(source) for source in sources]
    if not artifacts:
        raise SteerError("no artifact was given: there is nothing to compare")
    names = [str(n) if isinstance(s, Artifact) else Path(s).name for n, s in enumerate(sources)]
    vectors = [effective(one) for one in artifacts]
    layers = sorted(vectors[-1])
    for name, one in zip(names, vectors, strict=True):
        if sorted(one) != layers or next(iter(one.values())).shape != vectors[-1][layers[0]].shape:
            raise SteerError(f"{name} and {names[-1]} are not the same layers of the same model")
    stack = torch.stack([torch.stack([one[layer].float() for layer in layers]) for one in vectors])
    unit = normalize(stack, dim=-1)
    return Directions(names, layers, stack.norm(dim=-1), unit[-1] @ unit[-1].T, (unit * unit[-1]).sum(-1))


def effective(one: Artifact) -> dict[int, torch.Tensor]:
    """What each layer adds, (hidden_size,) by layer, an adaptive vector times the norm of its read-out."""
    if one.config.kind == "adaptive":
        return {layer: vector * readout.norm() for layer, (vector, readout) in one.rank_one().items()}
    return one.by_layer()


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-N` in `folder` that hold vectors, in the order of their steps."""
    folders = [
        (re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*")
    ]
    steps = [(int(m[1]), path) for m, path in folders if m and (path / artifact.TENSOR_FILE).is_file()]
    return [path for _, path in sorted(steps)]

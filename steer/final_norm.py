"""The norm between the last layer and the unembedding: found by a forward pass, its gain measured."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from steer.hooks import hooked
from steer.sites import find_decoder, probing


def find_final_norm(model: nn.Module) -> nn.Module | None:
    """
    The norm between the last layer and the unembedding; None for a model without one. It is the last module
    that the decoder calls after its layers and that multiplies no matrix.
    """
    decoder = find_decoder(model)
    called: list[nn.Module] = []

    def note(layer: bool, module: nn.Module, args: tuple, output: Any) -> None:
        called.clear() if layer else called.append(module)

    others = [child for child in decoder.backbone.children() if child is not decoder.layers]
    modules = [(True, layer) for layer in decoder.layers] + [(False, child) for child in others]
    vectors = model.__dict__.get("steering_vectors")  # off, they need not know where a prompt ends
    with (
        hooked(*(module.register_forward_hook(partial(note, layer)) for layer, module in modules)),
        probing(decoder.backbone) as ids,
        vectors.disabled() if vectors else nullcontext(),
    ):
        decoder.backbone(ids, use_cache=False)
    norms = [module for module in called if all(p.dim() < 2 for p in module.parameters())]
    return norms[-1] if norms else None


@torch.no_grad()
def through_final_norm(model: nn.Module, vectors: torch.Tensor) -> torch.Tensor:
    """
    Vectors times the gain of the final norm, as its division by the stream's length leaves them.

    Args:
        vectors: (n, hidden_size), centred first where the norm centres.

    Returns:
        (n, hidden_size). The gain is read off the module's output, so that RMSNorm, Gemma's 1 + weight and
        LayerNorm need no table.
    """
    gain = _gain(model)
    if gain is None:
        return vectors
    scale, centres = gain
    if centres:
        vectors = vectors - vectors.mean(1, keepdim=True)
    return vectors * scale.to(vectors.device, vectors.dtype)


@torch.no_grad()
def onto_stream(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """
    Directions in the residual stream before the final norm that move its output along `rows` most: the
    transpose of `through_final_norm`.

    Args:
        rows: (n, hidden_size), such as rows of the unembedding.

    Returns:
        (n, hidden_size).
    """
    gain = _gain(model)
    if gain is None:
        return rows
    scale, centres = gain
    rows = rows * scale.to(rows.device, rows.dtype)
    return rows - rows.mean(1, keepdim=True) if centres else rows


def _gain(model: nn.Module) -> tuple[torch.Tensor, bool] | None:
    """The final norm's gain, (hidden_size,) in float64, and whether it centres; None for no norm."""
    norm = find_final_norm(model)
    if norm is None:
        return None
    hidden_size = find_decoder(model).hidden_size
    parameter = next(norm.parameters(), None)
    device = torch.device("cpu") if parameter is None or parameter.device.type == "mps" else parameter.device
    signs = torch.ones(hidden_size, device=device)
    signs[1::2] = -1
    # Large, so that the norm's epsilon is nothing beside it; an odd size is made to have mean zero too.
    probe = 1e4 * (signs - signs.mean()).double()
    # In float64, where the module keeps it: bfloat16 would round the probe's unit length.
    # On the CPU only for GPUs of Apple, which have no float64: hooks of accelerate (device_map) on the norm
    # would move the probe to the device of the model.
    wide = deepcopy(norm).to(device).double()
    response = (wide(probe) - wide(-probe)) / 2  # a bias cancels
    scale = response / (probe / probe.square().mean().sqrt())
    offset = wide(probe + 1e4) - wide(probe)
    return scale, bool(offset.abs().max() < 1e-3 * response.abs().max())

"""
JumpReLU (arXiv 2407.14435): a feature is its pre-activation where that is above a learned threshold, else 0.

The threshold moves neither output nor count except by jumps, so its gradients are estimated from the
pre-activations in a window around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Width of the window, for inputs whose coordinates have mean square 1.
BANDWIDTH = 0.1


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = gradients
        z, threshold = ctx.saved_tensors
        return grad * (z > threshold), -(threshold * _window(z, threshold) * grad).sum(0)


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return (z > threshold).sum(1).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (grad,) = gradients
        z, threshold = ctx.saved_tensors
        return None, -(_window(z, threshold) * grad[:, None]).sum(0)


def _window(z: Tensor, threshold: Tensor) -> Tensor:
    """The kernel K((z - threshold) / BANDWIDTH) / BANDWIDTH, a rectangle of area 1."""
    return ((z - threshold).abs() < BANDWIDTH / 2).to(z.dtype) / BANDWIDTH


def jump(z: Tensor, threshold: Tensor) -> Tensor:
    """z (tokens, features) where it is above `threshold` (features,), else 0."""
    return _Jump.apply(z, threshold)


def count_active(z: Tensor, threshold: Tensor) -> Tensor:
    """l0 of each token, (tokens,): how many of its z are above their threshold."""
    return _Count.apply(z, threshold)

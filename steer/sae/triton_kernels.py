"""
HierarchicalTopK as two Triton kernels: memory flat in k, each prefix's error taken while the residual is in
registers. The algebra is that of `steer.sae.losses._Chunked`; nothing here runs without a CUDA device
(or Triton's interpreter, TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from steer.errors import SteerError

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

# Coordinates of the residual that one program holds in registers.
BLOCK = 512


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


if triton is not None:

    @triton.jit
    def _forward(
        target, values, table, indices, weights, residual, loss, width, K: tl.constexpr, BLOCK: tl.constexpr
    ):
        token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        left = tl.load(target + token * width + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for rank in range(K):
            feature = tl.load(indices + token * K + rank).to(tl.int64)
            value = tl.load(values + token * K + rank).to(tl.float32)
            row = tl.load(table + feature * width + column, mask=inside, other=0.0).to(tl.float32)
            left -= value * row
            total += tl.load(weights + rank).to(tl.float32) * left * left
        tl.store(residual + token * width + column, left, mask=inside)
        tl.store(loss + token * tl.num_programs(1) + block, tl.sum(total))

    @triton.jit
    def _backward(
        residual,
        values,
        table,
        indices,
        weights,
        suffix,
        value_grad,
        table_grad,
        width,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        left = tl.load(residual + token * width + column, mask=inside, other=0.0)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for step in range(K):
            rank = K - 1 - step
            total += tl.load(weights + rank).to(tl.float32) * left
            feature = tl.load(indices + token * K + rank).to(tl.int64)
            value = tl.load(values + token * K + rank).to(tl.float32)
            row = tl.load(table + feature * width + column, mask=inside, other=0.0).to(tl.float32)
            tl.atomic_add(value_grad + token * K + rank, tl.sum(row * total))
            tl.atomic_add(table_grad + feature * width + column, value * total, mask=inside)
            left += value * row
        tl.store(suffix + token * width + column, total, mask=inside)


class _Hierarchical(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, target: Tensor, values: Tensor, table: Tensor, indices: Tensor, weights: Tensor
    ) -> Tensor:
        tokens, width = target.shape
        blocks = triton.cdiv(width, BLOCK)
        residual = torch.empty(tokens, width, dtype=torch.float32, device=target.device)
        loss = torch.empty(tokens, blocks, dtype=torch.float32, device=target.device)
        inputs = [part.contiguous() for part in (target, values, table, indices, weights)]
        _forward[(tokens, blocks)](*inputs, residual, loss, width, K=values.shape[1], BLOCK=BLOCK)
        ctx.save_for_backward(residual, *inputs[1:])
        return loss.sum() / tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        residual, values, table, indices, weights = ctx.saved_tensors
        tokens, width = residual.shape
        suffix = torch.empty_like(residual)
        value_grad = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
        table_grad = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
        _backward[(tokens, triton.cdiv(width, BLOCK))](
            residual, values, table, indices, weights, suffix, value_grad, table_grad, width,
            K=values.shape[1], BLOCK=BLOCK,
        )  # fmt: skip
        scale = grad.float() * (2 / tokens)
        return (
            (suffix * scale).to(table.dtype),
            (value_grad * -scale).to(values.dtype),
            (table_grad * -scale).to(table.dtype),
            None,
            None,
        )


def hierarchical(target: Tensor, values: Tensor, table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """
    The loss of `steer.sae.losses.hierarchical_loss` for target (tokens, width) = x - b_dec, values and
    indices (tokens, k), strongest first, table (features, width) and weights (k,). Sums are in float32; the
    gradient of the table is added up atomically, so its last bits vary from run to run.
    """
    if triton is None:
        raise SteerError("the Triton kernel needs the package triton; choose implementation='chunked'")
    if not target.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise SteerError("the Triton kernel runs on a CUDA device; choose implementation='chunked' on a CPU")
    return _Hierarchical.apply(target, values, table, indices, weights)

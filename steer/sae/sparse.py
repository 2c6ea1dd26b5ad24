"""
Sparse arithmetic with gradients: the few active features of each token, and products that touch only those.

A product of a sparse (tokens, features) matrix with a dense one is an `embedding_bag`, in either direction:
token by token it gathers the rows of a feature table, feature by feature it gathers tokens. Both run at
memory speed on CPU and GPU; nothing of size tokens x features is ever scattered into.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Selection:
    """`indices` (tokens, k): which of `features` each token uses."""

    def __init__(self, indices: Tensor, features: int):
        self.indices = indices
        self.features = features

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """
        Positions in the flat indices sorted by feature, the token of each, and where each feature starts.
        """
        flat = self.indices.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.features).cumsum(0)
        return order, order // self.indices.shape[1], torch.cat([ends.new_zeros(1), ends])

    def gather(self, weights: Tensor, table: Tensor) -> Tensor:
        """Rows (tokens, width): for each token, the weighted sum of its features' rows of `table`."""
        return embedding_bag(self.indices, table, per_sample_weights=weights.to(table.dtype), mode="sum")

    def scatter(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Table (features, width): for each feature, the weighted sum of its tokens' `rows`."""
        order, tokens, starts = self._by_feature
        sorted_weights = weights.flatten()[order].to(rows.dtype)
        return embedding_bag(
            tokens, rows, starts, per_sample_weights=sorted_weights, mode="sum", include_last_offset=True
        )

    def total(self, weights: Tensor) -> Tensor:
        """(features,): the sum of the weights given to each feature."""
        out = weights.new_zeros(self.features)
        return out.index_add_(0, self.indices.flatten(), weights.flatten())


class _Chosen(torch.autograd.Function):
    """
    Values that a matrix product gave at the selected places: the identity forward; backward the gradient of
    `(x - shift) @ weight.T + bias` at those places alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        where: Selection,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, shift)
        ctx.where = where
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight, shift = ctx.saved_tensors
        where: Selection = ctx.where
        by_feature = where.total(grad.to(weight.dtype))
        shifted = x if shift is None else x - shift
        return (
            None,
            where.gather(grad, weight).to(x.dtype) if ctx.needs_input_grad[1] else None,
            where.scatter(grad, shifted.to(weight.dtype)) if ctx.needs_input_grad[2] else None,
            by_feature,
            # every token's input loses the same shift, so the tokens are summed before the product
            -(by_feature @ weight) if shift is not None else None,
            None,
        )


def chosen(
    values: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, where: Selection
) -> Tensor:
    """
    `values` (tokens, k), which are `((x - shift) @ weight.T + bias)` at `where`, with their gradient.

    x: (tokens, width); weight: (features, width); bias: (features,); shift: (width,) or None.
    """
    return _Chosen.apply(values, x, weight, bias, shift, where)


class _TableGradient(torch.autograd.Function):
    """The identity, that hands the table of a `gather` its gradient through the faster transposed product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, table: Tensor, where: Selection) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.where = where
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        (weights,) = ctx.saved_tensors
        return grad, None, ctx.where.scatter(weights, grad), None


def combine(weights: Tensor, table: Tensor, where: Selection) -> Tensor:
    """`where.gather(weights, table)` with gradients for the weights (tokens, k) and the table."""
    rows = where.gather(weights, table.detach())
    return _TableGradient.apply(rows, weights.detach(), table, where)


class _And(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        z = (p.clamp(min=0) * q.clamp(min=0)).sqrt()
        ctx.save_for_backward(p, q, z)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = gradients
        p, q, z = ctx.saved_tensors
        half = torch.where(z > 0, grad / (2 * z), 0)
        return half * q, half * p


def mand(p: Tensor, q: Tensor) -> Tensor:
    """
    mAND of KronSAE (arXiv 2505.22255): sqrt(p q) where both are positive, else 0. Its gradient is
    (q, p) / (2 sqrt(p q)) there, and 0 elsewhere.
    """
    return _And.apply(p, q)


def interact(p: Tensor, q: Tensor, interaction: str) -> Tensor:
    """
    A KronSAE's features from their p and q, by one of `steer.sae.config.INTERACTIONS`; none is negative.
    """
    if interaction == "mand":
        return mand(p, q)
    return p.relu() * q.relu() if interaction == "relu_product" else (p * q).relu()


@torch.no_grad()
def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    Values and indices of the k largest of each row of `scores` (rows, features), largest first.

    On a CPU `torch.topk` sorts whole rows. It is given less to sort: of groups of features, only the k with
    the largest maxima can hold one of the k largest. Exact; ties may be broken otherwise than by
    `torch.topk`.
    """
    features = scores.shape[1]
    size = _group_size(features, k) if scores.device.type == "cpu" else 1
    if size == 1:
        values, indices = scores.topk(k)
        return values, indices
    groups = features // size
    maxima = scores.view(len(scores), size, groups).amax(1)
    best = maxima.topk(k, sorted=False).indices
    places = torch.arange(0, features, groups, device=scores.device)
    candidates = (best[:, None, :] + places[:, None]).flatten(1)
    values, order = scores.gather(1, candidates).topk(k)
    return values, candidates.gather(1, order)


def _group_size(features: int, k: int) -> int:
    """The power of two that leaves least to sort, features / size + k size; 1 where little would be saved."""
    sizes = [s for s in (2, 4, 8, 16, 32) if features % s == 0 and features // s >= k]
    cost = {s: features // s + k * s for s in sizes}
    best = min(cost, key=cost.__getitem__, default=1)
    return best if best > 1 and 2 * cost[best] <= features else 1

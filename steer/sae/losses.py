"""
What an SAE is trained on: reconstruction, dead features' auxiliary loss, HierarchicalTopK, and Matryoshka.

Every loss is a squared error summed over the width and averaged over the tokens, as both papers write it.
HierarchicalTopK (arXiv 2505.24473) is the mean over prefix lengths j in J of ||x - x_hat_j||^2, where x_hat_j
uses the j strongest features of each token. It has three implementations of equal value and gradient: `plain`
holds (tokens, k, width) numbers, `chunked` needs memory that does not grow with k, `triton` is a GPU kernel.
Matryoshka (Bussmann et al., arXiv 2503.17547) nests dictionaries instead: its prefixes are the first features
of the dictionary, and the losses of all prefixes are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.sae.model import SAE, Active
from steer.sae.sparse import Selection, combine

IMPLEMENTATIONS = ("auto", "plain", "chunked", "triton")
# Numbers of (tokens, width) that the chunked form walks through at once, on a CPU.
CHUNK = 1 << 19


def reconstruction_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean over tokens of ||x - x_hat||^2; both (tokens, width)."""
    return (x - x_hat).square().sum(1).mean()


def auxiliary_loss(
    sae: SAE, x: Tensor, residual: Tensor, dead: Tensor, k: int | None = None, low_precision: bool = False
) -> Tensor:
    """
    How badly the dead features alone explain what the living leave (arXiv 2406.04093, appendix A.2): the k
    strongest of the dead (d_in / 2 by default) reconstruct `residual` (tokens, width), without a bias.

    dead: (n,) indices of the dead features. With fewer of them than k, the loss shrinks in proportion.
    """
    k = k or max(1, sae.cfg.d_in // 2)
    if not len(dead):
        return residual.new_zeros(())
    active = sae.strongest(x, min(k, len(dead)), dead, low_precision)
    explained = sae.decode_active(active) - sae.b_dec
    return min(1.0, len(dead) / k) * reconstruction_loss(residual.detach(), explained)


def matryoshka_loss(sae: SAE, x: Tensor, active: Active, prefixes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """
    The sum over `prefixes` m of mean ||x - x_hat_m||^2, x_hat_m from the active features below m and the bias
    (arXiv 2503.17547, section 3); x (tokens, width).

    Args:
        prefixes: sizes of the nested dictionaries, ascending, the last one d_sae.

    Returns:
        The loss, and the reconstruction (tokens, width) with all active features, without gradients.
    """
    residual, loss, start = x - sae.b_dec, x.new_zeros(()), 0
    for end in prefixes:
        inside = (active.indices >= start) & (active.indices < end)
        # of each token's places only as many columns as the fullest token needs
        most = max(1, int(inside.sum(1).max()))
        order = inside.to(torch.uint8).topk(most, dim=1).indices
        values = (active.values * inside).gather(1, order)
        where = Selection(active.indices.gather(1, order), sae.cfg.d_sae)
        residual = residual - combine(values, sae.W_dec, where)
        loss, start = loss + residual.square().sum(1).mean(), end
    return loss, (x - residual).detach()


def hierarchical_loss(
    sae: SAE,
    x: Tensor,
    active: Active,
    prefixes: Sequence[int] | None = None,
    implementation: str = "auto",
) -> Tensor:
    """
    The mean over `prefixes` (all of 1..k by default) of the reconstruction loss of the j strongest features.

    `active` must be sorted, strongest first, as `SAE.active` gives it. "auto" is the Triton kernel on a GPU
    that has Triton, else `chunked`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise SteerError(
            f"implementation={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    weights = prefix_weights(prefixes, active.values.shape[1], x.dtype, x.device)
    if implementation == "auto":
        from steer.sae import triton_kernels

        implementation = "triton" if x.is_cuda and triton_kernels.available() else "chunked"
    target = x - sae.b_dec
    if implementation == "plain":
        return _plain(target, active.values, sae.W_dec, active.where, weights)
    if implementation == "triton":
        from steer.sae.triton_kernels import hierarchical

        return hierarchical(target, active.values, sae.W_dec, active.indices, weights)
    return _Chunked.apply(target, active.values, sae.W_dec, active.where, weights)


def prefix_weights(
    prefixes: Sequence[int] | None, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(k,): 1/|J| at the last feature of each prefix, else 0."""
    if prefixes is None:
        return torch.full((k,), 1 / k, dtype=dtype, device=device)
    weights = torch.zeros(k, dtype=dtype, device=device)
    weights[torch.tensor(list(prefixes), device=device) - 1] = 1 / len(prefixes)
    return weights


def _plain(target: Tensor, values: Tensor, table: Tensor, where: Selection, weights: Tensor) -> Tensor:
    prefixes = (values[:, :, None] * table[where.indices]).cumsum(1)
    errors = (target[:, None] - prefixes).square().sum(2)
    return (errors * weights).sum(1).mean()


class _Chunked(torch.autograd.Function):
    """
    One walk from the longest prefix to the shortest gives the value and all gradients.

    With r_j = target - x_hat_j and s_i = sum over j >= i of weight_j r_j, the loss is the sum over i of
    weight_i |r_i|^2 = target . s_1 - sum_i a_i (w_i . s_i), and its gradients are -2 w_i . s_i for the value
    a_i, -2 a_i s_i for the row w_i, and 2 s_1 for the target. The walk needs r_k to begin with, and then only
    r_i and s_i of the moment: (tokens, width) each.
    """

    @staticmethod
    def forward(
        ctx: Any, target: Tensor, values: Tensor, table: Tensor, where: Selection, weights: Tensor
    ) -> Tensor:
        count, width = target.shape
        k = values.shape[1]
        by_rank, rank_weights = where.indices.T.contiguous(), weights.tolist()
        value_grad = values.new_zeros(k, count)
        target_grad = torch.empty_like(target)
        table_grad = torch.zeros_like(table)
        loss = target.new_zeros(())
        rows = count if target.is_cuda else min(count, max(16, CHUNK // width))
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            index, value = by_rank[:, part], values[part].T.contiguous()
            residual = target[part] - Selection(where.indices[part], where.features).gather(
                values[part], table
            )
            suffix = torch.zeros_like(residual)
            row, product = torch.empty_like(residual), torch.empty_like(residual)
            for rank in range(k - 1, -1, -1):
                if rank_weights[rank]:
                    suffix.add_(residual, alpha=rank_weights[rank])
                torch.index_select(table, 0, index[rank], out=row)
                torch.mul(row, suffix, out=product)
                torch.sum(product, 1, out=value_grad[rank, part])
                torch.mul(suffix, value[rank, :, None], out=product)
                table_grad.index_add_(0, index[rank], product)
                residual.addcmul_(row, value[rank, :, None])
            loss += (target[part] * suffix).sum() - (value * value_grad[:, part]).sum()
            target_grad[part] = suffix
        ctx.save_for_backward(target_grad, value_grad, table_grad)
        return loss / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        target_grad, value_grad, table_grad = ctx.saved_tensors
        scale = grad * (2 / len(target_grad))
        return target_grad * scale, value_grad.T * -scale, table_grad * -scale, None, None

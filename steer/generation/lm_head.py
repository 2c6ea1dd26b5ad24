"""
Log-probabilities of a frozen LM head with two matrix products instead of three.

trl's fused head computes the logits of a tile, forgets them, and computes them again for the gradient. While
the head is frozen the gradient is known as soon as the logits are: with p = softmax(W h) and target y,

    d log p_y / d h = W^T (1_y - p)                                                    (tokens, width)

is computed beside them and kept, and the backward pass multiplies its rows with the incoming gradient. In
bfloat16 the logits and 1_y - p are rounded, as trl rounds them, and all between them is float32. Under
autocast the products are in its dtype, as those of the model's own head. Each call then copies the weight:
272 MB in bfloat16 for 151,936 words and a width of 896.

Between the products a few rows are worked on at a time (`cpu.cached_rows`): with a vocabulary of 151,936, a
tile in float32 is 156 MB, and each operation on all of it would read and write main memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from steer import compat
from steer.generation.cpu import cached_rows

# Tokens whose logits are held at once.
TILE = 256


class FrozenHead(torch.autograd.Function):
    """trl's `ChunkedLogProbFunction` where the head takes no gradient; the same arguments and results."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple:
        bias, targets, temperature, _, _, logit_scale, _ = rest
        factor = logit_scale / temperature
        ctx.set_materialize_grads(False)
        log_probs, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kind = hidden.device.type
        # Autocast leaves a product alone that is written to a given tensor.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        near, head = hidden.to(dtype), weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        tile = near.new_empty(min(TILE, len(hidden)), len(weight))
        few = cached_rows(len(weight))
        logits_buffer, exp_buffer = hidden.new_empty(2, min(few, len(tile)), len(weight), dtype=wide)
        for start in range(0, len(hidden), TILE):
            tile = tile[: len(hidden) - start]
            torch.mm(near[start : start + TILE], head.t(), out=tile)
            for i in range(0, len(tile), few):
                rows = tile[i : i + few]
                part = slice(start + i, start + i + len(rows))
                target = targets[part, None]
                logits = rows if rows.dtype == wide else logits_buffer[: len(rows)].copy_(rows)
                if bias is not None:
                    logits += bias
                if factor != 1:
                    logits *= factor
                logits -= logits.amax(-1, keepdim=True)
                chosen = logits.gather(-1, target)
                # H = log Z - sum p z, and both sums are had from one table of exp(z)
                exp = torch.exp(logits, out=exp_buffer[: len(rows)])
                total = exp.sum(-1, keepdim=True)
                expected = logits.mul_(exp).sum(-1, keepdim=True) / total
                log_probs[part] = (chosen - total.log()).squeeze(-1)
                entropy[part] = (total.log() - expected).squeeze(-1)
                if slope is not None:
                    rows.copy_(exp.div_(-total).scatter_add_(-1, target, torch.ones_like(total)))
            if slope is not None:
                slope[start : start + TILE] = torch.mm(tile, head) * factor
        ctx.save_for_backward(slope, hidden, weight)
        ctx.rest = rest
        return log_probs, entropy, None, None, None

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        slope, hidden, weight = ctx.saved_tensors
        gradient = torch.zeros_like(hidden)
        if grads[0] is not None:
            gradient += grads[0].unsqueeze(-1) * slope
        if grads[1] is not None:  # of the entropy, which only an entropy bonus asks for: trl's way
            with torch.enable_grad():
                again = hidden.detach().requires_grad_()
                entropy = ChunkedLogProbFunction.apply(again, weight, *ctx.rest)[1]
                gradient += torch.autograd.grad(entropy, again, grads[1])[0]
        return gradient, *[None] * 8


class _Choose:
    """Stands for trl's function: the cheaper one where it computes the same."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple:
        softcap, wanted = rest[4], set(rest[6])
        fits = hidden.dtype == weight.dtype and hidden.device.type == "cpu"
        # Without a gradient too: a policy and its reference must not differ by the rounding of two ways.
        if fits and not weight.requires_grad and softcap is None and wanted <= {"log_probs", "entropy"}:
            return FrozenHead.apply(hidden, weight, *rest)
        return ChunkedLogProbFunction.apply(hidden, weight, *rest)


@contextmanager
def frozen_head() -> Iterator[None]:
    """Inside, trl's fused LM head uses `FrozenHead` on a CPU."""
    with compat.fused_head(_Choose):
        yield

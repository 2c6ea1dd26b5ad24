"""
What makes training fast and small on a CPU: an attention form for small batches, an LM head in tiles that
fit, and an allocator that keeps what it was given (`steer.generation.allocator`).

With a padding mask, transformers repeats keys and values for every query head, and makes a mask of numbers in
every layer; autograd keeps all of these copies. Torch's fused CPU kernel needs neither, and keeps no scores.
It is slow when few queries meet many sequences, as in sampling: there, two grouped matrix products do the
same sum.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steer import compat
from steer.generation.allocator import keep_freed_memory

log = logging.getLogger(__name__)
# Largest number of scores (batch x heads x queries x keys) that the matrix products hold at once.
MAX_SCORES = 1 << 24
# From so many queries on the fused kernel is faster, and with gradients it keeps less. In bfloat16 its
# backward pass is slower than the products for short sequences.
FUSED_QUERIES, FUSED_QUERIES_HALF = 16, 128
# Tokens of the LM head's tiles. trl's 4,096 are for a GPU: half a gigabyte each and several at once, more
# than everything else that a step keeps, and no faster here.
HEAD_TILE = 256
# Numbers (2 MB in float32) that stay in the processor's cache from one operation to the next.
CACHED = 1 << 19


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    fused_from: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    softmax(q k^T * scaling + mask) v, as transformers' `sdpa_attention_forward` computes it.

    Args:
        module: The attention module; only `num_key_value_groups` is read.
        query: (batch, heads, queries, size).
        key: (batch, groups, keys, size).
        value: (batch, groups, keys, value size); multi-head latent attention has another size here.
        attention_mask: Boolean, True where attention is allowed. A query that may see nothing gets zeros.
            None with one query, as rows without padding have it in sampling: it sees all keys.
        scaling: Factor of the scores; None is size ** -0.5.
        dropout: Of the weights.
        fused_from: Queries from which the fused kernel is used; None is `FUSED_QUERIES`, by dtype.

    Returns:
        (batch, queries, heads, value size), and None for the weights. Whatever the two matrix products do not
        cover (`_unknown`) is handed to `sdpa_attention_forward` unchanged.
    """
    if dropout or _unknown(module, query, key, value, attention_mask, kwargs):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1:3]
    if fused_from is None:
        fused_from = FUSED_QUERIES if query.dtype == torch.float32 else FUSED_QUERIES_HALF
    many = queries >= fused_from or batch * heads * queries * keys > MAX_SCORES
    if many and value.shape[-1] == size:
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            None if attention_mask is None else _numbers(attention_mask, query.dtype),
            scale=scaling,
            enable_gqa=heads != groups,
        )
        return out.transpose(1, 2).contiguous(), None
    folded = query.reshape(batch, groups, heads // groups * queries, size)
    scores = cast(torch.Tensor, _Scores.apply(folded, key)).view(batch, heads, queries, keys)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(query.dtype)
    out = torch.matmul(weights.view(batch, groups, -1, keys), value).view(batch, heads, queries, -1)
    if attention_mask is not None:
        out = out.masked_fill(~attention_mask.any(-1, keepdim=True), 0)
    return out.transpose(1, 2).contiguous(), None


class _Scores(torch.autograd.Function):
    """
    q k^T of (batch, groups, queries, size) and (batch, groups, keys, size), in float32 or more.

    A product in bfloat16 would be rounded to 8 bits. Some layers have scores of many hundreds (Qwen2.5: 1,200
    in the first), where that changes the softmax: the output was off by 18 %. The gradient is computed in the
    dtype of the inputs, as that of a product of them.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key)
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            return torch.matmul(query.to(wide), key.transpose(2, 3).to(wide))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = ctx.saved_tensors
        moved = gradients[0].to(query.dtype)
        return torch.matmul(moved, key), torch.matmul(moved.transpose(2, 3), query)


def _unknown(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, object],
) -> bool:
    """Whether a call is outside what `grouped_attention` computes itself."""
    return (
        # no mask means a causal one; a single query, the last, sees all keys
        (query.shape[2] > 1 if mask is None else mask.dtype != torch.bool)  # numbers are added to the scores
        or query.device.type != "cpu"
        or any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
        or query.shape[1] != key.shape[1] * getattr(module, "num_key_value_groups", 1)
        or value.shape[:3] != key.shape[:3]
        # Neither way: the kernel takes values of the size of the keys alone.
        or (value.shape[3] != key.shape[3] and query.shape[:3].numel() * key.shape[2] > MAX_SCORES)
    )


def _numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `mask` adds to the scores: zero or minus infinity. Made once for all layers that have the mask."""
    known: torch.Tensor | None = mask.__dict__.get("numbers")
    if known is None or known.dtype != dtype:
        known = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        mask.__dict__["numbers"] = known
    return known


@contextmanager
def grouped(model: PreTrainedModel, fused_from: int | None = None) -> Iterator[None]:
    """
    Inside, modules of a model on the CPU that call transformers' `sdpa` attention get the grouped form.

    The function behind the name is replaced, not the name in the model's config: models that compute their
    own attention where the name is "sdpa" (Falcon) keep that branch, and the masks stay as they are.
    `fused_from` as in `grouped_attention`.
    """
    if model.device.type != "cpu":
        yield
        return
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    chosen = grouped_attention if fused_from is None else partial(grouped_attention, fused_from=fused_from)
    AttentionInterface.register("sdpa", chosen)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", before)


@contextmanager
def head_inputs_copied(model: PreTrainedModel) -> Iterator[None]:
    """
    Inside, the LM head of a model on the CPU gets tensors of their own in place of views.

    `generate()` gives it a view, the last token of each prompt. Torch then multiplies row by row, and in
    bfloat16 it copies the head for each row first: 17 GB and 49 s for 64 rows and a vocabulary of 151,936, in
    place of 0.03 s. In float32 the view takes five to nine times as long.
    """
    head = model.get_output_embeddings()
    if head is None or model.device.type != "cpu":
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: tuple(x.contiguous() for x in inputs))
    try:
        yield
    finally:
        hook.remove()


def cached_rows(width: int) -> int:
    """How many rows of `width` numbers to work on at a time: about `CACHED` numbers, for all threads."""
    threads = torch.get_num_threads()
    return threads * max(1, CACHED // (threads * width))


def prepare() -> None:
    """
    Settings of this process that make training on a CPU faster and smaller; not for runs on an accelerator.
    """
    memory = "the allocator is not glibc's and stays as it is"
    if keep_freed_memory():
        memory = "glibc keeps freed memory (mallopt; for large models tcmalloc may help, docs/training.md)"
    log.info("on the CPU: %s, LM head tiles of %d tokens", memory, HEAD_TILE)
    compat.set_head_tiles(HEAD_TILE)
    compat.set_head_products()

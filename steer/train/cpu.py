"""
What makes training fast and small on a CPU: an attention form for small batches, an allocator that keeps what
it was given, and an LM head in tiles that fit.

With a padding mask, transformers repeats keys and values for every query head, and torch's fused CPU kernel
is slow when few queries meet many sequences, as in sampling. Two grouped matrix products do the same sum
without the copies. Scores are materialised, so long sequences still go to the fused kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.kernels import chunked_logprob

NAME = "steer_grouped"
# Largest number of scores (batch x heads x queries x keys) that is held at once.
MAX_SCORES = 1 << 24
# Tokens of the LM head's tiles.
HEAD_TILE = 256


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """
    softmax(q k^T * scaling + mask) v for `query` (batch, heads, queries, size) and `key`, `value` (batch,
    groups, keys, size). `attention_mask` is boolean, True where attention is allowed. Returns (batch,
    queries, heads, size).
    """
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1:3]
    if attention_mask is None or dropout or batch * heads * queries * keys > MAX_SCORES:
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
    folded = query.reshape(batch, groups, heads // groups * queries, size)
    scores = torch.matmul(folded, key.transpose(2, 3)).view(batch, heads, queries, keys)
    scores = scores.float() * (size**-0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min).softmax(-1).to(query.dtype)
    out = torch.matmul(weights.view(batch, groups, -1, keys), value).view(batch, heads, queries, size)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """
    Inside, a model on the CPU that uses `sdpa` attention uses the grouped form; any other is left alone.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def small_head_tiles() -> None:
    """
    Let trl's fused LM head work on 256 tokens at a time. Its tiles of 4,096 tokens are made for a GPU: half a
    gigabyte each and several at once, which was more than everything else a step keeps. As fast.
    """
    chunked_logprob.TOKEN_CHUNK_SIZE = HEAD_TILE


def keep_freed_memory() -> None:
    """
    Let glibc reuse freed tensors instead of returning them to the kernel (no effect with other allocators).

    Every step frees and allocates gigabytes; by default each large tensor is a fresh mapping whose pages
    fault in again, which took half of a step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)

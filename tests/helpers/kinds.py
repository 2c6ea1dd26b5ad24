"""Shared by the tests of adaptive and shared vectors: the down-projections by hand, and the two factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import steer
from steer import SteeringConfig, SteeringVectors

# The MLP's last matrix and the width of its input, written down by hand.
DOWN = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2"),
        ("mlp.down_proj", 48),
    ),
    "gpt2": ("mlp.c_proj", 128),
    "gpt_neox": ("mlp.dense_4h_to_h", 48),
}
RANK = 2


def attach(model: nn.Module, kind: str, **config: Any) -> SteeringVectors:
    return steer.attach(model, SteeringConfig(kind=kind, rank=RANK, **config))


def values(vectors: SteeringVectors) -> tuple[list[torch.Tensor], ...]:
    """By layer: the read-outs and vectors of adaptive vectors, or the mixes and the directions of shared."""
    found = vectors.named_parameters()
    parts = ("readout", "vector") if vectors.config.kind == "adaptive" else ("mix", "directions")
    return tuple([p for name, p in found.items() if name.endswith(f".{part}")] for part in parts)

"""Shared by the tests of vectors: random vectors and tokens, and where each site stands, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from steer import SteerError, SteeringVectors
from steer.config import POSITIONS

SOME = [name for name in POSITIONS if name != "all"]
# Where each site stands, written down by hand: attention, MLP, what is added to the stream after attention.
BLOCKS = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe"),
        ("self_attn", "mlp", "self_attn"),
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), ("self_attn", "mlp", "post_attention_layernorm")),
    "gpt2": ("attn", "mlp", "attn"),
    "gpt_neox": ("attention", "mlp", None),  # parallel residual: there is no stream between the two
}

# For what takes long: all tokens, windows, learned positions, experts.
FEW = ("llama", "gemma3_text", "gpt2", "mixtral")


def fill(vectors: SteeringVectors, std: float = 0.5, seed: int = 7) -> SteeringVectors:
    """Seeded random values, large enough that every effect is far above rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vectors.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return vectors


def tokens(batch: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(input_ids=ids, **inputs).logits


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return getattr(model.base_model, "h" if model.config.model_type == "gpt2" else "layers")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def message(error: pytest.ExceptionInfo[SteerError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def patch(module: nn.Module, vector: torch.Tensor, before: bool = False) -> None:
    """Steer `module` by replacing its forward method: no hooks, nothing of `steer`."""
    original = module.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = original(hidden_states + vector if before else hidden_states, *args, **kwargs)
        if before:
            return output
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    module.forward = forward

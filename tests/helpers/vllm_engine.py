"""Tiny models in a vLLM engine, and whether what it samples has the log-probabilities of transformers."""

from __future__ import annotations

import os
from typing import Any

import pytest
from helpers.steering import tokens
from transformers import PreTrainedModel

from evals.vllm_engine import ENVIRONMENT, Sampled, expected, run, start

__all__ = ["LENGTH", "SHAPES", "TOLERANCE", "Sampled", "expected", "prompt", "run", "same", "start"]

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")

# Both sides compute in float32 with other kernels. Log-probabilities differed by up to 2e-6 where the vectors
# change them by 0.1 and more; ten times that is still far below any error of placement or scale.
TOLERANCE = 2e-5
# Attention kernels of vLLM begin at heads of 32. Large weights make distributions that vectors change a lot.
SHAPES: dict[str, dict[str, Any]] = {
    kind: {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}
    for kind in ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "mixtral", "qwen3_moe")
}
SHAPES |= {kind: {"hidden_size": 128, "initializer_range": 0.1} for kind in ("qwen2", "phi3")}
SHAPES |= {"gpt2": {"n_embd": 128, "initializer_range": 0.1}}
LENGTH = 40


def same(model: PreTrainedModel, sampled: Sampled) -> bool:
    return bool((expected(model, sampled) - sampled.logps).abs().max() < TOLERANCE)


def prompt(length: int = LENGTH, seed: int = 3) -> list[int]:
    return tokens(1, length, seed)[0].tolist()

"""
Steered vLLM against steered transformers, on the families whose layers are not all attention and MLP: state
spaces, shared experts, layers in more than one list. The others are in `test_plugin.py`.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.steering import fill, message
from helpers.vllm_engine import expected, prompt, run, start
from torch import nn

from evals.architectures import tiny
from steer import SteerError, attach, detach, engine
from steer.artifact import Artifact
from steer.engine.plugin import find_layers


class Family(NamedTuple):
    """Shapes that vLLM's CPU kernels take, and the difference of log-probabilities that its kernels make."""

    shape: dict[str, Any]
    tolerance: float
    dtype: torch.dtype = torch.float32


HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "falcon_h1": Family(
        {**HEADS, "head_dim": 32, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32}
        | {"mamba_d_state": 16, "mamba_n_groups": 1},
        5e-5,
    ),
    # vLLM sums the states of a scan in another order; without vectors the difference is the same
    "granitemoehybrid": Family(
        {**HEADS, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}, 2e-3
    ),
    "gemma4_text": Family({**HEADS, "head_dim": 32, "global_head_dim": 32}, 1e-4),
    "glm4_moe": Family({**HEADS, "head_dim": 32}, 3e-4),
}
# What vectors of these sizes change, at least.
MOVED = 0.1


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]
    model = tiny(kind, **family.shape).to(family.dtype)
    model.save_pretrained(tmp_path)
    llm = start(tmp_path, block_size=None, dtype=str(family.dtype).removeprefix("torch."))
    # A prompt of two passes, beside another one.
    prompts = [prompt(), prompt(7, 4)]
    bases = run(llm, prompts, [None, None])
    vectors = fill(attach(model), 0.3)
    with vectors.disabled():
        for base in bases:
            assert (expected(model, base) - base.logps).abs().max() < family.tolerance
    engine.push(llm, Artifact(vectors.config, vectors.tensors()))
    for steered in run(llm, prompts, [None, None]):
        assert (expected(model, steered) - steered.logps).abs().max() < family.tolerance
        with vectors.disabled():
            assert (expected(model, steered) - steered.logps).abs().max() > MOVED
    detach(model)
    del llm
    gc.collect()


class Layered(nn.Module):
    """`lists` of layers by name, each of (number, whether it is new)."""

    def __init__(self, **lists: list[nn.Module]):
        super().__init__()
        for name, layers in lists.items():
            setattr(self, name, nn.ModuleList(layers))


def test_layers_are_found_by_their_number() -> None:
    layers: list[nn.Module] = [nn.Linear(2, 2) for _ in range(4)]
    layers[1].experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
    found = find_layers(Layered(layers=layers, decoder_layers=layers, towers=layers[:2]), 4)
    assert list(found.items()) == list(enumerate(layers))
    for lists in ({"one": layers, "two": [nn.Linear(2, 2) for _ in range(4)]}, {"one": layers[:3]}):
        with pytest.raises(SteerError, match=r"cannot steer Layered: .* 4 decoder layers .* one \(") as error:
            find_layers(Layered(**lists), 4)
        message(error)

"""
Steered vLLM against steered transformers, on the families whose layers are not all attention and MLP: state
spaces, shared experts, layers in more than one list. The others are in `test_plugin.py`.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers.steering import fill, message
from helpers.vllm_engine import expected, prompt, run, start
from torch import nn
from transformers import CONFIG_MAPPING

from evals.architectures import tiny
from steer import SteerError, attach, detach, engine
from steer.artifact import Artifact
from steer.engine.alike import GROUPS, UNLIKE, UNLIKE_ON_CPU, check_alike
from steer.engine.plugin import check_stream, find_layers


class Family(NamedTuple):
    """Shapes that vLLM's CPU kernels take, and the difference of log-probabilities that its kernels make."""

    shape: dict[str, Any]
    tolerance: float
    dtype: torch.dtype = torch.float32
    std: float = 0.3  # of the vectors' numbers


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
    # on a CPU its linear attention runs in bfloat16 alone
    "qwen3_next": Family(
        {**HEADS, "head_dim": 32, "num_hidden_layers": 4, "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        0.2,
        torch.bfloat16,
        2.0,
    ),
    "gemma4_text": Family({**HEADS, "head_dim": 32, "global_head_dim": 32}, 1e-4),
    "glm4_moe": Family({**HEADS, "head_dim": 32}, 3e-4),
}
# What vectors of these sizes change, at least.
MOVED = 0.1


def apart(model: Any, sampled: Any, family: Family) -> float:
    """The largest difference of the log-probabilities; in bfloat16, where single tokens go far, the mean."""
    difference = (expected(model, sampled) - sampled.logps).abs()
    return float(difference.max() if family.dtype == torch.float32 else difference.mean())


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]
    model = tiny(kind, **family.shape).to(family.dtype)
    model.save_pretrained(tmp_path)
    llm = start(tmp_path, block_size=None, dtype=str(family.dtype).removeprefix("torch."))
    # A prompt of two passes, beside another one.
    prompts = [prompt(), prompt(7, 4)]
    bases = run(llm, prompts, [None, None])
    vectors = fill(attach(model), family.std)
    with vectors.disabled():
        for base in bases:
            assert apart(model, base, family) < family.tolerance
    engine.push(llm, Artifact(vectors.config, vectors.tensors()))
    for steered in run(llm, prompts, [None, None]):
        assert apart(model, steered, family) < family.tolerance
        with vectors.disabled():
            assert apart(model, steered, family) > max(MOVED, 2 * family.tolerance)
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


def test_a_model_of_several_streams_is_refused_by_name(tmp_path: Path) -> None:
    tiny("gemma3n_text", **HEADS, head_dim=32).save_pretrained(tmp_path)
    llm = start(tmp_path, block_size=None)
    run(llm, [prompt()], [None])  # it runs as ever
    with pytest.raises(
        SteerError, match=r"cannot steer Gemma3nForCausalLM: its layers return 4 streams"
    ) as error:
        engine.push(llm, {0: torch.ones(128)})
    message(error)
    del llm, error  # its traceback holds the engine, which would end in the middle of another test
    gc.collect()


def test_a_residual_stream_that_vllm_scales_is_refused() -> None:
    config = SimpleNamespace(hf_text_config=SimpleNamespace(), dtype=torch.bfloat16)
    layer = nn.Linear(2, 2)
    check_stream(layer, {0: layer}, config)
    layer.routed_scaling_factor = 2.5
    check_stream(layer, {0: layer}, config)
    config.dtype = torch.float16
    with pytest.raises(SteerError, match=r"cannot steer Linear in float16, .*--dtype bfloat16") as error:
        check_stream(layer, {0: layer}, config)
    message(error)


@pytest.mark.parametrize("kind", [*UNLIKE, *UNLIKE_ON_CPU])
def test_a_model_that_vllm_computes_otherwise_is_refused(kind: str) -> None:
    config = SimpleNamespace(model_type=kind)
    with pytest.raises(SteerError, match=rf"cannot steer Linear \({kind}\): .*use_vllm=false") as error:
        check_alike(nn.Linear(2, 2), config, cpu=True)
    message(error)
    if kind in UNLIKE_ON_CPU:
        assert " on a CPU " in str(error.value)
        check_alike(nn.Linear(2, 2), config, cpu=False)


@pytest.mark.parametrize(("kind", "setting"), GROUPS.items())
def test_groups_of_mamba2_are_refused(kind: str, setting: str) -> None:
    config = CONFIG_MAPPING[kind]()
    for groups in (1, 8):
        setattr(config, setting, groups)
        if groups == 1:
            check_alike(nn.Linear(2, 2), config, cpu=True)
        else:
            with pytest.raises(SteerError, match=f" {setting}=8 ") as error:
                check_alike(nn.Linear(2, 2), config, cpu=False)
            message(error)

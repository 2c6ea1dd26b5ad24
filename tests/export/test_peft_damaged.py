"""PEFT adapters of other models or with damaged files are refused in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.artifacts import equal, random_artifact
from helpers.fuzz import BYTES, ODD, mutations
from helpers.steering import message
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import steer
from steer import SteerError
from steer.artifact import Artifact
from steer.export import peft
from steer.export.peft import CONFIG_FILE, TENSOR_FILE

Build = Callable[..., PreTrainedModel]


# --- damaged and foreign adapters


@pytest.fixture
def adapter(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    folder = peft.write(random_artifact(tiny_llama), tmp_path / "adapter")
    steer.detach(tiny_llama)
    return folder


def test_another_model_s_adapter_is_refused(adapter, build_tiny):
    for other in (
        build_tiny("llama", hidden_size=64),
        build_tiny("llama", num_hidden_layers=2),
        build_tiny("llama", num_hidden_layers=4),
        build_tiny("qwen2"),
        build_tiny("gpt2"),
    ):
        with pytest.raises(SteerError) as error:
            peft.read(adapter, other)
        message(error)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"base_model.model.model.layers.0.mlp.down_proj.beft_bias": torch.zeros(2, 16)},
        {"base_model.model.model.layers.0.mlp.down_proj.beft_bias": torch.zeros(32, 1)},
        {"base_model.model.model.layers.0.mlp.down_proj.beft_bias": torch.full((32,), float("nan"))},
        {"base_model.model.model.layers.0.mlp.down_proj.beft_bias": torch.zeros(32, dtype=torch.int32)},
        {"base_model.model.model.layers.0.mlp.down_proj.beft_bias": torch.zeros(0)},
        {"base_model.model.model.layers.7.mlp.down_proj.beft_bias": torch.zeros(32)},
        {"base_model.model.model.layers.00.mlp.down_proj.beft_bias": torch.zeros(32)},
        {"base_model.model.model.layers.\u0661.mlp.down_proj.beft_bias": torch.zeros(32)},
        {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.zeros(1, 48)},
        {"base_model.model.lm_head.beft_bias": torch.zeros(97)},
    ],
)
def test_other_tensors_are_refused(adapter, tiny_llama, tensors):
    save_file(tensors, adapter / TENSOR_FILE)
    with pytest.raises(SteerError) as error:
        peft.read(adapter, tiny_llama)
    message(error)


def test_a_flat_bias_is_read(adapter, tiny_llama):
    vector = torch.arange(32.0)
    save_file({"base_model.model.model.layers.1.mlp.down_proj.beft_bias": vector}, adapter / TENSOR_FILE)
    read = peft.read(adapter, tiny_llama)
    assert read.config.layers == "1"
    assert torch.equal(read.by_layer()[1], vector)


def test_tensors_that_the_metadata_does_not_describe_are_refused(adapter, tiny_llama):
    with safe_open(adapter / TENSOR_FILE, framework="pt") as file:
        metadata = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys() if ".1." not in name}  # noqa: SIM118
    save_file(kept, adapter / TENSOR_FILE, metadata=metadata)
    with pytest.raises(SteerError, match="layers 'all'") as error:
        peft.read(adapter, tiny_llama)
    message(error)


def test_a_pickle_is_not_opened(adapter, tiny_llama):
    (adapter / TENSOR_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(SteerError, match="safetensors") as error:
        peft.read(adapter, tiny_llama)
    message(error)


@pytest.mark.parametrize("kind", ["constant", "adaptive"])
def test_damaged_tensor_files_are_refused_or_read_as_they_say(tiny_llama, tmp_path, kind):
    """Whatever the bytes: one line, or vectors that are finite and fit the model."""
    peft.write(random_artifact(tiny_llama, kind=kind), tmp_path)
    steer.detach(tiny_llama)
    whole, refused = (tmp_path / TENSOR_FILE).read_bytes(), 0
    for damaged in mutations(whole, 300, seed=1):
        (tmp_path / TENSOR_FILE).write_bytes(damaged)
        refused += reads(tmp_path, tiny_llama) is None
    assert 150 < refused < 300


@pytest.mark.parametrize("kind", ["constant", "adaptive"])
def test_damaged_configs_are_refused_or_change_nothing(tiny_llama, tmp_path, kind):
    whole = random_artifact(tiny_llama, kind=kind)
    peft.write(whole, tmp_path)
    steer.detach(tiny_llama)
    text = (tmp_path / CONFIG_FILE).read_bytes()
    values, choose = json.loads(text), random.Random(2)
    damaged = [choose.choice(BYTES)(text, choose) for _ in range(100)]
    for name in [*values, "use_dora", "a\nb", "r"]:
        for odd in choose.sample(ODD, 15):
            fields = {**values, name: None}
            pairs = [f"{json.dumps(k)}:{odd if k == name else json.dumps(v)}" for k, v in fields.items()]
            damaged.append(("{" + ",".join(pairs) + "}").encode(errors="surrogatepass"))
    refused = 0
    for content in damaged:
        (tmp_path / CONFIG_FILE).write_bytes(content)
        found = reads(tmp_path, tiny_llama)
        refused += found is None
        if found is not None:  # another lora_alpha is another scale
            assert equal(Artifact(replace(found.config, scale=1.0), found.tensors), whole)
    assert 100 < refused < len(damaged)


def reads(adapter: Path, model: PreTrainedModel) -> Artifact | None:
    """What is read, after a look at it; None when it is refused in one line."""
    try:
        read = peft.read(adapter, model)
    except SteerError as error:
        assert str(error) and "\n" not in str(error)
        return None
    assert all(tensor.isfinite().all() for tensor in read.tensors.values())
    steer.load(read, model)  # refuses other shapes
    steer.detach(model)
    return read

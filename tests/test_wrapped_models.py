"""Vectors of a compiled, adapted or launched model carry the plain model's names, and older files load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.kinds import RANK
from helpers.steering import fill, logits, message, tokens
from safetensors.torch import load_file, save
from torch import nn

import steer
from steer import Artifact, SteerError, SteeringConfig
from steer.artifact import read_numpy
from steer.artifact_file import digest
from steer.mixture import Mixer, mixed
from steer.names import canonical
from steer.sites import find_decoder
from steer.vector_sets import Population


def adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "o_proj", "down_proj"]))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "adapted": adapted,
    "both": lambda model: torch.compile(adapted(model), backend="eager"),
}


@pytest.mark.parametrize("kind", ["constant", "adaptive", "shared"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_vectors_of_a_wrapped_model_load_into_the_plain_one(build_tiny, tmp_path, wrapper, kind) -> None:
    model, plain, ids = build_tiny("llama"), build_tiny("llama"), tokens()
    base = logits(plain, ids)
    wrapped = WRAPPERS[wrapper](model)
    vectors = fill(steer.attach(wrapped, SteeringConfig(kind=kind, rank=RANK)))
    assert all(name.startswith("model.") and name in PLAIN[kind] for name in vectors.named_parameters())
    steered = logits(model if wrapper == "compiled" else wrapped, ids)  # an adapter begins as nothing
    assert (steered - base).abs().max() > 1e-2
    vectors.save(tmp_path)
    steer.load(tmp_path, plain)
    torch.testing.assert_close(logits(plain, ids), steered, rtol=1e-5, atol=1e-5)
    with pytest.raises(SteerError, match="already has steering vectors"):
        steer.attach(model)
    steer.detach(wrapped)
    assert not [name for name, _ in wrapped.named_parameters() if "steering" in name]
    torch.testing.assert_close(logits(plain, ids), steered, rtol=1e-5, atol=1e-5)
    steer.load(tmp_path, wrapped)


PLAIN = {
    "constant": [f"model.layers.{i}.steering.vector" for i in range(3)],
    "adaptive": [f"model.layers.{i}.steering.{part}" for i in range(3) for part in ("vector", "readout")],
    "shared": [*(f"model.layers.{i}.steering.mix" for i in range(3)), "model.steering.directions"],
}


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "base_model.model.", "module.", "_orig_mod.base_model.model."]
)
@pytest.mark.parametrize("kind", ["constant", "shared"])
def test_files_with_the_names_of_a_wrapper_load(tiny_llama, tmp_path, prefix, kind) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(kind=kind, rank=RANK)))
    vectors.save(tmp_path)
    file = tmp_path / "steering.safetensors"
    tensors = {prefix + name: value for name, value in load_file(file).items()}
    text = (tmp_path / "steering_config.json").read_text().rstrip("\n")
    data = {name: value.numpy().tobytes() for name, value in tensors.items()}
    file.write_bytes(save(tensors, metadata={"steering_config": text, "sha256": digest(text, data)}))
    found = steer.read(tmp_path)
    assert sorted(found.tensors) == sorted(PLAIN[kind]) == sorted(read_numpy(tmp_path).tensors)
    for name, value in vectors.tensors().items():
        assert torch.equal(found.tensors[name], value)
    steer.detach(tiny_llama)
    steer.load(tmp_path, tiny_llama)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.layers.3.steering.vector", "model.layers.3.steering.vector"),
        ("transformer.h", "transformer.h"),
        ("_orig_mod.model.layers", "model.layers"),
        ("module.base_model.model.gpt_neox.layers", "gpt_neox.layers"),
        ("model._orig_mod.layers", "model.layers"),
        (
            "_fsdp_wrapped_module.model.layers.2._fsdp_wrapped_module.steering.mix",
            "model.layers.2.steering.mix",
        ),
        ("submodule.layers", "submodule.layers"),
        ("module", ""),
    ],
)
def test_canonical_names(name: str, plain: str) -> None:
    assert canonical(name) == plain
    assert canonical(plain) == plain


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_vectors_of_a_model_that_is_wrapped_afterwards(build_tiny, wrapper) -> None:
    model, ids = build_tiny("llama"), tokens()
    base = logits(model, ids)
    vectors = fill(steer.attach(model))
    saved = Artifact(vectors.config, vectors.tensors())
    wrapped = WRAPPERS[wrapper](model)
    assert steer.attached(wrapped) is vectors
    calls: tuple[Callable[[Any], Any], ...] = (steer.attach, Mixer, Population)
    for call in calls:
        with pytest.raises(SteerError, match="already has steering vectors"):
            call(wrapped)
    with pytest.raises(SteerError, match="already has steering vectors"), mixed(wrapped, {"one": saved}):
        pass
    if wrapper == "compiled":  # an adapter renames the parameters
        steer.detach(wrapped)
        assert torch.equal(logits(model, ids), base)


def test_the_model_inside_of_the_one_that_has_the_vectors_says_which_to_pass(tiny_llama) -> None:
    wrapped = adapted(tiny_llama)
    vectors = steer.attach(wrapped)
    for call in (steer.attached, steer.detach):
        with pytest.raises(SteerError, match="attached to another object that holds") as error:
            call(tiny_llama)
        message(error)
    assert steer.attached(wrapped) is vectors


def test_a_part_of_the_model_that_is_compiled(build_tiny) -> None:
    model = build_tiny("llama")
    model.model = torch.compile(model.model, backend="eager")
    assert find_decoder(model).name == "model.layers"
    assert list(steer.attach(model).named_parameters()) == PLAIN["constant"]

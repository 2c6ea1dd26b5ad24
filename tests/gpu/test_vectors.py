"""Vectors on a GPU: what they add, how they move between devices, and models that a device map places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gpu import DEVICE, on_gpu
from helpers.steering import fill
from helpers.training import SPREAD, model_folder, same

import steer
from steer.final_norm import find_final_norm, through_final_norm
from steer.models import load_model

pytestmark = on_gpu

IDS = torch.arange(3, 60).view(3, 19)


@torch.no_grad()
def logits(model: Any, device: str) -> torch.Tensor:
    return model(IDS.to(device)).logits.float().cpu()


@pytest.mark.parametrize("kind", ["constant", "adaptive", "shared"])
def test_steered_logits_equal_those_of_the_cpu(build_tiny, kind: str) -> None:
    """float32 on both; 1e-4 covers the other order of summation."""
    found = []
    for device in ("cpu", DEVICE):
        model = build_tiny("llama").to(device)
        rank = {"rank": 2} if kind == "shared" else {}
        vectors = fill(steer.attach(model, steer.SteeringConfig(kind=kind, **rank)))
        assert all(p.device.type == device for p in vectors.parameters())
        found.append(logits(model, device))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_vectors_move_with_the_model_and_stay_in_float32(build_tiny) -> None:
    model = build_tiny("llama")
    vectors = fill(steer.attach(model))
    before = vectors.tensors()
    model.to(DEVICE, torch.bfloat16)
    assert all(p.device.type == DEVICE and p.dtype == torch.float32 for p in vectors.parameters())
    assert same(vectors.tensors(), before)
    model.to("cpu")
    assert same(vectors.tensors(), before)


@pytest.mark.parametrize(("written", "read"), [("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)])
def test_saved_on_one_device_and_loaded_on_another(
    build_tiny, tmp_path: Path, written: str, read: str
) -> None:
    model = build_tiny("llama", initializer_range=SPREAD).to(written)
    vectors = fill(steer.attach(model))
    vectors.save(tmp_path / "vectors")
    expected = logits(model, written)
    other = build_tiny("llama", initializer_range=SPREAD).to(read)
    loaded = steer.load(tmp_path / "vectors", other)
    assert all(p.device.type == read for p in loaded.parameters())
    assert same(loaded.tensors(), vectors.tensors())
    torch.testing.assert_close(logits(other, read), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device_map", ["auto", {"": DEVICE}])
def test_a_model_that_a_device_map_places(
    build_tiny, tiny_tokenizer, tmp_path: Path, device_map: Any
) -> None:
    plain = build_tiny("llama", initializer_range=SPREAD)
    folder = model_folder(tmp_path / "model", plain, tiny_tokenizer)
    fill(steer.attach(plain))
    placed = load_model(str(folder), device_map=device_map)
    vectors = fill(steer.attach(placed))
    assert {p.device.type for p in vectors.parameters()} == {DEVICE}
    torch.testing.assert_close(logits(placed, DEVICE), logits(plain, "cpu"), atol=1e-3, rtol=1e-3)


def test_layers_whose_weights_are_kept_off_the_gpu(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    """A map that leaves layers on the CPU: their weights come to the GPU for each pass."""
    plain = build_tiny("llama", initializer_range=SPREAD)
    folder = model_folder(tmp_path / "model", plain, tiny_tokenizer)
    fill(steer.attach(plain))
    where = {"model.embed_tokens": DEVICE, "model.layers.0": DEVICE, "model.layers.1": "cpu"}
    where |= {"model.layers.2": "cpu", "model.norm": DEVICE, "model.rotary_emb": DEVICE, "lm_head": DEVICE}
    placed = load_model(str(folder), device_map=where)
    fill(steer.attach(placed))
    torch.testing.assert_close(logits(placed, DEVICE), logits(plain, "cpu"), atol=1e-3, rtol=1e-3)


def test_the_gain_of_a_norm_that_accelerate_keeps_on_its_device(build_tiny) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    rows = torch.randn(2, 32)
    expected = through_final_norm(build_tiny("llama"), rows)
    model = build_tiny("llama").to(DEVICE)
    add_hook_to_module(find_final_norm(model), AlignDevicesHook(torch.device(DEVICE), io_same_device=True))
    torch.testing.assert_close(through_final_norm(model, rows), expected)

"""Vectors keep their precision when the model around them is cast, and follow it to another device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, tokens
from helpers.training import same
from torch import nn

import steer
from steer import SteeringConfig
from steer.config import KINDS

CASTS: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module]]] = {
    "to(bfloat16)": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    "to(device, bfloat16)": (torch.bfloat16, lambda model: model.to("cpu", torch.bfloat16)),
    "half": (torch.float16, lambda model: model.half()),
    "double": (torch.float64, lambda model: model.double()),
    "type": (torch.bfloat16, lambda model: model.type(torch.bfloat16)),
}


@pytest.mark.filterwarnings("ignore:.*other weights")  # the base in float16 is another one
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_the_model_leaves_the_vectors(
    build_tiny: Any, tmp_path: Path, kind: str, cast: str
) -> None:
    model = build_tiny("llama")
    vectors = fill(steer.attach(model, SteeringConfig(kind=kind, rank=2)))
    before, parameters = vectors.tensors(), vectors.parameters()
    dtype, act = CASTS[cast]
    act(model)
    assert model.get_input_embeddings().weight.dtype == dtype  # the base was cast
    assert all(p.dtype == torch.float32 for p in vectors.parameters())
    assert same(vectors.tensors(), before)
    assert all(a is b for a, b in zip(vectors.parameters(), parameters, strict=True))  # an optimizer's
    other = build_tiny("llama").to(dtype)
    loaded = steer.load(vectors.save(tmp_path / "vectors"), other)
    assert same(loaded.tensors(), before)
    assert torch.equal(logits(model, tokens()), logits(other, tokens()))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_precision_is_that_of_the_config(tiny_llama: Any, tmp_path: Path, dtype: str) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(dtype=dtype)))
    before = vectors.tensors()
    tiny_llama.half().float()
    assert same(vectors.tensors(), before)
    assert same(steer.read(vectors.save(tmp_path / "vectors")).tensors, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_after_a_cast_is_training_of_a_cast_base(build_tiny: Any, dtype: torch.dtype) -> None:
    """The gradient is in float32, and small updates are not rounded away."""
    found = []
    for cast_first in (True, False):
        model = build_tiny("llama")
        if cast_first:
            model.to(dtype)
        vectors = fill(steer.attach(model))
        if not cast_first:
            model.to(dtype)
        optimizer = torch.optim.SGD(vectors.parameters(), lr=1e-4)
        ids = tokens()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in vectors.parameters())
        optimizer.step()
        found.append(vectors.tensors())
    assert same(found[0], found[1])
    start = fill(steer.attach(build_tiny("llama"))).tensors()
    assert all((found[0][name] != start[name]).any() for name in start)


def test_gradients_keep_their_precision_too(tiny_llama: Any) -> None:
    vectors = fill(steer.attach(tiny_llama))
    ids = tokens()
    tiny_llama(input_ids=ids, labels=ids).loss.backward()
    before = [p.grad.clone() for p in vectors.parameters()]
    tiny_llama.to(torch.bfloat16)
    for parameter, grad in zip(vectors.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad) and parameter.grad.dtype == torch.float32


def test_vectors_follow_the_model_to_another_device(tiny_llama: Any) -> None:
    vectors = steer.attach(tiny_llama, SteeringConfig(kind="adaptive"))
    tiny_llama.to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in vectors.parameters()} == {("meta", torch.float32)}

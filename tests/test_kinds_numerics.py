"""Logits and gradients of adaptive and shared vectors, against second implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.kinds import DOWN, attach, values
from helpers.steering import fill, layers_of, logits, relative, tokens
from torch import nn
from transformers import PreTrainedModel

import steer
from steer import SteeringConfig


@pytest.fixture(params=list(DOWN))
def dense(request: pytest.FixtureRequest, build_tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Every architecture without experts in turn: 3 layers, hidden size 32."""
    return build_tiny(request.param)


@pytest.fixture(params=["adaptive", "shared"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adaptive_equals_a_lora_of_rank_one_in_logits_and_gradients(dense):
    from peft import LoraConfig, get_peft_model

    model, ids = dense.double(), tokens(4, 16)
    target = DOWN[model.config.model_type][0]
    settings = LoraConfig(r=1, lora_alpha=-1.5, target_modules=rf".*{target}", lora_dropout=0.0)
    theirs = get_peft_model(copy.deepcopy(model), settings)
    vectors = fill(attach(model, "adaptive", dtype="float64", scale=-1.5))
    loras: list[list[nn.Parameter]] = [
        [p for name, p in theirs.named_parameters() if f"lora_{part}" in name] for part in "AB"
    ]
    for ours, lora in zip(values(vectors), loras, strict=True):
        for parameter, matrix in zip(ours, lora, strict=True):
            matrix.data = parameter.detach().clone().reshape(matrix.shape)
    a, b = model(ids, labels=ids), theirs(ids, labels=ids)
    with vectors.disabled():
        assert relative(logits(model, ids), b.logits.detach()) > 1e-2  # the effect is large
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-12)
    a.loss.backward()
    b.loss.backward()
    for ours, lora in zip(values(vectors), loras, strict=True):
        for parameter, matrix in zip(ours, lora, strict=True):
            assert relative(parameter.grad, matrix.grad.flatten()) < 1e-10


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        *((model_type, {}) for model_type in DOWN),
        # other matrices of the MLP are as wide as the stream, too: the last one is meant
        *(
            ("llama", {"intermediate_size": 32}),
            ("phi3", {"intermediate_size": 16}),
            ("gpt2", {"n_inner": 32}),
        ),
    ],
)
def test_adaptive_equals_replaced_forward_methods(build_tiny, model_type, sizes):
    model = build_tiny(model_type, **sizes)
    vectors = fill(attach(model, "adaptive"))
    steered, by_layer = logits(model, tokens()), [[p.detach().clone() for p in x] for x in values(vectors)]
    steer.detach(model)
    replace_forwards(model, *by_layer)
    # float32, and sums in another order
    torch.testing.assert_close(steered, logits(model, tokens()), rtol=1e-5, atol=1e-5)


def replace_forwards(
    model: PreTrainedModel, readouts: list[torch.Tensor], vectors: list[torch.Tensor]
) -> None:
    """x W^T + (x . readout) vector in every layer, as a method written here: no hooks, no PEFT."""
    for block, readout, vector in zip(layers_of(model), readouts, vectors, strict=True):
        down = block.get_submodule(DOWN[model.config.model_type][0])

        def forward(x: torch.Tensor, run=down.forward, readout=readout, vector=vector) -> Any:
            return run(x) + (x * readout).sum(-1, keepdim=True) * vector

        down.forward = forward


@pytest.mark.parametrize("site", ["resid_post", "attn_out", "resid_pre"])
def test_shared_equals_constant_vectors_in_logits_and_gradients(dense, site):
    """A (layers x rank) times B (rank x width), and the chain rule: dA = dV B^T, dB = A^T dV."""
    model, ids = dense.double(), tokens(4, 16)
    vectors = fill(attach(model, "shared", dtype="float64", site=site, scale=0.5))
    ours = model(ids, labels=ids)
    ours.loss.backward()
    mixes, (directions,) = values(vectors)
    mix, gradient = torch.stack([p.detach() for p in mixes]), torch.stack([p.grad for p in mixes])
    shared, shared_gradient = directions.detach(), directions.grad
    steer.detach(model)
    constant = steer.attach(model, SteeringConfig(dtype="float64", site=site, scale=0.5))
    constant.set_tensors(dict(zip(constant.named_parameters(), mix @ shared, strict=True)))
    theirs = model(ids, labels=ids)
    theirs.loss.backward()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-12)
    of_vectors = torch.stack([p.grad for p in constant.parameters()])
    assert relative(gradient, of_vectors @ shared.T) < 1e-10
    assert relative(shared_gradient, mix.T @ of_vectors) < 1e-10


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(dense, kind, reentrant):
    dense.train()
    vectors = fill(attach(dense, kind))

    def gradients() -> list[torch.Tensor]:
        dense.zero_grad()
        dense(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return [p.grad.clone() for p in vectors.parameters()]

    plain = gradients()
    assert all(gradient.any() for gradient in plain)
    dense.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for saved, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-8)


def test_half_precision_bases_keep_float32_vectors(dense, kind):
    ids, dense = tokens(), dense.bfloat16()
    base, vectors = logits(dense, ids), attach(dense, kind)
    assert torch.equal(logits(dense, ids), base)
    fill(vectors)
    out = dense(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16 and not torch.equal(out.logits, base)
    out.loss.backward()
    assert {p.dtype for p in vectors.parameters()} == {p.grad.dtype for p in vectors.parameters()}
    assert all(p.dtype == torch.float32 and p.grad.any() for p in vectors.parameters())

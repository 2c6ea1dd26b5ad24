"""MLPs computed again in the backward pass: the same gradient, and less that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import steer
from steer import SteeringConfig
from steer.generation.recompute import mlps, recomputed
from steer.training.memory import saved_bytes

ARCHITECTURES = ["llama", "qwen2", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox", "mixtral"]


def gradients(model: PreTrainedModel, modules: list[Any]) -> tuple[list[torch.Tensor], int]:
    """Of the vectors, and the bytes that were saved for them."""
    vectors = model.__dict__["steering_vectors"]
    ids = torch.arange(60, device=model.device).view(2, 30) % 90 + 3
    with saved_bytes(model) as found, recomputed(modules):
        logits = model(ids, use_cache=False).logits
    parameters = list(vectors.parameters())
    loss = torch.log_softmax(logits.double(), -1)[..., 5].sum()
    return list(torch.autograd.grad(loss, parameters)), sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_same_bit_for_bit(architecture: str, dtype: torch.dtype, build_tiny) -> None:
    if architecture == "mixtral" and dtype == torch.float64:
        pytest.skip("torch's grouped products of experts take no float64")
    model = build_tiny(architecture).to(dtype)
    steer.attach(model)
    modules = mlps(model)
    assert len(modules) == model.config.num_hidden_layers
    plain, kept = gradients(model, [])
    again, less = gradients(model, modules)
    assert all(t.abs().max() > 0 for t in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert less < kept


def test_dropout_and_autocast_are_as_in_the_first_pass(build_tiny) -> None:
    model = build_tiny("gpt2", resid_pdrop=0.5)
    steer.attach(model)
    model.train()
    found = []
    for modules in ([], mlps(model)):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, modules)[0])
        found[-1].append(torch.rand(4))  # what is drawn next
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(gradients(model, [])[0][0], found[0][0])


def test_the_modules_are_as_before_also_where_a_forward_was_replaced(tiny_llama: PreTrainedModel) -> None:
    first, *others = mlps(tiny_llama)
    own = first.forward
    first.__dict__["forward"] = own
    with recomputed([first, *others]):
        assert first.__dict__["forward"] is not own
    assert first.__dict__["forward"] is own
    assert all("forward" not in module.__dict__ for module in others)


def test_an_mlp_with_a_vector_inside_is_left_as_it_is(tiny_llama: PreTrainedModel) -> None:
    count = tiny_llama.config.num_hidden_layers
    steer.attach(tiny_llama, SteeringConfig(kind="adaptive", layers="0"))
    assert len(mlps(tiny_llama)) == count - 1


def test_a_module_that_is_given_a_state_runs_once(tiny_llama: PreTrainedModel) -> None:
    calls: list[int] = []

    class Counts(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, state: list[int] | None = None) -> torch.Tensor:
            calls.append(1)
            return hidden.exp().exp()

    module, hidden = Counts(), torch.zeros(2, requires_grad=True)
    for given, expected in (([], 1), (None, 2)):
        calls.clear()
        with recomputed([module]):
            out = module(hidden, given)
        out.sum().backward()
        assert len(calls) == expected

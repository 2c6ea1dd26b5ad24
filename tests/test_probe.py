"""Attaching measures that a vector at a site does what the site says, and leaves no trace in the model."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.steering import layers_of, message
from torch import nn
from transformers import PreTrainedModel

import steer
from evals.architectures import tiny
from steer import SteerError, SteeringConfig
from steer.artifact import from_vectors
from steer.probe import out_of_reach
from steer.sites import find_decoder, find_sites
from steer.vector_sets import Population

# What is wrong with a site that looks like any other by the names of its modules.
FAULTS = {
    ("granite", "resid_mid"): "by 0.5 s",  # the branch is multiplied before it is added
    ("falcon_h1", "resid_mid"): "by 0.5 s",
    ("minicpm3", "resid_mid"): "by 0.7 s",
    ("minimax", "resid_mid"): "by 0.5 s",
    ("hyperclovax", "resid_mid"): "by 0.5 s",
    ("gemma3n_text", "resid_mid"): "by 0.707 s",  # (h + attention + another branch) / sqrt(2)
    ("cpmant", "resid_post"): "shape (2, 35, 32)",  # a prompt of its own before the tokens
    ("xlnet", "resid_post"): "shape (3, 2, 32)",  # tokens before rows
    ("llama4_text", "mlp_out"): "shape (6, 32)",
    ("longcat_flash", "attn_out"): "ModuleList is never called",
    ("mllama", "resid_post"): "never called in a forward pass over text",  # a layer for images alone
}


@pytest.mark.parametrize(("model_type", "site"), FAULTS)
def test_a_site_that_does_something_else_is_refused(model_type: str, site: str) -> None:
    model = tiny(model_type)
    before = trace(model)
    with pytest.raises(SteerError) as error:
        steer.attach(model, SteeringConfig(site=site))
    assert FAULTS[model_type, site] in message(error)
    assert trace(model) == before
    config = SteeringConfig(layers=0)
    vectors = {
        i: torch.ones(find_decoder(model).hidden_size) for i in range(find_decoder(model).num_hidden_layers)
    }
    with pytest.raises(SteerError):
        steer.load(from_vectors(vectors, model, site=site), model)
    with pytest.raises(SteerError):
        Population(model).add("one", SteeringConfig(site=site))
    working = str(error.value).rpartition("sites that work in this layer: ")[2].partition(";")[0]
    if "no other site works" not in str(error.value):  # what it recommends is taken
        for other in working.split(", "):
            steer.attach(model, SteeringConfig(layers=config.layers, site=other))
            steer.detach(model)


def test_the_layers_that_work_are_named() -> None:
    model = tiny("mllama")
    with pytest.raises(SteerError, match="layers of this model that work: 0, 2, 3"):
        steer.attach(model)
    steer.attach(model, SteeringConfig(layers="0,2-3"))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid", "openai-gpt", "gemma4_text"])
def test_layers_of_several_kinds(model_type: str) -> None:
    """Where layers differ each one's own module is found: moving its output by hand gives the same logits."""
    model = tiny(model_type)
    ids = torch.tensor([[5, 6, 7, 8]])
    vectors = steer.attach(model, SteeringConfig(layers="0,3", site="resid_mid"))
    base = model(ids).logits
    for p in vectors.parameters():
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    steered = model(ids).logits
    values = list(vectors.tensors().values())
    steer.detach(model)
    assert (steered - base).abs().max() > 1e-2
    decoder = find_decoder(model)
    for index, value in zip((0, 3), values, strict=True):
        site = find_sites(decoder, [index], "resid_mid")[0].module
        original = site.forward

        def forward(*args, original=original, value=value, **kwargs):
            out = original(*args, **kwargs)
            return out + value if isinstance(out, torch.Tensor) else type(out)([out[0] + value, *out[1:]])

        site.forward = forward
    torch.testing.assert_close(model(ids).logits, steered, rtol=1e-5, atol=1e-5)


def trace(model: nn.Module) -> tuple:
    """All that attaching may not change: random state, modes, hooks, gradients, values."""
    modules = list(model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules]
    flags = [(n, p.requires_grad, p.grad is None, p.sum().item()) for n, p in model.named_parameters()]
    return torch.get_rng_state().tolist(), hooks, flags, sorted(n for n, _ in model.named_buffers())


def test_attaching_and_detaching_leaves_no_trace(tiny_model: PreTrainedModel) -> None:
    tiny_model.train()
    tiny_model.lm_head.eval() if hasattr(tiny_model, "lm_head") else None
    next(tiny_model.parameters()).requires_grad_(False)
    before = trace(tiny_model)
    for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        try:
            steer.attach(tiny_model, SteeringConfig(site=site))
        except SteerError as error:
            assert "in parallel" in str(error)
            continue
        assert torch.get_rng_state().tolist() == before[0]
        assert all(not p.any() for n, p in tiny_model.named_parameters() if "steering" in n)
        steer.detach(tiny_model)
        assert trace(tiny_model) == before


def test_dropout_does_not_disturb_the_measurement(build_tiny) -> None:
    noisy = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)
    model = build_tiny("gpt2", **noisy).train()
    model.gradient_checkpointing_enable()
    before = torch.get_rng_state()
    for site in ("resid_mid", "resid_post", "attn_out"):
        steer.attach(model, SteeringConfig(site=site))
        steer.detach(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(tiny_model: PreTrainedModel, dtype: torch.dtype) -> None:
    model = tiny_model.to(dtype)
    for site in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
        steer.attach(model, SteeringConfig(site=site))
        steer.detach(model)


def test_a_factor_of_a_bfloat16_model_is_seen() -> None:
    model = tiny("granite").to(torch.bfloat16)
    with pytest.raises(SteerError, match=r"by 0\.5 s"):
        steer.attach(model, SteeringConfig(site="resid_mid"))


@pytest.mark.parametrize("layers", ["0", "1", "all"])
def test_a_module_that_several_layers_share_is_refused(tiny_llama, layers) -> None:
    blocks = layers_of(tiny_llama)
    blocks[1].mlp = blocks[0].mlp
    with pytest.raises(SteerError, match="more than once"):
        steer.attach(tiny_llama, SteeringConfig(layers=layers, site="mlp_out"))
    steer.attach(tiny_llama, SteeringConfig(layers=layers))  # the layers themselves are not shared


def test_where_weights_are_not_at_hand_the_log_says_so(caplog) -> None:
    model = tiny("granite").to("meta")
    assert out_of_reach(model)
    with caplog.at_level(logging.WARNING, logger="steer.probe"):
        steer.attach(model)
    assert caplog.text.count("not checked on this model") == 1


def test_a_model_that_overflows_is_not_judged(tiny_llama, caplog) -> None:
    with torch.no_grad():
        layers_of(tiny_llama)[1].mlp.down_proj.weight.fill_(torch.inf)
    with caplog.at_level(logging.WARNING, logger="steer.probe"):
        steer.attach(tiny_llama)
    assert "not finite" in caplog.text


def test_a_model_that_is_no_single_decoder_is_refused() -> None:
    for model_type, reason in (("blt", "no single stack"), ("hrm_text", "no single stack")):
        with pytest.raises(SteerError, match=reason) as error:
            steer.attach(tiny(model_type))
        message(error)

"""Every row of the table of last matrices, against running models: a bias there is the site's vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, message, tokens
from helpers.vision import tiny_vision
from transformers import PreTrainedModel

import steer
from evals.architectures import tiny
from steer import SteerError, SteeringConfig
from steer.artifact import Artifact
from steer.export import gguf, lm_eval
from steer.export.architecture import LAYERS, SEVERAL_STREAMS, bias_place, check_same_logits, layer_names
from steer.sites import find_decoder, find_streams

VISION = {f"{name}_text": name for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
WHOLE = {"emu3_text_model": "emu3"}  # types of text models that transformers makes as part of another


# The first type of each row of the table, and those whose models are made in another way.
FIRST = {layer: name for name, layer in reversed(LAYERS.items())}
FEW = {*FIRST.values(), *VISION, *WHOLE}


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    if model_type in VISION:
        return tiny_vision(VISION[model_type])
    model = tiny(WHOLE.get(model_type, model_type), **changes)
    assert model.config.get_text_config().model_type == model_type
    return model


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW)) for name in LAYERS]
)
def test_a_bias_on_the_named_matrix_is_the_vector_of_the_site(model_type):
    model, ids = build(model_type), tokens()
    base = logits(model, ids)
    for site, place in LAYERS[model_type].sites().items():
        vectors = fill(steer.attach(model, SteeringConfig(site=site, layers="0,last")))
        values, decoder = vectors.effective(), next(iter(vectors.tensors())).split(".0.")[0]
        steered = logits(model, ids)
        steer.detach(model)
        hooks = [
            model.get_submodule(f"{decoder}.{layer}.{place}").register_forward_hook(
                lambda module, args, output, value=value: output + value
            )
            for layer, value in values.items()
        ]
        biased = logits(model, ids)
        for hook in hooks:
            hook.remove()
        # one float32 addition is done in another order
        assert (biased - steered).norm() < 1e-4 * (steered - base).norm(), site
        assert (steered - base).abs().max() > 1e-2, site


@pytest.mark.parametrize("model_type", [n for n, layer in LAYERS.items() if layer.mlp and not layer.stream])
def test_where_the_table_says_no_the_bias_is_another_vector(model_type):
    model, ids = build(model_type), tokens()
    vectors = fill(steer.attach(model, SteeringConfig(layers=0)))
    steered, (value,) = logits(model, ids), vectors.effective().values()
    steer.detach(model)
    down = find_decoder(model).layers[0].get_submodule(LAYERS[model_type].mlp or "")
    down.register_forward_hook(lambda module, args, output: output + value)
    assert (logits(model, ids) - steered).abs().max() > 1e-3


def test_adaptive_vectors_stand_at_the_down_projection():
    for model_type in ("llama", "gpt2", "gpt_neox", "gemma2"):
        vectors = steer.attach(build(model_type), SteeringConfig(kind="adaptive", layers=1))
        decoder, place = vectors.layers[0], bias_place(vectors.config, "x")
        (hooked,) = [n for n, m in vectors.model.named_modules() if m._forward_hooks and n.endswith(place)]
        assert f".{decoder}." in hooked


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma2"}, ["resid_post", "gemma2", "attn_out, mlp_out"]),
        ({"model_type": "gpt_neox", "site": "resid_mid"}, ["resid_mid", "resid_post"]),
        ({"model_type": "llama", "site": "resid_pre"}, ["resid_pre", "resid_post"]),
        ({"model_type": "llama", "positions": "completion"}, ["completion", "positions='all'"]),
        ({"model_type": "mixtral"}, ["mixtral", "mixture of experts", "resid_mid, attn_out"]),
        ({"model_type": "granitemoe", "site": "mlp_out"}, ["mixture of experts", "attn_out"]),
        ({"model_type": "granite", "site": "resid_mid"}, ["unchanged", "attn_out, mlp_out"]),
        ({"model_type": "opt"}, ["'opt'", "steer.load"]),
        ({}, ["None"]),
    ],
)
def test_vectors_that_are_no_bias_are_refused(config, words):
    with pytest.raises(SteerError) as error:
        bias_place(SteeringConfig(**config), "the format")
    assert all(word in message(error) for word in words)


def test_an_unknown_type_is_refused():
    with pytest.raises(SteerError, match="rwkv"):
        layer_names("rwkv")


# Settings of a type with which the block would scale or normalise what the bias adds: left out of the table.
@pytest.mark.parametrize("model_type", ["opt", "falcon_h1", "bitnet", "openai-gpt", "trocr", "rwkv"])
def test_types_whose_configs_differ_are_not_in_the_table(model_type):
    assert model_type not in LAYERS


def test_an_opt_with_norms_behind_is_why():
    model = tiny("opt", do_layer_norm_before=False)
    vectors = fill(steer.attach(model, SteeringConfig(layers=0)))
    steered, (value,) = logits(model, tokens()), vectors.effective().values()
    steer.detach(model)
    model.model.decoder.layers[0].fc2.register_forward_hook(lambda module, args, output: output + value)
    assert (logits(model, tokens()) - steered).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_differ_are_refused(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(16, 97, generator=generator)
    steered = base + torch.randn(16, 97, generator=generator)
    check_same_logits(steered.to(dtype), steered.to(dtype), base.to(dtype), "x")
    check_same_logits(base.to(dtype), base.to(dtype), base.to(dtype), "x")
    half = base + 0.5 * (steered - base)
    with pytest.raises(SteerError, match=r"would not compute what the steered model does.* by 0\.5 of what"):
        check_same_logits(half.to(dtype), steered.to(dtype), base.to(dtype), "x")


@pytest.mark.parametrize("model_type", [*SEVERAL_STREAMS, "gemma4_text", "llama"])
def test_models_of_several_streams_are_not_written_for_tools_that_may_steer_one(model_type, tmp_path):
    model = tiny(model_type)
    several = find_streams(find_decoder(model)) is not None
    assert several == (model_type in SEVERAL_STREAMS)
    vectors = fill(steer.attach(model))
    made = Artifact(vectors.config, vectors.tensors())
    for write in (
        lambda: gguf.write(made, tmp_path / "v.gguf", block_0="keep"),
        lambda: lm_eval.write(made, tmp_path / "v.pt"),
    ):
        if not several:
            write()
            continue
        with pytest.raises(SteerError, match="several residual streams") as error:
            write()
        message(error)

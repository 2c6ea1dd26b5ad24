"""Every row of the table of last matrices, against running models: a bias there is the site's vector."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, SHAPE, TOKENS
from helpers.steering import fill, logits, message, tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import steer
from steer import SteerError, SteeringConfig
from steer.export.architecture import LAYERS, bias_place, layer_names

SHAPES = {
    **ARCHITECTURES,
    **{name: SHAPE for name in ("olmo", "olmo3", "smollm3", "starcoder2", "cohere", "phi")},
    **{name: {**SHAPE, "head_dim": 8} for name in ("gemma", "seed_oss", "glm4", "exaone4", "ministral")},
    "granite": {**SHAPE, "residual_multiplier": 0.5},
}


def build(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SHAPES[model_type], **TOKENS)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", LAYERS)
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
        # one float32 addition is done in another order; logits are about one
        assert (biased - steered).abs().max() < 1e-6, site
        assert (steered - base).abs().max() > 1e-2, site


@pytest.mark.parametrize("model_type", [name for name, layer in LAYERS.items() if not layer.stream])
def test_where_the_table_says_no_the_bias_is_another_vector(model_type):
    model, ids = build(model_type), tokens()
    vectors = fill(steer.attach(model, SteeringConfig(layers=0)))
    steered, (value,) = logits(model, ids), vectors.effective().values()
    steer.detach(model)
    down = model.get_submodule(f"model.layers.0.{LAYERS[model_type].mlp}")
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
        ({"model_type": "mixtral"}, ["mixtral", "llama"]),
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

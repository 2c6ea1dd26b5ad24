"""Tiny models of every architecture: which there are, and that they are worth testing on."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from evals.architectures import LAYERS, VOCABULARY, causal_lm_types, tiny

REPRESENTATIVES = [
    "llama",
    "gemma2",
    "gpt2",
    "falcon",
    "bloom",
    "mamba",
    "rwkv",
    "qwen3_5",
    "deepseek_v3",
    "gpt_oss",
]


def test_encoders_and_encoder_decoders_are_left_out():
    types = causal_lm_types()
    assert set(types) < set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {"llama", "gemma3", "gemma3_text", "mamba", "qwen3_5_text", "bloom", "opt"} <= set(types)
    assert not {"bert", "roberta", "bart", "t5", "whisper", "musicgen", "prophetnet"} & set(types)
    assert not {"gpt-sw3"} & set(types)  # GPT-2 under a second name


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_tiny_models_tell_tokens_apart(model_type):
    model = tiny(model_type)
    assert model.config.get_text_config().num_hidden_layers == LAYERS
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 200_000
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
        again = tiny(model_type)(ids).logits
        other = tiny(model_type, seed=1)(ids).logits
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, other)
    assert logits.std() > 0.1
    assert len(set(logits.argmax(-1).flatten().tolist())) > 3


def test_every_kind_of_layer_is_there():
    kinds = {
        name: set(tiny(name).config.layer_types) for name in ("gemma3_text", "qwen3_next", "deepseek_v4")
    }
    assert kinds["gemma3_text"] == {"sliding_attention", "full_attention"}
    assert kinds["qwen3_next"] == {"linear_attention", "full_attention"}
    assert len(kinds["deepseek_v4"]) == 2


def test_changes_are_set_under_either_name():
    assert tiny("gpt2", num_hidden_layers=2).config.n_layer == 2
    assert tiny("gpt2", n_embd=64).config.hidden_size == 64
    assert len(tiny("gemma3_text", num_hidden_layers=3).config.layer_types) == 3

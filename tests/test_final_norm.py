"""The gain of the final norm, against what the norm does to the model's own stream, on every kind of norm."""

from __future__ import annotations

import pytest
import torch

import steer
from evals.architectures import tiny
from steer.final_norm import find_final_norm, through_final_norm
from steer.lens.logit_lens import logit_lens
from steer.sae.config import SAEConfig
from steer.sae.features import logit_effects
from steer.sae.model import SAE
from steer.sites import find_decoder

NORMS = {
    **dict.fromkeys(("llama", "olmo2", "gpt_oss", "gemma3n_text", "gemma4_text", "falcon_h1"), False),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "vaultgemma", "qwen3_next"), False),  # 1 + weight
    **dict.fromkeys(("gpt2", "bloom", "mpt", "opt", "cohere", "stablelm", "nemotron", "olmo", "rwkv"), True),
}


@torch.no_grad()
@pytest.mark.parametrize("model_type", NORMS)
def test_the_gain_is_what_the_norm_multiplies_with(model_type: str) -> None:
    """From the norm's own output y(x) = gain * x / |x| + bias, of which y(x) - y(-x) = 2 gain * x / |x|."""
    model = tiny(model_type)
    width = find_decoder(model).hidden_size
    seen: list[torch.Tensor] = []
    norm = find_final_norm(model)
    assert norm is not None
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    hidden = find_decoder(model).backbone(torch.tensor([[4, 5, 6]]), use_cache=False)[0]
    handle.remove()
    x = seen[-1][0, -1].double()
    assert torch.equal(norm(seen[-1]), hidden)  # nothing comes after it
    y = (norm(seen[-1]) - norm(-seen[-1]))[0, -1].double() / 2
    centred = x - x.mean() if NORMS[model_type] else x
    expected = y * centred.square().mean().sqrt()
    found = through_final_norm(model, x[None].float())[0].double()
    # The norm's epsilon is beside the stream's mean square; float32 rounds the rest.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4 * float(x.norm()) / width)
    assert torch.equal(find_decoder(model).backbone(torch.tensor([[4, 5, 6]]), use_cache=False)[0], hidden)


def test_vectors_that_must_know_where_the_prompt_ends() -> None:
    model = tiny("llama")
    steer.attach(model, steer.SteeringConfig(positions="completion"))
    assert find_final_norm(model) is model.model.norm


def test_both_readings_of_a_vector_use_the_same_gain(tiny_tokenizer) -> None:
    """A vector of the lens and a feature of a sparse autoencoder raise the same tokens."""
    model = tiny("gemma3n_text")
    sae = SAE(SAEConfig(d_in=32, d_sae=4, k=2))
    feature = sae.W_dec[1].detach()
    lens = logit_lens(model, tiny_tokenizer, {0: feature}, top=97)
    up, _ = logit_effects(sae, model, tiny_tokenizer, [1], words=5)
    by_hand = (
        feature * model.model.norm.weight
    ) @ model.lm_head.weight.T  # it multiplies by the weight alone
    assert lens.top[0, :5].tolist() == by_hand.topk(5).indices.tolist()
    assert up == [[tiny_tokenizer.decode([i]) for i in by_hand.topk(5).indices.tolist()]]

"""Positions under every way of `generate()`: assisted, looked up, in chunks, on an earlier turn's cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.steering import SOME, fill, logits, message, tokens
from transformers import DynamicCache, GenerationConfig

import steer
from evals.architectures import tiny
from steer import SteerError, SteeringConfig
from steer.vector_sets import Population

# Text that repeats itself, so that a lookup finds candidates; five tokens of it are drafted.
PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]])


@torch.no_grad()
def generated(
    model: Any, ids: torch.Tensor = PROMPT, mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The scores of eight greedy tokens: (tokens, vocabulary)."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.cat(out.logits)[: out.sequences.shape[1] - ids.shape[1]]


@pytest.mark.parametrize("positions", SOME)
@pytest.mark.parametrize("way", ["lookup", "assisted", "chunks", "last token", "embeddings", "no cache"])
def test_every_way_of_generating_steers_the_same_tokens(build_tiny, positions: str, way: str) -> None:
    model = build_tiny("llama")
    fill(steer.attach(model, SteeringConfig(positions=positions)))
    expected = generated(model)
    options: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "assisted": {"assistant_model": build_tiny("llama", seed=1)},
        "chunks": {"prefill_chunk_size": 4},
        "last token": {"prefill_chunk_size": 8},  # what remains of the prompt looks like decoding
        "embeddings": {"inputs_embeds": model.get_input_embeddings()(PROMPT)},
        "no cache": {"use_cache": False},
    }[way]
    torch.testing.assert_close(generated(model, **options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", SOME)
def test_a_second_turn_on_the_cache_of_the_first(tiny_llama, positions: str) -> None:
    fill(steer.attach(tiny_llama, SteeringConfig(positions=positions)))
    vectors = steer.vectors.attached(tiny_llama)
    cache = DynamicCache()
    with vectors.prompt_length(len(PROMPT[0])):  # the first turn reads the same tokens as prompt
        logits(tiny_llama, PROMPT[:, :-1], past_key_values=cache)
    torch.testing.assert_close(
        generated(tiny_llama, past_key_values=cache), generated(tiny_llama), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("positions", SOME)
def test_a_second_turn_by_its_new_tokens_alone(tiny_llama, positions: str) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions=positions)))
    cache = DynamicCache()
    with vectors.prompt_length(len(PROMPT[0])):
        logits(tiny_llama, PROMPT[:, :4], past_key_values=cache)
    new = generated(tiny_llama, PROMPT[:, 4:], torch.ones_like(PROMPT), past_key_values=cache)
    torch.testing.assert_close(new, generated(tiny_llama), rtol=1e-4, atol=1e-5)


def test_copies_and_populations_tell_too(tiny_llama) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")))
    expected = generated(tiny_llama)
    copied = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for p in vectors.parameters():
            p.zero_()
    torch.testing.assert_close(generated(copied, prefill_chunk_size=4), expected, rtol=1e-4, atol=1e-5)
    assert (generated(tiny_llama) - expected).abs().max() > 1e-3
    steer.detach(tiny_llama)
    assert "generate" not in tiny_llama.__dict__
    population = Population(tiny_llama)
    for name in ("one", "two"):
        fill(population.add(name, SteeringConfig(positions="completion")))
    with population.only("two"):
        torch.testing.assert_close(
            generated(tiny_llama, prefill_chunk_size=4), expected, rtol=1e-4, atol=1e-5
        )
    population.remove_all()
    assert "generate" not in tiny_llama.__dict__


def test_sets_count_the_tokens_of_recurrent_states_each_for_itself() -> None:
    model = tiny("mamba2")
    population = Population(model)
    sets = [population.add(name, SteeringConfig(positions="first_completion")) for name in ("one", "two")]
    cache = DynamicCache(config=model.config)
    with population.prompt_length(4):
        logits(model, PROMPT[:, :4], cache_params=cache)
        copied = copy.copy(cache)
        for of in (cache, copied):  # what the one counts is nothing to the other
            for column in (4, 5):
                logits(model, PROMPT[:, column : column + 1], cache_params=of)
                assert [vectors._state.mask.item() for vectors in sets] == [column == 4] * 2


def test_passes_with_the_vectors_off_count_too() -> None:
    model = tiny("mamba2")
    vectors = steer.attach(model, SteeringConfig(positions="first_completion"))
    cache = DynamicCache(config=model.config)
    with vectors.prompt_length(5):
        logits(model, PROMPT[:, :4], cache_params=cache)
        with vectors.disabled():
            logits(model, PROMPT[:, 4:5], cache_params=cache)
        logits(model, PROMPT[:, 5:6], cache_params=cache)
        assert vectors._state.mask.item()


def test_what_a_caller_tells_comes_first(tiny_llama) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")))
    with vectors.prompt_length(4):
        early = generated(tiny_llama)
    assert (early - generated(tiny_llama)).abs().max() > 1e-3


@pytest.mark.parametrize("positions", SOME)
def test_several_tokens_after_the_first_pass_are_ambiguous(tiny_llama, positions: str) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions=positions)))
    ids, cache = tokens(1, 9), DynamicCache()
    logits(tiny_llama, ids[:, :4], past_key_values=cache)
    with pytest.raises(SteerError, match="prompt_length") as error:
        logits(tiny_llama, ids[:, 4:8], past_key_values=cache)
    assert "adds 4 tokens to a cache of 4" in message(error)
    cache = DynamicCache()
    logits(tiny_llama, ids[:, :4], past_key_values=cache)
    cache.crop(3 - cache.get_seq_length())  # what assisted decoding does with rejected drafts
    with pytest.raises(SteerError, match="prompt_length"):
        logits(tiny_llama, ids[:, 3:4], past_key_values=cache)
    with vectors.prompt_length(4):
        logits(tiny_llama, ids[:, 4:8], past_key_values=cache)


def test_a_guided_prompt_has_a_length_of_its_own(tiny_llama) -> None:
    fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")))
    with pytest.raises(SteerError, match="guidance_scale"):
        generated(tiny_llama, guidance_scale=1.5)
    with pytest.raises(SteerError, match="guidance_scale"):
        tiny_llama.generate(tokens(), GenerationConfig(guidance_scale=1.5, max_new_tokens=1))
    tiny_llama.generation_config.guidance_scale = 1.5
    with pytest.raises(SteerError, match="guidance_scale"):
        generated(tiny_llama)


def test_a_state_that_does_not_count_tokens_is_refused() -> None:
    model = tiny("rwkv")
    vectors = fill(steer.attach(model, SteeringConfig(positions="completion")))
    with pytest.raises(SteerError, match="does not say how many tokens"):
        generated(model)
    with vectors.prompt_length(4):
        logits(model, PROMPT)  # one pass over everything needs no state

"""Which tokens are steered: compiled, generating, with caches and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.steering import FEW, SOME, fill, logits, message, tokens
from transformers import PreTrainedModel

import steer
from steer import Artifact, SteerError, SteeringConfig, SteeringVectors
from steer.config import POSITIONS
from steer.mixture import Mixer, mixed
from steer.vector_sets import Population

# --- compile, generate, positions


@pytest.fixture
def compiled(build_tiny):
    """A two-layer model and itself compiled into one graph; dynamo forgets it afterwards."""
    model = build_tiny("llama", num_hidden_layers=2)
    torch._dynamo.reset()
    yield model, torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


def test_compiled_equals_eager(compiled):
    model, fast = compiled
    ids = tokens()
    base = logits(model, ids, use_cache=False)
    vectors = fill(steer.attach(model))
    seen = [base]
    for change in (
        lambda: fill(vectors, seed=11),  # new values reach the compiled graph in place
        lambda: setattr(vectors, "scale", -0.5),
    ):
        change()
        seen.append(logits(fast, ids, use_cache=False))
        torch.testing.assert_close(seen[-1], logits(model, ids, use_cache=False))
        assert (seen[-1] - seen[-2]).abs().max() > 1e-3
    with vectors.disabled():
        torch.testing.assert_close(logits(fast, ids, use_cache=False), base)


def test_a_model_that_was_compiled_before_is_steered(compiled):
    model, fast = compiled
    ids = tokens()
    base = logits(fast, ids, use_cache=False)
    vectors = fill(steer.attach(model))
    saved = Artifact(vectors.config, vectors.tensors())
    steered = logits(model, ids, use_cache=False)
    assert (steered - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(fast, ids, use_cache=False), steered)
    steer.detach(model)
    torch.testing.assert_close(logits(fast, ids, use_cache=False), base)
    with mixed(model, {"one": saved}):
        torch.testing.assert_close(logits(fast, ids, use_cache=False), steered)
    torch.testing.assert_close(logits(fast, ids, use_cache=False), base)


def test_sets_in_a_model_that_was_compiled_before(compiled, monkeypatch):
    model, fast = compiled
    vectors = steer.attach(model)
    saved = Artifact(vectors.config, vectors.tensors())
    steer.detach(model)
    logits(fast, tokens(), use_cache=False)
    resets: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    population = Population(model)
    population.add("one", SteeringConfig())
    assert len(resets) == 1
    population.remove_all()
    assert len(resets) == 2
    Mixer(model).add("one", saved)
    assert len(resets) == 3


def test_compiled_gradients_and_positions_equal_eager(compiled):
    ids = tokens()
    vectors = fill(steer.attach(compiled[0], SteeringConfig(positions="completion")))
    grads = []
    with vectors.prompt_length(5):
        for call in compiled:
            call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            grads.append([p.grad for p in vectors.parameters()])
            compiled[0].zero_grad()
    for a, b in zip(*grads, strict=True):
        assert a is not b
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 9, 5 and 2 tokens in one batch."""
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, pad in enumerate((0, 4, 7)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


@torch.no_grad()
def generate(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> Any:
    """Eight greedy tokens a row, none of them an end."""
    model.generation_config.eos_token_id = None
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def full_pass(model: PreTrainedModel, sequences: torch.Tensor, mask: torch.Tensor, n: int) -> torch.Tensor:
    """Logits of one pass without a cache at the columns that predict the tokens from column `n` on."""
    whole = torch.cat([mask, torch.ones_like(sequences[:, mask.shape[1] :])], dim=1)
    place = (whole.cumsum(1) - 1).clamp(min=0)
    return logits(model, sequences, attention_mask=whole, position_ids=place, use_cache=False)[:, n - 1 : -1]


def caches(model: PreTrainedModel) -> tuple[str, ...]:
    """The caches that the model is tried with."""
    return ("dynamic", "static") if model.config.model_type in FEW else ("dynamic",)


def test_generating_equals_a_greedy_loop_without_a_cache(tiny_model):
    ids, plain = tokens(2, 9), generate(tiny_model, tokens(2, 9)).sequences
    fill(steer.attach(tiny_model))
    found = [generate(tiny_model, ids, cache_implementation=cache).sequences for cache in caches(tiny_model)]
    for _ in range(8):
        ids = torch.cat([ids, logits(tiny_model, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    assert all(torch.equal(out, ids) for out in found)
    assert not torch.equal(ids, plain)


def test_generating_with_a_compiled_static_cache(build_tiny):
    # what transformers does by itself on a GPU: the decoding steps run compiled
    from transformers import CompileConfig

    model = build_tiny("llama", num_hidden_layers=2)
    fill(steer.attach(model, SteeringConfig(positions="completion")))
    plain = generate(model, tokens(2, 9), cache_implementation="static")
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = generate(model, tokens(2, 9), cache_implementation="static", compile_config=compiling)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    torch._dynamo.reset()
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(plain.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_left_padded_batch_generates_what_its_rows_do(build_tiny, cache, positions):
    # Gemma 3 mixes sliding and full layers, GPT-2 has learned positions
    for model_type in ("llama", "gemma3_text", "gpt2"):
        model = build_tiny(model_type)
        fill(steer.attach(model, SteeringConfig(positions=positions)))
        ids, mask = left_padded()
        batch = generate(model, ids, mask, cache_implementation=cache)
        for row in range(3):
            # batches of one, of different lengths, right after a batch of three
            alone = generate(model, ids[row : row + 1, mask[row].bool()], cache_implementation=cache)
            assert torch.equal(alone.sequences[0, -8:], batch.sequences[row, -8:])
            scores = torch.stack(batch.logits, 1)[row]
            torch.testing.assert_close(torch.stack(alone.logits, 1)[0], scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", SOME)
def test_a_pass_over_everything_gives_the_logits_of_incremental_decoding(tiny_model, positions):
    vectors = fill(steer.attach(tiny_model, SteeringConfig(positions=positions)))
    ids, mask = left_padded()
    for cache in caches(tiny_model):
        out = generate(tiny_model, ids, mask, cache_implementation=cache)
        with vectors.prompt_length(9):
            whole = full_pass(tiny_model, out.sequences, mask, 9)
        torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-5, atol=1e-5)
    with vectors.disabled(), vectors.prompt_length(9):
        assert (full_pass(tiny_model, out.sequences, mask, 9) - whole).abs().max() > 1e-3
    # one column off must show, or the equality above would prove nothing
    with vectors.prompt_length(10):
        assert (full_pass(tiny_model, out.sequences, mask, 9) - whole).abs().max() > 1e-3


def steered_columns(vectors: SteeringVectors, ids: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
    """(batch, tokens) bool: where the stream after layer 0 moved by exactly its vector; else it rests."""
    (vector,) = vectors.tensors().values()
    with torch.no_grad(), vectors.prompt_length(length):
        steered = vectors.model(ids, output_hidden_states=True).hidden_states[1]
        with vectors.disabled():
            base = vectors.model(ids, output_hidden_states=True).hidden_states[1]
    moved = (steered == base + vector).all(-1)
    assert torch.equal(~moved, (steered == base).all(-1))
    return moved


COLUMNS = {
    "all": [0, 1, 2, 3, 4, 5, 6, 7],
    "prompt": [0, 1, 2, 3, 4],
    "last_prompt": [4],
    "completion": [5, 6, 7],
    "first_completion": [5],
}


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_are_the_columns_they_say(tiny_llama, positions):
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(layers=0, positions=positions)))
    moved = steered_columns(vectors, tokens(2, 8), 5)
    for row in moved:
        assert row.nonzero().flatten().tolist() == COLUMNS[positions]
    # rows of different prompt lengths: row 1 is as long as the first test's, row 0 has two prompt tokens less
    moved = steered_columns(vectors, tokens(2, 8), torch.tensor([3, 5]))
    shifted = {"all": list(range(8)), "prompt": [0, 1, 2], "last_prompt": [2]}
    shifted |= {"completion": [3, 4, 5, 6, 7], "first_completion": [3]}
    assert moved[0].nonzero().flatten().tolist() == shifted[positions]
    assert moved[1].nonzero().flatten().tolist() == COLUMNS[positions]


def test_prompt_and_completion_together_are_all(tiny_llama):
    columns = {}
    for positions in POSITIONS:
        vectors = fill(steer.attach(tiny_llama, SteeringConfig(layers=0, positions=positions)))
        columns[positions] = steered_columns(vectors, tokens(3, 8), torch.tensor([1, 7, 4]))
        steer.detach(tiny_llama)
    assert torch.equal(columns["prompt"] ^ columns["completion"], columns["all"])
    assert not (columns["last_prompt"] & ~columns["prompt"]).any()
    assert not (columns["first_completion"] & ~columns["completion"]).any()


def test_rows_of_different_prompt_lengths_are_what_they_are_alone(tiny_llama):
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")))
    ids, lengths = tokens(3, 10), [2, 9, 5]
    with vectors.prompt_length(torch.tensor(lengths)):
        batch = logits(tiny_llama, ids)
    for row, length in enumerate(lengths):
        with vectors.prompt_length(length):
            torch.testing.assert_close(logits(tiny_llama, ids[row : row + 1])[0], batch[row])


@pytest.mark.parametrize("positions", SOME)
def test_a_plain_pass_must_be_told_where_the_prompt_ends(tiny_model, positions):
    fill(steer.attach(tiny_model, SteeringConfig(positions=positions)))
    for options in ({}, {"use_cache": False}):
        with pytest.raises(SteerError, match="prompt_length") as error:
            logits(tiny_model, tokens(), **options)
        assert positions in message(error)


@pytest.mark.parametrize("positions", SOME)
def test_vectors_that_are_off_need_no_prompt_length(tiny_llama, positions):
    base = logits(tiny_llama, tokens())
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions=positions)))
    with vectors.disabled():
        assert torch.equal(logits(tiny_llama, tokens()), base)


def test_embeddings_in_place_of_tokens(tiny_llama):
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")))
    with vectors.prompt_length(4), torch.no_grad():
        embedded = tiny_llama(inputs_embeds=tiny_llama.get_input_embeddings()(tokens())).logits
        assert torch.equal(embedded, logits(tiny_llama, tokens()))


def test_two_generations_may_take_turns(tiny_llama):
    # each KV cache belongs to a prompt of its own length
    from transformers import DynamicCache

    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="first_completion")))
    texts = [tokens(1, 6), tokens(1, 9, seed=5)]
    prompts, caches = [4, 6], [DynamicCache(), DynamicCache()]
    for text, prompt, cache in zip(texts, prompts, caches, strict=True):
        logits(tiny_llama, text[:, :prompt], past_key_values=cache)
    for text, prompt, cache in zip(texts, prompts, caches, strict=True):
        steps = [
            logits(tiny_llama, text[:, i : i + 1], past_key_values=cache)
            for i in range(prompt, text.shape[1])
        ]
        with vectors.prompt_length(prompt):
            torch.testing.assert_close(
                torch.cat(steps, 1), logits(tiny_llama, text)[:, prompt:], rtol=1e-5, atol=1e-5
            )


def test_a_cache_filled_before_attaching_does_not_say_where_the_prompt_ends(tiny_llama):
    from transformers import DynamicCache

    cache = DynamicCache()
    logits(tiny_llama, tokens(1, 5), past_key_values=cache)
    steer.attach(tiny_llama, SteeringConfig(positions="completion"))
    with pytest.raises(SteerError, match="prompt_length") as error:
        logits(tiny_llama, tokens(1, 1), past_key_values=cache)
    message(error)


def test_a_prompt_that_generate_reads_in_chunks_needs_its_length(tiny_llama):
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")))
    ids = tokens(1, 9)
    with vectors.prompt_length(9):
        chunks = generate(tiny_llama, ids, prefill_chunk_size=4)
    whole = generate(tiny_llama, ids)
    torch.testing.assert_close(torch.stack(chunks.logits), torch.stack(whole.logits), rtol=1e-5, atol=1e-5)

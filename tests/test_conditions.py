"""Conditional vectors: decided for each row at its prompt's last token and kept for it; refused elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, message, tokens
from helpers.training import config, make_trainer
from transformers import DynamicCache

import steer
from steer import SteerError, SteeringConfig
from steer.artifact import Artifact, read
from steer.config import POSITIONS, Condition
from steer.generation.decoding import CachedRows, PlainRows
from steer.mixture import Mixer, mixed
from steer.vector_sets import Population

ROWS, LENGTH, LAYER = 6, 9, 0


def conditional(model: Any, ids: torch.Tensor, **config: Any) -> tuple[Artifact, Artifact, torch.Tensor]:
    """Vectors without and with a condition that holds for about half of the prompts, and for which."""
    settings = {"layers": "1-2", **config}
    vectors = fill(steer.attach(model, SteeringConfig(**settings)), 0.5)
    plain = Artifact(vectors.config, vectors.tensors())
    steer.detach(model)
    probe = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1][:, -1]
    cosine = torch.cosine_similarity(states, probe[None], dim=1)
    low, high = cosine.sort().values[ROWS // 2 - 1 : ROWS // 2 + 1].tolist()
    made = plain.with_condition(Condition(LAYER, (low + high) / 2), probe, {"made": "here"})
    return plain, made, cosine > (low + high) / 2


def generated(model: Any, ids: torch.Tensor, **more: Any) -> Any:
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, **more}
    return model.generate(ids, return_dict_in_generate=True, **settings)


KINDS = ({"kind": "adaptive", "scale": 9.0}, {"kind": "shared", "rank": 2})


@pytest.mark.parametrize(
    ("config", "use_cache"),
    [*(({"positions": p}, True) for p in POSITIONS), *((kind, True) for kind in KINDS), ({}, False)],
)
def test_rows_of_a_batch_are_steered_or_not(tiny_llama: Any, config: Any, use_cache: bool) -> None:
    ids = tokens(ROWS, LENGTH)
    plain, made, acts = conditional(tiny_llama, ids, **config)
    assert 0 < acts.sum() < ROWS
    found = {}
    for name, artifact in (("base", None), ("plain", plain), ("made", made)):
        with mixed(tiny_llama, {} if artifact is None else {name: artifact}):
            found[name] = [generated(tiny_llama, ids[i : i + 1], use_cache=use_cache) for i in range(ROWS)]
            if name == "made":
                together = generated(tiny_llama, ids, use_cache=use_cache)
    differ = False
    for row in range(ROWS):
        same = found["plain" if acts[row] else "base"][row]
        assert torch.equal(found["made"][row].sequences, same.sequences)
        for step, one in enumerate(same.logits):
            assert torch.equal(found["made"][row].logits[step], one)
            assert torch.allclose(together.logits[step][row], one[0], atol=1e-4)
        differ |= not torch.equal(found["base"][row].logits[-1], found["plain"][row].logits[-1])
    assert differ or config.get("positions") == "first_completion"


def test_padding_beams_and_samples(tiny_llama: Any) -> None:
    ids = tokens(ROWS, LENGTH)
    plain, made, acts = conditional(tiny_llama, ids)
    padded = torch.cat([torch.zeros(ROWS, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(LENGTH + 3) >= 3).long().expand(ROWS, -1)
    one = (~acts).nonzero()[0, 0]
    base = generated(tiny_llama, ids[one : one + 1], num_beams=3).sequences
    with mixed(tiny_llama, {"plain": plain}):
        always = [generated(tiny_llama, ids[i : i + 1], num_beams=3).sequences for i in range(ROWS)]
    with mixed(tiny_llama, {"made": made}):
        right = generated(tiny_llama, ids)
        left = generated(tiny_llama, padded, attention_mask=mask)
        beams = generated(tiny_llama, ids, num_beams=3).sequences
        assert torch.equal(beams[one], base[0])
        for row in acts.nonzero()[:, 0]:
            assert torch.equal(beams[row], always[row][0])
        twice = generated(tiny_llama, ids, num_return_sequences=2, do_sample=True, top_k=1).sequences
    assert torch.equal(right.sequences, left.sequences[:, 3:])
    assert torch.equal(twice[::2], right.sequences) and torch.equal(twice[1::2], right.sequences)


def test_scoring_in_one_pass_and_in_the_decoding_of_evaluations(tiny_llama: Any) -> None:
    ids = tokens(ROWS, LENGTH)
    _, made, acts = conditional(tiny_llama, ids, positions="completion")
    vectors = steer.load(made, tiny_llama)
    more = torch.cat([ids, tokens(ROWS, 4, 8)], 1)
    with vectors.prompt_length(torch.full((ROWS,), LENGTH)):
        whole = logits(tiny_llama, more)
    with vectors.disabled():
        assert not torch.equal(logits(tiny_llama, more)[acts], whole[acts])
        assert torch.allclose(logits(tiny_llama, more)[~acts], whole[~acts], atol=1e-6)
    chosen = torch.tensor([5, 5, 0, 3, 3, 3])
    for rows in (
        CachedRows(tiny_llama),
        PlainRows(tiny_llama, vectors.prompt_length),
    ):
        with torch.no_grad():
            rows.read(ids.tolist())
            rows.select(chosen)
            for step in range(4):
                found = rows.step(more[chosen, LENGTH + step])
                assert torch.allclose(found, whole[chosen, LENGTH + step], atol=1e-4)
    other = copy.deepcopy(tiny_llama)
    steer.attached(other)._state.probe *= -1  # of the copy alone
    assert torch.equal(steer.attached(tiny_llama)._state.probe, -steer.attached(other)._state.probe)


def test_what_cannot_be_decided_is_refused(tiny_llama: Any) -> None:
    ids = tokens(ROWS, LENGTH)
    _, made, _ = conditional(tiny_llama, ids)
    vectors = steer.load(made, tiny_llama)
    with torch.no_grad():
        with vectors.disabled():
            past = tiny_llama(input_ids=ids, use_cache=True).past_key_values
        with vectors.prompt_length(LENGTH), pytest.raises(SteerError, match="was not decided") as error:
            tiny_llama(input_ids=ids[:, :1], past_key_values=past)
        message(error)
        with vectors.prompt_length(LENGTH + 2), pytest.raises(SteerError, match="is to come"):
            tiny_llama(input_ids=ids)
        past = tiny_llama(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        past.batch_select_indices(torch.arange(2))
        with pytest.raises(SteerError, match="decided for 6 rows, and the pass has 2") as error:
            tiny_llama(input_ids=ids[:2, :1], past_key_values=past)
        message(error)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_ways_of_generate(tiny_llama: Any, options: dict[str, Any]) -> None:
    ids = tokens(ROWS, LENGTH)
    _, made, _ = conditional(tiny_llama, ids)
    with mixed(tiny_llama, {"made": made}):
        for row in range(ROWS):
            plain = generated(tiny_llama, ids[row : row + 1]).sequences
            assert torch.equal(generated(tiny_llama, ids[row : row + 1], **options).sequences, plain)


def test_prompts_as_embeddings_and_in_chunks(tiny_llama: Any) -> None:
    ids = tokens(ROWS, LENGTH)
    _, made, _ = conditional(tiny_llama, ids)
    with mixed(tiny_llama, {"made": made}):
        whole = generated(tiny_llama, ids)
        embeds = tiny_llama.get_input_embeddings()(ids)
        rows = tiny_llama.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
        assert torch.equal(rows, whole.sequences[:, LENGTH:])
        with pytest.raises(SteerError, match="last token, which is to come") as error:
            generated(tiny_llama, ids, prefill_chunk_size=4)
        message(error)
        with pytest.raises(SteerError, match="a condition cannot be told under guidance_scale") as error:
            generated(tiny_llama, ids, guidance_scale=1.5)
        message(error)
    _, made, _ = conditional(tiny_llama, ids, positions="completion")
    with mixed(tiny_llama, {"made": made}):
        whole = generated(tiny_llama, ids)
        chunks = generated(tiny_llama, ids, prefill_chunk_size=4)
        for one, two in zip(whole.logits, chunks.logits, strict=True):
            assert torch.allclose(one, two, atol=1e-4)


def test_a_cache_that_was_emptied_decides_again(tiny_llama: Any) -> None:
    ids = tokens(ROWS, LENGTH)
    _, made, _ = conditional(tiny_llama, ids)
    steer.load(made, tiny_llama)
    first = logits(tiny_llama, ids[:2], past_key_values=DynamicCache())
    cache = DynamicCache()
    logits(tiny_llama, ids, past_key_values=cache)
    cache.batch_select_indices(torch.arange(2))
    cache.crop(-LENGTH)
    assert torch.allclose(logits(tiny_llama, ids[:2], past_key_values=cache), first, atol=1e-5)


def test_two_conditions_at_once(tiny_llama: Any) -> None:
    """Each is decided by itself, the later one on a state that the earlier set may have changed."""
    ids = tokens(ROWS, LENGTH)
    _, one, acts = conditional(tiny_llama, ids)
    _, two, _ = conditional(tiny_llama, ids, positions="completion")
    never = replace(two, config=replace(two.config, condition=Condition(LAYER, 1.0)))
    with mixed(tiny_llama, {"one": one}):
        alone = generated(tiny_llama, ids)
    with mixed(tiny_llama, {"never": never, "one": one}):
        both = generated(tiny_llama, ids)
    for left, right in zip(alone.logits, both.logits, strict=True):
        assert torch.equal(left, right)
    with mixed(tiny_llama, {"one": one, "two": two}):
        both = generated(tiny_llama, ids)
    base = generated(tiny_llama, ids)
    assert torch.equal(both.logits[0], alone.logits[0])  # the second steers no prompt
    for row in range(ROWS):
        assert torch.equal(both.logits[1][row], base.logits[1][row]) == (not acts[row])


def test_saved_and_loaded(tiny_llama: Any, tmp_path: Any) -> None:
    _, made, _ = conditional(tiny_llama, tokens(ROWS, LENGTH))
    made.save_pretrained(tmp_path / "made")
    back = read(tmp_path / "made")
    assert back.config == made.config
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in made.tensors.items())
    assert "| condition | a cosine above" in (tmp_path / "made" / "README.md").read_text()
    vectors = steer.load(back, tiny_llama)
    named = {layer: made.tensors[f"model.layers.{layer}.steering.vector"] for layer in (1, 2)}
    assert vectors.norms() == {layer: vector.norm().item() for layer, vector in named.items()}
    assert all(torch.equal(vector, named[layer]) for layer, vector in vectors.effective().items())
    vectors.save(tmp_path / "again")
    again = read(tmp_path / "again")
    assert torch.equal(again.tensors["model.steering.probe"], made.tensors["model.steering.probe"])
    assert (2.0 * back).config.condition == back.select("2").config.condition == made.config.condition
    # what has no condition is written as before, for readers that know of none
    assert "condition" not in SteeringConfig().to_dict()
    with pytest.raises(SteerError, match="unknown fields 'condition'"):
        SteeringConfig.from_dict({"format_version": 1, "condition": {"layer": 0, "threshold": 0.5}})


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"layer": -1, "threshold": 0.5}, "layer=-1 is not the index"),
        ({"layer": True, "threshold": 0.5}, "layer=True"),
        ({"layer": 0, "threshold": float("nan")}, "threshold=nan is not a cosine"),
        ({"layer": 0, "threshold": 1.5}, "threshold=1.5 is not a cosine"),
        ({"layer": 0, "threshold": "0"}, "threshold='0'"),
        ({"layer": 0}, "is not an object with the fields layer and threshold"),
        ([], "is not an object"),
        ({"layer": 1, "threshold": 0.5}, "read after layer 1, and layer 1 has a vector"),
    ],
)
def test_wrong_conditions(condition: Any, words: str) -> None:
    values = {"layers": "1-2", "num_hidden_layers": 3, "condition": condition}
    with pytest.raises(SteerError, match=words) as error:
        SteeringConfig.from_dict(values)
    message(error)


def test_what_does_not_compute_conditions_refuses_them(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Any
) -> None:
    from steer.engine.client import steered_layers
    from steer.evaluation.side_effects import check_positions
    from steer.export import arrays, checkpoint, gguf, lm_eval, peft
    from steer.sae.activations import Reader
    from steer.training.init import start
    from steer.transfer.move import transfer

    plain, made, _ = conditional(tiny_llama, tokens(ROWS, LENGTH))
    attached = ("sae", "trainer")
    adaptive = replace(made.config, kind="adaptive")
    calls = {
        "sum": lambda: plain + made,
        "engine": lambda: steered_layers(made),
        "attach": lambda: steer.attach(tiny_llama, made.config),
        "population": lambda: Population(tiny_llama).add("one", made.config),
        "rank one": lambda: Artifact(adaptive, made.tensors).rank_one(),
        "side effects": lambda: check_positions(made.config),
        "sae": lambda: Reader(tiny_llama, 1),
        "trainer": lambda: make_trainer(tiny_llama, tiny_tokenizer, config(tmp_path)),
        "init": lambda: start(steer.attach(tiny_llama, plain.config), made, "made"),
        "play": lambda: Mixer(tiny_llama).add("made", made),
        "transfer": lambda: transfer(made, None, tiny_llama),
        "peft": lambda: peft.write(made, tmp_path / "peft"),
        "gguf": lambda: gguf.write(made, tmp_path / "x.gguf"),
        "arrays": lambda: arrays.write(made, tmp_path / "x.npz"),
        "lm_eval": lambda: lm_eval.write(made, tmp_path / "x.pt"),
        "checkpoint": lambda: checkpoint.write(made, None, tmp_path / "model"),
    }
    for name, call in calls.items():
        if name in attached:
            steer.load(made, tiny_llama)
        with pytest.raises(SteerError, match="have a condition") as error:
            call()
            pytest.fail(name)
        message(error)
        if "steering_vectors" in tiny_llama.__dict__:
            steer.detach(tiny_llama)
        if name == "side effects":
            assert "--engine hf" not in str(error.value), "that does not help"
    assert not [*tmp_path.iterdir()]

"""Sums of sets in a model of transformers: those of their vectors, and the base model again after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, message, relative, tokens

import steer
from steer import SteerError, SteeringConfig
from steer.artifact import Artifact
from steer.expression import Term, parse
from steer.mixture import chosen, mixed

PROMPT = 7


def made(model: Any, seed: int, **config: Any) -> Artifact:
    vectors = fill(steer.attach(model, SteeringConfig(**config)), 0.3, seed)
    saved = Artifact(vectors.config, vectors.tensors())
    steer.detach(model)
    return saved


def generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens that greedy decoding chose, (tokens, vocabulary)."""
    out = model.generate(
        ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits)[:, 0].log_softmax(-1)


def test_a_sum_is_the_sum_of_the_vectors(tiny_llama: Any) -> None:
    one, two = made(tiny_llama, 1), made(tiny_llama, 2, layers="0,2", scale=2.0)
    ids = tokens()
    base = logits(tiny_llama, ids)
    steer.load(0.7 * one + -0.3 * two, tiny_llama)
    expected = logits(tiny_llama, ids)
    steer.detach(tiny_llama)
    with mixed(tiny_llama, chosen(parse("two@-0.3+one@0.7"), {"one": one, "two": two})):
        assert relative(logits(tiny_llama, ids), expected) < 1e-5
    assert relative(base, expected) > 0.01
    assert torch.equal(logits(tiny_llama, ids), base)


def test_scale_0_is_the_base_to_the_bit(tiny_llama: Any) -> None:
    sets = {"one": made(tiny_llama, 1)}
    ids = tokens(1)
    base = logits(tiny_llama, ids)
    for scale in (1.0, 0.0, -2.0, 0.0):
        with mixed(tiny_llama, chosen([Term("one", scale)], sets)):
            assert torch.equal(logits(tiny_llama, ids), base) == (scale == 0)
    with mixed(tiny_llama, chosen(parse("base"), sets)):
        assert torch.equal(logits(tiny_llama, ids), base)


def test_layers_and_positions_of_each_set(tiny_llama: Any) -> None:
    one, two = made(tiny_llama, 1), made(tiny_llama, 2, kind="adaptive")
    terms = [Term("one", 1.0, "0", "completion"), Term("two", 50.0, "1-2", "last_prompt")]
    parts = chosen(terms, {"one": one, "two": two})
    assert [(a.config.layers, a.config.positions) for a in parts.values()] == [
        ("0", "completion"),
        ("1-2", "last_prompt"),
    ]
    ids = tokens(1, PROMPT)
    base = generated(tiny_llama, ids)
    with mixed(tiny_llama, {"two": parts["two"]}):
        prompt = generated(tiny_llama, ids)
    with mixed(tiny_llama, {"one": parts["one"]}):
        completion = generated(tiny_llama, ids)
    with mixed(tiny_llama, parts):
        both = generated(tiny_llama, ids)
    assert torch.equal(base[0], completion[0]) and torch.equal(both[0], prompt[0])
    assert relative(prompt[0], base[0]) > 1e-3
    assert relative(completion[1], base[1]) > 1e-3
    assert relative(both[1], prompt[1]) > 1e-3
    assert "generate" not in tiny_llama.__dict__


def test_what_cannot_be_mixed(tiny_llama: Any) -> None:
    sets = {"one": made(tiny_llama, 1, layers="0")}
    for terms, words in (
        ([Term("two")], "no vectors named 'two'; there are one"),
        ([Term("one", layers="1")], "steering of 'one': none of layers 1 is steered, only '0'"),
        ([Term("one", layers="99")], "steering of 'one': layer 99 does not exist"),
        ([Term("one", 1e300)], r"steering of 'one': scale=1e\+300 is too large for float32"),
        ([Term("one", 1.7e308)], "steering of 'one': scale=inf is not a finite number"),
    ):
        big = {"one": 100.0 * sets["one"]} if terms[0].scale > 1 else sets
        with pytest.raises(SteerError, match=words) as error:
            chosen(terms, big)
        message(error)
    steer.attach(tiny_llama)
    with pytest.raises(SteerError, match="already has steering vectors"), mixed(tiny_llama, sets):
        pass

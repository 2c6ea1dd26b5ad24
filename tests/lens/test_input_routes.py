"""Patches of single heads' queries, keys and values, against an attention that is written out."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.steering import message
from torch.nn.functional import softmax

from evals.architectures import tiny
from steer import SteerError
from steer.hooks import hooked
from steer.lens.attention_inputs import Projection, projections
from steer.lens.conditions import BASE, NONE, Condition, EffectPath, steered
from steer.lens.input_routes import input_routes
from steer.lens.passes import passes
from steer.lens.patching import patch
from steer.lens.subject import Row, Subject

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # logits of about 10 in size
LAYER = 3  # the last one, whose attention is patched; the vector is in the layer before


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@torch.no_grad()
def by_hand(subject: Subject, row: Row, direction: str, live: dict[str, Any]) -> torch.Tensor:
    """
    Llama's and OLMo 2's last attention written out, head after head; the rest of the plain model goes on with
    what it writes, and its MLP writes what it does in the reference run.
    """
    model, vectors = subject.model, subject.vectors
    attention, mlp = model.model.layers[LAYER].self_attn, model.model.layers[LAYER].mlp
    ids = torch.tensor([row.ids])
    inputs, rotary, wrote = {}, [], {}

    def run(on: bool) -> torch.Tensor:
        with nullcontext() if on else vectors.disabled():
            return model(input_ids=ids, use_cache=False).logits[0, row.prompt - 1 : len(row.ids) - 1]

    def keep(module: Any, args: tuple, kwargs: dict) -> None:
        inputs[on] = kwargs["hidden_states"][0]
        rotary[:] = (part[0] for part in kwargs["position_embeddings"])

    def note(module: Any, args: tuple, output: torch.Tensor) -> None:
        wrote[on] = output

    with hooked(attention.register_forward_pre_hook(keep, with_kwargs=True), mlp.register_forward_hook(note)):
        for on in (True, False):
            run(on)
    reference = direction == "remove"  # whether the vectors are on in it
    share = attention.num_key_value_groups
    outputs = []
    for head in range(model.config.num_attention_heads):
        pieces = {}
        for name, index in (("q", head), ("k", head // share), ("v", head // share)):
            made = getattr(attention, f"{name}_proj")(inputs[(index in live[name]) != reference])
            made = getattr(attention, f"{name}_norm", lambda made: made)(made)
            pieces[name] = made[:, index * attention.head_dim : (index + 1) * attention.head_dim]
        q, k = (rotate(pieces[name], *rotary) for name in "qk")
        scores = q @ k.T / math.sqrt(attention.head_dim)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        outputs.append(softmax(scores, -1) @ pieces["v"])
    written = attention.o_proj(torch.cat(outputs, -1))[None]
    with hooked(
        attention.register_forward_hook(lambda module, args, output: (written, *output[1:])),
        mlp.register_forward_hook(lambda module, args, output: wrote[reference]),
    ):
        return run(reference)


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
@pytest.mark.parametrize("direction", ["add", "remove"])
def test_swapped_inputs_are_those_of_an_attention_written_out(tiny_tokenizer, model_type, direction) -> None:
    subject = subject_of(tiny(model_type), tiny_tokenizer, layers=LAYER - 1)
    (row,) = texts([(7, 5)])
    reference = 0 if direction == "add" else 1
    ends = [BASE, steered(subject)]
    paths = {
        n: path for parts in ("q", "k", "v", "kv") for n, path in input_routes(subject, LAYER, parts).items()
    }
    assert len(paths) == 1 + (1 + 4) + 3 * (1 + 2)
    conditions = [*ends, *(Condition(ends[1 - reference].layers, path, reference) for path in paths.values())]
    (done,) = passes(subject, [row], conditions)
    for logits, path in zip(done.next_token(0)[2:], paths.values(), strict=True):
        live = {part: range(4) if path.q is None else getattr(path, part) for part in "qkv"}
        torch.testing.assert_close(logits, by_hand(subject, row, direction, live), **TOLERANCE)
        assert (logits - done.next_token(0)[reference]).abs().max() > 0.01


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "qwen3", "phi3", "gpt2", "gpt_neox", "cohere", "gpt_oss"]
)
def test_all_heads_are_the_attention_and_none_is_the_base_run(tiny_tokenizer, model_type) -> None:
    subject = subject_of(tiny(model_type), tiny_tokenizer, layers=0)
    every = input_routes(subject, 1, "qkv")
    assert [*every][:3] == ["attention", "qkv, all groups", "qkv, group 0"]
    closed = {"none": EffectPath(False, frozenset([1]), NONE, q=NONE, k=NONE, v=NONE)}
    for direction in ("add", "remove"):
        found = patch(subject, texts(), {**every, **closed}, direction=direction)
        assert found["qkv, all groups"] == pytest.approx(found["attention"], abs=1e-4)
        assert found["none"] == pytest.approx(0, abs=1e-4)
        shares = [found[name] for name in every]
        assert len({round(share, 5) for share in shares[1:]}) == len(shares) - 1


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_5_text", "jetmoe"])
def test_an_attention_with_other_inputs_is_refused(tiny_tokenizer, model_type) -> None:
    subject = subject_of(tiny(model_type), tiny_tokenizer, layers=0)
    with pytest.raises(SteerError) as error:
        patch(subject, texts(), input_routes(subject, LAYER, "q"))
    assert "--heads without --qkv" in message(error)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_heads_in_another_order_are_noticed(tiny_tokenizer, model_type, monkeypatch) -> None:
    """Fused projections have all queries first, or query, key and value of a head together."""

    def swapped(attention: Any, heads: int, groups: int) -> dict[str, Projection]:
        return {
            part: replace(one, columns=slice(None), each=n)
            if one.each is None
            else replace(one, columns=slice(32 * n, 32 * (n + 1)), each=None)
            for n, (part, one) in enumerate(projections(attention, heads, groups).items())
        }

    subject = subject_of(tiny(model_type), tiny_tokenizer, layers=0)
    monkeypatch.setattr("steer.lens.conditions.projections", swapped)
    with pytest.raises(SteerError) as error:
        patch(subject, texts(), input_routes(subject, 1, "k"))
    assert "those of one head change other heads" in message(error)


@pytest.mark.parametrize("parts", ["", "x", "qq"])
def test_unknown_parts_are_refused(tiny_llama, tiny_tokenizer, parts) -> None:
    with pytest.raises(SteerError) as error:
        input_routes(subject_of(tiny_llama, tiny_tokenizer), 1, parts)
    assert "give q, k, v" in message(error)

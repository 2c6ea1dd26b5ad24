"""Distances of attention maps, against the maps that transformers gives and scipy's distance."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.paths import ROOT
from helpers.steering import message
from scipy.spatial.distance import jensenshannon

from evals.architectures import tiny
from steer import SteerError
from steer.lens import attention
from steer.lens.attention import attention_distance, jensen_shannon
from steer.lens.controls import random_vectors, values
from steer.lens.subject import Row, Subject


@torch.no_grad()
def plain_maps(subject: Subject, row: Row) -> list[torch.Tensor]:
    """By attention layer, (heads, queries, keys) as `output_attentions` gives them; no padding, no hooks."""
    usual = subject.model.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    with subject.vectors.prompt_length(row.prompt):
        ids = torch.tensor([row.ids])
        maps = subject.model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    subject.model.set_attn_implementation(usual)
    return [part[0].double() for part in maps]


def plain_distance(subject: Subject, rows: list[Row], tensors: Any = None) -> list[list[float]]:
    """By layer and head: a loop over texts and query tokens with scipy's distance."""
    sums: list[np.ndarray] = []
    for row in rows:
        with subject.vectors.disabled():
            base = plain_maps(subject, row)
        if tensors is None:
            on = plain_maps(subject, row)
        else:
            with values(subject.vectors, tensors):
                on = plain_maps(subject, row)
        sums = sums or [np.zeros(len(part)) for part in base]
        for n, (one, other) in enumerate(zip(base, on, strict=True)):
            for query in range(1, len(row.ids)):
                sums[n] += jensenshannon(one[:, query], other[:, query], base=2, axis=1)
    tokens = sum(len(row.ids) - 1 for row in rows)
    return [(part / tokens).tolist() for part in sums]


# float32 maps of another batch against float64 sums.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.mark.parametrize(
    ("model_type", "side"),
    [("llama", "left"), ("mistral", "right"), ("gemma3_text", "left"), ("phi3", "right"), ("gpt2", "left")],
)
def test_distances_are_those_of_a_plain_loop(tiny_tokenizer, model_type, side) -> None:
    """Grouped queries, sliding windows and padding included."""
    model = tiny(model_type)
    before = model.config._attn_implementation
    subject = subject_of(model, tiny_tokenizer, layers="0-1", padding_side=side)
    found = attention_distance(subject, texts(((12, 4), (9, 2), (3, 6))), draws=1, seed=5)
    assert model.config._attn_implementation == before
    assert (found.layers, found.left_out, found.tokens) == ([0, 1, 2, 3], [], 15 + 10 + 8)
    rows = texts(((12, 4), (9, 2), (3, 6)))
    expected = plain_distance(subject, rows)
    assert max(map(max, expected)) > 0.02
    for n, part in enumerate(found.heads):
        np.testing.assert_allclose(part, expected[n], **TOLERANCE)
    np.testing.assert_allclose(found.distance, [np.mean(part) for part in expected], **TOLERANCE)
    drawn = plain_distance(subject, rows, random_vectors(subject.vectors, 5))
    np.testing.assert_allclose(found.random[0], [np.mean(part) for part in drawn], **TOLERANCE)
    assert found.distance[0] == 0  # the first vector is added after layer 0
    share = plain_maps(subject, rows[0])[2][:, 1:, 0].mean().item()
    alone = attention_distance(subject, rows[:1], draws=0)
    assert alone.first_token["steered"][2].item() == pytest.approx(share, rel=1e-4)


def test_batches_do_not_change_it(tiny_tokenizer, monkeypatch) -> None:
    subject = subject_of(tiny("llama"), tiny_tokenizer, layers="0-1")
    whole = attention_distance(subject, texts(), draws=1)
    monkeypatch.setattr(attention, "MAX_NUMBERS", 1)
    parts = attention_distance(subject, texts(), draws=1)
    torch.testing.assert_close(parts.distance, whole.distance, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts.random, whole.random, rtol=1e-3, atol=1e-5)


def test_distance_of_distributions() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.dirichlet(np.full(9, 0.2), 50), generator.dirichlet(np.full(9, 0.2), 50)
    one[0], other[0] = np.eye(9)[0], np.eye(9)[1]
    one[1] = other[1]
    found = jensen_shannon(torch.tensor(one), torch.tensor(other))
    np.testing.assert_allclose(found, jensenshannon(one, other, base=2, axis=1), rtol=1e-9, atol=1e-7)
    assert found[:2].tolist() == [1, 0]
    # Near each other: the divergence is (change / weights)^2 / 8 on average, in nats; float32 keeps it.
    near = torch.tensor([0.25, 0.75]) + torch.tensor([1e-4, -1e-4])
    exact = (1e-8 * (1 / 0.25 + 1 / 0.75) / 8 / np.log(2)) ** 0.5
    assert jensen_shannon(torch.tensor([0.25, 0.75]), near).item() == pytest.approx(exact, rel=1e-2)


def test_layers_without_attention_are_left_out_and_named(tiny_tokenizer) -> None:
    subject = subject_of(tiny("qwen3_5_text"), tiny_tokenizer, layers="0-1")
    found = attention_distance(subject, texts(), draws=2)
    assert (found.layers, found.left_out) == ([1, 3], [0, 2])
    expected = plain_distance(subject, texts())
    np.testing.assert_allclose(found.distance, [np.mean(part) for part in expected], **TOLERANCE)
    assert "left out: 0, 2" in "\n".join(found.lines())
    assert found.to_dict()["random_mean"] == found.random.mean(1).tolist()


def test_a_learned_sink_is_one_more_key(tiny_tokenizer) -> None:
    subject = subject_of(tiny("gpt_oss"), tiny_tokenizer, std=1.0, layers="0-1")
    (row,) = texts([(6, 4)])
    with subject.vectors.disabled():
        base = plain_maps(subject, row)
    on = plain_maps(subject, row)
    assert min(part.sum(-1).min() for part in base) < 0.5  # the rest goes to the sink
    whole = [[torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1).clamp(min=0) for part in some]
             for some in (base, on)]  # fmt: skip
    expected = [
        jensenshannon(one[:, 1:], other[:, 1:], base=2, axis=2).mean()
        for one, other in zip(*whole, strict=True)
    ]
    np.testing.assert_allclose(attention_distance(subject, [row], draws=0).distance, expected, **TOLERANCE)


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
def test_a_model_without_attention_maps_is_refused(tiny_tokenizer, model_type) -> None:
    with pytest.raises(SteerError) as error:
        attention_distance(subject_of(tiny(model_type), tiny_tokenizer, layers=0), texts())
    assert "gives no attention maps" in message(error)


def test_eager_attention_that_computes_something_else_is_refused(tiny_tokenizer) -> None:
    """transformers' fused attention leaves out Gemma 2's soft cap, which shows where scores are large."""
    model = tiny("gemma2")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    subject = subject_of(model, tiny_tokenizer)
    with pytest.raises(SteerError) as error:
        attention_distance(subject, texts())
    assert "with eager attention" in message(error)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert attention_distance(subject, texts(), draws=0).eager_error == 0


def test_a_text_of_one_token_is_refused(tiny_llama, tiny_tokenizer) -> None:
    with pytest.raises(SteerError) as error:
        attention_distance(subject_of(tiny_llama, tiny_tokenizer), [Row((5,), 1)])
    assert "two tokens or more" in message(error)


def test_the_page_quotes_the_committed_results() -> None:
    page = (ROOT / "docs/lens.md").read_text().splitlines()
    heads = [n for n, line in enumerate(page) if line.startswith("| attention of layer | ")]
    files = ("attention.json", "attention-coder-0.5b.json")
    assert len(heads) == len(files)
    for head, name in zip(heads, files, strict=True):
        found = json.loads((ROOT / "evals/results/lens" / name).read_text())
        at = [found["layers"].index(int(cell)) for cell in re.findall(r"\| (\d+) ", page[head])]
        draws = found["random"]
        mean = [sum(values) / len(draws) for values in zip(*draws, strict=True)]
        highest = [max(values) for values in zip(*draws, strict=True)]
        rows = {
            "trained": (found["distance"], found["mean"]),
            f"random, mean of {len(draws)} draws": (mean, sum(found["random_mean"]) / len(draws)),
            "random, highest draw": (highest, max(found["random_mean"])),
        }
        for line, (label, (layers, over_all)) in zip(page[head + 2 :], rows.items(), strict=False):
            cells = [label, *(f"{layers[i]:.3f}" for i in at), f"{over_all:.3f}"]
            assert line == f"| {' | '.join(cells)} |"
        assert f"{found['texts']} steered answers, {found['tokens']:,} tokens" in " ".join(page)

"""
The logit lens against the model's own output, plain arithmetic, nnsight and TransformerLens; script counts.
"""

from __future__ import annotations

import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.steering import message
from helpers.training import model_folder
from transformers import AutoTokenizer

from steer import SteerError
from steer.final_norm import find_final_norm, through_final_norm
from steer.lens.conditions import BASE, steered
from steer.lens.controls import random_readouts, random_vectors, values
from steer.lens.logit_lens import logit_lens
from steer.lens.passes import streams
from steer.lens.scripts import FOREIGN, SCRIPTS, count_scripts, script, vocabulary_scripts


def random_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Norm weights away from one and biases away from zero, so that a scale that is left out shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in find_final_norm(model).parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.3)
    return model


@torch.no_grad()
def test_the_final_norm_is_what_the_model_does_to_a_stream(tiny_model) -> None:
    """
    For every architecture: norm(x) - bias = scaled(x) / length(x), with the length that the norm divides by.
    """
    model = random_norms(tiny_model)
    norm = find_final_norm(model)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 100
    centred = isinstance(norm, torch.nn.LayerNorm)
    length = (x - x.mean(1, keepdim=True) if centred else x).square().mean(1, keepdim=True).sqrt()
    expected = norm(x) - (norm.bias if centred else 0)
    torch.testing.assert_close(through_final_norm(model, x) / length, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reading", ["dot", "cosine"])
@pytest.mark.parametrize("final_norm", [True, False])
def test_scores_are_plain_products(build_tiny, tiny_tokenizer, reading, final_norm) -> None:
    for kind in ("llama", "gemma2", "gpt2"):
        model = random_norms(build_tiny(kind))
        vectors = {i: torch.randn(32, generator=torch.Generator().manual_seed(i)) for i in (2, 0)}
        found = logit_lens(model, tiny_tokenizer, vectors, reading=reading, final_norm=final_norm, top=5)
        assert found.layers == [0, 2]
        for n, layer in enumerate((0, 2)):
            v = vectors[layer]
            if final_norm and kind == "gpt2":
                v = (v - v.mean()) * find_final_norm(model).weight
            elif final_norm:
                v = v * (find_final_norm(model).weight + (kind == "gemma2"))
            w = model.get_output_embeddings().weight
            expected = torch.stack([row @ v for row in w])
            if reading == "cosine":
                expected = torch.stack([torch.cosine_similarity(row, v, dim=0) for row in w])
            torch.testing.assert_close(found.scores[n], expected, rtol=1e-4, atol=1e-5)
            known = expected[: len(tiny_tokenizer)]
            assert found.top[n].tolist() == known.argsort(descending=True)[:5].tolist()
            assert found.bottom[n].tolist() == known.argsort()[:5].tolist()
            assert found.top_tokens[n] == [tiny_tokenizer.decode([i]) for i in found.top[n]]


@torch.no_grad()
def test_a_large_last_vector_is_what_the_model_says(tiny_llama, tiny_tokenizer) -> None:
    """Far along the last layer's vector the logits' order is that of the logit lens."""
    subject = subject_of(random_norms(tiny_llama), tiny_tokenizer, std=1e5, layers=2)
    lens = logit_lens(subject.model, tiny_tokenizer, subject.vectors.effective(), top=3)
    logits = subject.model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert logits[: len(tiny_tokenizer)].topk(3).indices.tolist() == lens.top[0].tolist()


def test_mistakes(tiny_llama, tiny_tokenizer) -> None:
    for wrong, expected in (
        ({"reading": "angle"}, "choose one of dot, cosine"),
        ({"vectors": {}}, "of shape (32,) by layer, got none"),
        ({"vectors": {0: torch.zeros(31)}}, "got (31,)"),
    ):
        with pytest.raises(SteerError) as error:
            logit_lens(tiny_llama, tiny_tokenizer, **{"vectors": {0: torch.zeros(32)}, **wrong})
        assert expected in message(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "latin"),
        ("café", "accented"),
        ("数学", "cjk"),
        ("ひら", "cjk"),
        ("한", "cjk"),
        (" при", "cyrillic"),
        ("αβ", "other script"),
        ("42", "digits"),
        ("x2", "latin"),
        ("{}$", "code"),
        (" \n", "space"),
        ("", "special"),
        ("<|im_end|>", "special"),
        ("<=", "code"),
    ],
)
def test_script_of_a_token(text, expected) -> None:
    assert script(text) == expected


def test_script_counts_add_up(tiny_llama, tiny_tokenizer) -> None:
    vectors = {0: torch.randn(32, generator=torch.Generator().manual_seed(3))}
    lens = logit_lens(tiny_llama, tiny_tokenizer, vectors, top=10)
    counts = count_scripts(lens, tiny_tokenizer)
    assert counts.base.sum().item() == pytest.approx(1)
    assert counts.promoted.sum() == counts.suppressed.sum() == 10
    kinds = vocabulary_scripts(tiny_tokenizer, len(tiny_tokenizer))
    assert SCRIPTS[kinds[tiny_tokenizer.convert_tokens_to_ids("7")]] == "digits"
    assert SCRIPTS[kinds[tiny_tokenizer.convert_tokens_to_ids("<|user|>")]] == "special"
    chosen = [SCRIPTS[kinds[i]] for i in lens.bottom[0]]
    assert counts.foreign().item() == sum(name in FOREIGN for name in chosen) / 10 == 0


@pytest.mark.real
def test_scripts_of_a_real_vocabulary() -> None:
    from steer.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    kinds = vocabulary_scripts(tokenizer, len(tokenizer))
    shares = torch.bincount(kinds, minlength=len(SCRIPTS)) / len(tokenizer)
    assert shares[SCRIPTS.index("latin")] > 0.8  # an English model


@torch.no_grad()
def test_streams_are_those_of_nnsight(tiny_model, tiny_tokenizer) -> None:
    """Our hooks' streams, base and steered, are nnsight's when nnsight adds the vectors itself."""
    nnsight = pytest.importorskip("nnsight")
    subject = subject_of(tiny_model, tiny_tokenizer)
    ours: dict[int, torch.Tensor] = {}
    row = texts()[0]
    streams(subject, [row], [BASE, steered(subject)], lambda layer, s, *_: ours.__setitem__(layer, s[:, 0]))
    vectors = subject.vectors.effective()
    traced = nnsight.NNsight(subject.model)
    layers = [traced.get(f"{subject.decoder.name}.{layer}") for layer in range(3)]
    for condition, factor in ((0, 0.0), (1, 1.0)):
        found = []
        with subject.vectors.disabled(), traced.trace(torch.tensor([row.ids])):
            for layer in range(3):
                layers[layer].output = layers[layer].output + factor * vectors[layer]
                found.append(layers[layer].output.save())
        for layer in range(3):
            torch.testing.assert_close(ours[layer][condition], found[layer][0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_readings_are_those_of_transformer_lens(tiny_llama, tiny_tokenizer, tmp_path) -> None:
    """TransformerLens over the same weights: its final norm and unembedding read the same from a vector."""
    transformer_lens = pytest.importorskip("transformer_lens")
    model = random_norms(tiny_llama)
    folder = model_folder(tmp_path / "model", model, tiny_tokenizer)
    bridge = transformer_lens.TransformerBridge.boot_transformers(
        str(folder), hf_model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
    )
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    unit = vector / vector.square().mean().sqrt()  # the norm divides by the length: of this one, by 1
    expected = bridge.unembed(bridge.ln_final(unit[None, None]))
    ours = logit_lens(model, tiny_tokenizer, {1: unit})
    torch.testing.assert_close(ours.scores[0], expected[0, 0], rtol=1e-4, atol=1e-5)


def test_random_vectors_are_as_long_and_leave_no_trace(build_tiny, tiny_tokenizer) -> None:
    for kind in ("constant", "adaptive", "shared"):
        subject = subject_of(build_tiny("llama"), tiny_tokenizer, kind=kind, rank=2)
        own = subject.vectors.effective()
        before = subject.vectors.tensors()
        with values(subject.vectors, random_vectors(subject.vectors, seed=1)):
            drawn = subject.vectors.effective()
        for layer, vector in own.items():
            torch.testing.assert_close(drawn[layer].norm(), vector.norm(), rtol=1e-4, atol=0)
            assert abs(torch.cosine_similarity(drawn[layer], vector, dim=0)) < 0.9
        assert all(torch.equal(t, before[name]) for name, t in subject.vectors.tensors().items())
        if kind != "adaptive":
            with pytest.raises(SteerError, match="have no read-outs"):
                random_readouts(subject.vectors)
            continue
        drawn = random_readouts(subject.vectors, seed=1)
        for name, tensor in drawn.items():
            torch.testing.assert_close(tensor.norm(), before[name].norm(), rtol=1e-4, atol=0)
            assert abs(torch.cosine_similarity(tensor, before[name], dim=0)) < 0.9

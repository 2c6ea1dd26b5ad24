"""The published code's conventions against plain loops, entropy and downstream readings too."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.steering import layers_of, message
from scipy import stats
from torch.nn.functional import cosine_similarity

from steer import SteerError
from steer.final_norm import find_final_norm
from steer.lens.conditions import Condition
from steer.lens.controls import random_vectors, values
from steer.lens.conventions import (
    LENSES,
    MEANS,
    lens_conventions,
    persistence_conventions,
    published_persistence,
)
from steer.lens.downstream import downstream, mean_changes
from steer.lens.entropy import entropy_shift
from steer.lens.logit_lens import logit_lens
from steer.lens.sampling import complete
from steer.lens.subject import Row


@pytest.fixture
def loud_llama(build_tiny):
    """Weights so large that the layers above a vector turn its change, and a gain away from one."""
    model = build_tiny("llama")
    with torch.no_grad():
        for block in layers_of(model):
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter *= 10
        weight = find_final_norm(model).weight
        weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) * 3)
    return model


@torch.no_grad()
def states_and_logits(subject, row, layers):
    """Stream after each layer (depth, tokens, width) and logits, with the vectors of `layers` alone on."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0].clone()))
        for block in layers_of(subject.model)
    ]
    chosen = {n: t * (int(n.split(".")[-3]) in layers) for n, t in subject.vectors.tensors().items()}
    with values(subject.vectors, chosen):
        logits = subject.model(torch.tensor([row.ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.stack(seen), logits


@torch.no_grad()
def test_each_lens_is_a_plain_product_and_overlaps_are_counted(loud_llama, tiny_tokenizer) -> None:
    subject = subject_of(loud_llama, tiny_tokenizer, layers="0,2")
    found = lens_conventions(subject, top=10, shown=3, draws=2, seed=4)
    gain, unembedding = find_final_norm(loud_llama).weight, loud_llama.get_output_embeddings().weight

    def tops() -> list[list[list[int]]]:
        own = subject.vectors.effective()
        readings = [[], [], []]
        for layer in (0, 2):
            plain = [float(row @ own[layer]) for row in unembedding]
            scaled = [float(row @ (own[layer] * gain)) for row in unembedding]
            angle = [cosine_similarity(row, own[layer], dim=0).item() for row in unembedding]
            for kept, scores in zip(readings, (scaled, plain, angle), strict=True):
                known = scores[: len(tiny_tokenizer)]
                kept.append(sorted(range(len(known)), key=lambda i: -known[i])[:10])
        return readings

    ids = tops()
    assert found.names == list(LENSES) and found.names[0].startswith("steer: ")
    for n in range(3):
        for layer in range(2):
            assert found.tokens[n][layer] == [tiny_tokenizer.decode([i]) for i in ids[n][layer][:3]]
            shared = len(set(ids[n][layer]) & set(ids[0][layer])) / 10
            assert found.overlap[n, layer].item() == pytest.approx(shared)
    assert (found.overlap[0] == 1).all() and (found.overlap[1:] < 1).any()
    with values(subject.vectors, random_vectors(subject.vectors, 4 + 2)):
        other = tops()
    shared = len(set(other[2][1]) & set(other[0][1])) / 10
    assert found.random_overlap[1, 2, 1].item() == pytest.approx(shared)
    name, mean, *_ = found.rows()[1]
    assert name == "published code: without it, dot product"
    assert mean == pytest.approx(found.overlap[1].mean().item())


def test_the_published_cosines_are_those_of_a_plain_loop(loud_llama, tiny_tokenizer) -> None:
    """One text, one vector at a time, the code's own order of things; tolerance 1e-4."""
    subject = subject_of(loud_llama, tiny_tokenizer, layers="0-1")
    prompts = [row.question for row in texts()]
    diff_diff, diff_vector = published_persistence(subject, prompts, [0, 1], seed=3)
    own = subject.vectors.effective()
    for n, source in enumerate((0, 1)):
        (rows,) = complete(subject, prompts, [Condition(frozenset([source]))], temperature=1.0, seed=3)
        assert any(row.completion for row in rows)
        for layer in range(3):
            to_mean, to_vector = [], []
            for row in rows:
                moved = states_and_logits(subject, row, [source])[0] - states_and_logits(subject, row, [])[0]
                kept = moved[layer][:-1][:-1]  # the first token is in, the last two are out
                mean = torch.stack(list(kept)).sum(0) / len(kept)
                for change in kept:
                    to_mean.append(cosine_similarity(change, mean, dim=0).item())
                    if layer < 2:
                        to_vector.append(cosine_similarity(change, own[layer], dim=0).item())
            if layer < source:
                assert diff_diff[n, layer].isnan() and diff_vector[n, layer].isnan()
                continue
            assert diff_diff[n, layer].item() == pytest.approx(sum(to_mean) / len(to_mean), abs=1e-4)
            if layer < 2:
                expected = sum(to_vector) / len(to_vector)
                assert diff_vector[n, layer].item() == pytest.approx(expected, abs=1e-4)
    assert diff_vector[:, 2].isnan().all()


def test_vectors_are_read_at_their_scale(loud_llama, tiny_tokenizer) -> None:
    subject = subject_of(loud_llama, tiny_tokenizer)
    subject.vectors.scale = -2.0
    prompts = [row.question for row in texts()]
    assert published_persistence(subject, prompts, [0])[1][0, 0].item() == pytest.approx(1, abs=1e-4)
    found = downstream(subject, texts(), top=6, draws=2, seed=3)
    assert found.statistics[2, 2] == 1  # the last layer's change is read as the vector itself
    assert found.random[2, :, 2].tolist() == [1, 1]
    lens = logit_lens(loud_llama, tiny_tokenizer, subject.vectors.added(), top=3)
    assert lens_conventions(subject, top=10, shown=3, draws=1).tokens[0] == lens.top_tokens


def test_both_conventions_are_there_with_their_controls(loud_llama, tiny_tokenizer) -> None:
    from steer.lens.persistence import persistence

    subject = subject_of(loud_llama, tiny_tokenizer)
    rows = texts()
    found = persistence_conventions(subject, rows, [0, 1], draws=2, seed=1)
    ours = persistence(subject, rows, {"0": [0], "1": [1]})
    torch.testing.assert_close(found.diff_diff[0], ours.diff_diff, equal_nan=True)
    published = published_persistence(subject, [row.question for row in rows], [0, 1], seed=1)
    torch.testing.assert_close(found.diff_diff[1], published[0], equal_nan=True)
    assert found.random_diff_diff.shape == (2, 2, 2, 3)
    (ours_name, ours_pairs), (published_name, published_pairs) = found.rows()
    assert (ours_name, published_name) == (MEANS["steer"], MEANS["published"])
    above = torch.stack([found.diff_diff[1, 0, 1], found.diff_diff[1, 0, 2], found.diff_diff[1, 1, 2]])
    assert published_pairs[0][0] == pytest.approx(above.mean().item(), abs=1e-6)
    assert published_pairs[0][0] != pytest.approx(ours_pairs[0][0], abs=1e-4)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["sources"] == [0, 1]


@torch.no_grad()
def test_mean_changes_are_those_of_a_plain_loop(loud_llama, tiny_tokenizer) -> None:
    """Tolerance 1e-4 relative to the change's length; batches of one and padding change nothing."""
    subject = subject_of(loud_llama, tiny_tokenizer)
    rows = texts()
    for size in (64, 1):
        subject.batch_size = size
        mean, length = mean_changes(subject, rows, [0, 2])
        for n, layer in enumerate((0, 2)):
            moved = torch.cat(
                [
                    (states_and_logits(subject, row, [layer])[0] - states_and_logits(subject, row, [])[0])[
                        -1
                    ][row.prompt - 1 : -1]
                    for row in rows
                ]
            )
            torch.testing.assert_close(mean[n], moved.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(length[n], moved.norm(dim=1).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_last_layer_s_reading_is_its_own_lens(loud_llama, tiny_tokenizer) -> None:
    """After the last layer a vector changes every state by itself: the two readings are one."""
    subject = subject_of(loud_llama, tiny_tokenizer)
    found = downstream(subject, texts(), top=6, draws=2, seed=3)
    assert found.lens.layers == [0, 1, 2]
    agreement, peak, overlap = found.statistics[:, 2].tolist()
    assert agreement == pytest.approx(1, abs=1e-4)
    assert overlap == 1
    assert found.statistics[0, 0] < 0.99  # two layers later the tokens' changes differ
    gain, unembedding = find_final_norm(loud_llama).weight, loud_llama.get_output_embeddings().weight
    scores = unembedding @ (gain * subject.vectors.effective()[2])
    known = scores[: len(tiny_tokenizer)]
    assert peak == pytest.approx(((known.max() - scores.mean()) / scores.std()).item(), rel=1e-3)
    assert found.lens.top[2].tolist() == known.argsort(descending=True)[:6].tolist()
    assert found.random.shape == (3, 2, 3)
    assert found.random[2, :, 2].tolist() == [1, 1]
    layer, tokens, pairs = found.rows()[2]
    assert (layer, len(tokens), pairs[0][0]) == (2, 6, pytest.approx(1, abs=1e-4))
    with pytest.raises(SteerError) as error:
        downstream(subject, texts(), [3])
    assert "layers [3] have no vector" in message(error)


@torch.no_grad()
def test_entropies_and_shifts_are_those_of_a_plain_loop(loud_llama, tiny_tokenizer) -> None:
    """Token by token in float64; tolerance 1e-5."""
    subject = subject_of(loud_llama, tiny_tokenizer, std=1.0)
    rows = [*texts(), *texts(seed=1)]
    found = entropy_shift(subject, rows, layers=[1], draws=3, seed=2)
    entropy, variation, gain, change = [], [], [], []
    for row in rows:
        both = [states_and_logits(subject, row, layers)[1].double().softmax(-1) for layers in ([], [1])]
        for at in range(row.prompt - 1, len(row.ids) - 1):
            base, steered = (p[at].tolist() for p in both)
            entropies = [-sum(p * math.log(p) for p in one) for one in (base, steered)]
            entropy.append(entropies[0])
            change.append(entropies[1] - entropies[0])
            variation.append(sum(abs(a - b) for a, b in zip(base, steered, strict=True)) / 2)
            gain.append(max(b - a for a, b in zip(base, steered, strict=True)))
    for name, expected in (("entropy", entropy), ("variation", variation), ("gain", gain)):
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.change.numpy(), change, atol=1e-5)
    (name, rho, mean, least, most, p), _ = found.correlations()
    ranks = [stats.rankdata(x) for x in (entropy, variation)]
    assert name == "variation"
    assert rho == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert least <= mean <= most and 0 < p <= 1
    with values(subject.vectors, random_vectors(subject.vectors, 2 + 2)):
        again = entropy_shift(subject, rows, layers=[1], draws=1)
    torch.testing.assert_close(found.random_variation[1], again.variation, rtol=1e-5, atol=1e-6)
    order = sorted(range(len(entropy)), key=lambda n: entropy[n])[:6]
    first = found.quarters()[0]
    assert first[0] == pytest.approx(np.mean([entropy[n] for n in order]), rel=1e-4)
    assert first[1] == pytest.approx(np.mean([variation[n] for n in order]), rel=1e-3)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["correlations"][0]["shift"] == "variation"


def test_a_single_token_has_no_correlation(loud_llama, tiny_tokenizer) -> None:
    found = entropy_shift(subject_of(loud_llama, tiny_tokenizer), [Row((5, 6, 7), 3)], draws=1)
    assert len(found.entropy) == 1
    assert found.to_dict()["correlations"][0]["spearman"] is None

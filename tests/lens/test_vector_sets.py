"""Spectra and pair correlations against plain loops, and random sets."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.steering import layers_of, message
from scipy import stats

from steer import SteerError, SteeringConfig
from steer.artifact import Artifact, write
from steer.lens.composition import Composition
from steer.lens.controls import random_vectors, values
from steer.lens.layer_study import pairs_table, with_correlations
from steer.lens.pair_correlation import FEWEST, pair_correlations
from steer.lens.random_sets import two_sided_p, with_random_sets
from steer.lens.spectrum import SetSpectrum, residual_norms, set_spectrum, stable_rank


@torch.no_grad()
def test_the_spectrum_is_that_of_the_gram_matrix(tiny_llama, tiny_tokenizer) -> None:
    """Squared singular values are eigenvalues of the rows' products; tolerance 1e-6 relative."""
    subject = subject_of(tiny_llama, tiny_tokenizer)
    rows = texts()
    found = set_spectrum(subject, rows, draws=3, seed=5)
    lengths: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for row in rows:
        seen: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
            for block in layers_of(subject.model)
        ]
        with subject.vectors.disabled():
            subject.model(torch.tensor([row.ids]))
        for hook in hooks:
            hook.remove()
        for layer, stream in enumerate(seen):
            lengths[layer] += [state.norm().item() for state in stream[1:]]
    means = [sum(lengths[layer]) / len(lengths[layer]) for layer in range(3)]
    np.testing.assert_allclose(found.residual.numpy(), means, rtol=1e-5)

    def spectrum(scale: list[float]) -> np.ndarray:
        own = subject.vectors.effective()
        rows = [own[layer].numpy().astype(float) / scale[layer] for layer in range(3)]
        gram = np.array([[float(a @ b) for b in rows] for a in rows])
        return np.sqrt(np.sort(np.linalg.eigvalsh(gram))[::-1])

    np.testing.assert_allclose(found.raw.numpy(), spectrum([1.0] * 3), rtol=1e-6)
    np.testing.assert_allclose(found.scaled.numpy(), spectrum(means), rtol=1e-5)
    with values(subject.vectors, random_vectors(subject.vectors, 5 + 2)):
        np.testing.assert_allclose(found.random_raw[1].numpy(), spectrum([1.0] * 3), rtol=1e-6)
    own = found.raw.square().sum() / found.raw[0] ** 2
    assert found.rows()[0][:2] == ("raw", pytest.approx(own.item()))
    assert found.to_dict()["stable_ranks"][1]["scaling"] == "scaled"


def test_one_direction_has_rank_one_and_random_ones_many(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    one = subject.vectors.effective()[0]
    same = {name: (n + 1) * one for n, name in enumerate(subject.vectors.tensors())}
    with values(subject.vectors, same):
        found = set_spectrum(subject, texts(), draws=20)
    name, own, mean, least, _, p = found.rows()[0]
    assert (name, own) == ("raw", pytest.approx(1, abs=1e-6))
    assert mean > least > 1.02
    assert p == pytest.approx(2 / 21)
    assert stable_rank(torch.ones(4)) == 4


def test_a_set_of_zeros_has_no_rank_and_none_in_json() -> None:
    own, draws = torch.zeros(2), torch.zeros(3, 2)
    found = SetSpectrum([0, 1], torch.ones(2), own, own, draws, draws)
    assert [set(row.values()) for row in found.to_dict()["stable_ranks"]] == [{"raw", None}, {"scaled", None}]


def test_residual_norms_do_not_depend_on_the_batch(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    whole = residual_norms(subject, texts(), [0, 2])
    subject.batch_size, subject.padding_side = 1, "right"
    torch.testing.assert_close(residual_norms(subject, texts(), [0, 2]), whole, rtol=1e-5, atol=0)


def test_a_set_of_one_layer_has_no_rank(tiny_llama, tiny_tokenizer) -> None:
    with pytest.raises(SteerError) as error:
        set_spectrum(subject_of(tiny_llama, tiny_tokenizer, layers=1), texts())
    assert "two layers or more, got layers [1]" in message(error)


def test_random_sets_are_drawn_and_put_back(tiny_llama, tiny_tokenizer) -> None:
    vectors = subject_of(tiny_llama, tiny_tokenizer).vectors
    own = vectors.effective()
    sets = with_random_sets(vectors, vectors.effective, 3, 0)
    assert all(torch.equal(vector, own[layer]) for layer, vector in vectors.effective().items())
    for layer, vector in own.items():
        drawn = torch.stack([one[layer] for one in sets])
        torch.testing.assert_close(drawn.norm(dim=1), vector.norm().expand(3), rtol=1e-5, atol=0)
        assert len(drawn.unique(dim=0)) == 3
    with pytest.raises(SteerError, match="0 random sets are no control"):
        with_random_sets(vectors, vectors.effective, 0, 0)


def test_a_p_value_counts_the_smaller_tail() -> None:
    null = [0.1 * n for n in range(19)]
    assert two_sided_p(5.0, null) == two_sided_p(-5.0, null) == pytest.approx(2 / 20)
    assert two_sided_p(0.9, null) == 1.0
    assert two_sided_p(0.15, null) == pytest.approx(2 * 3 / 20)
    assert math.isnan(two_sided_p(math.nan, null))


def composed(joint: float | None = 0.9) -> Composition:
    generator = torch.Generator().manual_seed(2)
    layers = [0, 3, 4, 9]
    alone = torch.rand(4, generator=generator, dtype=torch.float64) / 2
    pairs = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    pairs = (pairs + pairs.T) / 2
    return Composition(layers, alone, pairs, 0.9, 0.9, 0.1, 8, "accuracy", joint)


def test_correlations_are_those_of_a_plain_loop() -> None:
    """Spearman as Pearson of ranks and all orders of the layers one by one; tolerance 1e-9."""
    made = composed()
    vectors = {layer: torch.randn(8, generator=torch.Generator().manual_seed(layer)) for layer in made.layers}
    found = pair_correlations(made, vectors)
    assert [(c.measure, c.against) for c in found.correlations] == [
        (m, a) for m in ("score", "gain") for a in ("cosine", "distance")
    ]

    def value(measure: str, i: int, j: int) -> float:
        best = max(made.alone[i].item(), made.alone[j].item())
        gain = made.pairs[i, j].item() - best
        return gain if measure == "gain" else gain / (made.joint - best)

    def known(against: str, i: int, j: int) -> float:
        a, b = made.layers[i], made.layers[j]
        if against == "distance":
            return float(abs(a - b))
        return torch.cosine_similarity(vectors[a].double(), vectors[b].double(), dim=0).item()

    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert found.pairs == [(made.layers[i], made.layers[j]) for i, j in pairs]
    for c in found.correlations:
        ours = [value(c.measure, i, j) for i, j in pairs]
        theirs = [known(c.against, i, j) for i, j in pairs]
        np.testing.assert_allclose(getattr(found, c.measure).numpy(), ours, rtol=1e-9)
        np.testing.assert_allclose(getattr(found, c.against).numpy(), theirs, rtol=1e-9)
        rho = np.corrcoef(stats.rankdata(ours), stats.rankdata(theirs))[0, 1]
        assert c.rho == pytest.approx(rho, abs=1e-9)
        assert c.n == 6
        t = rho * math.sqrt(4 / (1 - rho**2))
        assert c.p == pytest.approx(2 * stats.t.sf(abs(t), 4), abs=1e-9)
        reached = 0
        for order in permutations(range(4)):
            other = [known(c.against, *sorted((order[i], order[j]))) for i, j in pairs]
            reached += abs(np.corrcoef(stats.rankdata(ours), stats.rankdata(other))[0, 1]) >= abs(rho) - 1e-9
        assert c.p_layers == pytest.approx(reached / 24)


def test_undefined_scores_are_left_out() -> None:
    vectors = {layer: torch.randn(8, generator=torch.Generator().manual_seed(layer)) for layer in range(10)}
    found = pair_correlations(composed(joint=None), vectors)
    score, *_ = found.correlations
    assert (score.n, math.isnan(score.rho)) == (0, True)
    assert score.told() == f"undefined: n = 0, and {FEWEST} pairs of different values are needed"
    assert found.correlations[2].n == 6
    assert "n = 6, p = " in found.rows()[2][2]


def test_scores_that_follow_the_cosine_are_found() -> None:
    """Nine layers, pairs that gain what their cosine says: rho 1, and no order of the layers does it."""
    layers = list(range(9))
    vectors = {layer: torch.randn(8, generator=torch.Generator().manual_seed(layer)) for layer in layers}
    unit = torch.nn.functional.normalize(torch.stack([vectors[layer].double() for layer in layers]), dim=1)
    alone = torch.zeros(9, dtype=torch.float64)
    made = Composition(layers, alone, unit @ unit.T, 1.0, 1.0, 0.0, 8, "accuracy", 2.0)
    score, distance = pair_correlations(made, vectors).correlations[:2]
    assert score.rho == pytest.approx(1) and score.n == 36
    assert score.p_layers == pytest.approx(1 / 5000)
    assert distance.p_layers > 0.001


def test_a_sweep_correlates_the_pairs_of_its_members(tmp_path) -> None:
    made = composed()
    vectors = {layer: torch.randn(8, generator=torch.Generator().manual_seed(layer)) for layer in made.layers}
    for layer, vector in vectors.items():
        config = SteeringConfig(layers=str(layer), hidden_size=8, num_hidden_layers=10)
        one = Artifact(config, {f"model.layers.{layer}.steering.vector": vector})
        write(tmp_path / "members" / f"layer-{layer}" / "vectors", one)
    told = {"norms": {f"layer-{layer}": 1.0 for layer in made.layers}, "told": {}, **made.to_dict()}
    found = with_correlations(told, tmp_path)
    expected = pair_correlations(made, vectors)
    assert found["correlations_told"] == expected.rows()
    assert found["correlations"] == expected.to_dict()
    lines = pairs_table(found)
    assert f"- pair score with cosine of the two vectors: {expected.correlations[0].told()}" in lines

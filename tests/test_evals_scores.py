"""Scores against second implementations, closed forms and enumeration; verdicts that must not be given."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import scores

RNG = np.random.default_rng(0)


def samples(problems: int, n: int, seed: int = 1) -> np.ndarray:
    """Problems of every difficulty, some never and some always solved."""
    rng = np.random.default_rng(seed)
    chance = np.concatenate([[0.0, 1.0], rng.random(problems - 2)])
    return rng.random((problems, n)) < chance[:, None]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    correct = samples(7, 6)
    for k in range(1, 7):
        subsets = list(itertools.combinations(range(6), k))
        counted = [np.mean([row[list(s)].any() for s in subsets]) for row in correct]
        # rounding of at most six factors
        np.testing.assert_allclose(scores.pass_at_k(correct, k), counted, atol=1e-15 * 10)


def test_pass_at_k_at_its_ends():
    correct = samples(40, 9)
    np.testing.assert_allclose(scores.pass_at_k(correct, 1), scores.avg_at_k(correct), atol=1e-15)
    np.testing.assert_array_equal(scores.pass_at_k(correct, 9), correct.any(1))
    for k in (0, 10):
        with pytest.raises(ValueError, match="9 samples"):
            scores.pass_at_k(correct, k)


def by_hand_majority(correct: np.ndarray, answers: list[str | None]) -> Fraction:
    votes = Counter("right" if c else a for c, a in zip(correct, answers, strict=True) if a is not None)
    if not votes:
        return Fraction(0)
    best = [a for a, n in votes.items() if n == max(votes.values())]
    return Fraction("right" in best, len(best))


@given(
    st.lists(st.tuples(st.sampled_from([None, "1", "2", "x", "y"]), st.booleans()), min_size=1, max_size=9)
)
@settings(max_examples=200, deadline=None)
def test_majority_vote_equals_counting_by_hand(row):
    answers = [a for a, _ in row]
    correct = np.array([[a == "1" and a is not None for a in answers]])
    found = scores.maj_at_k(correct, [answers])[0]
    assert found == pytest.approx(float(by_hand_majority(correct[0], answers)), abs=1e-15)


def test_majority_merges_ways_to_write_one_answer():
    correct = np.array([[True, True, False, False, False]])
    assert scores.maj_at_k(correct, [["1/2", "0.5", "7", "8", "9"]])[0] == 1
    assert scores.maj_at_k(correct, [["1/2", "0.5", "7", "7.0", "$7$"]])[0] == 0
    assert scores.maj_at_k(np.zeros((1, 2), bool), [[None, None]])[0] == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000"),
        (r"\frac{1}{2}", "0.50"),
        (r"\dfrac{2}{4}", ".5"),
        ("$ 3 $", "3."),
        (r"x \left( y \right)", "x(y)"),
    ],
)
def test_canonical_answers(one, other):
    assert scores.canonical(one) == scores.canonical(other)


@pytest.mark.parametrize("text", ["1/0", "٣", "9" * 5000, "1,00", "", r"\frac{1}{0}", "1e9"])
def test_what_is_no_number_stays_text(text):
    assert isinstance(scores.canonical(text), str)


@pytest.mark.parametrize(("right", "n"), [(0, 75), (69, 75), (75, 75), (1, 1), (13, 40)])
def test_wilson_solves_its_equation(right, n):
    found = scores.wilson(right, n)
    p = right / n
    for bound in (found.low, found.high):  # (p - b)^2 = z^2 b (1 - b) / n, or an end of the scale
        off = (p - bound) ** 2 - 1.959963984540054**2 * bound * (1 - bound) / n
        assert abs(off) < 1e-12 or bound in (0.0, 1.0)
    assert found.low <= p <= found.high


def test_bootstrap_of_shares_is_binomial():
    """Resampling n right-or-wrong answers draws from Binomial(n, p): means, spread and percentiles."""
    n, right = 60, 21
    values = np.array([[1.0] * right + [0.0] * (n - right)])
    means = scores.bootstrap(values) * n
    p = right / n
    # five standard errors of the mean and of the variance of 10,000 draws
    assert abs(means.mean() - right) < 5 * math.sqrt(n * p * (1 - p) / 10_000)
    assert means.var() == pytest.approx(n * p * (1 - p), rel=5 * math.sqrt(2 / 10_000))
    cdf = np.cumsum([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)])
    for q in (0.025, 0.25, 0.75, 0.975):
        assert abs(np.quantile(means, q) - int((cdf < q).sum())) <= 1


def test_bootstrap_equals_resampling_by_index():
    values = RNG.random((3, 20))
    means = scores.bootstrap(values, 20_000)
    rng = np.random.default_rng(5)
    slow = [values[np.ix_(rng.integers(0, 3, 3), rng.integers(0, 20, 20))].mean() for _ in range(20_000)]
    # two samples of 20,000: means within five standard errors, spreads within 4 %
    assert abs(means.mean() - np.mean(slow)) < 5 * np.std(slow) * math.sqrt(2 / 20_000)
    assert means.std() == pytest.approx(np.std(slow), rel=0.04)


def test_methods_are_resampled_alike():
    values = RNG.random((1, 30))
    both = scores.bootstrap(np.concatenate([values, values]))
    np.testing.assert_allclose(both, scores.bootstrap(values), atol=1e-12)
    np.testing.assert_array_equal(scores.bootstrap(values), scores.bootstrap(values))


def test_intervals_hold_their_level():
    """Of 300 experiments with a known truth, about 5 % miss it (four standard errors above at most)."""
    rng = np.random.default_rng(9)
    truth, missed = 0.4, 0
    for _ in range(300):
        chance = rng.beta(0.8, 1.2, 80)  # of mean 0.4
        values = (rng.random((80, 8)) < chance[:, None]).mean(1)[None]
        low, high = np.percentile(scores.bootstrap(values, 1000), (2.5, 97.5))
        missed += not low <= truth <= high
    assert missed / 300 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)


def test_estimate_never_claims_certainty():
    for value in (0.0, 1.0, 0.5):
        found = scores.estimate(np.full((1, 20), value))
        assert found.high - found.low > 0.1
    greedy = scores.estimate(np.array([[1.0, 0, 1, 1]]))
    assert greedy == scores.wilson(3, 4)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (9, 3), (40, 12)])
def test_mcnemar_is_the_sign_flip_test_and_the_sum_of_outcomes_no_likelier(gained, lost):
    n = gained + lost
    # second implementation: the two-sided binomial test as a sum over outcomes no likelier than this one
    weights = [math.comb(n, i) for i in range(n + 1)]
    expected = sum(w for w in weights if w <= weights[gained]) / 2**n
    assert scores.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-12)
    d = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 5)
    # exact up to 14 differences; above, four standard errors of 10,000 draws
    tolerance = 1e-12 if n <= 14 else 4 * math.sqrt(expected * (1 - expected) / 10_000) + 1e-4
    assert abs(scores.sign_flip(d) - expected) <= tolerance


def test_sign_flip_goes_through_all_signs():
    d = RNG.normal(0.5, 1, 8)
    sums = [abs(np.dot(s, d)) for s in itertools.product((1, -1), repeat=8)]
    assert scores.sign_flip(d) == np.mean(np.array(sums) >= abs(d.sum()) - 1e-9)
    assert scores.sign_flip(np.zeros(4)) == 1


def test_verdicts():
    base = np.zeros((1, 100))
    gain = np.zeros((1, 100))
    gain[0, :20] = 1
    assert scores.compare(gain, base).verdict == scores.BETTER
    assert scores.compare(base, gain).verdict == scores.WORSE
    assert scores.compare(gain, base).difference.value == pytest.approx(0.2)
    same = scores.compare(gain, gain)
    assert (same.verdict, same.p) == (scores.UNDECIDED, 1)
    # no difference on 100 problems: Wilson allows 3.7 % of other problems to differ, either way
    assert same.difference.value == 0
    assert same.difference.high == -same.difference.low == scores.wilson(0, 100).high


@pytest.mark.parametrize("problems", range(1, 6))
def test_a_handful_of_problems_is_never_enough(problems):
    """Every resample of these shows a gain, so the bootstrap alone would call it better."""
    values = np.linspace(0.8, 1, problems + 1)[None, 1:]
    found = scores.compare(values, np.zeros((1, problems)))
    assert scores.bootstrap(values).min() > 0
    assert found.verdict == scores.UNDECIDED


def test_better_is_rarely_said_of_equals():
    """Two equal methods: at most 5 % of 100 comparisons find a difference (four standard errors above)."""
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        chance = rng.random(40)[:, None]
        one, other = ((rng.random((40, 4)) < chance).mean(1)[None] for _ in range(2))
        found += scores.compare(one, other).verdict != scores.UNDECIDED
    assert found / 100 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 100)


def test_training_seeds_widen_the_interval():
    """Three seeds that disagree: their spread is part of the uncertainty."""
    rng = np.random.default_rng(3)
    base = np.zeros((1, 200))
    apart = np.stack([(rng.random(200) < p).astype(float) for p in (0.1, 0.5, 0.9)])
    pooled = np.stack([(rng.random(200) < 0.5).astype(float) for _ in range(3)])
    wide, narrow = (scores.compare(v, base).difference for v in (apart, pooled))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_gain_share():
    base = np.zeros((1, 400))
    full = np.zeros((1, 400))
    full[0, :200] = 1
    half = full.copy()
    half[0, :100] = 0
    found = scores.gain_share(half, base, full)
    assert found is not None
    assert found.value == 0.5
    # half is a part of full, so the share is binomial among full's 200 problems: its spread by the formula
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(math.sqrt(0.5 * 0.5 / 200), rel=0.1)
    whole = scores.gain_share(full, base, full)
    assert whole == scores.Estimate(1, 1, 1)
    assert scores.gain_share(half, base, base) is None
    nothing = scores.gain_share(base, base, full)
    assert nothing is not None
    assert nothing.low < nothing.value == 0 < nothing.high

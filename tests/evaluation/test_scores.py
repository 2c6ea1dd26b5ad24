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
from scipy import stats

from steer.evaluation import scores

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
    np.testing.assert_allclose(scores.pass_at_k(correct, 1), np.asarray(correct, float).mean(1), atol=1e-15)
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


def test_a_blank_box_has_no_vote():
    correct = np.array([[True, True, False, False, False]])
    assert scores.maj_at_k(correct, [["1", "1", "", "", " "]])[0] == 1


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


def by_hand_half_width(values: np.ndarray) -> float:
    """Of the mean of (seeds, problems), from sums of squares and tabulated quantiles of Student's t."""
    quantile = {1: 12.706205, 2: 4.302653, 19: 2.093024}
    seeds, problems = values.shape
    mean = values.sum() / values.size
    total = 0.0
    for means in (values.sum(1) / problems, values.sum(0) / seeds):
        n = len(means)
        if n > 1:
            total += quantile[n - 1] ** 2 * sum((m - mean) ** 2 for m in means) / (n - 1) / n
    return math.sqrt(total)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_are_students_over_seeds_and_problems(seeds):
    values = RNG.random((seeds, 20))
    found, half = scores.estimate(values), by_hand_half_width(values)
    # the table has seven digits
    assert found.low == pytest.approx(max(0, values.mean() - half), abs=1e-6)
    assert found.high == pytest.approx(min(1, values.mean() + half), abs=1e-6)
    base = RNG.random((1, 20))
    difference, half = scores.compare(values, base).difference, by_hand_half_width(values - base)
    assert difference.value == pytest.approx(values.mean() - base.mean())
    assert difference.high == pytest.approx(min(1, difference.value + half), abs=1e-6)
    assert scores.compare(base, values).difference.low == pytest.approx(-difference.high)


def test_seeds_of_both_sides_count():
    """Two trained methods: the variances of both methods' seeds add up."""
    one, other = RNG.random((3, 20)) * 0.1 + 0.4, RNG.random((2, 20)) * 0.1 + 0.4
    expected = scores._half_width(
        [
            (float(np.var(one.mean(1), ddof=1)) / 3, 2),
            (float(np.var(other.mean(1), ddof=1)) / 2, 1),
            (float(np.var(one.mean(0) - other.mean(0), ddof=1)) / 20, 19),
        ]
    )
    found = scores.compare(one, other).difference
    assert found.high - found.low == pytest.approx(2 * expected)


def test_the_p_value_is_the_level_of_the_interval_that_ends_at_zero():
    values = np.clip(RNG.normal([[0.5], [0.6], [0.55]], 0.2, (3, 40)), 0, 1)
    base = np.clip(RNG.normal(0.4, 0.2, (1, 40)), 0, 1)
    found = scores.compare(values, base)
    parts = scores._of_seeds(values) + scores._of_problems(values.mean(0) - base[0])
    assert scores._half_width(parts, found.p) == pytest.approx(found.difference.value)
    # one seed, many samples: close to the paired t test's, which the sign flip test approximates
    single = scores.compare(values[:1], base)
    assert single.p == pytest.approx(stats.ttest_rel(values[0], base[0]).pvalue, abs=0.02)


def trial(rng, seeds: int, sd: float, mean: float, together: float, problems: int = 75) -> np.ndarray:
    """
    Greedy answers (seeds, problems) of a method whose accuracy varies from seed to seed with this standard
    deviation. With chance `together` a problem is as hard for every seed, else each seed draws its own.
    """
    accuracy = np.clip(rng.normal(mean, sd, seeds), 0, 1)
    hard = np.where(rng.random(problems) < together, rng.random(problems), rng.random((seeds, problems)))
    return (hard < accuracy[:, None]).astype(float)


def truth(mean: float, sd: float) -> float:
    return float(np.clip(np.random.default_rng(1).normal(mean, sd, 200_000), 0, 1).mean())


@pytest.mark.parametrize("sd", [0.05, 0.2])
@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
def test_three_seeds_cover_the_truth(sd, together):
    """
    Accuracy, gain and share of the reference's gain, 1,000 experiments each: at least 0.93 hold the truth.
    (The percentile bootstrap over seeds and problems held 0.81 of the accuracies at a deviation of 0.2.)
    """
    rng = np.random.default_rng(0)
    expected, base_mean, full_mean, count = truth(0.65, sd), 0.1, 0.85, 1000
    share = (expected - base_mean) / (truth(full_mean, 0.05) - base_mean)
    held = Counter()
    for _ in range(count):
        ours, base = trial(rng, 3, sd, 0.65, together), trial(rng, 1, 0, base_mean, together)
        full = trial(rng, 3, 0.05, full_mean, together)
        found = {
            "accuracy": (scores.estimate(ours), expected),
            "gain": (scores.compare(ours, base).difference, expected - base_mean),
            "share": (scores.gain_share(ours, base, full), share),
        }
        for name, (estimate, value) in found.items():
            # None is an interval without ends, which holds everything
            held[name] += estimate is None or estimate.low <= value <= estimate.high
    assert min(held.values()) / count >= 0.93, held


@pytest.mark.parametrize("sd", [0.05, 0.2])
def test_two_equal_methods_are_rarely_told_apart(sd):
    """Three seeds each: at most 5 % of verdicts are false (three standard errors of 1,000 above)."""
    rng = np.random.default_rng(4)
    false = 0
    for _ in range(1000):
        one, other = (trial(rng, 3, sd, 0.65, 0.5) for _ in range(2))
        false += scores.compare(one, other).verdict != scores.UNDECIDED
    assert false / 1000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_intervals_hold_their_level():
    """One seed, 8 samples: of 1,000 experiments about 5 % miss the truth (plus three standard errors)."""
    rng = np.random.default_rng(9)
    truth, missed = 0.4, 0
    for _ in range(1000):
        chance = rng.beta(0.8, 1.2, 80)  # of mean 0.4
        found = scores.estimate((rng.random((80, 8)) < chance[:, None]).mean(1)[None])
        missed += not found.low <= truth <= found.high
    assert missed / 1000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_intervals_stay_in_their_range_and_hold_their_value(seeds, problems, seed):
    rng = np.random.default_rng(seed)
    values, base = (rng.integers(0, 3, (seeds, problems)) / 2 for _ in range(2))
    found, difference = scores.estimate(values), scores.compare(values, base)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert -1 <= difference.difference.low <= difference.difference.value <= difference.difference.high <= 1
    assert 0 < difference.p <= 1


def test_estimate_never_claims_certainty():
    for value in (0.0, 1.0, 0.5):
        found = scores.estimate(np.full((1, 20), value))
        assert found.high - found.low > 0.1
    greedy = scores.estimate(np.array([[1.0, 0, 1, 1]]))
    assert greedy == scores.share(3, 4)


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
    assert same.difference.high == -same.difference.low == scores.share(0, 100).high


@pytest.mark.parametrize("problems", range(1, 6))
def test_a_handful_of_problems_is_never_enough(problems):
    """The interval alone would call it better: from two problems on it leaves out zero."""
    values = np.linspace(0.8, 1, problems + 1)[None, 1:]
    found = scores.compare(values, np.zeros((1, problems)))
    assert found.difference.low > 0 or problems == 1
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

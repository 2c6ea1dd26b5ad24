"""Intervals and tests against their defining equations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.stats import benjamini_hochberg, mcnemar, sign_flip, t_quantile, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 75), (69, 75), (75, 75), (1, 1), (13, 40)])
def test_wilson_solves_its_equation(right, n):
    low, high = wilson(right, n)
    p = right / n
    for bound in (low, high):  # (p - b)^2 = z^2 b (1 - b) / n, or an end of the scale
        off = (p - bound) ** 2 - 1.959963984540054**2 * bound * (1 - bound) / n
        assert abs(off) < 1e-12 or bound in (0.0, 1.0)
    assert low <= p <= high


def test_quantiles_are_those_of_the_tables():
    # the tables have three digits
    for df, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (74, 1.993)):
        assert t_quantile(df) == pytest.approx(expected, abs=5e-4)
    assert t_quantile(2, 0.01) == pytest.approx(9.925, abs=5e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_benjamini_hochberg_rejects_what_the_step_up_rule_does(p):
    corrected = benjamini_hochberg(p)
    for level in (0.01, 0.05, 0.3):
        ranked = sorted(p)
        passing = [rank for rank, value in enumerate(ranked, 1) if value <= rank / len(p) * level]
        limit = ranked[max(passing) - 1] if passing else -1
        for value, q in zip(p, corrected, strict=True):
            if abs(q - level) > 1e-12:
                assert (q <= level) == (value <= limit)


def test_no_tests_need_no_correction():
    assert benjamini_hochberg([]) == []


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (9, 3), (40, 12)])
def test_mcnemar_is_the_sign_flip_test_and_the_sum_of_outcomes_no_likelier(gained, lost):
    n = gained + lost
    # second implementation: the two-sided binomial test as a sum over outcomes no likelier than this one
    weights = [math.comb(n, i) for i in range(n + 1)]
    expected = sum(w for w in weights if w <= weights[gained]) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-12)
    d = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 5)
    # exact up to 14 differences; above, four standard errors of 10,000 draws
    tolerance = 1e-12 if n <= 14 else 4 * math.sqrt(expected * (1 - expected) / 10_000) + 1e-4
    assert abs(sign_flip(d) - expected) <= tolerance


def test_sign_flip_goes_through_all_signs():
    d = np.random.default_rng(0).normal(0.5, 1, 8)
    sums = [abs(np.dot(s, d)) for s in itertools.product((1, -1), repeat=8)]
    assert sign_flip(d) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))
    assert sign_flip(np.zeros(4)) == 1

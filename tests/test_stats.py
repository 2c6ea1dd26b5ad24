"""Intervals and tests against their defining equations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.stats import benjamini_hochberg, t_quantile, wilson


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

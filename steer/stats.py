"""Statistics that several reports share: two-sided 95 % intervals and tests, by scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special, stats

LEVEL = 0.05
RESAMPLES = 10_000  # of the sign flip test: all assignments of signs up to 13 differences, then random ones


def wilson(hits: float, count: int) -> tuple[float, float]:
    """
    The 95 % score interval of a share (Wilson 1927).

    Args:
        hits: number of successes; a number that is not whole is rounded, since scipy counts trials.
        count: number of trials, 1 or more.

    Returns:
        Lower and upper end, in [0, 1], the share between them.
    """
    interval = stats.binomtest(round(hits), count).proportion_ci(1 - LEVEL, method="wilson")
    # rounding leaves an end that should be 0 or 1 beside it
    return min(float(interval.low), hits / count), max(float(interval.high), hits / count)


def t_quantile(df: float, level: float = LEVEL) -> float:
    """The value that the absolute value of Student's t with `df` degrees of freedom exceeds with `level`."""
    return float(special.stdtrit(df, 1 - level / 2))


def mcnemar(gained: int, lost: int) -> float:
    """
    Exact two-sided p-value that gains and losses among paired right-or-wrong answers are equally likely
    (McNemar 1947): the binomial test of one half. 1 where there is neither.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip(differences: np.ndarray) -> float:
    """
    Two-sided p-value of the mean of paired `differences` (problems,) when each could as well have had the
    other sign (Fisher's randomisation test). Exact for few differences, else from 10,000 random draws; for
    differences of -1, 0 and 1 it is McNemar's test.
    """
    d = differences[differences != 0]
    if len(d) < 2:  # both signs of one are as large
        return 1.0
    test = stats.permutation_test(
        (d,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """
    Each p-value corrected for the number of tests (Benjamini and Hochberg 1995): of the tests that are below
    0.05, 5 % are expected to be false.
    """
    return np.atleast_1d(stats.false_discovery_control(p)).tolist() if len(p) else []

"""Statistics that several reports share: two-sided 95 % intervals and tests, by scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special, stats

LEVEL = 0.05


def wilson(hits: float, count: int) -> tuple[float, float]:
    """
    The 95 % score interval of a share (Wilson 1927).

    Args:
        hits: number of successes; a number that is not whole is rounded, since scipy counts trials.
        count: number of trials, 1 or more.

    Returns:
        Lower and upper end, in [0, 1].
    """
    found = stats.binomtest(round(hits), count).proportion_ci(1 - LEVEL, method="wilson")
    return float(found.low), float(found.high)


def t_quantile(df: float, level: float = LEVEL) -> float:
    """The value that the absolute value of Student's t with `df` degrees of freedom exceeds with `level`."""
    return float(special.stdtrit(df, 1 - level / 2))


def mcnemar(gained: int, lost: int) -> float:
    """
    Exact two-sided p-value that gains and losses among paired right-or-wrong answers are equally likely
    (McNemar 1947): the binomial test of one half. 1 where there is neither.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """
    Each p-value corrected for the number of tests (Benjamini and Hochberg 1995): of the tests that are below
    0.05, 5 % are expected to be false.
    """
    return np.atleast_1d(stats.false_discovery_control(p)).tolist() if len(p) else []

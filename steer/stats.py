"""Statistics that several reports share: two-sided 95 % intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LEVEL = 0.05
_Z = 1.959963984540054  # of the normal distribution, two-sided 95 %


def wilson(hits: float, count: int) -> tuple[float, float]:
    """
    The 95 % score interval of a share (Wilson 1927).

    Args:
        hits: number of successes.
        count: number of trials, 1 or more.

    Returns:
        Lower and upper end, in [0, 1].
    """
    p = hits / count
    centre = (p + _Z * _Z / (2 * count)) / (1 + _Z * _Z / count)
    half = _Z * math.sqrt(p * (1 - p) / count + _Z * _Z / (4 * count * count)) / (1 + _Z * _Z / count)
    # min and max with p, because rounding leaves an end that should be 0 or 1 beside it
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


@lru_cache(maxsize=256)
def _t_table(df: int) -> tuple[Array, Array]:
    """
    Values of Student's t, falling, and the logarithm of the chance of a larger one on either side: Abramowitz
    and Stegun, equations 26.7.3 and 26.7.4.
    """
    t = np.concatenate([np.geomspace(1e7, 1e-4, 20_000), [0.0]])
    angle = np.arctan2(t, math.sqrt(df))
    sine, cosine = np.sin(angle), np.cos(angle)
    odd = df % 2
    term = cosine if odd else np.ones_like(cosine)
    total = term.copy() if df > 1 else np.zeros_like(cosine)
    for n in range(2 if odd else 1, df - 1, 2):
        term = term * (n / (n + 1)) * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return np.log(np.clip(1 - inside, 1e-300, 1.0)), t


def t_quantile(df: int, level: float = LEVEL) -> float:
    """The value that the absolute value of Student's t with `df` degrees of freedom exceeds with `level`."""
    return float(np.interp(math.log(level), *_t_table(df)))


def mcnemar(gained: int, lost: int) -> float:
    """
    Exact two-sided p-value that gains and losses among paired right-or-wrong answers are equally likely
    (McNemar 1947): the binomial test of one half. 1 where there is neither.
    """
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """
    Each p-value corrected for the number of tests (Benjamini and Hochberg 1995): of the tests that are below
    0.05, 5 % are expected to be false.
    """
    order = sorted(range(len(p)), key=lambda index: p[index])
    corrected, least = [0.0] * len(p), 1.0
    for rank in range(len(p), 0, -1):
        index = order[rank - 1]
        least = min(least, p[index] * len(p) / rank)
        corrected[index] = least
    return corrected

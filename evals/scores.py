"""
Scores and how sure they are. Arrays only: nothing here knows of models, files or pages.

`correct` is boolean of shape (problems, samples). Uncertainty is over problems, which are resampled whole
with all their samples, so that it holds for other problems of the same kind; where a method was trained
with several seeds, those are resampled too, independently of the problems.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RESAMPLES = 10_000
LEVEL = 0.05
# Resampled at once: bounds the memory at a few tens of megabytes for a thousand problems.
_CHUNK = 1000
# Up to this many differences other than zero, every assignment of signs is gone through.
_EXACT = 14
_Z = 1.959963984540054  # of the normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """
    A paired difference to the base: `verdict` is "better" or "worse" only when interval and test say so.
    """

    difference: Estimate
    p: float
    verdict: str


BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


# ---- one problem at a time


def avg_at_k(correct: Array) -> Array:
    """Share of right samples of each problem, (problems,)."""
    return np.asarray(correct, float).mean(1)


def pass_at_k(correct: Array, k: int) -> Array:
    """
    Chance that k samples drawn without replacement hold a right one, (problems,): 1 - C(n-c, k) / C(n, k)
    for c right ones of n (Chen et al. 2021, arXiv 2107.03374, equation 1). ValueError unless 1 <= k <= n.
    """
    problems, n = correct.shape
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples")
    wrong = n - np.asarray(correct, bool).sum(1)
    drawn = np.arange(k)
    return 1.0 - (np.clip(wrong[:, None] - drawn, 0, None) / (n - drawn)).prod(1).reshape(problems)


def maj_at_k(correct: Array, answers: Sequence[Sequence[str | None]]) -> Array:
    """
    Whether the most frequent answer of each problem is right, (problems,). Missing answers have no vote; of
    tied answers each counts its share. Right answers count as one answer however they are written, wrong ones
    as one when they are the same number or the same text.
    """
    right = np.asarray(correct, bool)
    codes = np.array([_codes(row, given) for row, given in zip(right, answers, strict=True)])
    voting = codes >= 0
    votes = ((codes[:, :, None] == codes[:, None, :]) & voting[:, None, :]).sum(2) * voting
    winning = (votes == votes.max(1, keepdims=True)) & voting
    return (winning & right).sum(1) / np.maximum(winning.sum(1), 1)


def _codes(correct: Array, answers: Sequence[str | None]) -> list[int]:
    seen: dict[str | Fraction | None, int] = {}
    return [
        0 if right else -1 if answer is None else 1 + seen.setdefault(canonical(answer), len(seen))
        for right, answer in zip(correct, answers, strict=True)
    ]


def canonical(answer: str) -> str | Fraction:
    r"""
    A number where `answer` is one ("1,000", "1/2", "\frac{1}{2}", "0.50"), else its text without spaces.
    """
    text = re.sub(r"\s|\$|\\[!,;]|\\left|\\right", "", answer).replace("\\dfrac", "\\frac")
    plain = re.sub(r"\\t?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", re.sub(r",(?=\d{3}(?!\d))", "", text))
    if len(plain) < 100 and re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+|\d+/\d+)", plain, re.ASCII):
        top, _, bottom = plain.partition("/")
        if not bottom or int(bottom):
            return Fraction(plain if bottom else top)
    return text


# ---- over problems


def wilson(right: float, n: int) -> Estimate:
    """Share with its score interval (Wilson 1927)."""
    p = right / n
    centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n)) / (1 + _Z * _Z / n)
    # min and max with p, because rounding leaves an end that should be 0 or 1 beside it
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def bootstrap(values: Array, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """
    Means of `values` (seeds, problems) under resampling of both, (resamples,). The same `seed` draws the same
    problems whatever the number of training seeds, so the results for two methods are paired.
    """
    seeds, problems = values.shape
    of_problems, of_seeds = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    means = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        weights = of_problems.multinomial(problems, np.full(problems, 1 / problems), size)
        rows = of_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), size) @ values
        means.append((rows * weights).sum(1) / (seeds * problems))
    return np.concatenate(means)


def estimate(values: Array) -> Estimate:
    """
    Mean of `values` (seeds, problems), each in [0, 1]. One right-or-wrong answer a problem gets Wilson's
    interval; all else the bootstrap's percentiles, unless every value is the same: resampling sees no spread
    there, and the interval is again Wilson's, over problems.
    """
    value, problems = float(values.mean()), values.shape[1]
    if (len(values) == 1 and np.isin(values, (0.0, 1.0)).all()) or np.ptp(values) == 0:
        return wilson(value * problems, problems)
    low, high = np.percentile(bootstrap(values), (50 * LEVEL, 100 - 50 * LEVEL))
    return Estimate(value, float(low), float(high))


def mcnemar(gained: int, lost: int) -> float:
    """
    Exact two-sided p-value that gains and losses among paired right-or-wrong answers are equally likely
    (McNemar 1947): the binomial distribution of the smaller count at one half.
    """
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def sign_flip(differences: Array, seed: int = 0) -> float:
    """
    Two-sided p-value of the mean of paired `differences` (problems,) when each could as well have had the
    other sign (Fisher's randomisation test). Exact for few differences, else from 10,000 random draws; for
    differences of -1, 0 and 1 it is McNemar's test.
    """
    d = differences[differences != 0]
    observed = abs(d.sum()) * (1 - 1e-9)  # sums in another order differ in the last bits
    if len(d) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((abs(signs @ d) >= observed).mean())
    rng = np.random.default_rng([seed, 3])
    hits = 0
    for start in range(0, RESAMPLES, _CHUNK):
        size = min(_CHUNK, RESAMPLES - start)
        hits += int(
            (abs((1 - 2.0 * rng.integers(0, 2, (size, len(d)), dtype=np.int8)) @ d) >= observed).sum()
        )
    return (1 + hits) / (1 + RESAMPLES)


def compare(values: Array, base: Array) -> Comparison:
    """
    `values` (seeds, problems) against `base` (base seeds, problems) on the same problems in the same order.

    The interval is the paired bootstrap's; the p-value McNemar's exact one for single right-or-wrong answers
    and the sign flip test's elsewhere. Both must clear 5 % for a verdict: an interval from a handful of
    problems is too narrow, and the test is not fooled by that.
    """
    d = values - base.mean(0, keepdims=True)
    low, high = np.percentile(bootstrap(d), (50 * LEVEL, 100 - 50 * LEVEL))
    if np.ptp(d) == 0:
        # resampling sees no spread: let the share of problems that Wilson allows be as different as can be
        spread = wilson(0, d.shape[1]).high
        low, high = d.mean() + spread * np.array([-1 - d.mean(), 1 - d.mean()])
    single = len(values) == len(base) == 1 and np.isin(values, (0, 1)).all() and np.isin(base, (0, 1)).all()
    p = mcnemar(int((d > 0).sum()), int((d < 0).sum())) if single else sign_flip(d.mean(0))
    verdict = UNDECIDED
    if p < LEVEL:
        verdict = BETTER if low > 0 else WORSE if high < 0 else UNDECIDED
    return Comparison(Estimate(float(d.mean()), float(low), float(high)), p, verdict)


def gain_share(values: Array, base: Array, reference: Array) -> Estimate | None:
    """
    What share of the reference's gain over the base `values` get, all (seeds, problems) on the same problems.
    The interval is a paired bootstrap's; None when the reference is not shown to be better than the base.
    """
    if compare(reference, base).verdict != BETTER:
        return None
    ours, theirs = values - base.mean(0, keepdims=True), reference - base.mean(0, keepdims=True)
    bottom = bootstrap(theirs)
    ratios = bootstrap(ours) / np.where(bottom > 0, bottom, np.nan)
    low, high = np.nanpercentile(ratios, (50 * LEVEL, 100 - 50 * LEVEL))
    if np.ptp(ours) == 0:  # no spread to resample: see `compare`
        gain = compare(values, base).difference
        low, high = gain.low / theirs.mean(), gain.high / theirs.mean()
    return Estimate(float(ours.mean() / theirs.mean()), float(low), float(high))

"""
Scores and how sure they are. Arrays only: nothing here knows of models, files or pages.

`correct` is boolean of shape (problems, samples). Intervals hold for other problems of the same kind and, for
a method that was trained with several seeds, for other seeds: both are random effects. With one seed an
interval is over problems alone, and says nothing of what another seed of the same method would give.

The interval of a mean of S seeds and P problems is

    mean +- sqrt(t(S - 1)^2 V_seeds / S + t(P - 1)^2 V_problems / P)

where V_seeds is the variance of the seeds' means, V_problems that of the problems' means, and t(n) the 97.5 %
point of Student's t with n degrees of freedom. Each variance has its own quantile: S - 1 degrees of freedom
for the seeds, P - 1 for the problems. For normally distributed means the coverage is at least 95 % whatever
the two variances (Banerjee 1960, "Approximate confidence interval for linear functions of means of k
populations when the population variances are not equal", Sankhya 22). The interaction of seeds and problems
is in both variances, which makes the interval wider, never narrower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from scipy import optimize

from steer.stats import LEVEL, mcnemar, sign_flip, t_quantile, wilson

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """
    A paired difference of two methods: `verdict` is "better" or "worse" only when interval and test say so.
    """

    difference: Estimate
    p: float
    verdict: str


BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


# ---- one problem at a time


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
        0 if right else 1 + seen.setdefault(canonical(answer), len(seen)) if answer and answer.strip() else -1
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


# ---- over problems and seeds


def share(right: float, n: int) -> Estimate:
    """`right` of `n` answers as a share with its Wilson interval."""
    return Estimate(right / n, *wilson(right, n))


# A part of the variance of a mean, with its degrees of freedom.
Part = tuple[float, int]


def _of_seeds(values: Array) -> list[Part]:
    """What training seeds add to the variance of the mean of `values` (seeds, problems); nothing for one."""
    seeds = len(values)
    return [(float(values.mean(1).var(ddof=1)) / seeds, seeds - 1)] if seeds > 1 else []


def _of_problems(means: Array) -> list[Part]:
    """What problems add to the variance of the mean of `means` (problems,); unknown for one problem."""
    problems = len(means)
    return [(float(means.var(ddof=1)) / problems if problems > 1 else math.inf, max(1, problems - 1))]


def _half_width(parts: Sequence[Part], level: float = LEVEL) -> float:
    """Half of the interval of a mean with these parts of variance."""
    return math.sqrt(sum(t_quantile(df, level) ** 2 * variance for variance, df in parts))


def _p_value(mean: float, parts: Sequence[Part]) -> float:
    """The level at which the interval of `mean` ends at zero: the test that belongs to the interval."""

    def reach(level: float) -> float:
        return _half_width(parts, level) - abs(mean)

    if mean == 0 or not math.isfinite(_half_width(parts)):
        return 1.0
    least = 1e-12
    if reach(least) <= 0:
        return least
    return float(optimize.brentq(reach, least, 1.0))


def estimate(values: Array) -> Estimate:
    """
    Mean of `values` with its interval.

    Args:
        values: (seeds, problems), each in [0, 1].

    Returns:
        The interval above, cut to [0, 1]; over problems alone for one seed. One right-or-wrong answer a
        problem gets Wilson's interval, and so do values that are all the same, which show no variance.
    """
    value, problems = float(values.mean()), values.shape[1]
    if (len(values) == 1 and np.isin(values, (0.0, 1.0)).all()) or np.ptp(values) == 0:
        return share(value * problems, problems)
    half = _half_width(_of_seeds(values) + _of_problems(values.mean(0)))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def compare(values: Array, base: Array) -> Comparison:
    """
    Two methods on the same problems in the same order: `values` minus `base`, paired over the problems.

    Args:
        values: (seeds, problems), each in [0, 1].
        base: (base seeds, problems). Seeds of the two are independent, whatever their numbers.

    Returns:
        The difference with its interval, cut to [-1, 1], a p-value and a verdict. With several seeds on
        either side the interval is over seeds and problems, and the p-value is the level at which it ends at
        zero. With one seed on each side both are over problems alone; the p-value is McNemar's exact one for
        single right-or-wrong answers and the sign flip test's elsewhere. For a verdict interval and
        p-value must both clear 5 %.
    """
    d = values.mean(0) - base.mean(0)
    mean = float(d.mean())
    seeds = _of_seeds(values) + _of_seeds(base)
    parts = seeds + _of_problems(d)
    half = _half_width(parts)
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    if half == 0:  # no variance to see: the share of problems that Wilson allows may differ as far as can be
        _, spread = wilson(0, len(d))
        low, high = mean + spread * (-1 - mean), mean + spread * (1 - mean)
    if half == 0 or not seeds:
        binary = len(values) == len(base) == 1 and np.isin([values, base], (0, 1)).all()
        p = mcnemar(int((d > 0).sum()), int((d < 0).sum())) if binary else sign_flip(d)
    else:
        p = _p_value(mean, parts)
    return Comparison(Estimate(mean, low, high), p, verdict(low, high, p))


def verdict(low: float, high: float, p: float) -> str:
    """What an interval of a difference and its p-value, corrected or not, say together."""
    if p < LEVEL:
        return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED
    return UNDECIDED


def gain_share(values: Array, base: Array, reference: Array) -> Estimate | None:
    """
    The share of the reference's gain over the base that another method gets: (values - base) / (reference -
    base).

    Args:
        values: the method's verdicts, (seeds, problems).
        base: the base's, on the same problems in the same order.
        reference: the reference's, likewise.

    Returns:
        The share with its interval by Fieller's theorem (1954): all shares r for which the interval of
        values - base - r (reference - base) holds zero, with the variances of `compare`. None when the
        reference is not shown to be better than the base, since the interval is then unbounded.
    """
    if compare(reference, base).verdict != BETTER:
        return None
    ours, theirs = values.mean(0) - base.mean(0), reference.mean(0) - base.mean(0)
    top, bottom = float(ours.mean()), float(theirs.mean())
    # coefficients of r^2, -2 r and 1 in the square of the mean less that of the interval's half width
    square, mixed, constant = bottom**2, top * bottom, top**2

    def take(parts: list[Part], of_square: float, of_mixed: float, of_constant: float) -> None:
        nonlocal square, mixed, constant
        for variance, df in parts:
            allowed = t_quantile(df) ** 2 * variance
            square -= allowed * of_square
            mixed -= allowed * of_mixed
            constant -= allowed * of_constant

    take(_of_seeds(values), 0, 0, 1)
    take(_of_seeds(reference), 1, 0, 0)
    take(_of_seeds(base), 1, 1, 1)
    problems = len(ours)
    covariance = np.cov(ours, theirs) / problems
    take([(1.0, problems - 1)], covariance[1, 1], covariance[0, 1], covariance[0, 0])
    if square <= 0:
        return None
    root = math.sqrt(max(0.0, mixed**2 - square * constant))
    low, high = (mixed - root) / square, (mixed + root) / square
    if np.ptp(ours) == 0 and len(values) == 1:  # no variance to see: see `compare`
        gain = compare(values, base).difference
        low, high = gain.low / bottom, gain.high / bottom
    return Estimate(top / bottom, low, high)

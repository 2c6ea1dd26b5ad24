"""Several sets of random vectors of equal length: the null distribution of a number of the trained ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from steer.errors import SteerError
from steer.lens.controls import random_vectors, values
from steer.stats import LEVEL
from steer.vectors import SteeringVectors

T = TypeVar("T")
LEAST = 19  # draws with which an empirical p-value of one side, rank / (draws + 1), can be 0.05
ONE_SIDED_DRAWS = 20  # `LEAST` or more
TWO_SIDED_DRAWS = 40  # of 39 or more, a two-sided p-value can be 0.05


def with_random_sets(vectors: SteeringVectors, measure: Callable[[], T], draws: int, seed: int) -> list[T]:
    """
    Call `measure` with random vectors of equal length in the place of `vectors`, which are put back.

    Args:
        draws: Number of sets, 1 or more.
        seed: The sets are drawn with the seeds `seed` + 1, `seed` + 2 and so on.

    Returns:
        What `measure` returned, one a set.

    Raises:
        SteerError: `draws` is less than 1.
    """
    if draws < 1:
        raise SteerError(f"{draws} random sets are no control; give a number from 1")
    found = []
    for n in range(draws):
        with values(vectors, random_vectors(vectors, seed + 1 + n)):
            found.append(measure())
    return found


def two_sided_p(value: float, null: Sequence[float]) -> float:
    """
    Two-sided p-value of `value` by its rank among the values of a null distribution: twice the smaller tail,
    the value itself counted, at most 1. NaN where `value` or one of the null is NaN.
    """
    if math.isnan(value) or any(math.isnan(x) for x in null):
        return math.nan
    below, above = sum(x <= value for x in null), sum(x >= value for x in null)
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(null)))


@dataclass(frozen=True)
class Null:
    """
    What random draws give for a number.

    Args:
        values: one number a draw.
        larger: whether larger numbers are the effect; otherwise smaller ones are.
    """

    values: tuple[float, ...]
    larger: bool = True

    @classmethod
    def of(cls, values: Iterable[float], larger: bool = True) -> Null:
        """The null distribution of those `values` that are finite."""
        return cls(tuple(float(value) for value in values if math.isfinite(value)), larger)

    @property
    def enough(self) -> bool:
        """Whether there are so many draws that the p-value can be 0.05."""
        return len(self.values) >= LEAST

    @property
    def quantile(self) -> float:
        """The 95th percentile, or the 5th where smaller numbers are the effect."""
        return float(np.quantile(self.values, 1 - LEVEL if self.larger else LEVEL))

    def rank(self, value: float) -> int:
        """The place of `value` among itself and the draws, 1 for the strongest; ties count against it."""
        return 1 + sum(one >= value if self.larger else one <= value for one in self.values)

    def p(self, value: float) -> float:
        """The empirical p-value of `value`: rank / (draws + 1)."""
        return self.rank(value) / (1 + len(self.values))

    def exceeded(self, value: float, margin: float = 0.0) -> bool:
        """
        Whether `value` is beyond what random vectors do: an empirical p-value of 0.05 or less, and `margin`
        or more beyond `quantile`.
        """
        beyond = value - self.quantile if self.larger else self.quantile - value
        return self.p(value) <= LEVEL and beyond >= margin

    def to_dict(self, value: float) -> dict[str, float]:
        """Draws, mean, lowest, highest and quantile, and the rank and p-value of `value`."""
        return {
            "draws": len(self.values),
            "mean": float(np.mean(self.values)),
            "low": min(self.values),
            "high": max(self.values),
            "quantile": self.quantile,
            "rank": self.rank(value),
            "p": self.p(value),
        }

"""The null distribution of a number: the same number of random vectors of equal length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from steer.stats import LEVEL

DRAWS = 20  # sets of random vectors
LEAST = 19  # draws with which an empirical p-value, rank / (draws + 1), can be 0.05


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

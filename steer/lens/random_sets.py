"""Several sets of random vectors: the null distribution of a statistic of the trained ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from steer.errors import SteerError
from steer.lens.controls import random_vectors, values
from steer.vectors import SteeringVectors

T = TypeVar("T")
DRAWS = 40  # of 39 or more, a two-sided p-value can be 0.05


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

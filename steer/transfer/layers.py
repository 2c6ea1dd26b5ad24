"""
Which layer of the recipient stands for which of the donor: by relative depth, or by likeness.

A match is (donor layer, recipient layer, share). The shares of a donor layer sum to 1, so the sum of all that
is added to the stream stays the donor's, whatever the two depths are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Match(NamedTuple):
    donor: int
    recipient: int
    share: float


def by_depth(layers: Sequence[int], depth: int, other: int) -> list[Match]:
    """
    Match `layers` of a donor of `depth` layers to a recipient of `other` layers by relative depth.

    Into a model that is as deep or shallower, layer i goes to round(i (other - 1) / (depth - 1)); where
    several meet, their vectors add up. Into a deeper one, every recipient layer j listens to the donor layer
    round(j (depth - 1) / (other - 1)), and those that listen to one layer share its vector equally: the same
    sum, spread over the same stretch of depth.
    """
    if other <= depth:
        return [Match(i, _nearest(i, depth, other), 1.0) for i in layers]
    listeners: dict[int, list[int]] = {}
    for j in range(other):
        listeners.setdefault(_nearest(j, other, depth), []).append(j)
    return [Match(i, j, 1 / len(listeners[i])) for i in layers for j in listeners[i]]


def by_likeness(layers: Sequence[int], other: int, likeness: Mapping[tuple[int, int], float]) -> list[Match]:
    """
    Match `layers` to the recipient layers that resemble them most in total, later ones never before earlier
    ones. `likeness` holds a number, such as CKA, for every pair (donor layer, recipient layer).
    """
    best = [0.0] * other  # the best total with the layers so far, the last of them at or before j
    choices: list[list[int]] = []
    for i in layers:
        total: list[float] = []
        chosen: list[int] = []
        for j in range(other):
            here = best[j] + likeness[i, j]
            better = j == 0 or here > total[-1]
            total.append(here if better else total[-1])
            chosen.append(j if better else chosen[-1])
        best = total
        choices.append(chosen)
    matches: list[Match] = []
    j = other - 1
    for i, chosen in zip(reversed(layers), reversed(choices), strict=True):
        j = chosen[j]
        matches.append(Match(i, j, 1.0))
    return matches[::-1]


def _nearest(layer: int, depth: int, other: int) -> int:
    """round(layer (other - 1) / (depth - 1)) with halves upwards."""
    steps = max(depth - 1, 1)
    return (2 * layer * (other - 1) + steps) // (2 * steps)

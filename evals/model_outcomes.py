"""What a check of a model comes to, and the comparison with an oracle that decides it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Relative to the largest logit or gradient. float32 sums in another order give 1e-6 to 1e-5; a wrong
# position, mask or vector 1e-3 or more.
TOLERANCE = 1e-4
STATES = ("works", "plain path", "refused", "not run", "not built", "wrong", "crash")


class Wrong(Exception):
    """A result that differs from the oracle's."""


@dataclass(frozen=True)
class Outcome:
    """What became of one check: one of `STATES`, and why where it is not "works"."""

    state: str
    why: str = ""


def far(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise `Wrong` where they differ by more than `TOLERANCE`."""
    distance = far(actual, expected)
    if not distance <= TOLERANCE:
        raise Wrong(f"{what} differ from the oracle's by {distance:.2g} of the largest")

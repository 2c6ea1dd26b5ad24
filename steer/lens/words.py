"""Numbers and tokens as the sentences of a report put them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from steer.lens.study import Report


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def quoted(tokens: Sequence[str]) -> str:
    """Tokens in quotation marks, joined as in a sentence."""
    return joined([f"“{token}”".replace("\n", "↵") for token in tokens])


def joined(parts: Sequence[str]) -> str:
    """The parts as in a sentence: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def mean(values: torch.Tensor) -> float:
    return values.double().mean().item()


def known_mean(values: torch.Tensor) -> float | None:
    """The mean of those that are numbers; None where none is."""
    known = values[~values.isnan()]
    return known.double().mean().item() if len(known) else None


def null_range(report: Report, name: str, show: Callable[[float], str] = "{:.2f}".format) -> str:
    """What random draws give for a number: the mean, and the lowest and highest of how many draws."""
    null = report.nulls.get(name)
    if null is None or not null.values:
        return "not measured"
    mean, low, high = (
        show(x) for x in (sum(null.values) / len(null.values), min(null.values), max(null.values))
    )
    return f"{mean} on average, {low} to {high} in {len(null.values)} draws"


def number(report: Report, name: str) -> float:
    """A number that the findings are judged by; NaN where it was not measured."""
    value = report.numbers.get(name)
    return math.nan if value is None else value

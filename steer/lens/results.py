"""What all results share: plain data that turns into JSON, and small statistics."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Result:
    """A dataclass of numbers, tensors and tokens."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; a tensor as nested lists, with None for what is not a number."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    def figure(self) -> Figure:
        """The result as a matplotlib figure."""
        raise NotImplementedError

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write the figure to `path`, as its suffix says (.png, .svg, .pdf)."""
        from steer.lens.plots import save

        return save(self.figure(), path)


def plain(value: object) -> Any:
    """`value` in JSON types: tensors, tuples, sets, mappings and dataclasses too."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Result):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def share(part: torch.Tensor, whole: torch.Tensor | float) -> torch.Tensor:
    """`part` / `whole` where the whole is above 0, a gain; NaN elsewhere, since a loss has no shares."""
    whole = torch.as_tensor(whole, dtype=part.dtype)
    return part / torch.where(whole > 0, whole, torch.nan)


def spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(n * (len(items) - 1) / (count - 1))] for n in range(count)]

"""
The queries, keys and values that an attention computes from its input: where they are, head by head, so that
those of single heads can be swapped with those of another run.

They are taken before rotary embeddings, which treat every run alike. Norms of one head come later too; a norm
over all heads at once (OLMo 2) comes before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from steer.errors import SteerError
from steer.sites import matrix_size

PARTS = {"q": "queries", "k": "keys", "v": "values"}
_NAMES = {
    "q": re.compile(r"q(uery)?(_proj|_lin)?"),
    "k": re.compile(r"k(ey)?(_proj|_lin)?"),
    "v": re.compile(r"v(alue)?(_proj|_lin)?"),
}
_NORMS = {part: re.compile(rf"{part}_(layer)?norm") for part in PARTS}
_SIDE_BY_SIDE = re.compile(r"qkv_proj|c_attn|Wqkv")  # all queries, then all keys, then all values
_BY_HEAD = re.compile(r"query_key_value")  # query, key and value of the first head, then of the second


@dataclass(frozen=True)
class Projection:
    """
    Queries, keys or values of one attention, in what a module returns.

    Args:
        module: returns (batch, tokens, width).
        heads: how many it computes: query heads, or key-value heads.
        columns: the columns of the width that they have, head after head.
        each: None; or, where a head has query, key and value side by side, which of the three it is.
    """

    module: nn.Module
    heads: int
    columns: slice
    each: int | None = None

    def split(self, output: torch.Tensor) -> torch.Tensor:
        """A view of the output, (batch, tokens, heads, head size)."""
        if self.each is not None:
            return output[..., self.columns].unflatten(-1, (self.heads, 3, -1))[..., self.each, :]
        return output[..., self.columns].unflatten(-1, (self.heads, -1))


def projections(attention: nn.Module, heads: int, groups: int) -> dict[str, Projection]:
    """
    Where an attention's queries, keys and values are.

    Args:
        attention: the module.
        heads: its query heads.
        groups: its key-value heads.

    Returns:
        By key of `PARTS`.

    Raises:
        SteerError: an attention that computes them in another way, such as from a compressed state.
    """
    children = {name: module for name, module in attention.named_children() if matrix_size(module)}
    own = {part: _only(children, pattern) for part, pattern in _NAMES.items()}
    counts = {"q": heads, "k": groups, "v": groups}
    if all(name is not None for name in own.values()):
        widths = {part: _width(children[str(name)]) for part, name in own.items()}
        sizes = {part: widths[part] / counts[part] for part in PARTS}
        if sizes["q"] == sizes["k"] and all(size.is_integer() for size in sizes.values()):
            return {
                part: Projection(
                    _norm(attention, part, widths[part]) or children[str(name)],
                    counts[part],
                    slice(None),
                )
                for part, name in own.items()
            }
    fused = [
        (name, module) for name, module in children.items() if _width(module) % (heads + 2 * groups) == 0
    ]
    for name, module in fused:
        size = _width(module) // (heads + 2 * groups)
        if _SIDE_BY_SIDE.fullmatch(name):
            ends = [0, heads * size, (heads + groups) * size, (heads + 2 * groups) * size]
            return {
                part: Projection(module, counts[part], slice(ends[n], ends[n + 1]))
                for n, part in enumerate(PARTS)
            }
        if _BY_HEAD.fullmatch(name) and heads == groups:
            return {part: Projection(module, heads, slice(None), n) for n, part in enumerate(PARTS)}
    modules = ", ".join(name for name, _ in attention.named_children())
    raise SteerError(
        f"{type(attention).__name__} has no matrices that compute queries of {heads} heads, and keys and "
        f"values of {groups}, from its input (its modules: {modules}); "
        "patch its heads as a whole (--heads without --qkv)"
    )


def _only(children: dict[str, nn.Module], pattern: re.Pattern[str]) -> str | None:
    found = [name for name in children if pattern.fullmatch(name)]
    return found[0] if len(found) == 1 else None


def _width(module: nn.Module) -> int:
    size = matrix_size(module)
    return size[1] if size else 0


def _norm(attention: nn.Module, part: str, width: int) -> nn.Module | None:
    """The norm over all heads of `part` at once, where there is one: one weight for each column."""
    for name, module in attention.named_children():
        weight = getattr(module, "weight", None)
        if _NORMS[part].fullmatch(name) and isinstance(weight, torch.Tensor) and weight.shape == (width,):
            return module
    return None


def dead(live: Sequence[int] | frozenset[int], heads: int) -> list[int]:
    """The heads that are not among those that pass a change on."""
    return [head for head in range(heads) if head not in live]

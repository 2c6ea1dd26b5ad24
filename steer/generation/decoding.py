"""
Next-token logits of rows that grow by one token at a time, in two ways with one interface.

`CachedRows` reads each prompt once and keeps its keys and values, and the states of recurrent layers, in
transformers' `DynamicCache`, whose rows are repeated for a group and dropped when they have ended.
`PlainRows` keeps no cache and reads every row again for each token: slow, and right on every causal model.
`steer.generation.verify` says which of them a model can take.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from steer.compat import cache_name, takes
from steer.generation.preallocated import preallocated_cache
from steer.kinds import select_rows
from steer.sites import input_device

# A common beginning is read separately when that saves as many tokens: each pass costs something of its own.
WORTH_A_PASS = 256

# What the settings of a window are called in transformers' configurations.
_WINDOW = re.compile(r"(?!use_)(\w+_)?window(_size)?|attention_chunk_size|local_attention|index_block_size")


def inputs(
    module: nn.Module, ids: torch.Tensor, mask: torch.Tensor, cache: Cache | None = None, **more: Any
) -> dict[str, Any]:
    """
    Arguments of a forward pass over the last columns of rows of which `mask` tells all columns.

    Args:
        module: A causal LM or its backbone. What its forward does not name is left out.
        ids: (rows, tokens) the tokens to read.
        mask: (rows, columns seen and read) 1 at tokens, 0 at padding.
        cache: What the columns before left in the layers.
        more: Further arguments, left out likewise.
    """
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if cache is not None and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        mask = mask[:, -ids.shape[1] :]  # without attention, it tells of the tokens that are read alone
    arguments = {"attention_mask": mask, "position_ids": position, **more}
    if cache is not None:
        arguments[cache_name(module) or ""] = cache
    return {"input_ids": ids, **{name: value for name, value in arguments.items() if takes(module, name)}}


class Rows(Protocol):
    """Rows of tokens, all at the same time step."""

    def read(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Begin with these rows. Returns the logits of each one's next token, (rows, vocabulary)."""

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these of the rows (indices, repeated as asked)."""

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Append a token (rows,) to each row. Returns the logits of the next, (rows, vocabulary)."""


class CachedRows:
    """
    Rows whose keys, values and recurrent states are cached. Prompts are padded on the left; what all begin
    with is read once where that saves `worth` tokens or more, None for never.
    """

    def __init__(self, model: PreTrainedModel, worth: int | None = None):
        self.model, self.worth = model, worth
        self.device = input_device(model)
        self.cache = preallocated_cache(model.config.get_text_config())

    def read(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        ids, mask = pad_left(prompts, self.device)
        common = common_prefix(ids, mask) if self.worth else 0
        if self.worth and common * (len(ids) - 1) >= self.worth:
            self.mask = mask.new_ones(1, common)
            self._last(ids[:1, mask[0] == 1][:, :common])
            self.select(torch.zeros(len(ids), dtype=torch.long, device=self.device))
            self.mask, ids = without_beginning(mask, common), ids[:, common:]
        else:
            self.mask = mask
        return self._last(ids)

    def select(self, rows: torch.Tensor) -> None:
        # Layers of attention and of linear attention alike can be indexed by it, with repeats.
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        select_rows(self.cache, rows)
        self.mask = self.mask[rows]

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._last(token[:, None])

    def _last(self, ids: torch.Tensor) -> torch.Tensor:
        # By index, which copies: given a view, torch's bfloat16 product on a CPU copies a frozen LM head for
        # every row, 20 GB for a vocabulary of 262,144.
        last = torch.tensor([ids.shape[1] - 1], device=self.device)
        wanted = inputs(self.model, ids, self.mask, self.cache, logits_to_keep=last)
        return self.model(**wanted, use_cache=True).logits[:, -1]


class PlainRows:
    """
    Rows that are read from their beginning for each token. They are padded on the right, where no causal
    model looks. `prompt_length` is called with the length of each row's prompt (rows,) and gives the context
    of a forward pass (`SteeringVectors.prompt_length`).
    """

    def __init__(
        self, model: PreTrainedModel, prompt_length: Callable[[torch.Tensor], AbstractContextManager]
    ):
        self.model = model
        self.prompt_length = prompt_length
        self.device = input_device(model)

    def read(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self.length = torch.tensor([len(row) for row in prompts], device=self.device)
        self.prompt = self.length
        longest = int(self.length.max())
        rows = [list(row) + [0] * (longest - len(row)) for row in prompts]
        self.ids = torch.tensor(rows, device=self.device)
        return self._next()

    def select(self, rows: torch.Tensor) -> None:
        self.ids, self.length, self.prompt = self.ids[rows], self.length[rows], self.prompt[rows]
        self.ids = self.ids[:, : int(self.length.max())]

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.ids = pad(self.ids, (0, 1)).scatter(1, self.length[:, None], token[:, None])
        self.length = self.length + 1
        self.ids = self.ids[:, : int(self.length.max())]
        return self._next()

    def _next(self) -> torch.Tensor:
        columns = torch.arange(self.ids.shape[1], device=self.device)
        mask = (columns < self.length[:, None]).long()
        first = int(self.length.min()) - 1  # the logits of earlier columns are of no use
        with self.prompt_length(self.prompt):
            wanted = inputs(self.model, self.ids, mask, logits_to_keep=columns[first:])
            logits = self.model(**wanted, use_cache=False).logits
        at = self.length - 1 - (len(columns) - logits.shape[1])
        return logits[torch.arange(len(at), device=logits.device), at]


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each (rows, longest), padded on the left with id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def common_prefix(ids: torch.Tensor, mask: torch.Tensor) -> int:
    """
    How many tokens all rows (rows, P), padded on the left, begin with; at least one of each is left over.
    """
    tokens = [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]
    shortest = min(map(len, tokens)) - 1
    if shortest < 1:
        return 0
    starts = torch.stack([row[:shortest] for row in tokens])
    return int((starts == starts[0]).all(0).cumprod(0).sum())


def window(config: Any) -> float:
    """
    How far back every layer of the model sees. Windows are measured in columns of the cache, so that padding
    between a prompt's tokens would shorten them.
    """
    sizes = (size for name, size in config.to_dict().items() if _WINDOW.fullmatch(name))
    return min((size for size in sizes if isinstance(size, int) and size), default=float("inf"))


def without_beginning(mask: torch.Tensor, common: int) -> torch.Tensor:
    """
    The mask (rows, P) of prompts padded on the left, whose first `common` tokens were read before: of each
    row those tokens, padding, and the rest of its prompt.
    """
    rest = mask * (mask.cumsum(1) > common)
    return torch.cat([torch.ones_like(mask[:, :common]), rest[:, common:]], 1)

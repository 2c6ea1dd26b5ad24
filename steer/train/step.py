"""
Log-probabilities of a group's completions, without computing anything twice.

Exact savings over a padded forward pass of (prompt + completion) rows: what all prompts begin with (a chat
template's system turn) goes through the model once, and so does a prompt that a group shares, both with their
gradient; completions are batched with others of about their length; and only the positions that predict a
completion token meet the LM head, in tiles, so no (tokens x vocabulary) tensor is ever whole.
"""

from __future__ import annotations

import copy
import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from steer.population import Owners
from steer.train.head import frozen_head

# A batch holds completions down to this share of its longest; the rest is padding.
FILL = 0.75
# A common beginning is read by itself when that saves as many tokens: each pass costs something of its own.
WORTH_A_PASS = 256


@dataclass(frozen=True)
class Scored:
    """Per-token values of completions, each (rows, completion length), zero at padding."""

    log_probs: torch.Tensor
    entropy: torch.Tensor


def add_group_scoring(model: PreTrainedModel) -> None:
    """
    Make `model(**batch, score_group=True)` return `Scored`. The model must have trl's fused LM head already.

    It is part of the model's forward, rather than a function around it, so that DDP and FSDP see a single
    forward pass.
    """
    fused = model.forward

    @functools.wraps(fused)
    def forward(self: PreTrainedModel, *args: Any, score_group: bool = False, **kwargs: Any) -> Any:
        return _score(self, fused, **kwargs) if score_group else fused(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _score(
    model: PreTrainedModel,
    fused: Any,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    owners: Owners | None = None,
) -> Scored:
    """
    Prompts (rows, P) padded on the left, completions (rows, C) on the right. `owners` tells which of several
    sets of vectors steers each row.
    """
    rows, longest = completion_ids.shape
    width = prompt_ids.shape[1]
    whose = owners.of.to(prompt_ids.device) if owners else prompt_ids.new_zeros(rows)
    # The owner first, so that the unique prompts come in the order of the sets.
    keys = torch.cat([whose[:, None], prompt_ids, prompt_mask], 1)
    unique, group = torch.unique(keys, dim=0, return_inverse=True)
    ids, mask = unique[:, 1 : 1 + width], unique[:, 1 + width :]
    each, set_of = torch.unique(unique[:, 0], return_inverse=True)
    position = (mask.cumsum(1) - 1).clamp(min=0)

    # The last prompt token predicts the first completion token, so it is left for the last pass.
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    common = common_prefix(ids, mask) if _window(config) > width + longest else 0
    if common * (len(ids) - len(each)) >= WORTH_A_PASS:
        one = ids[:1, mask[0] == 1][:, :common].expand(len(each), -1)
        if owners:
            owners.tell(each)
        model.base_model(input_ids=one, past_key_values=cache, use_cache=True)
        cache = _select(cache, set_of)
        # From here on a row is: the common columns, padding, the rest of its prompt.
        mask = torch.cat([torch.ones_like(mask[:, :common]), (mask * (position >= common))[:, common:]], 1)
    else:
        common = 0
    if owners:
        owners.tell(unique[:, 0])
    if width > common + 1:
        between = slice(common, -1)
        model.base_model(
            input_ids=ids[:, between],
            attention_mask=mask[:, :-1],
            position_ids=position[:, between],
            past_key_values=cache,
            use_cache=True,
        )

    log_probs = torch.zeros(rows, longest, device=completion_ids.device)
    entropy = torch.zeros_like(log_probs)
    lengths = completion_mask.sum(1)
    if not lengths.any():  # all masked out: one padding token keeps the graph, with a gradient of zero
        lengths[0] = 1
    for chosen, length in length_batches(lengths):
        if owners:
            chosen = chosen.sort().values
            owners.choose(chosen)
        which = group[chosen]
        inputs = torch.cat([ids[which, -1:], completion_ids[chosen, : length - 1]], 1)
        seen = torch.cat([mask[which], completion_mask[chosen, : length - 1]], 1)
        steps = torch.arange(length, device=inputs.device)
        labels = completion_ids[chosen, :length].masked_fill(completion_mask[chosen, :length] == 0, -100)
        with frozen_head():
            out = fused(
                input_ids=inputs,
                attention_mask=seen,
                position_ids=position[which, -1:] + steps,
                past_key_values=_select(cache, which),
                shift_labels=labels,
                fused_lm_head=True,
            )
        at = (chosen[:, None], steps[None, :])
        log_probs = log_probs.index_put(at, out.log_probs.float())
        entropy = entropy.index_put(at, out.entropy.float())
    return Scored(log_probs, entropy)


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


def _window(config: Any) -> float:
    """
    How far back every layer of the model sees. Windows are measured in columns of the cache, so that padding
    between a prompt's tokens would shorten them.
    """
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if size), default=float("inf"))


def length_batches(lengths: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """
    Row indices in batches of similar length, longest first, with the longest length of each; empty rows are
    left out.
    """
    ordered = torch.argsort(lengths, descending=True, stable=True)
    batches: list[tuple[torch.Tensor, int]] = []
    start = 0
    sizes = lengths[ordered].tolist()
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sizes[i] < FILL * sizes[start]:
            if sizes[start] > 0:
                batches.append((ordered[start:i], sizes[start]))
            start = i
    return batches


def _select(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """
    The cache of some rows, repeated as asked, still part of the autograd graph; `cache` itself stays as it
    is.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        # Not `keys[rows]`: on a CPU its backward pass adds rows with atomic operations, in the order in which
        # the threads come. That of index_select adds them one after the other, and takes a fifth of the time.
        if layer.get_seq_length() > 0:
            layer.keys, layer.values = (x.index_select(0, rows) for x in (layer.keys, layer.values))
    return chosen

"""
Log-probabilities of a group's completions, without computing anything twice.

Three exact savings over a padded forward pass of (prompt + completion) rows: a prompt shared by a group goes
through the model once, with its gradient; completions are batched with others of about their length; and only
the positions that predict a completion token meet the LM head, in tiles (trl's fused head), so no (tokens x
vocabulary) tensor is ever whole.
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

# A batch holds completions down to this share of its longest; the rest is padding.
FILL = 0.75


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
    keys = torch.cat([prompt_ids, prompt_mask], 1)
    if owners:  # first, so that the unique prompts come in the order of the sets
        keys = torch.cat([owners.of[:, None].to(keys.device), keys], 1)
    unique, group = torch.unique(keys, dim=0, return_inverse=True)
    ids, mask = unique[:, -2 * width : -width], unique[:, -width:]
    if owners:
        owners.tell(unique[:, 0])
    position = (mask.cumsum(1) - 1).clamp(min=0)

    # The last prompt token predicts the first completion token, so it is left for the second pass.
    cache = DynamicCache(config=model.config.get_text_config())
    if width > 1:
        head = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": position[:, :-1]}
        model.base_model(**head, past_key_values=cache, use_cache=True)

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
    chosen.batch_select_indices(rows)
    return chosen

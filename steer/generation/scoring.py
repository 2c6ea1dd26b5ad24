"""
Log-probabilities of a group's completions, without computing anything twice.

Exact savings over a padded forward pass of (prompt + completion) rows: what all prompts begin with (a chat
template's system turn) goes through the model once, and so does a prompt that a group shares, both with their
gradient; completions are batched with others of about their length; and only the positions that predict a
completion token meet the LM head, in tiles, so no (tokens x vocabulary) tensor is ever whole.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from steer.generation.caches import differentiable, has_states, select
from steer.generation.decoding import WORTH_A_PASS, common_prefix, inputs, window, without_beginning
from steer.generation.lm_head import frozen_head
from steer.vector_sets import Owners

# A batch holds completions down to this share of its longest; the rest is padding. It holds shorter ones
# where another pass would cost more than the padding.
FILL = 0.75
# Where the weights themselves are trained, each pass also writes a gradient as large as the model: that takes
# as long as so many tokens more (measured with SmolLM2-135M on two CPU cores).
PASS_OF_TRAINED_WEIGHTS = 512
# Models that `add_group_scoring` was called for.
SCORERS: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True)
class Scored:
    """Per-token values of completions, each (rows, completion length), zero at padding."""

    log_probs: torch.Tensor
    entropy: torch.Tensor


# Called with the arguments of a forward pass and `labels` (rows, tokens), the next tokens or -100.
Head = Callable[..., Scored]


def add_group_scoring(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """
    Make `model(**batch, score_group=True)` return `Scored`. The model must have trl's fused LM head already,
    of the same temperature.

    Arguments of the call, all tensors (rows, P or C): `prompt_ids` and `prompt_mask`, padded on the left,
    `completion_ids` and `completion_mask`, padded on the right; `owners`, which of several sets of vectors
    steers each row; and what is computed in which way, all True by default (`steer.generation.verify` finds
    what a model can take):

    - `share`: a prompt is read once for its group. Else every row is read whole, padded on the right.
    - `common`: what all prompts begin with is read once.
    - `fused`: log-probabilities by trl's fused LM head. Else from the model's own logits, which costs a
      (tokens x vocabulary) tensor.

    It is part of the model's forward, rather than a function around it, so that DDP and FSDP see a single
    forward pass.
    """
    forward = model.forward

    @functools.wraps(forward)
    def with_scoring(
        self: PreTrainedModel,
        *args: Any,
        score_group: bool = False,
        share: bool = True,
        common: bool = True,
        fused: bool = True,
        **kwargs: Any,
    ) -> Any:
        if not score_group:
            return forward(*args, **kwargs)
        head = functools.partial(_fused_head if fused else _own_head, forward, temperature)
        if not share:
            return _plain(self, head, **kwargs)
        return shared_scores(self, head, WORTH_A_PASS if common else None, **kwargs)

    model.forward = types.MethodType(with_scoring, model)
    SCORERS.add(model)


def _fused_head(forward: Any, _: float, labels: torch.Tensor, **inputs: Any) -> Scored:
    with frozen_head():
        out = forward(**inputs, shift_labels=labels, fused_lm_head=True)
    return Scored(out.log_probs, out.entropy)


def _own_head(forward: Any, temperature: float, labels: torch.Tensor, **inputs: Any) -> Scored:
    """
    The same from the logits that the model itself computes, which trl's head leaves out where there is more
    between the backbone and the logits than a matrix.
    """
    logits = forward(**inputs, use_cache=False).logits.float()
    table = torch.log_softmax(logits / temperature, -1)
    chosen = table.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    entropy = torch.special.entr(table.exp()).sum(-1)
    padding = labels == -100
    return Scored(chosen.masked_fill(padding, 0), entropy.masked_fill(padding, 0))


def _plain(
    model: PreTrainedModel,
    head: Head,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    owners: Owners | None = None,
) -> Scored:
    """
    Every row in one pass, its padding on the right: no causal model looks there, and positions count from
    the first token, however the model comes by them.
    """
    if owners:
        owners.tell(owners.of)
    mask = torch.cat([prompt_mask, completion_mask], 1).long()
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    ids = torch.cat([prompt_ids, completion_ids], 1).gather(1, order)
    # Completion token c of a row is predicted by the column before its own.
    steps = torch.arange(completion_ids.shape[1], device=ids.device)
    at = (prompt_mask.sum(1, keepdim=True) + steps - 1).clamp(max=ids.shape[1] - 1)
    real = completion_mask.bool()
    labels = torch.full_like(ids, -100)
    row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(at)
    labels[row[real], at[real]] = completion_ids[real]
    scored = head(labels=labels, **inputs(model, ids, mask.gather(1, order)))
    return Scored(
        scored.log_probs.float().gather(1, at).masked_fill(~real, 0),
        scored.entropy.float().gather(1, at).masked_fill(~real, 0),
    )


def shared_scores(
    model: PreTrainedModel,
    head: Head,
    worth: int | None,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    owners: Owners | None = None,
) -> Scored:
    """
    Prompts read once for their groups; what all begin with once, where that saves `worth` tokens or more.
    """
    rows, longest = completion_ids.shape
    width = prompt_ids.shape[1]
    whose = owners.of.to(prompt_ids.device) if owners else prompt_ids.new_zeros(rows)
    # The owner first, so that the unique prompts come in the order of the sets.
    keys = torch.cat([whose[:, None], prompt_ids, prompt_mask], 1)
    unique, group = torch.unique(keys, dim=0, return_inverse=True)
    ids, mask = unique[:, 1 : 1 + width], unique[:, 1 + width :]
    each, set_of = torch.unique(unique[:, 0], return_inverse=True)

    # The last prompt token predicts the first completion token, so it is left for the last pass.
    config, backbone = model.config.get_text_config(), model.base_model
    cache = differentiable(DynamicCache(config=config))
    common = common_prefix(ids, mask) if worth and window(config) > width + longest else 0
    if worth and common * (len(ids) - len(each)) >= worth:
        one = ids[:1, mask[0] == 1][:, :common].expand(len(each), -1)
        if owners:
            owners.tell(each)
        backbone(**inputs(backbone, one, torch.ones_like(one), cache), use_cache=True)
        cache = select(cache, set_of)
        mask = without_beginning(mask, common)
    else:
        common = 0
    if owners:
        owners.tell(unique[:, 0])
    if width > common + 1:
        backbone(**inputs(backbone, ids[:, common:-1], mask[:, :-1], cache), use_cache=True)

    log_probs = torch.zeros(rows, longest, device=completion_ids.device)
    entropy = torch.zeros_like(log_probs)
    # One token after a recurrent state is a step of decoding, which writes over the state: two are not.
    least = 2 if has_states(model) else 1
    wide, real = (pad(x, (0, least - 1)) for x in (completion_ids, completion_mask))
    lengths = completion_mask.sum(1)
    if not lengths.any():  # all masked out: one padding token keeps the graph, with a gradient of zero
        lengths[0] = 1
    worth = pass_tokens(model) if torch.is_grad_enabled() else 0
    for chosen, length in length_batches(lengths, worth):
        if owners:
            chosen = chosen.sort().values
            owners.choose(chosen)
        which = group[chosen]
        size = max(length, least)
        tokens = torch.cat([ids[which, -1:], wide[chosen, : size - 1]], 1)
        seen = torch.cat([mask[which], real[chosen, : size - 1]], 1)
        labels = wide[chosen, :size].masked_fill(real[chosen, :size] == 0, -100)
        out = head(labels=labels, **inputs(model, tokens, seen, select(cache, which)))
        at = (chosen[:, None], torch.arange(length, device=tokens.device)[None, :])
        log_probs = log_probs.index_put(at, out.log_probs[:, :length].float())
        entropy = entropy.index_put(at, out.entropy[:, :length].float())
    return Scored(log_probs, entropy)


def pass_tokens(model: torch.nn.Module) -> int:
    """What a forward and backward pass costs `model` beside its tokens, in tokens."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    return PASS_OF_TRAINED_WEIGHTS if 2 * trained > sum(size for size, _ in sizes) else 0


def length_batches(lengths: torch.Tensor, worth: int = 0) -> list[tuple[torch.Tensor, int]]:
    """
    Row indices in batches of similar length, longest first, with the longest length of each; empty rows are
    left out. A batch ends only where that saves the rows after it `worth` tokens of padding.
    """
    ordered = torch.argsort(lengths, descending=True, stable=True)
    batches: list[tuple[torch.Tensor, int]] = []
    start = 0
    sizes = lengths[ordered].tolist()
    filled = sum(size > 0 for size in sizes)
    for i in range(1, filled + 1):
        saved = 0 if i == filled else (sizes[start] - sizes[i]) * (filled - i)
        if i == filled or (sizes[i] < FILL * sizes[start] and saved >= worth):
            batches.append((ordered[start:i], sizes[start]))
            start = i
    return batches

"""
A feature in the model: added to the residual stream, or taken out of what steering changes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from steer.compat import with_cache
from steer.errors import SteerError
from steer.hooks import hooked
from steer.places import find_places
from steer.sae.activations import Reader
from steer.sae.model import SAE
from steer.sites import find_decoder


@contextmanager
def changed(
    model: PreTrainedModel, layer: int, site: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside, the activations (rows, columns, hidden_size) at the site become what `change` makes of them."""
    decoder = find_decoder(model)
    place = find_places(model, [layer % decoder.num_hidden_layers], site)[0]
    with hooked(*place.change(change)):
        yield


@contextmanager
def shifted(
    model: PreTrainedModel, layer: int, direction: Tensor, site: str = "resid_post"
) -> Iterator[None]:
    """
    Inside, `direction` (hidden_size,) is added to the activations at the site, at every token: a feature is
    added with `strength * sae.W_dec[f]`.
    """
    hidden_size = find_decoder(model).hidden_size
    if direction.shape != (hidden_size,):
        raise SteerError(
            f"direction of shape {tuple(direction.shape)}, the model's hidden size is {hidden_size}"
        )
    with changed(model, layer, site, lambda hidden: hidden + direction.to(hidden.device, hidden.dtype)):
        yield


@torch.no_grad()
def answer_without(
    sae: SAE,
    reader: Reader,
    features: Sequence[int],
    prompts: Sequence[Sequence[int]],
    length: int,
    eos: Sequence[int],
) -> list[list[int]]:
    """
    Greedy completions (at most `length` tokens, the end token included) of the steered model whose DiffSAE
    `features` are ablated: at every token the base model reads the same text, the SAE encodes how far the
    steered activations are from its own, and what the features add to them is taken away.

    reader: of the differences that the SAE was trained on. SteerError for one of anything else.
    """
    if reader.what != "difference" or reader.width != sae.cfg.d_in:
        raise SteerError(
            f"ablation needs a reader of differences of width {sae.cfg.d_in}, this one reads "
            f"{reader.what!r} of width {reader.width}: Reader(model, layer, what='difference')"
        )
    model, off = reader.model, torch.tensor(list(features), device=sae.device)
    base: list[Tensor] = []

    def ablate(hidden: Tensor) -> Tensor:
        difference = (hidden.float() - base.pop()).flatten(0, 1)
        active = sae.active(difference.to(sae.device, sae.dtype))
        share = active.values * torch.isin(active.indices, off)
        part = active.where.gather(share, sae.W_dec).view(hidden.shape)
        return hidden - part.to(hidden.device, hidden.dtype)

    answers: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):  # prompts of one length need no padding
        by_length.setdefault(len(prompt), []).append(index)
    for rows in by_length.values():
        ids = torch.tensor([list(prompts[row]) for row in rows], device=model.device)
        caches = DynamicCache(), DynamicCache()
        for _ in range(length):
            base.append(reader.base(ids, caches[0]))
            with hooked(*reader.place.change(ablate)):
                logits = model(input_ids=ids, **with_cache(model, caches[1])).logits
            ids = logits[:, -1:].argmax(-1)
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                if not answers[row] or answers[row][-1] not in eos:
                    answers[row].append(token)
            if all(answers[row][-1] in eos for row in rows):
                break
    return answers

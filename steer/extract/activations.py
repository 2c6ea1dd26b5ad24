"""Means of a model's activations over chosen tokens of texts, its steering vectors off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from steer.errors import SteerError
from steer.extract.rows import Row
from steer.hooks import hooked
from steer.models import context_length
from steer.places import find_places
from steer.sites import find_decoder, input_device

TOKENS = {
    "last": "the last token of each text",
    "all": "every token but the first, which models use as an attention sink",
    "completion": "the tokens after the prompt",
}


@dataclass(frozen=True)
class Activations:
    """
    What a model computes of some texts.

    Args:
        layers: the layers, ascending.
        mean: (layers, hidden_size) in float64, the mean over all chosen tokens of all texts.
        norm: (layers,), the mean length of the residual stream at these tokens: at the site, or after the
            layer for attn_out and mlp_out.
        texts: (texts, layers, hidden_size) in float32, the mean of each text; None where not asked for.
    """

    layers: list[int]
    mean: Tensor
    norm: Tensor
    texts: Tensor | None = None


def chosen(row: Row, tokens: str) -> slice:
    """The columns of a row that `tokens`, a key of `TOKENS`, names."""
    if tokens not in TOKENS:
        raise SteerError(f"tokens={tokens!r} is unknown; choose one of {', '.join(TOKENS)}")
    end = len(row.ids)
    return slice({"last": end - 1, "all": 1, "completion": row.prompt}[tokens], end)


@torch.no_grad()
def read_activations(
    model: PreTrainedModel,
    rows: Sequence[Row],
    layers: Sequence[int],
    site: str = "resid_post",
    tokens: str = "last",
    batch_size: int = 16,
    keep_texts: bool = False,
    label: str | None = None,
) -> Activations:
    """
    Read what `model` computes at a site of some layers.

    Args:
        model: vectors that are attached to it are off meanwhile.
        rows: the texts.
        layers: indices of the layers, from 0.
        site: a key of `steer.config.SITES`. At resid_mid the stream itself is read: what the layer is given,
            plus what its attention adds.
        tokens: a key of `TOKENS`.
        batch_size: texts in a forward pass. They are padded on the right, which changes nothing.
        keep_texts: whether to keep the mean of each text as well.
        label: of the progress bar; None for none.

    Raises:
        SteerError: no text, a text without such a token, one that is longer than the model's context, and
            activations that are not finite.
    """
    decoder = find_decoder(model)
    layers = sorted(layers)
    if not rows:
        raise SteerError("no texts were given: there is nothing to read")
    empty = [row for row in rows if not row.ids[chosen(row, tokens)]]
    if empty:
        what = (
            f"needs texts with completions, {len(empty)} of {len(rows)} are prompts alone; leave those out"
            if tokens == "completion"
            else f"leaves no token of {len(empty)} of {len(rows)} texts; give longer texts"
        )
        raise SteerError(f"tokens={tokens!r} {what}")
    longest, context = max(len(row.ids) for row in rows), context_length(model.config)
    if context and longest > context:
        raise SteerError(f"a text has {longest} tokens, the model reads {context}; leave longer texts out")
    at = {layer: place for place, layer in enumerate(layers)}
    shape = len(layers), decoder.hidden_size
    total, length = torch.zeros(shape, dtype=torch.float64), torch.zeros(len(layers), dtype=torch.float64)
    texts = torch.zeros(len(rows), *shape) if keep_texts else None
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # little padding
    device = input_device(model)

    def use(batch: Sequence[int], layer: int, hidden: Tensor) -> None:
        for place, index in enumerate(batch):
            states = hidden[place, chosen(rows[index], tokens)].double().cpu()
            total[at[layer]] += states.sum(0)
            if texts is not None:
                texts[index, at[layer]] = states.mean(0).float()

    def measure(batch: Sequence[int], layer: int, hidden: Tensor) -> None:
        for place, index in enumerate(batch):
            states = hidden[place, chosen(rows[index], tokens)].double()
            length[at[layer]] += states.norm(dim=1).sum().cpu()

    places = find_places(model, layers, site)
    streams = places if site.startswith("resid_") else find_places(model, layers, "resid_post")
    vectors = model.__dict__.get("steering_vectors")
    was_training = model.training
    model.eval()
    try:
        with (
            vectors.disabled() if vectors is not None else nullcontext(),
            tqdm(total=len(rows), desc=label, unit="text", leave=False, disable=label is None) as bar,
        ):
            for start in range(0, len(rows), batch_size):
                batch = order[start : start + batch_size]
                handles = []
                for i, layer in enumerate(layers):
                    handles += places[i].watch(partial(use, batch, layer))
                    handles += streams[i].watch(partial(measure, batch, layer))
                width = max(len(rows[i].ids) for i in batch)
                ids = torch.zeros(len(batch), width, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for place, index in enumerate(batch):
                    size = len(rows[index].ids)
                    ids[place, :size], mask[place, :size] = torch.tensor(rows[index].ids), 1
                with hooked(*handles):
                    decoder.backbone(ids.to(device), attention_mask=mask.to(device), use_cache=False)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    count = sum(len(row.ids[chosen(row, tokens)]) for row in rows)
    if not (total.isfinite().all() and length.isfinite().all()):
        raise SteerError("the model's activations are not finite; load it in float32 or bfloat16")
    return Activations(layers, total / count, length / count, texts)

"""A trainer's batches: what they may hold, which of their tokens count, and some of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steer.errors import SteerError
from steer.generation.decoding import inputs
from steer.generation.verify import fast_paths


def placed(base: Any, model: Any, **batch: Any) -> Any:
    """`model`'s forward pass with the positions that trl does not pass, which count no padding."""
    return model(**inputs(base, batch.pop("input_ids"), batch.pop("attention_mask")), **batch)


def check_padding(model: Any, lengths: Sequence[int]) -> None:
    """SteerError where padding prompts of these lengths on the left would change what `model` says."""
    reason = fast_paths(model).padding
    if reason and len(set(lengths)) > 1:
        raise SteerError(
            f"{type(model).__name__}: {reason}, and these prompts are of unequal length ({min(lengths)} to "
            f"{max(lengths)} tokens); use steer's own sampler and scorer, which pad on the right: leave "
            "fast_sampler on, and generation_kwargs, repetition_penalty, tools, images and router losses out"
        )


def check_text(data: Any) -> None:
    """SteerError for problems with images."""
    image_columns = {"image", "images"} & set(getattr(data, "column_names", None) or [])
    if image_columns:
        raise SteerError(
            f"the data set has the column {min(image_columns)!r}, and vectors are trained on text alone; "
            "remove the column, or train on problems without images"
        )


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """(rows, tokens), 1 at the completion tokens that count in the loss."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def rows_of(batch: dict[str, Any], rows: slice | torch.Tensor) -> dict[str, Any]:
    """Those rows of every per-row tensor; scalars (the token count of the whole batch) stay."""
    size = len(batch["prompt_ids"])
    per_row = (torch.is_tensor(v) and v.dim() > 0 and len(v) == size for v in batch.values())
    return {k: v[rows] if cut else v for (k, v), cut in zip(batch.items(), per_row, strict=True)}

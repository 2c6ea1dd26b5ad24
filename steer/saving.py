"""A warning for `save_pretrained` of a model with vectors, which `from_pretrained` would drop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def warn_when_saved(model: nn.Module) -> None:
    """Let `model.save_pretrained` warn, until the entry "save_pretrained" leaves the model's `__dict__`."""
    save: Any = getattr(model, "save_pretrained", None)
    if save is not None:
        model.__dict__["save_pretrained"] = partial(_save, save)


def _save(save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        "this model has steering vectors, and save_pretrained writes them as parameters that from_pretrained "
        "drops: save them with `vectors.save(folder)`; call steer.detach(model) to save the base model; "
        "`steer export ARTIFACT --to checkpoint --out FOLDER` writes a model that has both",
        stacklevel=2,
    )
    return save(*args, **kwargs)

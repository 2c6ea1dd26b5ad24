"""
Continuous batching of transformers is refused where a thread has vectors off or chooses among them: it runs
the model in a thread of its own, which that does not reach.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from steer.errors import SteerError


class BatchGuard:
    """
    Lets `model.generate_batch` raise SteerError where `chosen()` names what holds in the calling thread
    alone. `remove()` ends it; of several, the last one first.
    """

    def __init__(self, model: nn.Module, chosen: Callable[[], str | None]):
        self.model = model
        self.before = model.__dict__.get("generate_batch")
        if hasattr(model, "generate_batch"):
            model.__dict__["generate_batch"] = partial(_generate_batch, chosen, model.generate_batch)

    def remove(self) -> None:
        self.model.__dict__.pop("generate_batch", None)
        if self.before is not None:
            self.model.__dict__["generate_batch"] = self.before


def _generate_batch(chosen: Callable[[], str | None], generate: Any, *args: Any, **kwargs: Any) -> Any:
    if what := chosen():
        raise SteerError(
            f"model.generate_batch runs the model in a thread of its own, which `{what}` does not reach; "
            "call model.generate there, without cache_implementation='paged'"
        )
    return generate(*args, **kwargs)

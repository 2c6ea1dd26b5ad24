"""
MLPs whose inner activations are computed again in the backward pass instead of kept (selective activation
recomputation, arXiv 2205.05198).

In a frozen model they are three quarters of what a token leaves for the backward pass, and two of the six
matrix products of an MLP bring them back. Unlike checkpointing of whole layers this reruns no hook of a
vector and writes to no cache, so that prompts can still be shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steer.compat import is_hooked
from steer.errors import SteerError
from steer.sites import find_decoder, find_sites


def mlps(model: nn.Module) -> list[nn.Module]:
    """
    The MLP of each decoder layer of `model` that has one module for it. Left out are those in which something
    is hooked, such as an adaptive vector: it depends on which pass runs.
    """
    decoder = find_decoder(model)
    found = []
    for layer in range(decoder.num_hidden_layers):
        try:
            mlp = find_sites(decoder, [layer], "mlp_out")[0].module
        except SteerError:  # the layer's matrices are its own
            continue
        inside = [part for part in mlp.modules() if part is not mlp]
        if not any(is_hooked(part) for part in inside):
            found.append(mlp)
    return found


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Forward passes inside keep nothing of `modules` but their inputs. The backward pass may come later."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = partial(_again, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    given = [x for x in (*args, *kwargs.values()) if x is not None]
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    # What is not a tensor may be a state that the module changes: RWKV's. Below the lowest vector nothing is
    # kept anyway.
    if torch.is_grad_enabled() and len(tensors) == len(given) and any(x.requires_grad for x in tensors):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)

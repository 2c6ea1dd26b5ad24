"""
Hooks on modules of transformers: read or replace the hidden states that a module is given or returns.

transformers 5 passes hidden states as the first argument or as `hidden_states=`, and returns a bare tensor,
or a tuple (in OpenAI GPT a list) that begins with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steer.errors import SteerError

# Hidden states (batch, tokens, hidden_size), at a down-projection its input too, to steered hidden states
Steer = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Streams:
    """
    How hidden states hold several residual streams in parallel, as hyper-connections and AltUp keep them.

    Args:
        count: how many there are.
        dim: the dimension of hidden states that counts them; None where they are one after the other in the
            last dimension, (batch, tokens, count * hidden_size).
    """

    count: int
    dim: int | None

    def split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The streams, each (batch, tokens, hidden_size)."""
        return hidden.chunk(self.count, -1) if self.dim is None else hidden.unbind(self.dim)

    def join(self, streams: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hidden states of these streams."""
        return torch.cat(list(streams), -1) if self.dim is None else torch.stack(list(streams), self.dim)


@dataclass(frozen=True)
class Site:
    """
    The module to hook in one layer.

    Args:
        module: the module.
        on_input: its input is steered instead of its output.
        with_input: a vector that changes its output reads its input.
        streams: of the hidden states there, each of which is steered; None where there is one.
    """

    module: nn.Module
    on_input: bool = False
    with_input: bool = False
    streams: Streams | None = None


def hidden_in(args: tuple, kwargs: dict) -> Any:
    """The hidden states that a module is called with; None where there are none."""
    return args[0] if args else kwargs.get("hidden_states")


def replace_in(args: tuple, kwargs: dict, hidden: torch.Tensor) -> tuple[tuple, dict]:
    """The same arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def hidden_out(output: object) -> torch.Tensor:
    """The hidden states in what a module returned."""
    return output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[return-value]


def replace_out(output: object, hidden: torch.Tensor) -> object:
    """The same output with other hidden states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def hook(vector: Steer, site: Site, first: bool = True) -> RemovableHandle:
    """
    Let `vector` change the hidden states at `site`: it is called with them, at a down-projection also with
    its input. Returns the handle.

    Args:
        vector: takes and returns hidden states (batch, tokens, width).
        site: where.
        first: before the hooks that are there; otherwise after them, on what steering leaves.
    """
    # `partial` rather than a closure, so that a deep copy of the model steers with its own vectors.
    # First, because transformers captures hidden states with hooks of its own, installed at first use.
    if site.streams:
        vector = partial(_each, vector, site.streams)
    if site.on_input:
        return site.module.register_forward_pre_hook(
            partial(_steer_input, vector), prepend=first, with_kwargs=True
        )
    steer = _steer_adaptively if site.with_input else steer_output
    return site.module.register_forward_hook(partial(steer, vector), prepend=first)


def watch(seen: Callable[[torch.Tensor], None], site: Site, hidden_size: int) -> RemovableHandle:
    """
    Call `seen` with the hidden states at `site`, as steering leaves them. Returns the handle. A pass raises
    SteerError where they are not (batch, tokens, hidden_size).
    """
    seen = partial(_see_stream, seen, site.module, hidden_size)
    if site.on_input:
        return site.module.register_forward_pre_hook(partial(_see_input, seen), with_kwargs=True)
    return site.module.register_forward_hook(partial(_see_output, seen))


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[list[RemovableHandle]]:
    """Inside, these hooks are in place, and those whose handles are added to the list."""
    registered = list(handles)
    try:
        yield registered
    finally:
        for handle in registered:
            handle.remove()


def _each(vector: Steer, streams: Streams, hidden: torch.Tensor) -> torch.Tensor:
    return streams.join([vector(stream) for stream in streams.split(hidden)])


def _steer_adaptively(vector: Steer, down: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return vector(output, args[0])


def steer_output(vector: Steer, module: nn.Module, args: tuple, output: object) -> object:
    """A forward hook, once `vector` is bound: what `vector` makes of the hidden states that are returned."""
    return replace_out(output, vector(hidden_out(output)))


def _steer_input(vector: Steer, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return replace_in(args, kwargs, vector(hidden_in(args, kwargs)))


def _see_output(seen: Callable[[torch.Tensor], None], module: nn.Module, args: tuple, output: Any) -> None:
    seen(hidden_out(output))


def _see_input(seen: Callable[[torch.Tensor], None], module: nn.Module, args: tuple, kwargs: dict) -> None:
    seen(hidden_in(args, kwargs))


def _see_stream(
    seen: Callable[[torch.Tensor], None], module: nn.Module, hidden_size: int, hidden: torch.Tensor
) -> None:
    seen(one_stream(hidden, module, hidden_size))


def one_stream(hidden: torch.Tensor, module: nn.Module, hidden_size: int) -> torch.Tensor:
    """
    `hidden`, the hidden states of `module`; SteerError where they are not (batch, tokens, hidden_size), as
    where a model has several residual streams.
    """
    if hidden.dim() != 3 or hidden.shape[2] != hidden_size:
        raise SteerError(
            f"the hidden states of a {type(module).__name__} have the shape {tuple(hidden.shape)}, expected "
            f"(batch, tokens, {hidden_size}): what reads activations needs a model with one residual stream"
        )
    return hidden

"""
What steering should do to a model, computed the slow way: one row at a time, without padding, caches or
hooks. Modules are steered by replacing their `forward`, greedy decoding reads the whole sequence again for
each token. Nothing here calls `steer`; `evals.model_checks` compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Conv1D

Change = Callable[[torch.Tensor], torch.Tensor]

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe", re.IGNORECASE)
_NO_SUBLAYER = re.compile(r"norm|ln_|dropout|router|gate$|hyper_?connection", re.IGNORECASE)


def logits(model: nn.Module, row: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary) of one row (tokens,), in one pass without a cache."""
    return model(input_ids=row[None], use_cache=False).logits[0]


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], tokens: int) -> list[int]:
    """The most likely next token, again and again, each from a pass over the whole sequence."""
    row = list(prompt)
    for _ in range(tokens):
        row.append(int(logits(model, torch.tensor(row))[-1].argmax()))
    return row[len(prompt) :]


def log_probs(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Log-probability (completion length,) of each token of `completion` after `prompt`."""
    row = torch.tensor([*prompt, *completion])
    scores = torch.log_softmax(logits(model, row), -1)
    return scores[len(prompt) - 1 : -1].gather(1, row[len(prompt) :, None]).squeeze(1)


@contextmanager
def changed(module: nn.Module, change: Change, before: bool = False) -> Iterator[None]:
    """Inside, `module` returns `change(output)`, or reads `change(input)` where `before` is set."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if before:
            if args:
                return original(change(args[0]), *args[1:], **kwargs)
            return original(**{**kwargs, "hidden_states": change(kwargs["hidden_states"])})
        output = original(*args, **kwargs)
        if isinstance(output, (tuple, list)):
            return type(output)([change(output[0]), *output[1:]])
        return change(output)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def added(
    modules: Sequence[nn.Module],
    vectors: Sequence[torch.Tensor],
    before: bool = False,
    only: slice = slice(None),
    counting: bool = False,
) -> Iterator[None]:
    """
    Inside, each of `modules` returns (or reads, with `before`) what it did plus its vector, at the columns
    `only` of each pass; of several residual streams each. With `counting` a pass over one token goes on where
    the last one ended.
    """

    def plus(vector: torch.Tensor, column: int) -> Change:
        seen = 0

        def change(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            tokens = hidden.shape[column]
            seen = seen if counting and tokens == 1 else 0
            where = torch.zeros(seen + tokens, dtype=hidden.dtype)
            where[only] = 1
            where = where[seen:].view(tokens, *[1] * (hidden.dim() - column - 1))
            seen += tokens
            return hidden + where * vector.repeat(hidden.shape[-1] // len(vector))

        return change

    with ExitStack() as stack:
        for module, vector in zip(modules, vectors, strict=True):
            # AltUp's streams (Gemma 3n) come before the rows, those of hyper-connections after the tokens.
            streams_first = hasattr(module, "altup")
            stack.enter_context(changed(module, plus(vector, 2 if streams_first else 1), before))
        yield


@contextmanager
def recorded(module: nn.Module, seen: list[torch.Tensor], inputs: bool = False) -> Iterator[None]:
    """Inside, `seen` gets what `module` returns, or what it reads where `inputs` is set."""

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.detach().clone())
        return hidden

    with changed(module, keep, before=inputs):
        yield


def sublayer(layer: nn.Module, site: str) -> nn.Module | None:
    """The one child of a decoder layer that is its attention or MLP, by its name, or else by its class."""
    kind = _ATTENTION if site == "attn_out" else _MLP
    children = [
        (name, type(child).__name__, child)
        for name, child in layer.named_children()
        if not _NO_SUBLAYER.search(f"{name} {type(child).__name__}")
    ]
    named = [child for name, _, child in children if kind.search(name)]
    found = named or [child for _, class_name, child in children if kind.search(class_name)]
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def mid_reader(model: nn.Module, layer: nn.Module, row: torch.Tensor) -> nn.Module | None:
    """
    The child of `layer` that reads the stream between attention and MLP: the first one after the attention
    whose input is neither the layer's own nor what another child returned. None where there is no such child.
    """
    known: list[torch.Tensor] = []
    attention = sublayer(layer, "attn_out")
    found: list[nn.Module] = []
    ran: list[nn.Module] = []

    def watch(child: nn.Module, stack: ExitStack) -> None:
        original = child.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs.get("hidden_states")
            new = isinstance(given, torch.Tensor) and all(given.data_ptr() != t.data_ptr() for t in known)
            if new and attention in ran and not isinstance(child, nn.Dropout):
                found.append(child)
            output = original(*args, **kwargs)
            ran.append(child)
            known.extend(
                t for t in (output if isinstance(output, (tuple, list)) else (output,)) if torch.is_tensor(t)
            )
            return output

        child.forward = forward
        stack.callback(lambda: delattr(child, "forward"))

    def enter(hidden: torch.Tensor) -> torch.Tensor:
        known.append(hidden)
        return hidden

    with ExitStack() as stack:
        for child in layer.children():
            watch(child, stack)
        stack.enter_context(changed(layer, enter, before=True))
        logits(model, row)
    return found[0] if found else None


def down_projection(layer: nn.Module, hidden_size: int) -> nn.Module | None:
    """The linear module of a layer's MLP that writes `hidden_size` numbers and reads the most, or None."""
    mlp = sublayer(layer, "mlp_out")
    reads: dict[nn.Module, int] = {}
    for module in mlp.modules() if mlp else []:
        if isinstance(module, (nn.Linear, Conv1D)):
            shape = module.weight.shape
            written, read = shape if isinstance(module, nn.Linear) else reversed(shape)
            if written == hidden_size:
                reads[module] = read
    return max(reads, key=lambda m: reads[m]) if reads else None

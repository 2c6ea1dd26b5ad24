"""
The kinds of vector, one module each. It sits in its decoder layer as `layer.steering`, is called with the
hidden states where it is, and changes nothing until it is trained.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from steer.compat import in_backward, is_replica
from steer.config import Condition
from steer.errors import SteerError

if TYPE_CHECKING:
    from transformers import Cache


class _Own(threading.local):
    """What is set in one thread alone, so that threads that serve requests do not see each other's passes."""

    enabled: bool = True
    prompt_length: int | torch.Tensor | None = None
    mask: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    asking: _Asking | None = None


class _Asking(NamedTuple):
    """What a pass asks of the condition: for which rows, at which columns; the cache that keeps it."""

    rows: torch.Tensor  # (rows,) bool
    columns: torch.Tensor  # (rows,)
    past: Any


def _per_thread(name: str) -> Any:
    """A property with a value of its own in each thread, and the last value of any in `_last_NAME`."""
    last = f"_last_{name}"

    def read(self: SteeringState) -> Any:
        # Checkpointed layers run again in the backward pass, on a GPU in a thread of autograd's. A compiled
        # graph cannot ask for its thread: compiled models share one value.
        shared = torch.compiler.is_compiling() or in_backward()
        return getattr(self, last) if shared else getattr(self._own, name)

    def write(self: SteeringState, value: Any) -> None:
        setattr(self, last, value)
        if not torch.compiler.is_compiling():
            setattr(self._own, name, value)

    return property(read, write)


_NUMBERS = itertools.count()


class SteeringState:
    """
    What all vectors of one model share: the scale, and for each thread whether they are on, the columns of
    the prompt where it is told, the mask of the tokens that are steered in the running pass, (tokens, 1)
    for all rows or (batch, tokens, 1), None for every token, and the gate (batch,) of a condition: the rows
    that are steered.
    """

    enabled: bool = _per_thread("enabled")
    prompt_length: int | torch.Tensor | None = _per_thread("prompt_length")
    mask: torch.Tensor | None = _per_thread("mask")
    gate: torch.Tensor | None = _per_thread("gate")
    asking: _Asking | None = _per_thread("asking")

    def __init__(self, positions: str, scale: float, condition: Condition | None = None):
        self.positions = positions
        self.scale = scale
        self.condition = condition
        self.probe: torch.Tensor | None = None  # (hidden_size,), where there is a condition
        self._own = _Own()
        self._last_enabled, self._last_prompt_length, self._last_mask = True, None, None
        self._last_gate, self._last_asking = None, None
        self._number = next(_NUMBERS)  # its count on a cache is kept by it, also on a copy of the cache

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.positions, self.scale, self.condition), {"probe": self.probe}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.probe = state["probe"]

    def check_thread(self, module: nn.Module, args: tuple) -> None:
        """A forward pre-hook: refuses `nn.DataParallel` where its threads lack what the caller's has set."""
        if not is_replica(module):
            return
        told = self.positions != "all" or self.condition is not None
        if told or not self._last_enabled:
            raise SteerError(
                "nn.DataParallel runs the model in threads of its own, which "
                f"`vectors.{'prompt_length(n)' if told else 'disabled()'}` does not reach; use one GPU "
                "(CUDA_VISIBLE_DEVICES=0), or a launcher, which starts a process for each"
            )

    def place(self, tokens: int, past: Cache | None, device: torch.device, rows: int = 1) -> None:
        """
        Set `mask` for a pass over `tokens` new columns of `rows` rows after those in the cache `past` (None
        without one), and what it asks of the condition.
        """
        seen = self.count(tokens, past)
        if seen is None:
            raise SteerError(
                f"{self.what}: the {type(past).__name__} that the model keeps between passes does not say "
                "how many tokens it has seen; use positions='all' and no condition, or one pass over all "
                "tokens in `with vectors.prompt_length(n):`"
            )
        length = self.prompt_length
        if length is None:
            length = self._prompt_on(past, seen, tokens)
        if self.condition is not None:
            self._ask(tokens, past, device, rows, seen, length)
        if self.positions == "all":
            return
        column = torch.arange(tokens, device=device) + seen  # (tokens,)
        if isinstance(length, torch.Tensor) and length.dim():
            column, length = column[None, :], length.to(device)[:, None]
        rule: dict[str, torch.Tensor] = {
            "prompt": column < length,
            "last_prompt": column == length - 1,
            "completion": column >= length,
            "first_completion": column == length,
        }
        self.mask = rule[self.positions].unsqueeze(-1)

    def _ask(
        self, tokens: int, past: Any, device: torch.device, rows: int, seen: int, length: int | torch.Tensor
    ) -> None:
        """Prepare the decision of the rows whose prompt ends in the pass; the others keep theirs."""
        last = torch.as_tensor(length, device=device).expand(rows) - 1 - seen
        # An empty cache may have been used for other prompts before.
        self.gate = getattr(past, "steering_gates", {}).get(self._number) if seen else None
        now = (last >= 0) & (last < tokens)
        fix = "read the prompt in one pass with the vectors on, and go on with its cache, row for row"
        if bool((last >= tokens).any()) and self.positions in ("all", "prompt"):
            raise SteerError(f"the condition is decided at the prompt's last token, which is to come: {fix}")
        if self.gate is None:
            if bool((last < 0).any()):
                raise SteerError(
                    f"the condition was not decided for the prompts that this cache holds: {fix}"
                )
            self.gate = torch.zeros(rows, dtype=torch.bool, device=device)
        if len(self.gate) != rows:
            raise SteerError(
                f"the condition was decided for {len(self.gate)} rows, and the pass has {rows}: {fix}"
            )
        self.asking = _Asking(now, last.clamp(0, tokens - 1), past) if bool(now.any()) else None

    @contextmanager
    def narrowed(self, rows: slice) -> Iterator[None]:
        """Inside, the vectors get these rows of the running pass alone."""
        mask = self.mask
        if mask is not None and mask.dim() == 3 and len(mask) > 1:
            self.mask = mask[rows]
        try:
            yield
        finally:
            self.mask = mask

    def decide(self, hidden: torch.Tensor) -> None:
        """Decide the condition of a pass, given the states (batch, tokens, hidden_size) after its layer."""
        asked = self.asking
        if asked is None or not self.enabled:
            return
        assert self.condition is not None and self.probe is not None and self.gate is not None
        rows = torch.arange(len(hidden), device=hidden.device)
        state = hidden[rows, asked.columns.to(hidden.device)].detach().float()
        cosine = torch.cosine_similarity(state, self.probe.to(hidden.device).float()[None], dim=1)
        acts = (cosine > self.condition.threshold).to(self.gate.device)
        self.gate = torch.where(asked.rows, acts, self.gate)
        self.asking = None
        if asked.past is not None:  # a new dict: copies of the cache share the one before
            gates = getattr(asked.past, "steering_gates", {})
            asked.past.steering_gates = {**gates, self._number: self.gate}

    def count(self, tokens: int, past: Any) -> int | None:
        """
        How many columns the cache `past` holds, before a pass over `tokens` more; None where nothing tells.
        A cache of recurrent states alone does not count them: it keeps what each state of vectors has
        counted, so this is called once before every pass, also where the vectors are off.
        """
        if past is None:
            return 0
        if not hasattr(past, "get_seq_length"):
            return None
        try:
            # Zero too where the first layer is recurrent and its entry stays empty: RecurrentGemma.
            return int(past.get_seq_length()) or max((_length(layer) for layer in past.layers), default=0)
        except ValueError:  # no layer of attention
            counts: dict[int, int] = getattr(past, "steering_seen", {})
            seen = counts.get(self._number) if past.has_previous_state() else 0
            if seen is not None:  # a new dict: copies of the cache share the one before
                past.steering_seen = {**counts, self._number: seen + tokens}
            return seen

    @property
    def what(self) -> str:
        """What needs the end of the prompt, for messages."""
        return f"positions={self.positions!r}" if self.condition is None else "a condition"

    def _prompt_on(self, past: Cache | None, seen: int, tokens: int) -> int:
        """
        Length of the prompt where nobody tells: the pass over an empty cache reads it, each later one a
        generated token. The cache keeps it, so that several generations may take turns.
        """
        if past is not None and seen == 0:
            past.steering_prompt_length = tokens  # type: ignore[attr-defined]  # a name of ours
        length = getattr(past, "steering_prompt_length", None)
        what = self.what
        fix = "wrap this call in `with vectors.prompt_length(n):`, n the prompt's columns with padding"
        if length is None:
            raise SteerError(f"{what} must know where the prompt ends: {fix}")
        if seen and (tokens > 1 or seen < length):
            raise SteerError(
                f"{what} cannot tell prompt from completion in a pass that adds "
                f"{tokens} tokens to a cache of {seen}, the first pass having read {length}: {fix}"
            )
        return length

    def add(self, hidden: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """`hidden` (batch, tokens, hidden_size) plus `change` (broadcast to it) at the steered tokens."""
        steered = hidden + change
        mask = self.mask
        if self.condition is not None:
            assert self.gate is not None
            gate = self.gate[:, None, None]
            mask = gate if mask is None else mask & gate
        return steered if mask is None else torch.where(mask.to(hidden.device), steered, hidden)


def select_rows(cache: Any, rows: torch.Tensor) -> None:
    """Let the decisions of conditions follow the rows of a cache, which goes on with `rows` of them."""
    gates = getattr(cache, "steering_gates", None)
    if gates:
        cache.steering_gates = {number: gate[rows.to(gate.device)] for number, gate in gates.items()}


def _length(layer: Any) -> int:
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0


class _Precise(nn.Module):
    """
    Parameters that keep their own precision when the model around them is cast: after
    `model.to("cuda", torch.bfloat16)` they are on the GPU, and float32 as before.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep, recurse)


class SteeringVector(_Precise):
    """
    One vector of shape (hidden_size,), zero at the start, added to hidden states of shape (batch, tokens,
    hidden_size): h <- h + scale * s ("Small Vectors, Big Effects", arXiv 2509.06608, section 2).
    """

    def __init__(
        self,
        hidden_size: int,
        state: SteeringState,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        self.state = state

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.state.enabled:
            return hidden
        # Added in the precision of the stream, as a bias would be; the vector itself keeps its own.
        return self.state.add(hidden, (self.state.scale * self.vector).to(hidden.device, hidden.dtype))

    def effective(self) -> torch.Tensor:
        """The direction that is added, (hidden_size,), as long as its effect is strong."""
        return self.vector


class AdaptiveVector(_Precise):
    """
    The paper's adaptive token-wise scaling: the MLP's output gets scale * (x . readout) * vector, where x is
    the input of the MLP's down-projection at that token. `vector` (hidden_size,) is zero at the start,
    `readout` (inner,) is not: together they are a LoRA of rank one on the down-projection.
    """

    def __init__(
        self,
        hidden_size: int,
        inner: int,
        layer: int,
        state: SteeringState,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        self.readout = nn.Parameter(_kaiming(inner, inner, layer).to(device, dtype))
        self.state = state

    def forward(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not self.state.enabled:
            return hidden
        vector = (self.state.scale * self.vector).to(hidden.device, hidden.dtype)
        return self.state.add(hidden, self.coefficient(x).unsqueeze(-1) * vector)

    def coefficient(self, x: torch.Tensor) -> torch.Tensor:
        """How much of the vector each token gets: (batch, tokens) from x (batch, tokens, inner)."""
        if x.shape[-1] != self.readout.shape[0]:  # this process has a part of x
            raise SteerError(
                f"kind='adaptive': the down-projection reads {x.shape[-1]} numbers a token, expected "
                f"{len(self.readout)}; load a tensor-parallel model without tp_plan, or use kind='constant'"
            )
        return x @ self.readout.to(x.device, x.dtype)

    def effective(self) -> torch.Tensor:
        """The direction, (hidden_size,), times the norm of its read-out."""
        return self.vector * self.readout.norm()


class SharedDirections(_Precise):
    """The `rank` directions (rank, hidden_size), zero at the start, that the layers of one model mix."""

    def __init__(
        self,
        rank: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.directions = nn.Parameter(torch.zeros(rank, hidden_size, dtype=dtype, device=device))


class SharedVector(_Precise):
    """
    One layer's vector as a mix of directions that all layers share: the matrix of all vectors is A (layers x
    rank) times B (rank x hidden_size). `mix` (rank,) is this layer's row of A, drawn at random; B starts at
    zero.
    """

    def __init__(
        self,
        shared: SharedDirections,
        layer: int,
        state: SteeringState,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        rank = len(shared.directions)
        self.mix = nn.Parameter(_kaiming(rank, rank, layer).to(device, dtype))
        self._shared = [shared]  # in a list, so that it is not a child: the directions are the model's, once
        self.state = state

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.state.enabled:
            return hidden
        return self.state.add(hidden, (self.state.scale * self.effective()).to(hidden.device, hidden.dtype))

    def effective(self) -> torch.Tensor:
        """The layer's vector, (hidden_size,)."""
        return self.mix @ self._shared[0].directions.to(self.mix.device)


def _kaiming(size: int, fan_in: int, layer: int) -> torch.Tensor:
    """
    Kaiming-uniform values (size,), as LoRA draws its A; by layer, not by the global generator, so that every
    process of a run draws the same.
    """
    generator = torch.Generator().manual_seed(layer)
    return (2 * torch.rand(size, generator=generator) - 1) / sqrt(fan_in)

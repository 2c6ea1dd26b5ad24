"""
Several sets of vectors inside one model, chosen token by token: the part of the engine that knows no vLLM.

Every decoder layer holds a bank of shape (slots, hidden_size), float32. All layers share two buffers with an
entry for each token of the running batch: which row of the bank it gets, and with what coefficient,

    h_t <- h_t + coefficient_t * bank[slot_t]

Row 0 is zero for ever (the base model), row 1 belongs to requests that name nothing (the policy in training),
the rest to named sets. All three are written in place, and the addition holds no branch: a compiled or
captured graph sees every change, and a new set of vectors never compiles anything.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from steer.engine.receipt import checksum
from steer.errors import SteerError
from steer.hooks import hidden_out, replace_out

DEFAULT = "default"
BASE_ROW, DEFAULT_ROW = 0, 1
NAME = re.compile(r"[A-Za-z0-9][\w.:/@+-]{0,199}", re.ASCII)
# Factors are float32.
LARGEST = torch.finfo(torch.float32).max
# Whether a set with these positions (`steer.config.POSITIONS`) steers each of the four parts of a sequence:
# the prompt but for its last token, that token, the first generated token, and the others.
PARTS = {
    "all": (True, True, True, True),
    "prompt": (True, True, False, False),
    "last_prompt": (False, True, False, False),
    "completion": (False, False, True, True),
    "first_completion": (False, False, True, False),
}


@dataclass(frozen=True)
class Choice:
    """
    What one request asks for: a factor, and the sets that it multiplies, none for the base model. A token
    gets the last of the sets that steers its position.
    """

    names: tuple[str, ...] = (DEFAULT,)
    scale: float = 1.0

    @classmethod
    def of(cls, sampling_params: object) -> Choice:
        """
        From `sampling_params.extra_args["steering"]`: {"name": ..., "scale": ...}, or a name alone with the
        factor in "steering_scale" (over HTTP values are flat). A list of names is taken for a name. Without
        the key the default set, with a name of None or an empty list the base model. SteerError for anything
        else.
        """
        extra = getattr(sampling_params, "extra_args", None) or {}
        given = extra.get("steering", {})
        if not isinstance(given, dict):
            given = {"name": given, "scale": extra.get("steering_scale", 1.0)}
        unknown = set(given) - {"name", "scale"}
        name, scale = given.get("name", DEFAULT), given.get("scale", 1.0)
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and abs(scale) <= LARGEST
        names = [] if name is None else name if isinstance(name, list) else [name]
        if unknown or not number or not all(isinstance(one, str) for one in names):
            raise SteerError(
                f"steering={given!r} is not understood: expected {{'name': a name, a list of names or None, "
                f"'scale': a number to {LARGEST:.2g}}}, both optional"
            )
        return cls(tuple(names), float(scale))


@dataclass(frozen=True)
class Entry:
    """A set of vectors in the bank: its row, what stamps its cached prefixes, and which tokens it steers."""

    row: int
    version: int
    positions: str


class Steering(nn.Module):
    """The `steering` child of one decoder layer: its bank, and the buffers that all layers share."""

    bank: torch.Tensor
    slot: torch.Tensor
    coefficient: torch.Tensor

    def __init__(self, rows: int, hidden_size: int, slot: torch.Tensor, coefficient: torch.Tensor):
        super().__init__()
        bank = torch.zeros(rows, hidden_size, dtype=torch.float32, device=slot.device)
        for name, buffer in {"bank": bank, "slot": slot, "coefficient": coefficient}.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` of shape (tokens, hidden_size), or (1, tokens, hidden_size)."""
        tokens = hidden.shape[-2]
        rows = self.bank[self.slot[:tokens]] * self.coefficient[:tokens, None]
        return hidden + rows.to(hidden.dtype)


def steer_output(module: nn.Module, args: tuple, output: object) -> object:
    """Forward hook of a decoder layer."""
    return replace_out(output, module.steering(hidden_out(output)))  # type: ignore[operator]


class Bank:
    """
    The named sets of vectors of one model, and what the tokens of the running batch get.

    `layers` are this process's decoder layers by index in the whole model, which has `num_hidden_layers` of
    them (a pipeline stage holds some). `tokens` is the most tokens that a batch can have.
    """

    def __init__(
        self,
        layers: dict[int, nn.Module],
        num_hidden_layers: int,
        hidden_size: int,
        rows: int,
        tokens: int,
        device: torch.device | str,
    ):
        if not isinstance(rows, int) or rows < 2:
            raise SteerError(f"steering_slots={rows!r}: expected 2 or more, for base model and default set")
        self.num_hidden_layers, self.hidden_size, self.rows = num_hidden_layers, hidden_size, rows
        self.slot = torch.full((tokens,), DEFAULT_ROW, dtype=torch.int64, device=device)
        self.coefficient = torch.ones(tokens, dtype=torch.float32, device=device)
        self.vectors: dict[int, Steering] = {}
        for index, layer in layers.items():
            layer.steering = self.vectors[index] = Steering(rows, hidden_size, self.slot, self.coefficient)
            layer.register_forward_hook(steer_output)
        self.entries = {DEFAULT: Entry(DEFAULT_ROW, 0, "all")}
        self.requests: dict[str, tuple[Choice, int]] = {}  # by id: its choice, the length of its prompt
        self._particular: set[str] = set()  # those that choose anything but the default set as it is
        self._pushes = 0
        self._uniform = True  # every token gets the default set

    # ---- the sets

    def push(self, name: str, vectors: dict[int, torch.Tensor], positions: str = "all") -> None:
        """
        Put `vectors` ((hidden_size,) by layer; layers not in it get none) under `name`, in place of what it
        held. Nothing is changed unless all of it is right; SteerError says what is not.
        """
        if not NAME.fullmatch(name):
            raise SteerError(f"{name!r} cannot name vectors: use letters, digits and . _ - : / @ +")
        self.check(vectors)
        entry = self.entries.get(name)
        if entry is None:
            free = set(range(self.rows)) - {e.row for e in self.entries.values()} - {BASE_ROW}
            if not free:
                raise SteerError(
                    f"no room for {name!r}: all {self.rows - 1} places are taken, by "
                    f"{', '.join(self.entries)}; remove one, or start the engine with more steering_slots"
                )
            row = min(free)
        else:
            row = entry.row
        for layer, module in self.vectors.items():
            if layer in vectors:
                module.bank[row].copy_(vectors[layer].detach())
            else:
                module.bank[row].zero_()
        self._stamp(name, row, positions)

    def set_default(self, layer: int, vector: torch.Tensor) -> None:
        """One layer of the default set, the others left as they are."""
        self.check({layer: vector})
        if layer in self.vectors:
            self.vectors[layer].bank[DEFAULT_ROW].copy_(vector.detach())
        self._stamp(DEFAULT, DEFAULT_ROW, self.entries[DEFAULT].positions)

    def remove(self, name: str) -> None:
        """Forget a set; the default one becomes zero."""
        if name not in self.entries:
            raise SteerError(f"no vectors named {name!r}; the engine has {', '.join(self.entries)}")
        row = self.entries[name].row
        for module in self.vectors.values():
            module.bank[row].zero_()
        if name == DEFAULT:
            self._stamp(name, row, "all")
        else:
            del self.entries[name]

    def versions(self) -> dict[str, int]:
        """By name, a number that changes with every push. No two sets ever share one, except 0: zeros."""
        return {name: entry.version for name, entry in self.entries.items()}

    def partial(self) -> list[str]:
        """The sets that steer some tokens only: which ones depends on the length of the prompt."""
        return [name for name, entry in self.entries.items() if not all(PARTS[entry.positions])]

    def held(self, name: str) -> dict[str, Any] | None:
        """
        What this process holds under `name`: `version`, `positions`, and `layers`, a list of [layer,
        checksum] of all its layers. None for an unknown name. Any transport carries it.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        rows = torch.stack([module.bank[entry.row] for module in self.vectors.values()]).cpu()
        layers = [[layer, checksum(row)] for layer, row in zip(self.vectors, rows, strict=True)]
        return {"version": entry.version, "positions": entry.positions, "layers": layers}

    def check(self, vectors: dict[int, torch.Tensor]) -> None:
        """SteerError unless this model has those layers, and each vector is finite and fits."""
        for layer, vector in vectors.items():
            if not 0 <= layer < self.num_hidden_layers:
                raise SteerError(
                    f"layer {layer} does not exist: the engine's model has layers 0 to "
                    f"{self.num_hidden_layers - 1}"
                )
            if tuple(vector.shape) != (self.hidden_size,) or not vector.dtype.is_floating_point:
                raise SteerError(
                    f"the vector of layer {layer} is {vector.dtype} of shape {tuple(vector.shape)}, the "
                    f"engine's model takes floats of shape ({self.hidden_size},); vectors only "
                    "fit a model of their own hidden size"
                )
        if vectors and not torch.isfinite(torch.stack(list(vectors.values()))).all():
            layer = next(layer for layer, vector in vectors.items() if not torch.isfinite(vector).all())
            raise SteerError(f"the vector of layer {layer} holds NaN or Inf; the engine keeps what it has")

    def _stamp(self, name: str, row: int, positions: str) -> None:
        self._pushes += 1
        self.entries[name] = Entry(row, self._pushes, positions)

    # ---- the running batch

    def add_request(self, request: str, choice: Choice, prompt: int) -> None:
        """`prompt` is the number of its tokens. The entry is looked up when the request runs."""
        self.requests[request] = (choice, prompt)
        if choice != Choice():
            self._particular.add(request)

    def finish_request(self, request: str) -> None:
        """`request` may be unknown: a pooling request, say."""
        self.requests.pop(request, None)
        self._particular.discard(request)

    def place(self, requests: list[str], starts: torch.Tensor, positions: torch.Tensor) -> None:
        """
        Set the shared buffers for a batch: `requests` in order, the first token of each in `starts` (one
        more than requests, ascending), and `positions` of all tokens in their sequences, (tokens,).
        """
        if self.entries[DEFAULT].positions == "all" and self._particular.isdisjoint(requests):
            if not self._uniform:
                self.slot.fill_(DEFAULT_ROW)
                self.coefficient.fill_(1.0)
                self._uniform = True
            return
        self._uniform = False
        rows, real = [], []  # of each request: the length of its prompt, the row of each of PARTS; the factor
        for choice, prompt in (self.requests.get(request, (Choice(), 0)) for request in requests):
            parts = [BASE_ROW] * 4
            for name in choice.names:
                entry = self.entries[name]  # the scheduler took no unknown name, removes none in use
                steered = PARTS[entry.positions]
                parts = [entry.row if on else row for on, row in zip(steered, parts, strict=True)]
            rows.append([prompt, *parts])
            real.append(choice.scale)
        device, count = self.slot.device, len(positions)
        table = torch.tensor(rows, dtype=torch.int64).to(device)
        scale = torch.tensor(real, dtype=torch.float32).to(device)
        token = torch.arange(count, device=device)
        owner = torch.bucketize(token, starts[1 : len(requests)].to(torch.int64), right=True)
        after = positions - table[owner, 0]  # from the first generated token on
        part = (after + 2).clamp(0, 3)
        self.slot[:count] = table[owner, 1 + part]
        self.coefficient[:count] = scale[owner]


def pack(vectors: dict[int, torch.Tensor]) -> str:
    """
    Vectors by layer as text that any transport carries and nothing can execute: base64 of a safetensors file
    with the layers, the sizes and all numbers in one row, since each tensor of its own costs as much as all.
    """
    numbers = [vector.detach().flatten() for vector in vectors.values()]
    tensors = {
        "layers": torch.tensor(list(vectors), dtype=torch.int64),
        "sizes": torch.tensor([len(row) for row in numbers], dtype=torch.int64),
        "numbers": torch.cat(numbers).float().cpu() if numbers else torch.empty(0),
    }
    return base64.b64encode(save(tensors)).decode()


def unpack(text: str) -> dict[int, torch.Tensor]:
    """The inverse of `pack`; SteerError when it is not."""
    try:
        tensors = load(base64.b64decode(text, validate=True))
        rows = tensors["numbers"].split(tensors["sizes"].tolist())
        return dict(zip(tensors["layers"].tolist(), rows, strict=True))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise SteerError(f"what was pushed is not a set of vectors by layer ({error})") from error

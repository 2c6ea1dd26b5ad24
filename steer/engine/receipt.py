"""
Proof that a push arrived: every worker of an engine answers with a version and a checksum of each vector that
it holds now, and the sender compares them with what it sent.

`vllm serve` and its workers are other processes, often on other machines. A push that one of them lost, a
server that was started again, or a second run that pushes to the same server would otherwise go unnoticed:
the engine would sample from other vectors than the trainer's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steer.errors import SteerError

# The checksum of a vector that is zero, and of one that a layer does not have.
ZERO = "zero"


def checksum(vector: torch.Tensor) -> str:
    """SHA-256 (16 digits) of the numbers in float32, as the engine keeps them; `ZERO` for zeros."""
    if not vector.any():
        return ZERO
    return hashlib.sha256(vector.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Receipt:
    """What an engine acknowledged: a push, with the checksums of what all workers hold since then."""

    name: str
    version: int  # of the engine's: changes with every push
    positions: str
    bytes: int  # of the vectors sent, 4 for each number
    layers: dict[int, str] = field(repr=False)  # checksums; other layers hold zeros

    def is_of(self, vectors: Mapping[int, torch.Tensor], positions: str) -> bool:
        """Whether the push was of `vectors`, (hidden_size,) by layer, with these `positions`."""
        layers = {layer: checksum(vector) for layer, vector in vectors.items()}
        return (layers, positions) == (self.layers, self.positions)

    def check(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """
        SteerError unless all workers still hold the vectors of this push, with both values.

        Args:
            answers: one from each worker, with `held`: None, or `version`, `positions` and `layers`, a list
                of [layer, checksum].
        """
        seen = set()
        for number, answer in enumerate(answers):
            if "held" not in answer:
                raise SteerError(
                    "the engine runs an older steer, which does not say what it holds: install this version "
                    "in its environment and start it again"
                )
            held = answer["held"]
            who = f"worker {number} of {len(answers)}"
            if held is None:
                raise SteerError(f"{who} of the engine no longer holds {self.name!r}, {_ADVICE}")
            for layer, checksum in held["layers"]:
                seen.add(layer)
                wanted = self.layers.get(layer, ZERO)
                if checksum != wanted:
                    raise SteerError(
                        f"{who} of the engine holds other vectors than were pushed as {self.name!r}: layer "
                        f"{layer} has checksum {checksum}, pushed was {wanted}; {_ADVICE}"
                    )
            if held["positions"] != self.positions:
                raise SteerError(
                    f"{who} of the engine steers positions={held['positions']!r} with {self.name!r}, pushed "
                    f"was {self.positions!r}; {_ADVICE}"
                )
            if held["version"] != self.version:
                raise SteerError(
                    f"{who} of the engine holds version {held['version']} of {self.name!r}, pushed was "
                    f"version {self.version}; {_ADVICE}"
                )
        missing = sorted(self.layers.keys() - seen)
        if missing:
            raise SteerError(
                f"no worker of the engine answered for layer {missing[0]} of {self.name!r}, which was "
                f"pushed; {_ADVICE}"
            )


_ADVICE = (
    "a push was lost, the engine was started again, or another program pushes to it: start the engine again, "
    "for this run alone, and then the run, which goes on from its last checkpoint"
)


def confirmed(
    answers: Sequence[Mapping[str, Any]], name: str, vectors: Mapping[int, torch.Tensor], positions: str
) -> Receipt:
    """
    The receipt of a push.

    Args:
        answers: what each worker answered to it.
        name: of the set.
        vectors: what was pushed, (hidden_size,) by layer.
        positions: the tokens that it steers.

    Raises:
        SteerError: a worker does not hold just that.
    """
    layers = {layer: checksum(vector) for layer, vector in vectors.items()}
    version = max(((answer.get("held") or {}).get("version", 0) for answer in answers), default=0)
    receipt = Receipt(name, version, positions, 4 * sum(v.numel() for v in vectors.values()), layers)
    receipt.check(answers)
    return receipt

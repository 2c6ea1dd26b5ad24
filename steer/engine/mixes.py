"""
Sums of sets in the engine: each is a set of its own there, pushed by the first request that needs it and kept
until the engine's room is needed for another. A request waits while requests that run have all of the room.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from steer.engine.bank import PARTS
from steer.engine.client import steered_layers
from steer.errors import SteerError

if TYPE_CHECKING:
    import torch

    from steer.artifact import Artifact

Push = Callable[[str, "dict[int, torch.Tensor]", str], Awaitable[None]]
# How often a request that waits asks again for room that no other request of this process gives back.
PATIENCE_S = 0.5


def summed(artifacts: Sequence[Artifact]) -> list[tuple[str, dict[int, torch.Tensor]]]:
    """
    The sets whose order gives every token the sum of the artifacts that steer it, where a token gets the last
    one that steers its position (`steer.engine.bank.Choice`): one for each of the artifacts' positions.

    Returns:
        Positions, and vectors (hidden_size,) by layer, of each.

    Raises:
        SteerError: the engine cannot hold one of the artifacts.
    """
    given = [steered_layers(artifact) for artifact in artifacts]
    parts = []
    # Of two kinds of positions one holds the other, or they have no token in common: the wide ones first.
    for positions in sorted({positions for _, positions in given}, key=lambda p: -sum(PARTS[p])):
        total: dict[int, torch.Tensor] = {}
        for vectors, wide in given:
            if all(there or not here for there, here in zip(PARTS[wide], PARTS[positions], strict=True)):
                for layer, vector in vectors.items():
                    total[layer] = total[layer] + vector if layer in total else vector
        parts.append((positions, total))
    return parts


@dataclass
class Mix:
    """A sum in the engine: the names of its sets there, and how many requests use it."""

    names: list[str]
    users: int = 0


class Mixes:
    """
    The sums that the engine holds.

    Args:
        push: puts vectors under a name into the engine, with positions.
        remove: forgets a name, known or not; SteerError while the engine uses it.
        room: how many sets the engine can hold besides those that have names of their own.
    """

    def __init__(self, push: Push, remove: Callable[[str], Awaitable[None]], room: Callable[[], int]):
        self.push, self.remove, self.room = push, remove, room
        self.known: dict[Hashable, Mix] = {}  # the one that was used last is last
        self.changed = asyncio.Condition()
        self._left: list[str] = []  # sets in the engine that no request will name again
        self._numbers = count()

    @asynccontextmanager
    async def use(self, key: Hashable, artifacts: Mapping[str, Artifact]) -> AsyncIterator[list[str]]:
        """
        Inside, the engine holds the sum of the artifacts under these names.

        Args:
            key: equal for equal sums.
            artifacts: what is summed.

        Raises:
            SteerError: the engine cannot hold it, now or ever.
        """
        mix = await self._get(key, artifacts)
        try:
            yield mix.names
        finally:
            async with self.changed:
                mix.users -= 1
                self.changed.notify_all()

    async def _get(self, key: Hashable, artifacts: Mapping[str, Artifact]) -> Mix:
        async with self.changed:
            parts: list[tuple[str, dict[int, torch.Tensor]]] = []
            while key not in self.known:
                parts = parts or await asyncio.to_thread(summed, list(artifacts.values()))
                if len(parts) > self.room():
                    raise SteerError(
                        f"the sum of {', '.join(artifacts)} takes {len(parts)} of the engine's places, and "
                        f"the sets that are served leave {self.room()}: remove one, or start the server with "
                        "--additional-config '{\"steering_slots\": 32}'"
                    )
                if await self.free(len(parts)):
                    self.known[key] = Mix(await self._pushed(parts))
                else:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self.changed.wait(), PATIENCE_S)
            mix = self.known[key] = self.known.pop(key)
            mix.users += 1
            return mix

    async def free(self, places: int) -> bool:
        """Make room for so many sets in place of sums that no request uses; whether there is room."""
        while self._open() < places:
            idle = next((key for key, mix in self.known.items() if not mix.users), None)
            if idle is not None:
                self._left += self.known.pop(idle).names
            for name in list(self._left):
                with suppress(SteerError):  # a request that ended here has not ended in the engine
                    await self.remove(name)
                    self._left.remove(name)
            if idle is None:
                break
        return self._open() >= places

    def _open(self) -> int:
        return self.room() - len(self._left) - sum(len(mix.names) for mix in self.known.values())

    async def _pushed(self, parts: Sequence[tuple[str, dict[int, torch.Tensor]]]) -> list[str]:
        names: list[str] = []
        try:
            for positions, vectors in parts:
                name = f"mix+{next(self._numbers)}"  # a set that is served has no + in its name
                names.append(name)
                await self.push(name, vectors, positions)
        except BaseException:  # refused, by one engine of several perhaps, or the request is gone
            self._left += names
            raise
        return names

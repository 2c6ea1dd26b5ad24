"""Sums of sets in the bank of an engine: who adds up where, and who waits for room."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest
import torch
from helpers.fake_engine import DEPTH, TOKENS, WIDTH, Block, vectors
from helpers.steering import message

from steer import SteerError, SteeringConfig
from steer.artifact import Artifact
from steer.config import POSITIONS
from steer.engine.bank import Bank, Choice
from steer.engine.mixes import Mixes, summed
from steer.kinds import SteeringState


def artifact(seed: int, **config: Any) -> Artifact:
    made = SteeringConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH, model_type="llama", **config)
    layers = made.resolve_layers(DEPTH)
    return Artifact(made, {f"m.{i}.steering.vector": v for i, v in vectors(seed, layers).items()})


@pytest.mark.parametrize("positions", list(product(POSITIONS, repeat=3)))
def test_every_token_gets_the_sum_of_what_steers_it(positions: tuple[str, ...]) -> None:
    prompt, length = 4, 9
    blocks = [Block() for _ in range(DEPTH)]
    bank = Bank(dict(enumerate(blocks)), DEPTH, WIDTH, 8, TOKENS, "cpu")
    given = [artifact(seed, positions=p, layers=f"{seed}-2") for seed, p in enumerate(positions)]
    names = []
    for where, total in summed(given):
        names.append(f"mix+{len(names)}")
        bank.push(names[-1], total, where)
    assert len(names) == len(set(positions))
    bank.add_request("r", Choice(tuple(names)), prompt)
    bank.place(["r"], torch.tensor([0, length]), torch.arange(length))
    for layer, block in enumerate(blocks):
        expected = torch.zeros(length, WIDTH)
        for one in given:
            state = SteeringState(one.config.positions, 1.0)
            if one.config.positions != "all":
                state.prompt_length = prompt
                state.place(length, None, torch.device("cpu"))
            vector = one.by_layer().get(layer, torch.zeros(WIDTH))
            expected = state.add(expected[None], vector)[0]
        assert torch.allclose(block(torch.zeros(length, WIDTH))[0], expected, atol=1e-6)


class Fake:
    """
    Two engines that share the requests, with a number of places each. A set that is still `busy` in one of
    them is not removed there; the one that is `broken` takes no set.
    """

    def __init__(self, room: int) -> None:
        self.both: tuple[list[str], list[str]] = ([], [])
        self.held = self.both[0]
        self.busy: set[str] = set()
        self.broken = False
        self.places = room
        self.mixes = Mixes(self.push, self.remove, lambda: self.places)

    async def push(self, name: str, vectors: Any, positions: str) -> None:
        await asyncio.sleep(0)
        for held in self.both[: 1 if self.broken else 2]:
            assert len(held) < self.places, "more sets than the engine has places"
            held.append(name)
        await asyncio.sleep(0)
        if self.broken:
            raise SteerError("a push was lost")

    async def remove(self, name: str) -> None:
        await asyncio.sleep(0)
        for number, held in enumerate(self.both):
            if number and name in self.busy:
                raise SteerError(f"{name} is used")
            if name in held:
                held.remove(name)


SUMS = {key: {"a": artifact(0), "b": artifact(key)} for key in range(1, 6)}


def test_a_sum_is_pushed_once_and_kept() -> None:
    async def go() -> None:
        engine = Fake(2)
        for key in (1, 2, 1, 2, 1):
            async with engine.mixes.use(key, SUMS[key]) as names:
                assert set(names) <= set(engine.held)
        assert engine.held == ["mix+0", "mix+1"]
        async with engine.mixes.use(3, SUMS[3]):  # in place of the one that was used least recently
            assert engine.held == ["mix+0", "mix+2"]

    asyncio.run(go())


def test_a_request_waits_while_others_use_all_places() -> None:
    async def go() -> None:
        engine = Fake(2)
        running, most, order = 0, 0, []

        async def one(key: int) -> None:
            nonlocal running, most
            async with engine.mixes.use(key, SUMS[key]) as names:
                running += 1
                most = max(most, len(engine.held))
                for _ in range(5):
                    await asyncio.sleep(0)
                    assert set(names) <= set(engine.held)
                running -= 1
                order.append(key)

        await asyncio.gather(*(one(1 + i % 5) for i in range(40)))
        assert sorted(order) == sorted(1 + i % 5 for i in range(40))
        assert most == 2 and running == 0

    asyncio.run(go())


def test_a_set_that_the_engine_still_uses_is_removed_later(monkeypatch: Any) -> None:
    monkeypatch.setattr("steer.engine.mixes.PATIENCE_S", 0.0)

    async def go() -> None:
        engine = Fake(1)
        async with engine.mixes.use(1, SUMS[1]):
            engine.busy = {"mix+0"}
        waiting = asyncio.create_task(engine.mixes.use(2, SUMS[2]).__aenter__())

        async def forgotten_by_one() -> None:
            while engine.both != ([], ["mix+0"]):  # the sum is made in a thread first
                await asyncio.sleep(0)

        await asyncio.wait_for(forgotten_by_one(), 60)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done() and engine.both == ([], ["mix+0"])
        engine.busy = set()
        assert await waiting == ["mix+1"] and engine.both == (["mix+1"], ["mix+1"])

    asyncio.run(go())


def test_a_set_whose_push_failed_gives_its_place_back() -> None:
    async def go() -> None:
        engine = Fake(1)
        engine.broken = True
        with pytest.raises(SteerError, match="a push was lost"):
            async with engine.mixes.use(1, SUMS[1]):
                pass
        assert engine.both == (["mix+0"], [])
        engine.broken = False
        async with engine.mixes.use(1, SUMS[1]) as names:
            assert names == ["mix+1"] and engine.both == (names, names)
        gone = asyncio.create_task(engine.mixes.use(2, SUMS[2]).__aenter__())
        while "mix+2" not in engine.held:
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        async with engine.mixes.use(3, SUMS[3]) as names:
            assert engine.both == (names, names)

    asyncio.run(go())


def test_what_never_has_room_is_refused() -> None:
    async def go() -> None:
        engine = Fake(1)
        two = {"a": artifact(0), "b": artifact(1, positions="completion")}
        with pytest.raises(
            SteerError, match=r"the sum of a, b takes 2 .* leave 1: .*steering_slots"
        ) as error:
            async with engine.mixes.use(1, two):
                pass
        message(error)
        with pytest.raises(SteerError, match="PEFT LoRA"):
            async with engine.mixes.use(2, {"a": artifact(0, kind="adaptive")}):
                pass
        assert engine.held == []

    asyncio.run(go())

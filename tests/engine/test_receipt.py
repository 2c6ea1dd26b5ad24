"""A push is proven to have arrived: engines that lose one, delay one or hold another are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import DEPTH, WIDTH, Engine, vectors
from helpers.steering import message

from steer import SteerError
from steer.engine.client import push, remove, verify
from steer.engine.receipt import ZERO, checksum

# Layers of each worker: one with all, two that hold all (tensor or data parallel), stages of a pipeline.
WORKERS = [([0, 1, 2],), ([0, 1, 2], [0, 1, 2]), ([0], [1, 2])]


@pytest.mark.parametrize("stages", WORKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_engine_holds_what_it_acknowledged(stages: Any, dtype: torch.dtype) -> None:
    engine = Engine(stages)
    given = {layer: vector.to(dtype) for layer, vector in vectors(1, [0, 2]).items()}
    first = push(engine, given, name="set", positions="prompt")
    assert first.bytes == 2 * WIDTH * 4
    verify(engine, first)
    push(engine, vectors(2), name="other")
    verify(engine, first)
    second = push(engine, {1: torch.zeros(WIDTH)}, name="set")
    assert second.version > first.version
    verify(engine, second)


@pytest.mark.parametrize("stages", WORKERS)
def test_a_push_that_one_worker_lost_is_refused_with_both_checksums(stages: Any) -> None:
    engine = Engine(stages)
    old, new = vectors(1), vectors(2)
    push(engine, old)
    lost = engine.blind = [len(stages) - 1]
    with pytest.raises(SteerError) as error:
        push(engine, new)
    text = message(error)
    layer = stages[lost[0]][0]
    assert f"worker {lost[0]} of {len(stages)}" in text and f"layer {layer} has" in text
    assert checksum(old[layer]) in text and checksum(new[layer]) in text


def test_a_set_that_no_worker_took_and_one_that_is_gone() -> None:
    engine = Engine()
    engine.blind = [0, 1]
    with pytest.raises(SteerError, match="no longer holds 'set'"):
        push(engine, vectors(1), name="set")
    engine.blind = []
    receipt = push(engine, vectors(1), name="set")
    remove(engine, "set")
    with pytest.raises(SteerError, match="worker 0 of 2 of the engine no longer holds 'set'"):
        verify(engine, receipt)


def test_another_push_is_seen_even_when_it_brings_the_same_vectors() -> None:
    engine = Engine()
    receipt = push(engine, vectors(1))
    push(engine, vectors(1))
    with pytest.raises(SteerError, match="holds version 2 of 'default', pushed was version 1") as error:
        verify(engine, receipt)
    message(error)
    push(engine, vectors(1), positions="completion")
    with pytest.raises(SteerError, match="positions='completion' with 'default', pushed was 'all'"):
        verify(engine, receipt)


def test_a_push_that_arrives_late_overwrites_a_newer_one() -> None:
    engine = Engine()
    push(engine, vectors(1))
    receipt = push(engine, vectors(2))
    engine.stages[1].push("default", vectors(1))  # sent before, applied now
    with pytest.raises(SteerError, match=r"worker 1 of 2 .* holds other vectors than were pushed"):
        verify(engine, receipt)


def test_an_engine_that_was_started_again_holds_zeros() -> None:
    receipt = push(Engine(), vectors(1))
    pushed = checksum(vectors(1)[0])
    with pytest.raises(SteerError, match=f"layer 0 has checksum {ZERO}, pushed was {pushed}"):
        verify(Engine(), receipt)


def test_a_layer_that_no_worker_answers_for() -> None:
    engine = Engine([[0], [1]])
    with pytest.raises(SteerError, match="no worker of the engine answered for layer 2 of 'default'"):
        push(engine, vectors(1))


def test_an_engine_with_an_older_plugin() -> None:
    class Older:
        def collective_rpc(self, method: str, args: tuple = ()) -> list[dict[str, Any]]:
            return [{"error": None, "versions": {"default": 1}}]

    with pytest.raises(SteerError, match="runs an older steer") as error:
        push(Older(), vectors(1))
    message(error)


def test_checksums_are_of_the_numbers_that_the_engine_keeps() -> None:
    row = torch.randn(WIDTH)
    assert checksum(row) == checksum(row.double()) == checksum(torch.stack([row, -row], 1)[:, 0])
    assert checksum(row) != checksum(-row)
    assert checksum(torch.zeros(WIDTH)) == checksum(-torch.zeros(WIDTH)) == ZERO
    assert len({checksum(vector) for vector in vectors(1).values()}) == DEPTH

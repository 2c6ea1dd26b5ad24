"""`evals.growth` and `evals.memory`: tiny shapes through the code that measures large ones."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from evals import growth
from evals.gpu_check.speed import METHODS
from evals.growth import POPULATION, Point
from evals.memory import profile
from evals.step_timing import Batch


def test_every_axis_has_points_for_every_method_and_cheap_ones_come_first() -> None:
    plan = growth.points("135M", (*METHODS, POPULATION))
    assert len(set(plan)) == len(plan)
    for axis in ("length", "rows", "size"):
        for method in METHODS:
            values = sorted(p.x for p in plan if (p.axis, p.method) == (axis, method))
            assert len(values) >= 3 and len(set(values)) == len(values)
    assert [p.members for p in plan if p.method == POPULATION] == [1, 2, 4, 8, 16]
    assert {p.tokens for p in plan if p.axis == "length"} == {64, 128, 256, 512, 1024, 2048}
    assert {p.rows for p in plan if p.axis == "rows"} == {16, 32, 64, 128, 256, 512}
    work = [growth.random_parameters(p.shape) * p.rows * p.tokens * p.members for p in plan]
    assert work == sorted(work)


@pytest.mark.parametrize("method", ["steer", POPULATION])
def test_a_point_is_measured(method: str) -> None:
    found = growth.measure(
        Point("rows", method, "tiny", 8, 4, 2 if method == POPULATION else 1), 1, "float32"
    )
    assert found["seconds"] > 0 and found.keys() == {"seconds", "training GB"}


def test_a_point_above_the_limit_is_stopped() -> None:
    found = growth.run(Point("rows", "steer", "tiny", 8, 4), 1, "float32", most_bytes=0)
    assert found["stopped"] == "above 0.0 GB" and "seconds" not in found
    assert growth.settled(found, 0) and not growth.settled(found, 1)


def test_a_point_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho first >&2\necho a reason >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = growth.run(Point("rows", "steer", "tiny", 8, 4), 1, "float32", most_bytes=1e12)
    assert found["stopped"] == "exit code 3: a reason" and not growth.settled(found, 0)


def test_seconds_of_a_population_are_a_median_on_the_clock_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0, 100, 100, 101, 101, 103, 103, 109])  # updates of 100, 1, 2 and 6 seconds
    monkeypatch.setattr(growth, "clock", lambda: float(next(times)))
    found = growth.population(Point("members", POPULATION, "tiny", 8, 4), 4, "float32")
    assert found["seconds"] == 2


def test_a_run_goes_on_behind_failures_and_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[int] = []

    def fake(point: Point, steps: int, dtype: str, most_bytes: float) -> dict[str, Any]:
        ran.append(point.members)
        if point.members == 1:
            return {**asdict(point), "stopped": "exit code 1: a reason"}
        if point.members * growth.GB > most_bytes:
            return {**asdict(point), "stopped": "above it", "limit GB": most_bytes / growth.GB}
        return {**asdict(point), "seconds": 1.0, "peak GB": 1.0}

    def run(most_gb: str, *more: str) -> list[int]:
        words = ["--methods", POPULATION, "--most_gb", most_gb, "--out", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", ["growth", *words])
        ran.clear()
        growth.main()
        return list(ran)

    monkeypatch.setattr(growth, "run", fake)
    monkeypatch.setattr(growth, "plot", lambda *args: None)
    assert run("4.4") == [1, 2, 4, 8, 16]
    record = json.loads((tmp_path / "growth.json").read_text())
    assert [row["members"] for row in record["points"] if "seconds" in row] == [2, 4]
    assert {"processor", "threads", "shape"} <= record["setting"].keys()
    assert run("4.4") == [1]
    assert run("8.8") == [1, 8, 16]
    record = json.loads((tmp_path / "growth.json").read_text())
    assert sorted(row["members"] for row in record["points"]) == [1, 2, 4, 8, 16]
    with pytest.raises(SystemExit, match="other settings"):
        run("8.8", "--shape", "0.5B")


def test_a_run_that_was_stopped_goes_on_and_is_plotted(tmp_path: Path) -> None:
    setting = {"dtype": "float32"}
    assert growth.known(tmp_path / "growth.json", setting) == []
    done = [{**asdict(Point("length", "steer", "tiny", 8, n)), "seconds": n, "peak GB": n} for n in (4, 8)]
    done += [{**asdict(Point("length", "trl-full", "tiny", 8, 8)), "stopped": "above 1.0 GB"}]
    done += [
        {**asdict(Point("members", POPULATION, "tiny", 8, 8, n)), "seconds": n, "peak GB": 1} for n in (1, 2)
    ]
    growth.write(tmp_path, setting, done)
    assert {path.name for path in tmp_path.iterdir()} == {
        "growth.json",
        "growth-length.png",
        "growth-members.png",
    }
    assert growth.known(tmp_path / "growth.json", setting) == json.loads(json.dumps(done))
    with pytest.raises(SystemExit, match="other settings"):
        growth.known(tmp_path / "growth.json", {"dtype": "bfloat16"})


def test_what_an_update_saves_is_told_by_module() -> None:
    """Two layers of 32 and 64 numbers, and two rows of 20 tokens."""
    batch = Batch(1, 2, 20)
    saved = profile("tiny", "steer", batch, "float32", 2, skip_zero_advantage=False)["saved MB"]
    tokens = 2 * 20
    assert saved["model.layers.*.mlp"] * 1e6 >= 2 * 64 * 4 * tokens  # both factors of the product
    assert not any("scores" in name for name in saved)
    short = profile("tiny", "steer", Batch(1, 2, 8), "float32", 2, skip_zero_advantage=False)["saved MB"]
    assert any("scores" in name for name in short)
    less = profile("tiny", "steer", batch, "float32", 2, recompute_mlps=True)["saved MB"]
    assert sum(less.values()) < sum(saved.values())

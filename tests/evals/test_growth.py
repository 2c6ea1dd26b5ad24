"""`evals.growth` and `evals.memory`: tiny shapes through the code that measures large ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

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

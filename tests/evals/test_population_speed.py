"""`evals.population_speed`: what it runs and adds up, without training anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from evals import population_speed

# Stands for a recipe: leaves the results of a run, or of each member.
RECIPE = """
import json, sys
from pathlib import Path

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else None

folder = Path(value("--output_dir"))
layers = value("--each_layer")
for place in [folder / "members" / f"layer-{i}" for i in layers.split(",")] if layers else [folder]:
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps({"training_seconds": 1.5}))
"""


def test_both_sides_train_alone_and_take_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def run(recipe: str, config: Path, folder: Path, changes: list[str]) -> dict[str, float]:
        assert yaml.safe_load(config.read_text())["eval_data"] == "none"
        order.append(recipe.removesuffix(".py"))
        seconds = {"grpo_steer.py": 6.0, "layer_sweep.py": 4.0}[recipe]
        times = dict.fromkeys(("wall_seconds", "cpu_seconds"), seconds)
        return {**times, "training_seconds": seconds / 2, "memory_bytes": 1e9}

    monkeypatch.setattr(population_speed, "run", run)
    monkeypatch.setattr(population_speed, "distance", lambda one, other: 0.0)
    words = ["--members", "2", "--depth", "4", "--rounds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["population_speed", *words])
    population_speed.main()
    assert order == ["layer_sweep", "grpo_steer", "grpo_steer", "grpo_steer", "grpo_steer", "layer_sweep"]
    record = json.loads((tmp_path / "population-speed.json").read_text())
    assert [side["training_seconds"] for side in (*record["solo"], *record["together"])] == [6, 6, 2, 2]
    assert (record["wall_ratio"], record["training_ratio"], record["memory_ratio"]) == (3, 3, 1)
    assert "| training alone | 6 s | 2 s | 3.00 |" in capsys.readouterr().out


def test_seconds_of_training_are_those_of_a_run_or_of_all_members(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(population_speed, "ROOT", tmp_path)
    (tmp_path / "recipes").mkdir()
    for recipe in ("grpo_steer.py", "layer_sweep.py"):
        (tmp_path / "recipes" / recipe).write_text(RECIPE)
    config = tmp_path / "config.yaml"
    for side in (population_speed.alone, population_speed.population):
        found = side(config, tmp_path, [0, 2])
        assert found["training_seconds"] == 3 and found["wall_seconds"] > 0

"""docs/results.md holds what the committed result files say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from helpers.paths import ROOT

from evals.results_page import RESULTS, markdown, render, sweep_cost, tables
from steer.training.summary import score_table


def test_the_page_is_current() -> None:
    shown = (ROOT / "docs" / "results.md").read_text()
    assert shown == render(), "the page is stale: python -m evals.results_page --out docs/results.md"


def test_the_page_follows_the_files(tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(RESULTS, copy, ignore=shutil.ignore_patterns("*.png", "*.safetensors"))
    assert render(copy) == render()
    file = copy / "demo" / "results.json"
    changed = json.loads(file.read_text())
    changed["after"].update(accuracy=0.123, low=0.011)
    file.write_text(json.dumps(changed))
    assert "| 0.123 [0.011, " in render(copy) and "0.123 [0.011, " not in render()


def test_the_readme_agrees_with_the_files() -> None:
    readme, shown = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    numbers = re.findall(r"[-+]?\d\.\d{3}\*{0,2} \[[^\]]+\]", readme)
    assert len(numbers) > 10
    assert not [number for number in numbers if number.replace("*", "") not in shown]
    printed = score_table(json.loads((RESULTS / "demo" / "results.json").read_text()))
    lines = [line.rstrip() for line in printed.splitlines()]
    assert "\n".join(lines) in readme


def test_the_cost_of_a_population_tells_training_apart_where_the_record_does() -> None:
    side = {"wall_seconds": 12.0, "cpu_seconds": 8.0, "memory_bytes": 1e9}
    record: dict[str, Any] = {"settings": {"members": 2}, "solo": [side], "together": [side]}
    record |= {"wall_ratio": 1.0, "cpu_ratio": 1.0, "memory_ratio": 1.0}
    assert "training alone" not in sweep_cost(record)
    side["training_seconds"] = 6.0
    assert "| training alone | 6 s | 6 s | 1.50 |" in sweep_cost(record | {"training_ratio": 1.5})


def test_tables_of_a_text() -> None:
    one, two = markdown(["a", "b"], [[1, 2]]), markdown(["c"], [[3], [4]])
    assert tables(f"Text.\n\n{one}\n\nMore | text.\n\n{two}\n") == [one, two]
    assert len({line.count("|") for line in one.splitlines()}) == 1

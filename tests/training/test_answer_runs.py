"""Whole runs of `steer train --method sft` and `--method dpo`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.answers import PLAIN, PROMPT, answers_folder
from helpers.launching import run_here
from helpers.paths import ROOT

from steer import artifact
from steer.cli import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    return answers_folder(place, build_tiny, tiny_tokenizer)


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_whole_run_says_how_it_was_trained(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(base / "model"), *PLAIN, "--eval_data", str(base / "heldout.jsonl")]
    words += ["--train_data", str(base / "train.jsonl"), "--output_dir", str(base / "sft")]
    words += ["--max_steps", "4", "--learning_rate", "0.1", "--save_steps", "2", "--disable_tqdm", "true"]
    words += ["--validate_every", "4", "--examples", "0"]
    run_here(ROOT / "recipes" / "sft_steer.py", *words, plots=True)
    folder = base / "sft"
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 4 and {"before", "after", "validation"} <= results.keys()
    saved = artifact.read(folder / "vectors")
    known = saved.config.provenance
    assert known["recipe"] == "sft_steer" and known["method"] == "sft"
    assert known["data"]["from"] == str(base / "train.jsonl") and known["data"]["examples"] > 30
    assert saved.config.prompt == PROMPT and known["results"]["after"] == results["after"]
    card = (folder / "vectors" / "README.md").read_text()
    assert "examples, by supervised training (SFT), 4 updates." in card
    assert "rewarded by" not in card and "No control run" not in card
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "run.json").read_text())["answers"]["method"] == "sft"
    assert "steered" in capsys.readouterr().out
    run_here(ROOT / "recipes" / "sft_steer.py", *words)  # finished
    assert torch.equal(
        *(next(iter(artifact.read(folder / name).tensors.values())) for name in ("vectors", "checkpoint-4"))
    )
    with pytest.raises(SystemExit, match="holds another run: "):
        run_here(ROOT / "recipes" / "sft_steer.py", *words, "--loss_type", "dft")


def test_preferences_are_trained_from_a_run(base: Path) -> None:
    words = ["--model", str(base / "model"), *PLAIN, "--eval_data", "none", "--save_steps", "2"]
    words += ["--train_data", str(base / "run"), "--output_dir", str(base / "dpo"), "--beta", "0.2"]
    run_here(ROOT / "recipes" / "dpo_steer.py", *words, "--max_steps", "2")
    known = artifact.read(base / "dpo" / "vectors").config.provenance
    assert known["method"] == "dpo" and known["data"]["pairs"] == 3 and known["training"]["beta"] == 0.2
    # the run that is trained on has gone on since
    path = base / "run" / "completions" / "completions_00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(1), path)
    with pytest.raises(SystemExit, match="run has changed since this run began: 3 examples then, 2 now"):
        run_here(ROOT / "recipes" / "dpo_steer.py", *words, "--max_steps", "4")


def test_a_printed_config_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--config", "demo-dpo", "--use_cpu", "true", "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    one, two = (
        train.parse(["--config", name, "--use_cpu", "true"])
        for name in (str(tmp_path / "run.yaml"), "demo-dpo")
    )
    assert one.training.method == "dpo" and one.identity() == two.identity()


@pytest.mark.slow
@pytest.mark.real
def test_a_real_model_learns_from_its_own_right_answers(tmp_path: Path) -> None:
    """The untrained SmolLM2 samples; those of its answers that are right teach it to answer in the box."""
    short = ["--eval_limit", "30", "--examples", "0", "--use_cpu", "true", "--model_dtype", "float32"]
    sampled = [*short, "--config", "demo", "--log_completions", "true", "--output_dir", str(tmp_path / "run")]
    run_here(ROOT / "recipes" / "grpo_steer.py", *sampled, "--max_steps", "2", "--learning_rate", "0")
    words = [*short, "--config", "demo-sft", "--train_data", str(tmp_path / "run"), "--max_steps", "12"]
    words += ["--eval_data", "arithmetic", "--output_dir", str(tmp_path / "own")]
    run_here(ROOT / "recipes" / "sft_steer.py", *words, "--per_device_train_batch_size", "8")
    results = json.loads((tmp_path / "own" / "results.json").read_text())
    known = artifact.read(tmp_path / "own" / "vectors").config.provenance
    assert known["data"]["answers"] == 256 and 0 < known["data"]["examples"] <= known["data"]["right"]
    before, after = results["before"], results["after"]
    assert after["answered"] > before["answered"] + 0.2 and after["accuracy"] > before["accuracy"] + 0.1

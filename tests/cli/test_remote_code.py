"""A model that comes with Python code of its own: no command runs it unasked, and each does with the flag."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers.dynamic_module_utils
from helpers.commands import every_command
from helpers.steering import fill
from helpers.training import model_folder, write_problems

import steer
from steer.cli import main

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_architecture"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
ASKED = ("--data", "sums.jsonl", "--problems", "2", "--max-new-tokens", "2")
TRAINED = ("--model", "model", "--train_data", "sums.jsonl", "--use_cpu", "--template", "plain")
TRAINED += ("--max_steps", "1", "--max_completion_length", "2", "--num_generations", "2")
TRAINED += ("--per_device_train_batch_size", "2", "--report_to", "none", "--output_dir", "run")
COMMANDS = {
    "generate": "generate model --vectors vectors --prompt 1 --max-new-tokens 2",
    "eval": "eval --model model --vectors vectors --benchmarks sums.jsonl --samples 0 --template plain "
    "--max-new-tokens 2 --out eval",
    "lens": "lens logit vectors --model model",
    "lens shift": "lens shift vectors --data sums.jsonl --problems 2 --max-new-tokens 2",
    "lens transfer": "lens transfer vectors vectors --data sums.jsonl --problems 2 --max-new-tokens 2",
    "calibrate": "calibrate vectors --target-kl 1e-6",
    "extract pairs": "extract pairs pairs.jsonl --model model --out pairs",
    "extract token": "extract token 7 --model model --out token",
    "export": "export vectors --to checkpoint --out whole",
    "import": "import rows.npz --model model --confirm-model --out imported",
    "transfer": "transfer vectors --to model --out moved --method direct --no-rescale",
    "transfer with texts": "transfer vectors --to model --out moved --method direct --texts texts.txt "
    "--accept-poor-map",
    "train": f"train {' '.join(TRAINED)}",
    "train-baseline": f"train-baseline --method full --model_dtype float32 {' '.join(TRAINED)}",
    "sweep": f"sweep --learning_rates 1e-3 1e-2 {' '.join(TRAINED)}",
    "sae train": "sae train --config sae.yaml",
}


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `model` and what the commands read."""
    folder = model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_architecture", "architectures": ["OwnModel"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    vectors = fill(steer.attach(tiny_llama, steer.SteeringConfig(kind="adaptive")), std=0.01)
    vectors.config.base_model_name_or_path, vectors.config.model_type = "model", "own_architecture"
    vectors.save(tmp_path / "vectors")
    np.savez(tmp_path / "rows.npz", vectors=np.ones((3, 32), dtype=np.float32))
    write_problems(tmp_path / "sums.jsonl", range(10, 14), modulus=10)
    (tmp_path / "texts.txt").write_text("\n".join(f"{n} plus {n + 1} makes {2 * n + 1}" for n in range(40)))
    (tmp_path / "pairs.jsonl").write_text('{"positive": "1+1=", "negative": "2+2="}\n' * 2)
    (tmp_path / "sae.yaml").write_text(
        "saes: {topk: {d_sae: 64, k: 4}}\ntexts: [texts.txt]\noutput_dir: sae\nmodel: model\nlayer: 1\n"
        "tokens: 64\nbatch_size: 32\nblock: 64\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused says."""
    try:
        assert main(words) == 1
    except SystemExit as stop:
        return str(stop.code)
    return capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_with_code_of_its_own(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = COMMANDS[name].split()
    refused = [line for line in failure(words, capsys).splitlines() if line.startswith("error: ")]
    assert len(refused) == 1 and "--trust_remote_code" in refused[0] and "'model'" in refused[0]
    assert not (place / "modules").exists(), "nothing of it was made ready to be imported"
    trusted = [*words, "trust_remote_code=true" if name == "sae train" else "--trust_remote_code"]
    assert main(trusted) == 0


def test_every_program_that_takes_the_flag_is_tried() -> None:
    """By its first word: the commands of `lens`, and of `extract`, load their models in one place."""
    taking = {
        words[0]
        for words, parser in every_command()
        if "--trust-remote-code" in parser._option_string_actions
    }
    assert {"calibrate", "extract", "lens"} <= taking
    assert taking - {"serve", "play"} <= {line.split()[0] for line in COMMANDS.values()}


def test_the_page_runs_no_code_unasked(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("steer.cli.play.require", lambda *args: None)
    monkeypatch.setattr("steer.cli.play._serve", lambda comparison, *args: served.append(comparison))
    assert "--trust_remote_code" in failure(["play", "vectors"], capsys) and not served
    assert main(["play", "vectors", "--trust_remote_code"]) == 0
    assert type(served[0].model).__name__ == "OwnModel"


def test_the_server_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: seen.append(words))
    monkeypatch.setattr("steer.cli.serve.require", lambda *args: None)
    start = ["serve", "org/model", "--vectors", "vectors", "--port", "1"]
    assert main(start) == 0
    assert main([*start, "--trust_remote_code", "--revision", "v2"]) == 0
    plain, trusted = seen
    assert "--trust-remote-code" not in plain and "--revision" not in plain
    assert set(trusted) - set(plain) == {"--trust-remote-code", "--revision", "v2"}
    assert plain[plain.index("--api-server-count") + 1] == "1", "one process knows the sets"
    assert main([*start, "--headless"]) == 0 and "--api-server-count" not in seen[-1]

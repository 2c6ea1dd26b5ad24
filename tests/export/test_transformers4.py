"""
Exported checkpoints in transformers 4, which reads other names of some settings than version 5 writes.

The last test needs version 4 in a folder of its own: `pip install --no-deps --target DIR transformers==4.57.3
"tokenizers<0.23" "huggingface_hub<1"`, then STEER_TRANSFORMERS_4=DIR.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteeringConfig
from steer.artifact import Artifact
from steer.export import checkpoint
from steer.export.transformers4 import add_names

BASE = {"rope_type": "default", "rope_theta": 77.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
ADAPTIVE = {"kind": "adaptive"}
# Vectors, the changes in the tiny model, and what version 4 must find in config.json.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama base": ({}, {"rope_parameters": BASE}, {"rope_theta": 77.0}),
    "llama yarn": ({}, {"rope_parameters": YARN}, {"rope_theta": 5000.0, "rope_scaling": {**YARN}}),
    "qwen2 llama3": ({}, {"rope_parameters": LLAMA3}, {"rope_theta": 50.0, "rope_scaling": {**LLAMA3}}),
    "mistral base": ({}, {"rope_parameters": BASE, "sliding_window": None}, {"rope_theta": 77.0}),
    "gpt_neox part": (
        {},
        {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 77.0, "rotary_pct": 0.5},
    ),
    "gemma3_text two": (
        ADAPTIVE,
        {"rope_parameters": GEMMA},
        {
            "rope_theta": 300.0,
            "rope_local_base_freq": 20.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3 part": (
        ADAPTIVE,
        {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}},
        {"rope_theta": 77.0, "partial_rotary_factor": 0.5},
    ),
}
for _, _, expected in CASES.values():
    expected.get("rope_scaling", {}).pop("rope_theta", None)

LOADER = """
import sys, json, torch, transformers
from pathlib import Path
assert transformers.__version__.startswith("4."), transformers.__version__
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "steered", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "steered")
    ids = torch.load(folder / "ids.pt")
    with torch.no_grad():
        error = (model(ids).logits - torch.load(folder / "logits.pt")).abs().max().item()
    print(json.dumps([folder.name, error, tokenizer("1+2=3")["input_ids"]]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def exported(home: Path, build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast):
    """Each case as a checkpoint, made at the first call, with what the steered model computes beside it."""

    def make(name: str) -> Path:
        folder = home / name.replace(" ", "-")
        if folder.exists():
            return folder
        steering, changes, _ = CASES[name]
        model = build_tiny(name.split()[0], **changes)
        model.save_pretrained(folder / "base")
        tiny_tokenizer.save_pretrained(folder / "base")
        vectors = fill(steer.attach(model, SteeringConfig(**steering)), 0.3)
        ids = tokens(2, 40)
        torch.save(ids, folder / "ids.pt")
        torch.save(logits(model, ids), folder / "logits.pt")
        made = Artifact(vectors.config, vectors.tensors())
        checkpoint.write(made, str(folder / "base"), folder / "steered")
        return folder

    return make


@pytest.mark.parametrize("name", CASES)
def test_both_names_are_written_and_version_5_reads_the_same(exported, name: str) -> None:
    folder = exported(name)
    config = json.loads((folder / "steered" / "config.json").read_text())
    assert {key: config.get(key) for key in CASES[name][2]} == CASES[name][2]
    assert config["torch_dtype"] == config["dtype"]
    plain = AutoModelForCausalLM.from_pretrained(folder / "steered")
    difference = logits(plain, torch.load(folder / "ids.pt")) - torch.load(folder / "logits.pt")
    assert difference.abs().max() < 1e-4


def test_the_tokenizer_has_a_class_that_version_4_knows(exported) -> None:
    written = json.loads((exported("llama base") / "steered" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in written and written["additional_special_tokens"]


def test_what_version_4_has_no_name_for_is_named(tmp_path: Path) -> None:
    config = {"model_type": "olmo3", "rope_parameters": GEMMA}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert add_names(tmp_path) == (
        "version 4 has one rotary embedding for all layers of a olmo3, not one for each kind"
    )


def test_version_4_computes_the_same(exported, home: Path) -> None:
    packages = os.environ.get("STEER_TRANSFORMERS_4")
    if not packages:
        pytest.skip("transformers 4 is not installed: set STEER_TRANSFORMERS_4 (see the top of this file)")
    for name in CASES:
        exported(name)
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(home)],
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == sorted(name.replace(" ", "-") for name in CASES)
    assert {name: error for name, error, _ in found if not error < 1e-4} == {}
    ids = PreTrainedTokenizerFast.from_pretrained(home / "llama-base" / "base")("1+2=3")["input_ids"]
    assert all(seen == ids for *_, seen in found)

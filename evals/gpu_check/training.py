"""
A run of `steer train` on GSM8K with vLLM in the trainer's process, and what it came to. The dry run trains a
tiny model on a few sums, without vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig

from evals.gpu_check.parts import ROOT
from evals.gpu_check.speed import words
from steer.training.resuming import newest_checkpoint

# 8 prompts x 8 samples an update, as in the config.
CONFIG = "gsm8k-qwen2.5-coder-1.5b"
CHANGES = [
    "--max_steps",
    "20",
    "--max_completion_length",
    "512",
    "--use_vllm",
    "true",
    "--vllm_mode",
    "colocate",
]
CHANGES += ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "4"]
DRY = ["--use_cpu", "true", "--max_steps", "2", "--max_completion_length", "4", "--template", "plain"]
DRY += ["--num_generations", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
# Figures of each update that are kept.
CURVES = ("reward", "accuracy", "completions/mean_length", "seconds/wall")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, without vLLM")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        # A real run is kept, so that one that was stopped goes on.
        folder = Path(place) / "run" if args.dry_run else ROOT / "runs" / "gpu-check" / "gsm8k"
        changes = [*DRY, *tiny(Path(place))] if args.dry_run else CHANGES
        command = [sys.executable, "-m", "steer.cli", "train", "--config", CONFIG, *changes]
        subprocess.run([*command, "--output_dir", str(folder)], check=True)
        print(json.dumps(summary(folder)))


def tiny(place: Path) -> list[str]:
    """The settings that name a model and problems, both made here."""
    # Not the shape of Qwen2: for that AutoTokenizer makes a tokenizer of its own.
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    words(config.vocab_size).save_pretrained(place / "model")
    for name, numbers in (("train", range(20)), ("heldout", range(20, 24))):
        rows = [{"problem": f"{n} + 1", "answer": str(n + 1)} for n in numbers]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"--model": "model", "--train_data": "train.jsonl", "--eval_data": "heldout.jsonl"}
    return [word for flag, name in data.items() for word in (flag, str(place / name))]


def summary(folder: Path) -> dict[str, Any]:
    """Accuracies before and after, the curves, and the engine's figures of the last update."""
    results = json.loads((folder / "results.json").read_text())
    checkpoint = newest_checkpoint(folder, lambda path: path)
    assert checkpoint is not None
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    updates = [row for row in history if "reward" in row]
    found: dict[str, Any] = {stage: results[stage] for stage in ("before", "after")}
    found["seconds an update"] = statistics.median(row["seconds/wall"] for row in updates)
    found["updates"] = [{name: row.get(name) for name in CURVES} for row in updates]
    found["engine"] = {name: value for name, value in updates[-1].items() if name.startswith("engine/")}
    return found


if __name__ == "__main__":
    main()

"""Shared by the tests that start recipes: a folder with all that a run needs, processes, launchers."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from helpers.paths import ROOT
from helpers.training import SPREAD, model_folder, write_problems
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LAUNCHERS = ROOT / "recipes" / "accelerate"
# Whole boxed answers as single tokens: a random model then writes one now and then, right ones among them.
BOXED = [rf"\boxed{{{n}}}" for n in range(10)]


def run_folder(
    place: Path,
    build_tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    held_out: int,
    **settings: Any,
) -> Path:
    """`place`, with `model/`, `train.jsonl`, `heldout.jsonl` and `config.yaml` made at the first call."""
    if (place / "config.yaml").exists():
        return place
    tokenizer.add_tokens(BOXED)
    model_folder(
        place / "model",
        build_tiny("llama", initializer_range=SPREAD, vocab_size=len(tokenizer)),
        tokenizer,
    )
    for name, numbers in (("train", range(40)), ("heldout", range(40, 40 + held_out))):
        write_problems(place / f"{name}.jsonl", numbers, modulus=10)
    common = {
        "model": str(place / "model"),
        "train_data": str(place / "train.jsonl"),
        "eval_data": str(place / "heldout.jsonl"),
        "template": "plain",
        "rewards": ["correct01", "format"],
        "reward_weights": [1.0, 0.25],
        "save_steps": 2,
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "max_completion_length": 3,
        "report_to": "none",
        "output_dir": str(place / "whole"),
    }
    (place / "config.yaml").write_text(yaml.safe_dump({**common, **settings}))
    return place


def environment() -> dict[str, str]:
    # sums in a fixed order, whatever the machine; nothing of a launcher that may have started the tests
    left = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**left, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def started(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )


def run_here(script: Path, *words: str, plots: bool = False) -> None:
    """
    A recipe run inside this process, to save the imports, on one thread as `started` ones are: sums in the
    same order. Its training.png takes longer than a short run: without one unless `plots`. SystemExit with
    its line where it is refused.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        drawn = nullcontext() if plots else patch("steer.training.recipe.plot_training")
        with drawn, patch.object(sys, "argv", [str(script), *words]):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        torch.set_num_threads(threads)


def launcher(config: Path, *options: str) -> list[str]:
    """The words before a script that start it under accelerate, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--main_process_port", str(port), *options]

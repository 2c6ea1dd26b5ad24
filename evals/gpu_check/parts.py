"""The parts of the check on a GPU: what each runs, what it needs, and how long it may take."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from steer.extras import MODULES

ROOT = Path(__file__).resolve().parents[2]
TRAIN = MODULES["train"]
LEVELS = ("offline", "full")
# Of parts with random weights.
SPEED = ("--prompts", "16", "--samples", "8", "--tokens", "256", "--rows", "32", "--steps", "3")
LONG = ("--prompts", "2", "--samples", "8", "--tokens", "4096", "--rows", "4", "--steps", "1")
DRY = ("--prompts", "2", "--samples", "2", "--tokens", "6", "--rows", "2", "--steps", "2")


@dataclass(frozen=True)
class Part:
    """
    A process that prints its result as JSON in its last line.

    Attributes:
        name: Of the part, in results and on the command line.
        about: What it shows, in one line.
        words: A module of this package and its arguments.
        dry: The same in small, for a CPU.
        seconds: Most that it may take.
        needs: Modules without which it is skipped.
    """

    name: str
    about: str
    words: tuple[str, ...]
    dry: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = TRAIN

    def command(self, dry_run: bool) -> list[str]:
        module, *arguments = self.dry if dry_run else self.words
        return [sys.executable, "-m", f"evals.gpu_check.{module}", *arguments]


def _speed(shape: str, method: str, seconds: int) -> Part:
    return Part(
        f"speed-{shape}-{method}",
        f"GRPO updates by {method}, random weights in the shape of {shape}",
        ("speed", shape, method, *SPEED),
        ("speed", "tiny", method, *DRY),
        seconds,
    )


_TESTS = Part(
    "tests",
    "the tests marked gpu",
    ("tests", "-m", "gpu", "tests/gpu", "tests/sae/test_losses.py"),
    ("tests", "-m", "gpu", "tests/gpu/test_vectors.py", "tests/sae/test_losses.py"),
    150,
)
_KERNEL = Part(
    "sae-kernel",
    "the Triton kernel of HierarchicalTopK against PyTorch: values, time, memory",
    ("kernel", "--width", "1536", "--features", "32768", "--tokens", "4096", "--k", "32", "64", "128"),
    ("kernel", "--width", "24", "--features", "64", "--tokens", "8", "--k", "4"),
    90,
    (*TRAIN, "triton"),
)
_FSDP = Part(
    "fsdp2",
    "FSDP2 on one device, launched with recipes/accelerate/fsdp2.yaml",
    ("tests", "-m", "gpu", "-k", "one_gpu and fsdp2", "tests/training/test_sharded.py"),
    ("tests", "-m", "gpu", "-k", "one_gpu and fsdp2", "tests/training/test_sharded.py"),
    120,
)
_LONG = Part(
    "long-0.5B",
    "an update with completions of 4,096 tokens, random weights in the shape of 0.5B",
    ("speed", "0.5B", "steer", *LONG),
    ("speed", "tiny", "steer", *DRY[:-1], "1"),
    200,
)
# What tells most comes first: a run that is cut off has lost the least.
OFFLINE = (
    _TESTS,
    _KERNEL,
    _speed("0.5B", "steer", 90),
    _speed("0.5B", "trl-lora", 90),
    _speed("0.5B", "trl-full", 90),
    _FSDP,
    _speed("1.5B", "steer", 120),
    _speed("1.5B", "trl-lora", 120),
    _speed("1.5B", "trl-full", 120),
    _LONG,
)
FULL = (
    *OFFLINE,
    Part(
        "vllm",
        "the tests of the engine with vLLM's CUDA build",
        ("tests", "-m", "not slow", "tests/engine"),
        ("tests", "-m", "not slow", "tests/engine/test_bank.py"),
        1800,
        (*TRAIN, *MODULES["vllm"]),
    ),
    Part(
        "deepspeed",
        "ZeRO-2 and ZeRO-3 on one device",
        ("tests", "-m", "gpu", "-k", "one_gpu and zero", "tests/training/test_sharded.py"),
        ("tests", "-m", "gpu", "-k", "one_gpu and zero", "tests/training/test_sharded.py"),
        600,
        (*TRAIN, "deepspeed"),
    ),
    Part(
        "gsm8k-1.5B",
        "20 updates on GSM8K with a 1.5B model, 512 tokens, vLLM in the trainer's process",
        ("training",),
        ("training", "--dry-run"),
        5400,
        (*TRAIN, *MODULES["vllm"]),
    ),
)

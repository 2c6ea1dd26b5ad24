"""Shared by the tests of training: a run small enough to repeat many times, and its reward functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steer import SteeringConfig, artifact
from steer.generation.completion import Completion
from steer.training.config import SteeringGRPOConfig
from steer.training.resuming import newest_checkpoint
from steer.training.steering_trainer import SteeringGRPOTrainer

# Weights this large make peaked, varied next-token distributions; the default 0.02 makes almost uniform ones.
SPREAD = 0.3
# Prompts of unequal length, so that batches are padded on the left.
PROMPTS = ["1+1=", "what is 20+3?", "7", "12-5=", "say a word", "99", "3*3 is", "x"]
TARGETS = range(80, 90)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of vectors in a run folder."""
    return newest_checkpoint(folder, artifact.read)


def problems(count: int = len(PROMPTS)) -> Dataset:
    """`count` prompts, each with an index to reward by."""
    return Dataset.from_dict(
        {"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(count)], "number": list(range(count))}
    )


def target_share(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Share of ten tokens in the completion: something vectors can learn in a few updates."""
    return [sum(token in TARGETS for token in ids) / len(ids) for ids in completion_ids]


def parity(completion_ids: list[list[int]], number: list[int], **columns: Any) -> list[float]:
    """Depends on the sampled ids, and is the same for a whole group of every third prompt."""
    return [0.0 if n % 3 == 0 else float(sum(ids) % 5) for ids, n in zip(completion_ids, number, strict=True)]


def config(folder: Path, **changes: Any) -> SteeringGRPOConfig:
    """Two prompts with four samples each a step, on the CPU, with nothing reported and nothing saved."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "save_strategy": "no",
    }
    return SteeringGRPOConfig(**{**defaults, **changes})


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    args: SteeringGRPOConfig,
    reward: Callable[..., list[float]] | list[Any] = parity,
    steering: SteeringConfig | None = None,
    data: Dataset | None = None,
    **kwargs: Any,
) -> SteeringGRPOTrainer:
    return SteeringGRPOTrainer(
        model,
        reward,
        args,
        steering,
        train_dataset=problems() if data is None else data,
        processing_class=tokenizer,
        **kwargs,
    )


def logged(trainer: SteeringGRPOTrainer, name: str) -> list[float]:
    """The values of one metric, log by log."""
    return [row[name] for row in trainer.state.log_history if row.get(name) is not None]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [one.ids for one in completions]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Equal to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def far(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest distance between two sets of vectors, relative to the longest of the second."""
    assert left.keys() == right.keys()
    scale = max(tensor.norm().item() for tensor in right.values())
    return max((left[name] - right[name]).norm().item() for name in left) / scale


def model_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model on disk, as a user has it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_problems(path: Path, numbers: range, modulus: int) -> Path:
    """A local file of additions in the record form; answers are taken modulo `modulus`."""
    rows = [{"problem": f"{n}+{n % 7}", "answer": str((n + n % 7) % modulus)} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

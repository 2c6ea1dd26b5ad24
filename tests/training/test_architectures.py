"""The recipe trains models whose layers are not attention, or more than one kind of it: the reward rises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from helpers.launching import ROOT, run_here
from helpers.training import model_folder, write_problems
from transformers import PreTrainedTokenizerFast

import steer
from evals.architectures import tiny
from steer.generation.verify import fast_paths

REWARD = """
def high(completion_ids, **columns):
    return [sum(token > 60 for token in ids) / len(ids) for ids in completion_ids]
"""
# Linear attention, convolutions and a state space, and what each of them reads without a fast path.
FAMILIES: dict[str, set[str]] = {
    "qwen3_5_text": {"common"},
    "lfm2": {"common"},
    "mamba2": {"common"},
    "gemma4_text": set(),
}


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mamba2")) for name in FAMILIES]
)
def test_the_reward_rises(
    model_type: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny(model_type)
    assert {name for name, reason in vars(fast_paths(model)).items() if reason} == FAMILIES[model_type]
    model_folder(tmp_path / "model", model, tiny_tokenizer)
    write_problems(tmp_path / "train.jsonl", range(16), modulus=10)
    (tmp_path / f"high_{model_type}.py").write_text(REWARD)
    settings = {
        **{"model": "model", "train_data": "train.jsonl", "eval_data": "none", "template": "plain"},
        **{
            "rewards": [f"high_{model_type}.py:high"],
            "reward_weights": [1.0],
            "output_dir": "run",
            "use_cpu": True,
        },
        **{"num_generations": 8, "per_device_train_batch_size": 16, "max_completion_length": 6},
        **{"max_steps": 20, "learning_rate": 0.4, "logging_steps": 1, "report_to": "none", "save_steps": 20},
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    run_here(ROOT / "recipes" / "grpo_steer.py", "--config", "config.yaml")
    log = json.loads(Path("run/checkpoint-20/trainer_state.json").read_text())["log_history"]
    rewards = [row["reward"] for row in log if "reward" in row]
    assert len(rewards) == 20
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, list(rewards)
    vectors = steer.load(os.path.join("run", "vectors"), tiny(model_type))
    assert all(norm > 0 for norm in vectors.norms().values())

"""The reward `majority` in training: alone and in a population the same, and only of whole groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launching import ROOT, run_folder, run_here
from helpers.steering import message
from helpers.training import config, far, make_trainer

from steer import SteerError, artifact
from steer.tasks.grading import MathGrader
from steer.tasks.majority import Majority
from steer.training.config import SteeringGRPOConfig
from steer.training.resuming import newest_checkpoint


def test_a_run_and_a_member_get_the_same_rewards(
    tmp_path: Path, build_tiny: Callable, tiny_tokenizer: Any
) -> None:
    settings = {"rewards": ["majority"], "reward_weights": [1.0], "eval_data": "none", "learning_rate": 0.02}
    base = run_folder(tmp_path, build_tiny, tiny_tokenizer, 1, **settings, max_steps=3, use_cpu=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for script, more in (("grpo_steer", []), ("layer_sweep", ["--seeds", "42", "--winners", "0"])):
            out = ["--output_dir", str(base / script)]
            run_here(ROOT / "recipes" / f"{script}.py", "--config", str(base / "config.yaml"), *out, *more)
    finally:
        torch.set_num_threads(threads)
    member = base / "layer_sweep" / "members" / "seed-42"
    alone = newest_checkpoint(base / "grpo_steer", artifact.read)
    assert alone is not None
    history = json.loads((alone / "trainer_state.json").read_text())["log_history"]
    log = json.loads((member / "log.json").read_text())
    for name in ("majority/agreement", "majority/distinct", "majority/answered", "rewards/majority/mean"):
        values = [row[name] for row in history if name in row]
        assert values == pytest.approx([row[name] for row in log]), name
        assert len(values) == 3 and len(set(values)) > 1
    left, right = (artifact.read(folder / "vectors").tensors for folder in (base / "grpo_steer", member))
    assert max(t.norm() for t in left.values()) > 0, "the reward never differed: nothing was tested"
    assert far(right, left) < 1e-4  # float32 sums in another order


def test_a_group_in_two_processes_is_refused(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = config(tmp_path, num_generations=8)
    monkeypatch.setattr(SteeringGRPOConfig, "world_size", 2)
    with pytest.raises(SteerError) as error:
        make_trainer(tiny_llama, tiny_tokenizer, args, Majority(MathGrader()))
    assert "a process has 4 rows, which is not a multiple of num_generations=8" in message(error)

"""How far an engine is from the trainer, and the bounds that warn and stop."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.steering import message
from helpers.training import config, make_trainer

from steer import SteerError
from steer.training.group_trainer import GroupGRPOTrainer
from steer.training.mismatch import MismatchCheck, check_mismatch, distance, mismatch

TRAINER = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 5.0]])
ENGINE = torch.tensor([[-1.5, -2.0, -9.0], [float("nan"), -0.5, 7.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 0]])


def test_mismatch() -> None:
    found = mismatch(TRAINER, ENGINE, MASK)
    d = torch.tensor([0.5, 0.0, -0.5])
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["max"] == 0.5
    assert found["kl"] == pytest.approx((d.exp() - 1 - d).mean().item())
    assert distance(TRAINER, ENGINE, MASK) == (1.0, 3)
    assert math.isnan(distance(TRAINER * math.nan, ENGINE, MASK)[0])
    assert mismatch(TRAINER, ENGINE, MASK * 0) == {"mean": 0.0, "max": 0.0, "kl": 0.0}


def test_the_bounds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = config(tmp_path)
    assert (args.vllm_mismatch_warn, args.vllm_mismatch_stop) == (0.05, 0.2)
    with caplog.at_level("WARNING", "steer"):
        check_mismatch(0.05, 1, args)
        assert not caplog.text
        check_mismatch(0.2, 7, args)
    assert "update 7: the engine's log-probabilities are 0.2" in caplog.text and "is 0.05" in caplog.text
    for mean in (0.21, math.inf, math.nan):
        with pytest.raises(SteerError, match=f"one, update 7: .* are {mean:.3g} .*_stop is 0.2") as error:
            check_mismatch(mean, 7, args, "one")
        message(error)
    caplog.clear()
    check_mismatch(9.0, 1, config(tmp_path, vllm_mismatch_warn=None, vllm_mismatch_stop=None))
    assert not caplog.text
    with pytest.raises(SteerError, match=r"vllm_mismatch_stop=0\.0 is out of range; give a value above 0"):
        config(tmp_path, vllm_mismatch_stop=0.0)


def test_an_update_is_judged_by_all_of_its_tokens(tmp_path: Path) -> None:
    args = config(tmp_path, vllm_mismatch_warn=None, vllm_mismatch_stop=0.17)
    check = MismatchCheck(args, Accelerator(cpu=True))
    state = SimpleNamespace(global_step=4)
    near = torch.zeros(3, 1)
    for _ in range(2):  # three tokens 1/3 apart, three that agree: 1/6; and nothing stays for the next update
        assert check.add(TRAINER, ENGINE, MASK)["mean"] == pytest.approx(1 / 3)
        check.add(near, near, near + 1)
        check.on_pre_optimizer_step(args, state, None)
    check.add(TRAINER, ENGINE, MASK)
    with pytest.raises(SteerError, match=r"update 5: the engine's log-probabilities are 0\.333 "):
        check.on_pre_optimizer_step(args, state, None)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_evaluation_does_not_count_for_the_update(
    build_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    trainer = make_trainer(build_tiny("llama"), tiny_tokenizer, config(tmp_path))
    monkeypatch.setattr(GroupGRPOTrainer, "_loss", lambda *args: torch.zeros(()))
    trainer.use_vllm = True
    trainer.vllm_generation = SimpleNamespace(sync_seconds=0.0, sync_bytes=0, logprobs_mode="raw_logprobs")
    trainer._scored = TRAINER
    trainer.model.train(mode == "train")
    inputs = {"completion_mask": MASK, "sampling_per_token_logps": ENGINE}
    trainer._loss(trainer.model, inputs)
    assert trainer.mismatch_check.tokens == (3 if mode == "train" else 0)
    assert trainer._metrics[mode]["engine/mean"] == [pytest.approx(1 / 3)]

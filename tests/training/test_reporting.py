"""Tables of completions beside the logs, and a dry run that leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from helpers.launching import ROOT, run_folder
from helpers.training import SPREAD, config, make_trainer, parity, problems
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl.trainer import grpo_trainer

from steer.training.dry_run import sampled_rows, updates


def own_reward(completion_ids: list[list[int]], log_extra: Any, **columns: Any) -> list[float]:
    log_extra("length", [len(ids) for ids in completion_ids])
    return [float(sum(ids) % 5) for ids in completion_ids]


def test_completions_are_logged_as_tables(
    tmp_path: Path, build_tiny, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    sent: list[dict[str, Any]] = []
    stub = SimpleNamespace(Table=lambda dataframe: dataframe, log=sent.append)
    monkeypatch.setattr(grpo_trainer, "trackio", stub, raising=False)
    args = config(tmp_path, report_to="tensorboard", log_completions=True)
    model = build_tiny("llama", initializer_range=SPREAD)
    trainer = make_trainer(model, tiny_tokenizer, args, own_reward, data=problems(40))
    trainer.args.report_to = ["tensorboard", "trackio"]
    trainer.train()
    tables = [entry["completions"] for entry in sent]
    assert [table["step"].iloc[0] for table in tables] == [1, 2, 2], "trl sends the last one again at the end"
    for step, table in enumerate(tables[:2], 1):
        assert list(table["step"]) == [step] * 8
        assert {"prompt", "completion", "own_reward", "length", "advantage"} <= set(table.columns)
        kept = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        pandas.testing.assert_frame_equal(kept, table, check_dtype=False)
        # leave-one-out advantages of each prompt's four samples, as the update uses them
        for _, group in table.groupby("prompt"):
            rewards = group["own_reward"].to_numpy()
            expected = (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
            assert group["advantage"].to_numpy() == pytest.approx(expected, abs=1e-5)
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    board.Reload()
    assert "train/reward" in board.Tags()["scalars"]


@pytest.mark.parametrize("rounds", [0, 2], ids=["plain", "dynamic sampling"])
def test_the_log_tells_rollouts_from_the_rest_of_an_update(
    tmp_path: Path, build_tiny, tiny_tokenizer, rounds: int
) -> None:
    args = config(tmp_path, logging_steps=1, dynamic_sampling_rounds=rounds)
    model = build_tiny("llama", initializer_range=SPREAD)
    trainer = make_trainer(model, tiny_tokenizer, args, parity, data=problems(9))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["seconds/rollout"] < row["seconds/wall"]
    assert sum(row["seconds/rollout"] for row in rows) == pytest.approx(trainer.rollout_seconds)
    if rounds:  # those that were drawn in vain count too
        assert sum(row["dynamic_sampling/rounds"] for row in rows) > 0


def test_a_dry_run_says_what_would_be_trained(tmp_path: Path, build_tiny, tiny_tokenizer, recipe) -> None:
    base = run_folder(tmp_path, build_tiny, tiny_tokenizer, 4, max_steps=50, use_cpu=True)
    words = ["--config", str(base / "config.yaml"), "--dry_run", "true", "--validate_every", "5"]
    text = recipe(ROOT / "recipes" / "grpo_steer.py", *words, "--validation", "4")
    for part in ("96 parameters, at layers all", "4 held out", "1 x correct01, 0.25 x format"):
        assert part in text, text
    assert "4 prompts x 8 answers of up to 3 tokens: 96 tokens" in text
    assert "Answer:" in text and "for 50 updates" in text and "GB a device" in text
    assert not (base / "whole").exists()
    assert "rounds of samples" not in text
    text = recipe(ROOT / "recipes" / "grpo_steer.py", *words[:4], "--dynamic_sampling_rounds", "9")
    assert "up to 9 more rounds of samples, whose time is not in it" in text


@pytest.mark.parametrize(
    ("changes", "count", "rows"),
    [
        ({}, 30, 8),
        ({"num_iterations": 3}, 90, 8),
        ({"steps_per_generation": 4}, 24, 32),  # eight problems a generation: four are left over
        ({"steps_per_generation": 4, "num_iterations": 2, "sample_rows": 12}, 48, 12),
        ({"gradient_accumulation_steps": 2}, 15, 16),
        ({"max_steps": 5, "num_iterations": 3}, 5, 8),
    ],
)
def test_updates_and_rows_of_a_dry_run(
    tmp_path: Path, build_tiny, tiny_tokenizer, changes: dict[str, int], count: int, rows: int
) -> None:
    args = config(tmp_path, **{"max_steps": -1, "num_train_epochs": 3, **changes})
    assert (updates(args, 20), sampled_rows(args)) == (count, rows)
    model = build_tiny("llama", initializer_range=SPREAD)
    trainer = make_trainer(model, tiny_tokenizer, args, parity, data=problems(20))
    batches = len(trainer.get_train_dataloader())
    assert changes.get("max_steps") or count == 3 * batches / args.gradient_accumulation_steps

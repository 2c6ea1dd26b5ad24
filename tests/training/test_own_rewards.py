"""Recipes with rewards of the user's own, from a config file, on two processes and in a population."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.launching import LAUNCHERS, ROOT, launcher, run_folder, run_here, started
from transformers import PreTrainedModel, PreTrainedTokenizerFast

OWN = """
def near(completions, completion_ids, answer, golds, size, modulus=5, **columns):
    assert all([a, "7"] == g and int(a) == (s + 1) % 10 for a, g, s in zip(answer, golds, size, strict=True))
    return [float(sum(ids) % modulus) for ids in completion_ids]


async def short(completions, **columns):
    return [None if len(text) > 1000 else -float(len(text)) for text in completions]
"""


@pytest.fixture
def base(
    tmp_path: Path,
    build_tiny: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    sys.modules.pop("own_reward", None)
    (tmp_path / "own_reward.py").write_text(OWN)
    rows = [{"question": f"{n}+1", "gold": [str((n + 1) % 10), "7"], "size": n} for n in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_folder(
        tmp_path,
        build_tiny,
        tiny_tokenizer,
        4,
        max_steps=1,
        use_cpu=True,
        train_data="own.jsonl",
        eval_data="none",
        columns={"problem": "question", "answer": "gold"},
    )


def configured(base: Path, **changes: object) -> Path:
    path = base / "own.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load((base / "config.yaml").read_text()), **changes}))
    return path


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_is_found_and_an_edited_file_is_another_run(base: Path, processes: int) -> None:
    rewards = [{"name": "own_reward.py:near", "modulus": 7}, "own_reward.py:short"]
    config = configured(base, rewards=rewards, per_device_train_batch_size=32 // processes)
    script, words = ROOT / "recipes" / "grpo_steer.py", ["--config", str(config)]
    if processes == 1:
        run_here(script, *words)
    else:
        done = started([*launcher(LAUNCHERS / "cpu-2.yaml"), str(script), *words], base)
        assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((base / "whole" / "checkpoint-1" / "trainer_state.json").read_text())
    row = next(row for row in state["log_history"] if "reward" in row)
    assert {"rewards/near/mean", "rewards/short/mean"} <= set(row)
    assert 0 < row["rewards/near/mean"] < 7 and row["rewards/short/mean"] < 0
    run = json.loads((base / "whole" / "run.json").read_text())
    assert run["run"]["columns"] == "problem=question,answer=gold"
    assert run["run"]["rewards"] == rewards
    assert set(run["source"]) == {"source of own_reward.py:near", "source of own_reward.py:short"}
    (base / "own_reward.py").write_text(OWN.replace("float(sum", "2 * float(sum"))
    with pytest.raises(SystemExit, match=r"holds another run: .*source of own_reward.py:near was"):
        run_here(script, *words, "--per_device_train_batch_size", "32")


def test_a_member_of_a_population_has_rewards_of_its_own(base: Path) -> None:
    member = {
        "name": "own",
        "rewards": [{"name": "own_reward.py:near", "modulus": 7}],
        "reward_weights": [2.0],
    }
    config = configured(base, population=[member, {"name": "base", "seed": 3}], winners=0)
    run_here(ROOT / "recipes" / "layer_sweep.py", "--config", str(config))
    log = json.loads((base / "whole" / "members" / "own" / "log.json").read_text())
    assert log[0]["reward"] == pytest.approx(2 * log[0]["rewards/near/mean"]) and log[0]["reward"] > 0
    kept = json.loads((base / "whole" / "population.json").read_text())
    assert kept["own"]["rewards"] == member["rewards"] and len(kept["own"]["source"]) == 1
    assert "source" not in kept["base"]

"""The learning-rate finder: its rule on constructed rewards, and the command on a tiny model."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.launching import run_folder
from helpers.steering import message
from helpers.training import config

import steer
from steer.cli import train
from steer.cli.find_lr import _short, growth, recommended
from steer.errors import SteerError
from steer.training.sweep import find_rate
from steer.training.sweep.find_rate import Trial, choose, middle_rate, scaled, smoothed
from steer.training.sweep.halving import mean_reward
from steer.training.sweep.member import check_supported
from steer.training.sweep.study import Study

STEPS = 20
REWARD = '''
def share(completion_ids, **columns):
    """Share of every other token: something that vectors can learn."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def none(completions, **columns):
    return [0.5] * len(completions)


def once(completion_ids, trainer_state, **columns):
    """As share, but nothing is scored in the third update."""
    return [None if trainer_state.global_step == 2 else value for value in share(completion_ids)]
'''


def noisy(mean: Callable[[int], float], seed: int, size: float = 0.03, steps: int = STEPS) -> list[float]:
    draw = random.Random(seed)
    return [mean(i) + draw.gauss(0, size) for i in range(steps)]


def trial(rate: float, mean: Callable[[int], float], seed: int = 0, **changes: Any) -> Trial:
    return Trial(rate, rate / 1e-3, noisy(mean, seed), **changes)


FLAT, SLOW = (lambda i: 0.2), (lambda i: 0.2 + 0.005 * i)
GOOD, BAD = (lambda i: min(0.9, 0.2 + 0.06 * i)), (lambda i: 0.2 + 0.1 * i if i < 6 else 0.05)


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_between_too_small_and_collapsing_is_chosen(seed: int) -> None:
    rewards = {1e-5: FLAT, 1e-4: SLOW, 1e-3: GOOD, 1e-2: BAD}
    trials = [trial(rate, mean, 10 * seed + i) for i, (rate, mean) in enumerate(rewards.items())]
    trials.append(Trial(1e-1, 100, [0.2, 0.1], "diverged: the gradient of update 3 would not be finite"))
    choice = choose(trials, STEPS)
    assert choice.trial is trials[2] and not choice.note
    assert choice.why_not[1e-5] == "its reward did not rise"
    assert choice.why_not[1e-2].startswith("its reward fell from 0.")
    assert choice.why_not[1e-1].startswith("diverged")
    assert set(choice.why_not) == {1e-5, 1e-4, 1e-2, 1e-1}


def test_of_rates_that_are_equally_good_the_smallest_is_chosen() -> None:
    trials = [trial(1e-3, GOOD, 1), trial(2e-3, GOOD, 2), trial(1e-5, FLAT, 3)]
    best = max(trials, key=lambda t: t.reward(smoothed(STEPS)))
    choice = choose(trials, STEPS)
    assert choice.trial is trials[0], "whichever of the two has the higher reward by chance"
    last = smoothed(STEPS)
    apart = [b - t for b, t in zip(best.rewards[-last:], trials[0].rewards[-last:], strict=True)]
    mean = sum(apart) / last
    assert mean <= sqrt(sum((d - mean) ** 2 for d in apart) / (last - 1)) / sqrt(last)
    better = trial(2e-3, lambda i: min(1.2, 0.2 + 0.09 * i), 2)
    choice = choose([trials[0], better], STEPS)
    assert choice.trial is better and "largest of the rates" in choice.note
    assert choice.why_not[1e-3] == "learned less"


def test_vectors_that_are_too_strong_are_not_recommended() -> None:
    trials = [trial(1e-3, SLOW, 1, kl=0.1), trial(1e-2, GOOD, 2, kl=find_rate.MAX_KL * 1.5)]
    choice = choose(trials, STEPS)
    assert choice.trial is trials[0] and "too strong" in choice.why_not[1e-2]
    trials[1].kl = find_rate.MAX_KL / 2
    assert choose(trials, STEPS).trial is trials[1]
    trials[0].growth = trials[1].growth = 3.0
    assert choose(trials, STEPS).trial is trials[0], "it would be too strong at the end of the run"
    trials[1].kl_at_start = trials[1].kl - 0.1
    assert choose(trials, STEPS).trial is trials[1], "what it started from does not grow"


def test_how_far_the_kl_grows_in_the_whole_run(tmp_path: Path) -> None:
    assert growth(config(tmp_path, max_steps=40), 100, 20) == 2
    assert growth(config(tmp_path, max_steps=4), 100, 20) == 1
    assert growth(config(tmp_path, max_steps=4000), 100, 20) == find_rate.MAX_GROWTH
    # 2 prompts an update
    epochs = config(tmp_path, max_steps=-1, num_train_epochs=1.5)
    assert growth(epochs, 101, 20) == 75 / 20
    assert growth(epochs, 101, 20, processes=2) == 38 / 20


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([trial(1e-4, FLAT, 1), trial(1e-3, FLAT, 2)], "no rate learned"),
        ([Trial(1e-3, 1, [0.5] * STEPS), Trial(1e-2, 10, [0.5] * STEPS)], "no rate learned"),
        ([trial(1e-3, BAD, 1), trial(1e-2, BAD, 2)], "every rate collapsed, 0.001 and larger"),
        ([trial(1e-4, FLAT, 1), trial(1e-2, BAD, 2)], "rates from 0.01 collapsed"),
        ([trial(1e-3, GOOD, 1, kl=float("inf")), trial(1e-2, FLAT, 2)], "0.001, the smallest, collapsed"),
    ],
)
def test_nothing_is_recommended_where_no_rate_is_usable(trials: list[Trial], expected: str) -> None:
    choice = choose(trials, STEPS)
    assert choice.trial is None and expected in choice.note
    assert set(choice.why_not) == {t.learning_rate for t in trials}


def test_noise_alone_seldom_looks_like_learning() -> None:
    found = sum(
        choose([trial(1e-3, FLAT, seed), trial(1e-2, FLAT, 1000 + seed)], STEPS).trial is not None
        for seed in range(200)
    )
    assert found <= 20  # 5 % of 200 are 10


def test_the_grid_and_the_rule_of_layers(tmp_path: Path) -> None:
    default = config(tmp_path, learning_rate=1e-3)
    assert middle_rate(default, range(30), 30) == 1e-3
    assert middle_rate(default, [29], 30) == pytest.approx(30e-3)
    assert middle_rate(config(tmp_path, learning_rate=3e-3), [29], 30) == 3e-3, "as it was set"
    rates = [t.learning_rate for t in find_rate.trials(default, None, range(30), 30)]
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert [t.learning_rate for t in find_rate.trials(default, [0.1, 0.01], [0], 30)] == [0.01, 0.1]
    table = config(tmp_path, lr_by_layer="0:0.003,3-7:7e-3")
    assert scaled(table.lr_by_layer or "", 10) == "0:0.03,3-7:0.07"
    assert scaled("geometric:0.003:0.1", 0.3) == "geometric:0.0009:0.03"
    tenfold = find_rate.trials(table, None, range(30), 30)[-1]
    asked = recommended(table, tenfold)
    assert asked == {"learning_rate": 10 * table.learning_rate, "lr_by_layer": "0:0.03,3-7:0.07"}
    before, after = (made.layer_rates([*range(30)], 30) for made in (table, config(tmp_path, **asked)))
    assert after == pytest.approx({layer: 10 * rate for layer, rate in before.items()})
    with pytest.raises(SteerError) as error:
        find_rate.trials(table, [0.1, 0.2], [0], 30)
    assert "lr_by_layer" in message(error)


# ---- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finder")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    (place / "own.py").write_text(REWARD)
    settings = {
        "rewards": [f"{place / 'own.py'}:share"],
        "reward_weights": None,
        "max_steps": 5,
        "max_completion_length": 6,
        "per_device_train_batch_size": 64,
    }
    return run_folder(place, build_tiny, tiny_tokenizer, 4, **settings, use_cpu=True, disable_tqdm=True)


def words(base: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(base / "config.yaml"), "--output_dir", str(out), "--find_lr", "true", *more]


def run(*arguments: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.main(arguments)
    finally:
        torch.set_num_threads(threads)


RATES = ("--find_lr_rates", "1e-6", "0.2", "1000", "--find_lr_steps", "12")


def test_the_command_finds_the_rate_that_works(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(*words(base, out, *RATES))
    found = json.loads((tmp_path / "run-find-lr" / "find_lr.json").read_text())
    assert found["recommended"] == {"learning_rate": 0.2}
    why = {t["learning_rate"]: t["why_not"] for t in found["trials"]}
    assert why[0.2] is None and why[1e-6] and why[1000]
    assert [t["updates"] for t in found["trials"]].count(12) >= 2, "half of three, rounded up, go on"
    assert (tmp_path / "run-find-lr" / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    command = printed.split("Run next:\n")[1].strip()
    assert command == found["next"]
    program, name, *told = shlex.split(command)
    assert (program, name) == ("steer", "train")
    settings = train.parse(told)
    assert settings.training.learning_rate == 0.2 and settings.training.output_dir == str(out)
    assert settings.finder is not None and not settings.finder.find_lr
    assert not out.exists(), "the run itself has not begun"

    monkeypatch.setattr(
        "steer.training.sweep.trainer.PopulationTrainer.update", lambda *args: pytest.fail("trained again")
    )
    run(*words(base, out, *RATES))
    assert json.loads((tmp_path / "run-find-lr" / "find_lr.json").read_text()) == found
    run(*told)
    assert json.loads((out / "results.json").read_text())["after"]["problems"] == 4


def test_a_rate_has_the_batch_of_the_run_however_many_processes_there_are(base: Path, tmp_path: Path) -> None:
    settings = train.parse(words(base, tmp_path / "run"))
    short = _short(settings, tmp_path, 12, processes=4).training
    check_supported(short)
    assert short.per_device_train_batch_size * short.gradient_accumulation_steps == 4 * 64
    assert settings.training.gradient_accumulation_steps == 1


def test_it_starts_from_vectors(base: Path, tmp_path: Path) -> None:
    model = steer.models.load_model(str(base / "model"))
    vectors = steer.attach(model)
    vectors.set_tensors({n: 0.1 * torch.ones_like(t) for n, t in vectors.tensors().items()})
    vectors.save(tmp_path / "v")
    with pytest.raises(SteerError, match="no rate learned"):
        run(*words(base, tmp_path / "run", "--init", str(tmp_path / "v"), "--find_lr_rates", "1e-9", "1e-8",
                   "--find_lr_steps", "8"))  # fmt: skip
    for tried in json.loads((tmp_path / "run-find-lr" / "find_lr.json").read_text())["trials"]:
        assert tried["kl"] == pytest.approx(tried["kl_at_start"], rel=0.01) and tried["kl"] > 1e-3
    made = steer.read(tmp_path / "run-find-lr" / "members" / "lr-1e-09" / "vectors")
    for tensor in made.tensors.values():
        assert torch.allclose(tensor, torch.full_like(tensor, 0.1), atol=1e-6)


def test_it_says_that_nothing_was_learned(base: Path, tmp_path: Path) -> None:
    reward = ("--rewards", f"{base / 'own.py'}:none")
    with pytest.raises(SteerError, match="no rate learned"):
        run(*words(base, tmp_path / "run", *reward, *RATES))
    found = json.loads((tmp_path / "run-find-lr" / "find_lr.json").read_text())
    assert found["recommended"] is None and found["next"] is None and len(found["trials"]) == 3


def test_an_update_without_a_reward_is_told(base: Path, tmp_path: Path) -> None:
    reward = ("--rewards", f"{base / 'own.py'}:once")
    with pytest.raises(SteerError, match="no sample of update 3 was scored"):
        run(*words(base, tmp_path / "run", *reward, "--find_lr_rates", "0.1", "0.2", "--find_lr_steps", "8"))


def test_it_trains_on_no_held_out_problem_and_on_problems_in_their_order(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlap = tmp_path / "both.jsonl"
    rows = (base / "train.jsonl").read_text().splitlines()
    overlap.write_text("\n".join([*rows[:30], *(base / "heldout.jsonl").read_text().splitlines()]) + "\n")

    def stop(study: Study, members: Any) -> None:
        assert study.held_out is None and len(study.train) == 30
        assert {m.training.pass_rate_floor for m in members} == {1.0}
        assert {m.training.dynamic_sampling_rounds for m in members} == {2}
        assert {m.training.get_warmup_steps(12) for m in members} == {1}, "not the 50 of the whole run"
        raise SteerError("seen")

    monkeypatch.setattr("steer.cli.find_lr.train_members", stop)
    more = ("--train_data", str(overlap), "--dynamic_sampling_rounds", "2", "--pass_rate_floor", "0.2",
            "--warmup_steps", "50")  # fmt: skip
    with pytest.raises(SteerError, match="seen"):
        run(*words(base, tmp_path / "run", *more, *RATES))


def test_rewards_are_compared_as_they_were_before_dynamic_sampling() -> None:
    log = [{"reward": 0.5, "dynamic_sampling/reward": 0.9}, {"reward": 0.5, "dynamic_sampling/reward": None}]
    assert mean_reward(log) == 0.9
    assert mean_reward([{"reward": 0.25}, {"reward": 0.75}, {"reward": None}]) == 0.5


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--learning_rates", "0.1", "0.2"], "a population"),
        (["--lr_sweep", "0.1"], "lr_sweep"),
        (["--sweep_steps", "9"], "sweep_steps"),
        (["--keep", "0.3"], "keep"),
        (["--dry_run", "true"], "dry_run"),
        (["--find_lr_rates", "0.1"], "two or more"),
        (["--find_lr_rates", "0.1", "0"], "two or more"),
        (["--find_lr_steps", "3"], "8 or more"),
    ],
)
def test_what_has_no_part_in_it_is_refused(
    base: Path, tmp_path: Path, more: list[str], expected: str
) -> None:
    with pytest.raises(SteerError) as error:
        run(*words(base, tmp_path / "run", *more))
    assert expected in message(error)
    assert not [*tmp_path.iterdir()]


def test_a_config_that_has_the_finder_is_switched_off(base: Path, tmp_path: Path) -> None:
    from steer.cli.find_lr import _next

    known = yaml.safe_load((base / "config.yaml").read_text())
    path = tmp_path / "c.yaml"
    for more in ({}, {"find_lr_rates": [0.1, 0.2], "find_lr_steps": 9}):
        path.write_text(yaml.safe_dump({**known, "find_lr": True, "learning_rate": 0.5, **more}))
        for switch in ([], ["--find_lr", "true"]):
            given = ["--config", str(path), "--learning-rate=3", *switch]
            command = _next(given, {"learning_rate": 0.25})
            settings = train.parse(shlex.split(command)[2:])
            assert settings.training.learning_rate == 0.25
            assert settings.finder is not None and not settings.finder.find_lr


def test_rates_of_a_finder_that_is_not_asked_for_are_refused(base: Path) -> None:
    for more in (["--find_lr_steps", "9"], ["--find_lr_rates", "0.1", "0.2"]):
        with pytest.raises(SteerError, match="set find_lr=true") as error:
            train.parse(["--config", str(base / "config.yaml"), *more])
        message(error)


def test_the_next_command_has_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.cli.find_lr import _next

    monkeypatch.setenv("STEER_LAUNCHER", "ddp")
    given = ["--config", "demo", "--find_lr", "true"]
    command = _next(given, {"learning_rate": 0.25})
    assert command == "steer train --config demo --find_lr false --learning_rate 0.25 --launcher ddp"

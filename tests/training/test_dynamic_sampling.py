"""Groups without an advantage are replaced, and problems that are always or never solved come up less."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.training import PROMPTS, config, logged, parity, problems, same

from steer import SteerError
from steer.training.dynamic_sampling import PassRates, UpdateSamples
from steer.training.group_trainer import GroupGRPOTrainer
from steer.training.loss import group_advantages
from steer.training.steering_trainer import SteeringGRPOTrainer

GROUP = 4


def update(
    folder: Path, first: list[int], count: int = 8, multiple: int = 1, step: int = 0, **settings: Any
) -> UpdateSamples:
    args = config(folder, **{"dynamic_sampling_rounds": 3, **settings})
    weights = torch.tensor(settings.get("reward_weights", [1.0]))
    return UpdateSamples(args, PassRates(count, args), first, step, weights, multiple)


def drawn(asked: list[int], flat: set[int], columns: int = 1) -> tuple[list[Any], torch.Tensor]:
    """Rows that name their problem; the groups of `flat` problems have equal rewards."""
    rows = [(problem, i) for problem in asked for i in range(GROUP)]
    scores = [0.0 if problem in flat else float(i % 2) for problem, i in rows]
    return rows, torch.tensor(scores)[:, None].repeat(1, columns)


def complete(samples: UpdateSamples, flat: set[int]) -> list[list[int]]:
    """Draw until nothing is wanted; returns what was asked for, round by round."""
    asked = []
    while wanted := samples.wanted():
        asked.append(list(wanted))
        samples.add(*drawn(wanted, flat))
    return asked


def test_flat_groups_are_replaced_by_other_problems(tmp_path: Path) -> None:
    samples = update(tmp_path, [0, 1, 2, 3])
    asked = complete(samples, flat={1, 3})
    assert asked[0] == [0, 1, 2, 3] and len(asked[1]) == 2
    assert not set(asked[1]) & {0, 1, 2, 3}
    assert samples.problems == [0, asked[1][0], 2, asked[1][1]]
    assert samples.rows == [(problem, i) for problem in samples.problems for i in range(GROUP)]
    assert torch.equal(samples.scores, drawn(samples.problems, set())[1])
    metrics = samples.metrics()
    assert metrics["dynamic_sampling/refilled"] == 0.5
    assert metrics["dynamic_sampling/rounds"] == 1
    assert metrics["dynamic_sampling/samples"] == 6 * GROUP
    assert metrics["dynamic_sampling/wasted"] == pytest.approx(2 / 6)
    assert metrics["dynamic_sampling/reward"] == 0.25  # of the first round alone


def test_the_rounds_end_with_the_budget_or_the_data(tmp_path: Path) -> None:
    everything = set(range(8))
    two = update(tmp_path, [0], dynamic_sampling_rounds=2)
    assert [len(asked) for asked in complete(two, everything)] == [1, 1, 1]
    off = update(tmp_path, [0], dynamic_sampling_rounds=0)
    assert len(complete(off, everything)) == 1 and off.metrics() == {}
    small = update(tmp_path, [0, 1], count=3)
    asked = complete(small, everything)
    assert asked == [[0, 1], [2]]  # each problem once, then there is none left
    assert small.problems == [0, 1] and small.rows == drawn([0, 1], set())[0]
    assert small.metrics()["dynamic_sampling/wasted"] == 1.0


def test_a_round_is_a_multiple_of_what_the_processes_need(tmp_path: Path) -> None:
    samples = update(tmp_path, [0, 1, 2, 3], count=10, multiple=2)
    asked = complete(samples, flat={1})
    assert [len(one) for one in asked] == [4, 2]  # one flat group
    assert samples.problems == [0, asked[1][0], 2, 3]
    assert complete(update(tmp_path, [0, 1], count=3, multiple=2), {0, 1}) == [[0, 1]]


def test_what_is_flat_follows_the_advantages(tmp_path: Path) -> None:
    nan = torch.nan
    cases = [
        ([1.0, 1.0, 1.0, 1.0], True),
        ([0.1, 0.1, 0.1, 0.1], True),
        ([0.0, 0.0, 0.0, 1.0], False),
        ([nan, nan, nan, nan], True),
        ([nan, 1.0, nan, nan], True),  # nothing to compare it with
        ([nan, 1.0, 0.5, nan], False),
    ]
    samples = update(tmp_path, [0])
    for scores, flat in cases:
        scored = torch.tensor(scores)[:, None]
        assert samples._flat(scored) == ([0] if flat else []), scores
        advantages = group_advantages(scored[:, 0], GROUP, samples.args)
        assert bool((advantages.abs() < 1e-6).all()) == flat


def test_weights_of_rewards_decide_what_is_flat(tmp_path: Path) -> None:
    opposite = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    both = {"reward_weights": [1.0, 1.0]}
    assert update(tmp_path, [0], **both)._flat(opposite) == [0]
    assert update(tmp_path, [0], reward_weights=[1.0, 0.5])._flat(opposite) == []


def test_functions_that_are_normalised_one_by_one_decide_by_their_sum(tmp_path: Path) -> None:
    def flat(scores: list[list[float]], weights: list[float]) -> bool:
        apart = {"multi_objective_aggregation": "normalize_then_sum", "advantage": "group"}
        samples = update(tmp_path, [0], reward_weights=weights, **apart)
        return samples._flat(torch.tensor(scores)) == [0]

    opposite = [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert flat(opposite, [1.0, 1.0]), "they cancel"
    assert not flat(opposite, [1.0, 0.5])
    assert not flat([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [1.0, 1.0])
    assert flat([[0.5, 0.0], [0.5, 1.0], [0.5, 0.0], [0.5, 1.0]], [1.0, 0.0]), "logged alone: no weight"
    assert flat([[0.1, torch.nan]] * 4, [1.0, 1.0])


def test_rewards_that_are_no_pass_rate_get_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates = PassRates(4, config(tmp_path, pass_rate_floor=0.2))
    rates.add([0], torch.tensor([[0.0], [1], [torch.nan], [1]]))
    assert not caplog.records
    rates.add([0], torch.tensor([[-0.5], [0], [torch.nan], [3]]))
    rates.add([1], torch.tensor([[-1.0], [0], [0], [0]]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "from -0.5 to 3" in caplog.text


def test_pass_rates_run_and_weigh_as_documented(tmp_path: Path) -> None:
    args = config(tmp_path, pass_rate_floor=0.2)
    rates = PassRates(5, args)
    rates.add([0, 1], torch.tensor([[1.0], [0], [0], [0], [1], [1], [1], [1]]))
    rates.add([0, 2], torch.tensor([[1.0], [1], [1], [0], [-1], [-1], [-1], [3]]))  # limited to 0 to 1
    rates.add([3], torch.full((4, 1), torch.nan))  # nothing was scored
    assert rates.rates[:3].tolist() == [0.5, 1.0, 0.25] and rates.rates[3:].isnan().all()
    expected = [1 - 2 * 0.5**4, 0.2, 1 - 0.25**4 - 0.75**4, 1.0, 1.0]
    assert rates.weights() == pytest.approx(expected)


def test_a_problem_is_kept_as_often_as_its_weight_says(tmp_path: Path) -> None:
    args = config(tmp_path, pass_rate_floor=0.25)
    rates = PassRates(40, args)
    rates.rates[:3] = torch.tensor([0.0, 1.0, 0.5])
    kept: Counter[int] = Counter()
    steps = 2000
    for step in range(steps):
        samples = UpdateSamples(args, rates, [0, 1, 2, 3], step, torch.ones(1))
        assert len(set(samples.problems)) == 4
        kept.update({0, 1, 2, 3} & set(samples.problems))
    shares = [kept[problem] / steps for problem in range(4)]
    assert shares == pytest.approx([0.25, 0.25, 0.875, 1.0], abs=0.03)


def test_refills_come_from_likely_problems_too(tmp_path: Path) -> None:
    args = config(tmp_path, pass_rate_floor=0.01, dynamic_sampling_rounds=1)
    chosen: Counter[int] = Counter()
    for step in range(300):
        rates = PassRates(20, args)
        rates.rates[1:11] = 1.0
        samples = UpdateSamples(args, rates, [0], step, torch.ones(1))
        samples.add(*drawn(samples.wanted(), {0}))
        chosen.update(samples.wanted())
    known = sum(chosen[problem] for problem in range(1, 11))
    assert chosen.total() == 300 and 0 < known < 15  # 1 in 91


def test_draws_depend_on_the_seed_and_the_update_alone(tmp_path: Path) -> None:
    def asked(**changes: Any) -> list[list[int]]:
        return complete(update(tmp_path, [0, 1, 2], count=100, **changes), {0, 1, 2})

    np.random.seed(1)
    first = asked()
    np.random.seed(2)
    assert asked() == first
    assert asked(seed=8) != first and asked(step=1) != first


# ---- in the trainer


def trained(run: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Any, list[dict]]:
    """A trainer after its run, and the batches that its updates were given."""
    batches = []
    generate = GroupGRPOTrainer._generate_and_score_completions

    def recorded(self: Any, inputs: Any) -> dict[str, Any]:
        batches.append(generate(self, inputs))
        return batches[-1]

    monkeypatch.setattr(GroupGRPOTrainer, "_generate_and_score_completions", recorded)
    return run(**{"max_steps": 4, **settings}), batches


def check(trainer: SteeringGRPOTrainer, batch: dict[str, Any]) -> list[int]:
    """The advantages of a batch are those of its own prompts and completions; returns the problems."""
    tokenizer = trainer.processing_class
    prompts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    numbers = [PROMPTS.index(prompt) for prompt in prompts]
    ids = [
        row[mask.bool()].tolist()
        for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    rewards = torch.tensor(parity(ids, numbers))
    assert torch.allclose(batch["advantages"], group_advantages(rewards, GROUP, trainer.args))
    assert numbers == [n for n in numbers[::GROUP] for _ in range(GROUP)]
    return numbers[::GROUP]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"fast_sampler": False}, marks=pytest.mark.slow),
        pytest.param({"beta": 0.1}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"num_iterations": 2, "max_steps": 8},
    ],
    ids=str,
)
def test_updates_hold_no_flat_group_while_there_are_others(run, monkeypatch, settings: dict) -> None:
    plain, _ = trained(run, monkeypatch, **settings)
    assert max(logged(plain, "frac_reward_zero_std")) > 0  # every third problem is flat
    trainer, batches = trained(run, monkeypatch, dynamic_sampling_rounds=5, **settings)
    assert logged(trainer, "frac_reward_zero_std") == [0.0] * len(logged(trainer, "frac_reward_zero_std"))
    for batch in batches:
        assert not {0, 3, 6} & set(check(trainer, batch))
    assert max(logged(trainer, "dynamic_sampling/refilled")) > 0
    counts = logged(trainer, "dynamic_sampling/samples")
    assert min(counts) == 8 and max(counts) > 8
    # tokens of discarded samples are counted; the samples of plain updates alone would be fewer
    assert logged(trainer, "num_tokens")[-1] > logged(plain, "num_tokens")[-1]


def test_refilled_rows_bring_their_own_log_probabilities(run, monkeypatch) -> None:
    """An engine's log-probabilities travel with their rows."""
    sample = GroupGRPOTrainer._generate_single_turn

    def engine(self: Any, *args: Any, **kwargs: Any) -> tuple:
        ids, _ = sample(self, *args, **kwargs)
        return ids, [[-token / 100 for token in row] for row in ids]

    monkeypatch.setattr(GroupGRPOTrainer, "_generate_single_turn", engine)
    trainer, batches = trained(run, monkeypatch, dynamic_sampling_rounds=5)
    assert max(logged(trainer, "dynamic_sampling/refilled")) > 0
    for batch in batches:
        mask = batch["completion_mask"].bool()
        expected = -batch["completion_ids"][mask] / 100
        assert torch.allclose(batch["sampling_per_token_logps"][mask], expected)


def test_without_flat_groups_it_changes_nothing(run) -> None:
    def first(completion_ids: Any, **_: Any) -> list[float]:  # never the same for a whole group
        return [float(i % GROUP + ids[0] % 2 / 4) for i, ids in enumerate(completion_ids)]

    plain = run(reward=first)
    found = run(reward=first, dynamic_sampling_rounds=3, pass_rate_floor=0.5)
    assert logged(found, "dynamic_sampling/rounds") == [0.0, 0.0]
    assert same(found.vectors.tensors(), plain.vectors.tensors())
    assert logged(found, "num_tokens") == logged(plain, "num_tokens")
    assert logged(found, "reward") == logged(plain, "reward") == logged(found, "dynamic_sampling/reward")


def test_no_row_is_drawn_twice_with_the_same_random_numbers(run, monkeypatch) -> None:
    asked: list[range] = []
    import steer.training.group_trainer as module

    uniforms = module.uniforms

    def recorded(rows: range, *args: Any) -> torch.Tensor:
        asked.append(rows)
        return uniforms(rows, *args)

    monkeypatch.setattr(module, "uniforms", recorded)
    run(max_steps=1, dynamic_sampling_rounds=3, reward=lambda completions, **_: [0.0] * len(completions))
    assert asked == [range(8), range(8, 16), range(16, 24), range(24, 32)]


def test_what_rewards_log_stays_with_its_rows(run, monkeypatch) -> None:
    def reward(completion_ids: Any, number: Any, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("number", list(number))
        log_metric("seen", float(len(number)))
        return parity(completion_ids, number)

    trainer, batches = trained(
        run, monkeypatch, reward=reward, dynamic_sampling_rounds=5, max_steps=1, log_completions=True
    )
    numbers = check(trainer, batches[0])
    assert list(trainer._logs["extra"]["number"]) == [n for n in numbers for _ in range(GROUP)]
    assert list(trainer._logs["prompt"]) == [PROMPTS[n] for n in numbers for _ in range(GROUP)]


def test_what_rewards_measure_is_of_the_first_round(run) -> None:
    calls: list[int] = []

    def reward(completions: Any, log_metric: Any, **_: Any) -> list[float]:
        calls.append(len(completions))
        log_metric("call", float(len(calls)))
        return [0.0] * len(completions)

    trainer = run(max_steps=1, dynamic_sampling_rounds=3, reward=reward)
    assert len(calls) == 4 and logged(trainer, "call") == [1.0]


def test_known_problems_come_up_less(run) -> None:
    def reward(number: list[int], completion_ids: Any, **_: Any) -> list[float]:
        seen.update(number[::GROUP])
        return [float(n % 2 and sum(ids) % 2) for n, ids in zip(number, completion_ids, strict=True)]

    found = {}
    for floor in (1.0, 0.05):
        seen: Counter[int] = Counter()
        trainer = run(max_steps=16, pass_rate_floor=floor, reward=reward, max_completion_length=4)
        found[floor] = sum(seen[n] for n in range(0, 8, 2)) / seen.total()
    assert found[1.0] == 0.5 and found[0.05] < 0.3
    assert logged(trainer, "pass_rate/known")[-1] == 1.0
    assert trainer.pass_rates.rates[::2].tolist() == [0.0] * 4


def test_data_without_an_index_and_tools_are_refused(run, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="train_dataset is a IterableDataset; give"):
        run(data=problems().to_iterable_dataset(), dynamic_sampling_rounds=1)
    with pytest.raises(SteerError, match=r"pass_rate_floor=0.0 is out of range.*never be tried again"):
        config(tmp_path, pass_rate_floor=0.0)
    with pytest.raises(SteerError, match="dynamic_sampling_rounds=-1 is out of range"):
        config(tmp_path, dynamic_sampling_rounds=-1)


def test_chat_prompts_are_refilled_too(run, tiny_tokenizer) -> None:
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in PROMPTS],
            "number": list(range(len(PROMPTS))),
        }
    )
    trainer = run(data=data, dynamic_sampling_rounds=5)
    assert logged(trainer, "frac_reward_zero_std") == [0.0, 0.0]

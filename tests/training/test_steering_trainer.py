"""The trainer on a tiny Llama: it learns, and its savings change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.heads import contiguous_inputs
from helpers.training import SPREAD, config, far, logged, make_trainer, parity, problems, same, target_share
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer import grpo_trainer

import steer
from steer import SteerError, SteeringConfig
from steer.training.callbacks import ProgressBar, VectorLog
from steer.training.steering_trainer import SteeringGRPOTrainer

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def vectors(trainer: SteeringGRPOTrainer) -> dict[str, torch.Tensor]:
    return trainer.vectors.tensors()


# ---- it learns, and only the vectors change


LEARN: dict[str, Any] = {
    "max_steps": 15,
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "learning_rate": 0.4,
}


def test_learns_and_leaves_the_base_as_it_was(run, build_tiny) -> None:
    before = {n: p.clone() for n, p in build_tiny("llama", initializer_range=SPREAD).named_parameters()}
    trainer = run(target_share, **LEARN)
    rewards = logged(trainer, "reward")
    assert len(rewards) == 15
    # ten of the 97 tokens are rewarded
    assert rewards[0] < 0.15 and sum(rewards[-3:]) / 3 > 0.5
    own = set(trainer.vectors.named_parameters())
    after = {n: p for n, p in trainer.model.named_parameters() if n not in own}
    assert same(before, {n: p.detach() for n, p in after.items()})
    assert all(p.grad is None and not p.requires_grad for p in after.values())
    assert all(t.norm() > 0 for t in vectors(trainer).values())


def test_trains_float32_vectors_on_a_bfloat16_base(run) -> None:
    trainer = run(target_share, dtype=torch.bfloat16, **LEARN)
    base = [p for n, p in trainer.model.named_parameters() if not n.endswith("steering.vector")]
    assert {p.dtype for p in base} == {torch.bfloat16}
    assert {p.dtype for p in trainer.vectors.parameters()} == {torch.float32}
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.15
    # finer than bfloat16 resolves: the vectors were not rounded on the way
    moved = torch.cat(list(vectors(trainer).values()))
    assert not torch.equal(moved, moved.bfloat16().float())


# ---- savings that must not change the result


@pytest.mark.parametrize("loss_type", LOSSES)
def test_neither_rows_left_out_nor_an_update_in_parts_change_anything(run, loss_type: str) -> None:
    # SGD, because Adam's first steps are signs and would hide a wrong scale; unequal micro-batches.
    steps = 2 if loss_type == "dapo" else 1
    settings: dict[str, Any] = {
        "loss_type": loss_type,
        "max_steps": steps,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
        "importance_sampling_level": "sequence" if loss_type == "luspo" else "token",
        "epsilon_high": 5.0 if loss_type == "cispo" else None,
    }
    counts: list[int] = []

    def count(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        counts.append(len(inputs["advantages"]))
        return original(self, model, inputs)

    original = grpo_trainer.GRPOTrainer._compute_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_trainer.GRPOTrainer, "_compute_loss", count)
        skipping = run(skip_zero_advantage=True, **settings)
        assert len(counts) == 2 * steps
        assert min(counts) < 8, "no row was left out: the test would prove nothing"
        whole = run(skip_zero_advantage=False, **settings)
        assert counts[2 * steps :] == [8] * 2 * steps
        parts = run(skip_zero_advantage=False, update_rows=3, **settings)
        assert counts[4 * steps :] == [3, 3, 2] * 2 * steps
        both = run(update_rows=3, **settings)
    # float32 sums over other shapes
    for other in (skipping, parts, both):
        assert far(vectors(other), vectors(whole)) < 1e-4
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4, abs=1e-6)


def test_what_is_scored_before_an_update_is_scored_in_whole_groups(run, monkeypatch) -> None:
    counts: list[int] = []
    original = SteeringGRPOTrainer._score_rows

    def count(self: Any, model: Any, ids: torch.Tensor, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            counts.append(len(ids))
        return original(self, model, ids, *args)

    monkeypatch.setattr(SteeringGRPOTrainer, "_score_rows", count)
    # a generation of three groups of four feeds two updates of six rows
    settings: dict[str, Any] = {"per_device_train_batch_size": 6, "steps_per_generation": 2, "beta": 0.1}
    trainer = run(max_steps=1, **settings)
    assert counts == [8, 4] * 2, "of the policy, and of the reference"
    counts.clear()
    prompts = torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9], [3, 4, 5, 6]]).repeat_interleave(4, 0)
    ids = torch.cat([prompts, torch.arange(60).view(12, 5) + 10], 1)
    with torch.no_grad():
        parts, whole = (
            trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, (ids > 0).long(), 5, batch_size=size
            )[0]
            for size in (6, None)
        )
    assert counts == [8, 4, 12]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_an_update_in_parts_with_a_reference_changes_nothing(run) -> None:
    settings: dict[str, Any] = {"beta": 0.1, "max_steps": 3, "learning_rate": 0.1}
    assert far(vectors(run(update_rows=3, **settings)), vectors(run(update_rows=0, **settings))) < 1e-4


def test_a_batch_without_any_advantage_still_takes_part(run) -> None:
    trainer = run(lambda completions, **columns: [1.0] * len(completions))
    assert trainer.state.global_step == 2
    assert all((t == 0).all() for t in vectors(trainer).values())


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_a_batch_of_truncated_samples_only_still_takes_part(run, loss_type: str) -> None:
    # every completion of three tokens is cut off, so every row is masked and nothing is left to score
    settings: dict[str, Any] = {"max_completion_length": 3, "skip_zero_advantage": False, "update_rows": 3}
    trainer = run(mask_truncated_completions=True, loss_type=loss_type, **settings)
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(t).all() for t in vectors(trainer).values())
    assert logged(trainer, "completions/clipped_ratio") == [1.0, 1.0]
    assert all((t == 0).all() for t in vectors(trainer).values())


@pytest.mark.parametrize("positions", ["all", "completion"])
def test_sharing_prompts_changes_nothing(run, positions: str) -> None:
    steering = SteeringConfig(positions=positions)
    # micro-batches of one group each: shorter prompts then share columns of padding
    settings = {"steering": steering, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    shared = run(share_prompts=True, **settings)
    plain = run(share_prompts=False, **settings)
    assert all(t.norm() > 0 for t in vectors(plain).values())
    assert far(vectors(shared), vectors(plain)) < 1e-4


def test_gradient_checkpointing_changes_nothing_and_turns_sharing_off(run) -> None:
    calls: list[bool] = []

    def watch(trainer: SteeringGRPOTrainer) -> SteeringGRPOTrainer:
        forward = trainer.model.forward

        def watched(*args: Any, score_group: bool = False, **kwargs: Any) -> Any:
            if score_group and torch.is_grad_enabled():
                calls.append(kwargs["share"])
            return forward(*args, score_group=score_group, **kwargs)

        trainer.model.forward = watched
        trainer.train()
        return trainer

    plain = watch(run(optim="sgd", train=False))
    assert all(calls) and calls
    calls.clear()
    saving = watch(run(optim="sgd", gradient_checkpointing=True, train=False))
    assert calls and not any(calls)
    assert saving.model.is_gradient_checkpointing
    assert far(vectors(saving), vectors(plain)) < 1e-4


def test_a_frozen_router_has_no_loss_of_its_own(run, build_tiny) -> None:
    def trained(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        model = build_tiny("mixtral", initializer_range=SPREAD, router_aux_loss_coef=1.0)
        return vectors(run(model=model, folder=folder, max_steps=1, **settings))

    default, off = trained("default"), trained("off", router_aux_loss_coef=0.0)
    assert same(default, off)
    assert far(trained("trl", router_aux_loss_coef=None), default) > 1e-3


def test_both_samplers_train(run) -> None:
    for fast in (True, False):
        trainer = run(fast_sampler=fast, top_k=20, top_p=0.9, folder=f"fast-{fast}")
        assert trainer.state.global_step == 2 and len(logged(trainer, "reward")) == 2
        assert all(t.norm() > 0 for t in vectors(trainer).values())


def test_the_sampler_of_transformers_leaves_out_the_models_generation_config(run, build_tiny) -> None:
    model = build_tiny("llama", initializer_range=SPREAD)
    model.generation_config.min_p = 1.0  # alone the likeliest token would be drawn
    own, plain = run(model=model, fast_sampler=False, folder="own"), run(fast_sampler=False)
    assert any(tensor.norm() > 0 for tensor in vectors(plain).values())
    assert same(vectors(own), vectors(plain))
    assert model.generation_config.min_p == 1.0


def test_the_sampler_of_transformers_gives_the_head_no_views(run, build_tiny, monkeypatch) -> None:
    model = build_tiny("llama", initializer_range=SPREAD)
    contiguous = contiguous_inputs(model, monkeypatch)
    run(model=model, fast_sampler=False, max_steps=1)
    assert len(contiguous) > 1 and all(contiguous)


def test_the_same_seed_gives_the_same_vectors_and_another_seed_others(run) -> None:
    first = run()
    assert same(vectors(first), vectors(run()))
    assert not same(vectors(first), vectors(run(seed=8)))


# ---- advantages


@pytest.mark.parametrize("advantage", ["loo", "group"])
def test_advantages_equal_a_plain_loop(run, advantage: str) -> None:
    rewards: list[float] = []
    seen: list[torch.Tensor] = []

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        rewards[:] = [float(sum(ids) % 7) for ids in completion_ids]
        return rewards

    trainer = run(reward, advantage=advantage, train=False, scale_rewards="none")
    trainer.model.train()
    rows = [row for row in problems(2).to_list() for _ in range(4)]
    seen.append(trainer._generate_and_score_completions(rows)["advantages"])
    for start in (0, 4):
        group = rewards[start : start + 4]
        for i, value in enumerate(group):
            others = [r for j, r in enumerate(group) if j != i] if advantage == "loo" else group
            expected = value - sum(others) / len(others)
            assert seen[0][start + i].item() == pytest.approx(expected, abs=1e-5)
    assert len(set(rewards)) > 2


# ---- the reference policy


def test_kl_is_to_the_model_without_vectors_and_needs_no_second_model(run, monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a second model was loaded")

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", refuse)
    free = run(max_steps=3, folder="free")
    held = run(max_steps=3, beta=2.0, folder="held")
    assert held.args.beta == held.beta == 2.0
    kl = logged(held, "kl")
    assert kl[0] == 0.0 and min(kl[1:]) > 1e-4
    assert not logged(free, "kl")
    assert far(vectors(held), vectors(free)) > 1e-2


def test_kl_pulls_the_vectors_back(run) -> None:
    # with no reward to gain, only the KL term is left: it must not grow from zero vectors
    trainer = run(lambda completions, **columns: [0.0] * len(completions), beta=1.0)
    assert logged(trainer, "kl") == [0.0, 0.0]
    assert all((t == 0).all() for t in vectors(trainer).values())


# ---- what is logged


def test_layers_are_logged(run) -> None:
    trainer = run(max_steps=3, save_strategy="steps", save_steps=2, train=False)
    trainer.add_callback(VectorLog(trainer.vectors, trainer._metrics["train"]))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    for layer in range(3):
        for row in rows:
            assert row[f"layer/{layer}/norm"] > 0 and row[f"layer/{layer}/grad_norm"] > 0
        # the first update makes the vector, so it is all of it
        assert rows[0][f"layer/{layer}/update_ratio"] == pytest.approx(1, abs=1e-5)
        assert 0 < rows[1][f"layer/{layer}/update_ratio"] < 2
        assert f"layer/{layer}/cosine" not in rows[0] and f"layer/{layer}/cosine" not in rows[1]
        assert 0 < rows[2][f"layer/{layer}/cosine"] <= 1 + 1e-6
    norms = trainer.vectors.norms()
    assert [rows[-1][f"layer/{i}/norm"] for i in norms] == pytest.approx(list(norms.values()))


def test_the_trainer_brings_its_log_and_its_bar(run) -> None:
    # a user who starts the trainer from Python gets what the recipe shows, without adding callbacks
    trainer = run(disable_tqdm=False, train=False)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(VectorLog) == kinds.count(ProgressBar) == 1


def test_completions_are_written(run, tmp_path: Path, capsys) -> None:
    import pandas

    drawn: list[list[int]] = []

    def size(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        drawn.extend(completion_ids)
        return [float(sum(ids) % 5) for ids in completion_ids]

    trainer = run(size, log_completions=True, num_completions_to_print=1)
    tables = sorted((tmp_path / "run" / "completions").glob("*.parquet"))
    assert [table.name for table in tables] == ["completions_00001.parquet", "completions_00002.parquet"]
    table = pandas.read_parquet(tables[0])
    assert len(table) == 8 and {"prompt", "completion", "advantage", "size"} <= set(table.columns)
    cut = [len(ids) == 8 and ids[-1] not in trainer.eos_token_ids for ids in drawn[:8]]
    assert table["cut_off"].tolist() == cut and any(cut)


def test_tensorboard_gets_the_log(run, tmp_path: Path, monkeypatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(report_to="tensorboard")
    files = [*tmp_path.rglob("events.out.tfevents*")]
    assert files
    reader = events.EventAccumulator(str(files[0]))
    reader.Reload()
    assert {"train/reward", "train/loss"} <= set(reader.Tags()["scalars"])


# ---- bad input


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "1 rewards for 8"),
        ([1.0] * 9, "9 rewards for 8"),
        ([1.0] * 7 + [math.nan], "not finite"),
        ([math.inf] + [0.0] * 7, "not finite"),
        (["1"] * 8, "not finite"),
        (None, "NoneType"),
    ],
)
def test_wrong_rewards_stop_the_run(run, value: Any, message: str) -> None:
    def wrong(**columns: Any) -> Any:
        return value

    with pytest.raises(SteerError, match=message) as caught:
        run(wrong)
    assert "'wrong'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model=false"),
        ({"advantage": "loo", "scale_rewards": "group"}, "scale_rewards=none"),
        ({"advantage": "loo", "scale_rewards": "batch"}, "scale_rewards=none"),
        ({"advantage": "median"}, "loo, group"),
    ],
)
def test_settings_that_cannot_work_say_so_at_the_start(settings: dict, message: str) -> None:
    with pytest.raises(SteerError, match=message) as caught:
        config(Path("unused"), **settings)
    assert "\n" not in str(caught.value)


def test_peft_and_vectors_given_twice_are_refused(run, tiny_llama, tiny_tokenizer, tmp_path: Path) -> None:
    args = config(tmp_path)
    with pytest.raises(SteerError, match="peft_config"):
        make_trainer(tiny_llama, tiny_tokenizer, args, peft_config=LoraConfig())
    steer.attach(tiny_llama)
    with pytest.raises(SteerError, match="already has steering vectors"):
        make_trainer(tiny_llama, tiny_tokenizer, args, steering=SteeringConfig())
    own = make_trainer(tiny_llama, tiny_tokenizer, args)
    assert own.vectors is steer.attached(tiny_llama)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_problems_are_refused_before_training(run, count: int) -> None:
    # two prompts a step are asked for
    with pytest.raises(SteerError, match="data set") as caught:
        run(data=problems(8).select(range(count)))
    assert "\n" not in str(caught.value)


def test_setting_beta_aside_leaves_the_arguments_whole_after_an_error(
    tiny_llama, tiny_tokenizer, tmp_path
) -> None:
    args = config(tmp_path, beta=0.25)
    with pytest.raises(TypeError):
        make_trainer(tiny_llama, tiny_tokenizer, args, data=["no", "data", "set"])
    assert args.beta == 0.25
    # and the model can be used again: the vectors of the failed attempt are not in the way
    assert make_trainer(tiny_llama, tiny_tokenizer, args).beta == 0.25


def test_evaluation_does_not_disturb_training(run) -> None:
    class Evaluate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.evaluate(eval_dataset=problems(4))

    quiet = run(max_steps=3)
    trainer = run(max_steps=3, per_device_eval_batch_size=4, train=False)
    trainer.add_callback(Evaluate())
    trainer.train()
    assert any("eval_reward" in row for row in trainer.state.log_history)
    assert same(vectors(trainer), vectors(quiet))


def test_batches_of_an_evaluation_are_not_drawn_alike(run) -> None:
    seen: list[tuple[int, ...]] = []
    evaluations: list[list[tuple[int, ...]]] = []

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        seen.extend(tuple(ids) for ids in completion_ids)
        return parity(completion_ids=completion_ids, **columns)

    class Evaluate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for _ in range(2):
                seen.clear()
                trainer.evaluate(eval_dataset=Dataset.from_list([{"prompt": "7", "number": 1}] * 4))
                evaluations.append(list(seen))

    trainer = run(reward, max_steps=1, per_device_eval_batch_size=4, train=False)
    trainer.add_callback(Evaluate())
    trainer.train()
    first, second = evaluations
    assert len(first) == 16
    assert len(set(first)) > 4, "four batches of four samples of one prompt"
    assert first == second


def test_a_prompt_that_begins_with_bos_gets_no_second_one(run, tiny_tokenizer) -> None:
    trainer = run(train=False)
    ids, _, _ = trainer._tokenize_prompts(["<s>1+1=", "<s>2"])
    assert [row[0] for row in ids] == [1, 1] and all(row.count(1) == 1 for row in ids)


def test_a_model_with_nothing_to_train_or_more_than_vectors_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    held = steer.attach(tiny_llama)
    for parameter in held.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(SteerError, match="no vector requires a gradient"):
        make_trainer(tiny_llama, tiny_tokenizer, config(tmp_path))
    for parameter in held.parameters():
        parameter.requires_grad_(True)
    tiny_llama.lm_head.requires_grad_(True)
    with pytest.raises(SteerError, match=r"1 parameters of the base model require a gradient \(lm_head"):
        make_trainer(tiny_llama, tiny_tokenizer, config(tmp_path))

"""Every kind of vector under the same trainer: all learn, runs resume, logs and rates are by layer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import relative
from helpers.training import SPREAD, config, logged, make_trainer, parity, same, target_share
from transformers import PreTrainedModel

import steer
from steer import SteerError, SteeringConfig, artifact
from steer.training.steering_trainer import SteeringGRPOTrainer


@pytest.fixture(params=["adaptive", "shared"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(build_tiny, tiny_tokenizer, tmp_path: Path, kind: str) -> Callable[..., SteeringGRPOTrainer]:
    """`run(positions=..., resume=..., **settings)`: a fresh model with vectors of this kind, trained."""

    def start(
        folder: str = "run",
        resume: Path | None = None,
        train: bool = True,
        model: PreTrainedModel | None = None,
        reward: Any = target_share,
        steering: dict[str, Any] | None = None,
        **settings: Any,
    ) -> SteeringGRPOTrainer:
        model = model or build_tiny("llama", initializer_range=SPREAD)
        vectors = SteeringConfig(kind=kind, rank=2, **(steering or {}))
        args = config(tmp_path / folder, **settings)
        trainer = make_trainer(model, tiny_tokenizer, args, reward, vectors)
        if train:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    return start


def fresh(
    trainer: SteeringGRPOTrainer, build_tiny: Callable[..., PreTrainedModel]
) -> dict[str, torch.Tensor]:
    """The same vectors before training, which no seed of the run decides."""
    config = trainer.vectors.config
    return steer.attach(build_tiny("llama", seed=5), SteeringConfig(kind=config.kind, rank=2)).tensors()


def test_all_parameters_learn_and_the_base_stays(run, build_tiny) -> None:
    base = {n: p.clone() for n, p in build_tiny("llama", initializer_range=SPREAD).named_parameters()}
    trainer = run(max_steps=15, per_device_train_batch_size=32, num_generations=8, learning_rate=0.2)
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.15 and sum(rewards[-3:]) / 3 > rewards[0] + 0.15
    before, after = fresh(trainer, build_tiny), trainer.vectors.tensors()
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], before[name]) for name in after)
    rest = {n: p.detach() for n, p in trainer.model.named_parameters() if n not in after}
    assert same(rest, base)


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 0.5, "num_iterations": 2}, {"fast_sampler": False, "lr_scheduler_type": "linear"}],
    ids=["plain", "reference", "sampler of transformers"],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(run, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"max_steps": 5, "save_steps": 3, "save_strategy": "steps", **settings}
    whole = run(folder="whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    random.seed(99)
    torch.manual_seed(99)
    resumed = run(folder="resumed", resume=checkpoint, **settings)
    assert not same(artifact.read(checkpoint).tensors, whole.vectors.tensors())
    assert same(resumed.vectors.tensors(), whole.vectors.tensors())
    assert logged(resumed, "reward") == logged(whole, "reward")


def test_logs_tell_each_layer_and_what_is_shared(run, kind) -> None:
    trainer = run(max_steps=3)
    for layer, norm in trainer.vectors.norms().items():
        assert logged(trainer, f"layer/{layer}/norm")[-1] == pytest.approx(norm)
        assert len(logged(trainer, f"layer/{layer}/norm")) == 3
        assert all(ratio > 0 for ratio in logged(trainer, f"layer/{layer}/update_ratio"))
    shared = logged(trainer, "shared/grad_norm")
    assert len(shared) == (3 if kind == "shared" else 0)
    # together they are the gradient that the trainer clipped: its norm is below the limit here or at it
    parts = [logged(trainer, f"layer/{layer}/grad_norm") for layer in range(3)] + ([shared] if shared else [])
    total = [sum(part[step] ** 2 for part in parts) ** 0.5 for step in range(3)]
    assert total == pytest.approx([min(norm, 2.0) for norm in logged(trainer, "grad_norm")], rel=1e-4)


def test_rates_by_layer_reach_both_factors(run, kind, build_tiny) -> None:
    trainer = run(lr_by_layer="0:0,2:0.5", learning_rate=0.01, weight_decay=0.0)
    by_name = {id(p): name for name, p in trainer.vectors.named_parameters().items()}
    rates = {by_name[id(g["params"][0])]: g["initial_lr"] for g in trainer.optimizer.param_groups}
    told = {0: 0.0, 1: 0.01, 2: 0.5}
    for name, rate in rates.items():
        assert rate == (0.01 if name.endswith("directions") else told[int(name.split(".")[2])])
    assert len(rates) == (6 if kind == "adaptive" else 4)
    before, after = fresh(trainer, build_tiny), trainer.vectors.tensors()
    for name in after:
        assert torch.equal(after[name], before[name]) == (".layers.0." in name)


@pytest.mark.parametrize("positions", ["all", "completion"])
def test_savings_of_the_update_change_nothing(run, positions, build_tiny) -> None:
    # SGD, because Adam's first steps are signs and would hide a wrong scale
    settings: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 8.0, "reward": parity}
    settings["steering"] = {"positions": positions}

    def moved(**more: Any) -> dict[str, torch.Tensor]:
        trainer = run(**settings, **more)
        start = fresh(trainer, build_tiny)
        return {name: tensor - start[name] for name, tensor in trainer.vectors.tensors().items()}

    saving = moved()
    assert all(change.norm() > 1e-3 for change in saving.values())
    for other in ({"share_prompts": False, "skip_zero_advantage": False}, {"gradient_checkpointing": True}):
        for name, change in moved(**other).items():
            assert relative(saving[name], change) < 1e-3, name  # float32 sums over other shapes


def test_the_reference_is_the_model_without_vectors(run) -> None:
    trainer = run(beta=0.5, max_steps=3)
    kl = logged(trainer, "kl")
    assert kl[0] == 0.0  # fresh vectors change nothing
    assert kl[-1] > 0.0


def test_a_checkpoint_of_another_kind_is_refused(
    run, tmp_path: Path, kind, build_tiny, tiny_tokenizer
) -> None:
    run(save_strategy="steps", save_steps=2)
    args = config(tmp_path / "other", max_steps=3)
    model = build_tiny("llama", initializer_range=SPREAD)
    other = make_trainer(model, tiny_tokenizer, args, target_share, SteeringConfig(kind="constant"))
    with pytest.raises(SteerError, match=r"steering\.(readout|mix)") as error:
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "\n" not in str(error.value)

"""Each member of a population becomes what it becomes alone, in a run of `SteeringGRPOTrainer` itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import config, far, logged, make_trainer, parity, problems, target_share
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steer import SteeringConfig
from steer.rewards import RandomReward
from steer.train.member import Member
from steer.train.population import PopulationTrainer

# (steering, settings, reward) of each member of a mixed population
MIXED: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "first": ({"layers": "0"}, {}, parity),
    "last, other seed": ({"layers": "2"}, {"seed": 11, "learning_rate": 0.2}, parity),
    "all": ({"layers": "all"}, {"lr_by_layer": "geometric:0.01:0.1"}, parity),
    "adaptive": ({"kind": "adaptive", "layers": "1"}, {}, parity),
    "shared": ({"kind": "shared", "rank": 2}, {"lr_scheduler_type": "linear"}, parity),
    "attention": ({"site": "attn_out", "layers": "1"}, {"max_grad_norm": 0.01}, target_share),
    "before": (
        {"site": "resid_pre", "layers": "1-2"},
        {"advantage": "group", "scale_rewards": "group"},
        parity,
    ),
    "completion": ({"positions": "completion"}, {"loss_type": "grpo"}, parity),
    "prompt": ({"positions": "prompt", "layers": "1"}, {"loss_type": "dr_grpo"}, parity),
    "random": ({"layers": "0"}, {"loss_type": "bnpo"}, RandomReward()),
    "kl": ({"layers": "1"}, {"beta": 0.1, "warmup_steps": 2}, parity),
    "batch": ({"layers": "2"}, {"advantage": "group", "scale_rewards": "batch", "weight_decay": 0.1}, parity),
}
COMMON = {"max_steps": 5, "per_device_train_batch_size": 8}


@pytest.fixture(scope="module")
def solo(
    build_tiny: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """The trainer of a run alone, after it."""

    def run(tokenizer: PreTrainedTokenizerFast, steering: dict, changes: dict, reward: Any) -> Any:
        args = config(tmp_path_factory.mktemp("solo"), **{**COMMON, **changes})
        trainer = make_trainer(
            build_tiny("llama", initializer_range=0.3), tokenizer, args, reward, SteeringConfig(**steering)
        )
        trainer.train()
        return trainer

    return run


def population(
    model: PreTrainedModel, tokenizer: Any, folder: Path, specs: dict[str, Any], **changes: Any
) -> PopulationTrainer:
    members = [
        Member(name, [reward], config(folder, **{**COMMON, **own, **changes}), SteeringConfig(**steering))
        for name, (steering, own, reward) in specs.items()
    ]
    return PopulationTrainer(model, members, problems(), tokenizer, folder / "state-0.pt")


def test_every_member_equals_its_run_alone(build_tiny, tiny_tokenizer, tmp_path, solo) -> None:
    together = population(build_tiny("llama", initializer_range=0.3), tiny_tokenizer, tmp_path, MIXED)
    together.train()
    by_name = {member.name: member for member in together.members}
    for name, spec in MIXED.items():
        alone, member = solo(tiny_tokenizer, *spec), by_name[name]
        got, expected = member.vectors.tensors(), alone.vectors.tensors()
        assert max(t.norm() for t in expected.values()) > 0, name
        # float32 sums in another order; Adam divides by the gradient's size, which keeps the difference small
        assert far(got, expected) < 1e-4, name
        for key in ("reward", "loss", "grad_norm", "learning_rate", "entropy", "completions/mean_length"):
            mine = [row[key] for row in member.log]
            assert mine == pytest.approx(logged(alone, key), rel=2e-3, abs=2e-5), (name, key)

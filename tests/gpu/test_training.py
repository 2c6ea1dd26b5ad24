"""Training on a GPU: the vectors that the CPU finds, a base in bfloat16, and a population."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gpu import DEVICE, on_gpu
from helpers.training import SPREAD, config, far, make_trainer, parity, problems

from steer import SteeringConfig
from steer.training.sweep.member import Member
from steer.training.sweep.trainer import PopulationTrainer

pytestmark = on_gpu


def test_two_updates_equal_those_of_the_cpu(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    """The sampler's noise does not depend on the device, so both runs see the same completions."""
    runs = []
    for use_cpu in (True, False):
        args = config(tmp_path / str(use_cpu), use_cpu=use_cpu)
        trainer = make_trainer(build_tiny("llama", initializer_range=SPREAD), tiny_tokenizer, args)
        trainer.train()
        runs.append(trainer.vectors.tensors())
    assert far(runs[1], runs[0]) < 1e-2


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_trains_a_bfloat16_base(build_tiny, tiny_tokenizer, tmp_path: Path, architecture: str) -> None:
    model = build_tiny(architecture, initializer_range=SPREAD).to(torch.bfloat16)
    trainer = make_trainer(model, tiny_tokenizer, config(tmp_path, use_cpu=False))
    trainer.train()
    assert trainer.model.device.type == DEVICE
    assert all(p.dtype == torch.float32 and p.norm() > 0 for p in trainer.vectors.parameters())


def test_parts_of_an_update_add_up_to_the_whole(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    """`update_rows` bounds the activations that are held, and changes no gradient."""
    runs = []
    for rows in (0, 3):
        args = config(tmp_path / str(rows), use_cpu=False, update_rows=rows)
        trainer = make_trainer(build_tiny("llama", initializer_range=SPREAD), tiny_tokenizer, args)
        trainer.train()
        runs.append(trainer.vectors.tensors())
    assert far(runs[1], runs[0]) < 1e-3


def test_members_of_a_population_equal_their_runs_alone(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    specs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "first": ({"layers": "0"}, {}),
        "all": ({"layers": "all"}, {"seed": 11}),
        "completion": ({"positions": "completion"}, {"loss_type": "grpo"}),
    }
    members, alone = [], {}
    for name, (steering, changes) in specs.items():
        settings = {"use_cpu": False, "max_steps": 3, **changes}
        members.append(
            Member(name, [parity], config(tmp_path / "all", **settings), SteeringConfig(**steering))
        )
        args = config(tmp_path / name, **settings)
        model = build_tiny("llama", initializer_range=SPREAD)
        trainer = make_trainer(model, tiny_tokenizer, args, steering=SteeringConfig(**steering))
        trainer.train()
        alone[name] = trainer.vectors.tensors()
    model = build_tiny("llama", initializer_range=SPREAD).to(DEVICE)
    together = PopulationTrainer(model, members, problems(), tiny_tokenizer, tmp_path / "state.pt")
    together.train()
    for member in together.members:
        assert far(member.vectors.tensors(), alone[member.name]) < 1e-3, member.name

"""Updates cut by memory: tokens' bytes are measured, parts stay below the limit, the result is the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.steering import message
from helpers.training import far, same
from transformers import PreTrainedModel

import steer
from steer import SteerError
from steer.training import memory
from steer.training.batches import rows_of
from steer.training.memory import GB, Cost, UpdateMemory


def rows(*sizes: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(sizes)


def test_a_row_costs_its_tokens_and_a_shared_prompt_is_counted_once() -> None:
    cost = Cost(token=10, pair=0)
    assert cost.of(rows((8, 5, 1))) == 10 * 13
    assert cost.of(rows((8, 5, 1), (8, 5, 0), (8, 6, 1))) == 10 * (24 + 11)
    assert cost.of(rows((8, 5, 0), (8, 5, 0))) == 10 * (16 + 5), "a part reads its first prompt itself"
    assert cost.of(rows((8, 0, 1), (7, 0, 1), (2, 0, 1))) == 10 * (8 + 8 + 2), "rows of a batch are padded"
    assert Cost(token=0, pair=1).of(rows((8, 5, 1))) == 5 * 5 + 8 * 13


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_measured_is_what_a_longer_pass_keeps(architecture: str, attention: str, build_tiny) -> None:
    model: PreTrainedModel = build_tiny(architecture, attn_implementation=attention)
    steer.attach(model)

    def score(tokens: int) -> Any:
        return model(torch.full((1, tokens), 3), use_cache=False).logits

    state = torch.get_rng_state()
    cost = Cost.measured(model, score, 16)
    assert torch.equal(state, torch.get_rng_state())
    with memory.saved_bytes(model) as found:
        kept = score(60)
    del kept
    real = sum(found.values())
    assert cost.fixed + cost.token * 60 + cost.pair * 60**2 == pytest.approx(real, rel=0.1)
    assert (cost.pair > 0) == (attention == "eager")


def test_weights_in_half_precision_are_no_tokens(build_tiny) -> None:
    """Autocast keeps a copy of each weight for the pass, of one token or of many."""
    model: PreTrainedModel = build_tiny("llama", hidden_size=64, intermediate_size=512)

    def score(tokens: int) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(torch.full((1, tokens), 3), use_cache=False).logits

    cost = Cost.measured(model, score, 9)
    with memory.saved_bytes(model) as found:
        kept = score(60)
    del kept
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert cost.fixed == pytest.approx(2 * weights, rel=0.1)
    assert cost.of(rows((60, 0, 1))) == pytest.approx(sum(found.values()), rel=0.1)


def bounded(limit: float, recompute: bool | None = None) -> UpdateMemory:
    found = UpdateMemory.__new__(UpdateMemory)
    found.limit, found.recompute, found.cost, found.mlps, found._told = (
        limit,
        recompute,
        Cost(1, 0),
        [],
        False,
    )
    return found


def test_parts_are_below_the_limit_and_no_more_than_needed() -> None:
    lengths = rows(*[(10, 4, 1), (10, 4, 0), (10, 4, 0), (10, 4, 0)] * 4)
    assert bounded(1e9).parts(lengths, 32) == [slice(0, 16)]
    assert bounded(1e9).parts(lengths, 6) == [slice(0, 6), slice(6, 12), slice(12, 18)]
    for limit in (30, 50, 100, 176):
        found = bounded(limit)
        parts = found.parts(lengths, 32)
        assert [i for part in parts for i in range(16)[part]] == list(range(16))
        assert all(found.cost.of(lengths[part]) <= limit for part in parts)
    assert len(bounded(176).parts(lengths, 32)) == 1 and len(bounded(175).parts(lengths, 32)) == 2
    assert len(bounded(3).parts(lengths, 32)) == 16, "a row is never cut"


def settings(**changes: Any) -> dict[str, Any]:
    return {"optim": "sgd", "max_grad_norm": 0.0, "skip_zero_advantage": False, **changes}


def test_a_limit_changes_the_parts_and_not_the_result(run, monkeypatch, caplog) -> None:
    from steer.training.group_trainer import GroupGRPOTrainer

    counts: list[int] = []
    original = GroupGRPOTrainer._loss

    def watched(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        counts.append(len(inputs["advantages"]))
        return original(self, model, inputs)

    monkeypatch.setattr(GroupGRPOTrainer, "_loss", watched)
    whole = run(**settings(update_memory=0.0))
    assert counts == [8, 8]
    cost = whole.update_memory.cost
    limit = cost.of(rows((8, 10, 1), (8, 10, 0))) / GB
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="steer.training.memory"):
        parts = run(**settings(update_memory=limit))
    assert max(counts[2:]) <= 2 and sum(counts[2:]) == 16
    assert far(parts.vectors.tensors(), whole.vectors.tensors()) < 1e-4
    lines = [r.message for r in caplog.records if r.name == "steer.training.memory"]
    assert len(lines) == 1 and "an update keeps" in lines[0] and "update_memory is at most 0.0 GB" in lines[0]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("positions", ["all", "completion"])
def test_recomputing_changes_not_a_bit(run, share: bool, positions: str, caplog) -> None:
    changes = settings(share_prompts=share, update_memory=0.0)
    steering = steer.SteeringConfig(positions=positions)
    plain = run(steering=steering, **changes).vectors.tensors()
    with caplog.at_level(logging.INFO, logger="steer.training.memory"):
        again = run(steering=steering, recompute_mlps=True, **changes).vectors.tensors()
    assert any("MLPs are computed again" in record.message for record in caplog.records)
    assert same(plain, again)


def test_rows_that_do_not_fit_alone_are_recomputed(run, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="steer.training.memory"):
        trainer = run(**settings(update_memory=1e-9))
    told = [r.message for r in caplog.records if "MLPs are computed again" in r.message]
    assert len(told) == 1 and f"{trainer.model.config.num_hidden_layers} MLPs" in told[0]
    assert "1 rows" in told[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="steer.training.memory"):
        run(**settings(update_memory=1e-9, recompute_mlps=False))
    assert not any("MLPs are computed again" in record.message for record in caplog.records)


@pytest.mark.parametrize("setting", [{"recompute_mlps": True}, {"update_memory": 2.0}])
def test_settings_without_effect_are_refused(run, setting: dict[str, Any], monkeypatch) -> None:
    from steer.training.group_trainer import GroupGRPOTrainer

    (name,) = setting
    with pytest.raises(SteerError, match=f"{name}=.* gradient_checkpointing=true") as error:
        run(**setting, gradient_checkpointing=True, train=False)
    message(error)
    run(update_memory=0.0, recompute_mlps=False, gradient_checkpointing=True, train=False)
    monkeypatch.setattr(GroupGRPOTrainer, "_in_step", lambda self: True)  # as a launcher's config makes it
    with pytest.raises(SteerError, match=f"{name}=.* FSDP or DeepSpeed") as error:
        run(**setting, train=False)
    message(error)


def test_what_is_recomputed_is_not_measured(run) -> None:
    plain, less = (run(**settings(recompute_mlps=recompute)).update_memory for recompute in (None, True))
    assert 0 < less.cost.token < 0.7 * plain.cost.token
    lengths = rows(*[(8, 10, 1)] * 8)
    plain.limit = less.limit = plain.cost.of(lengths) - 1
    assert len(plain.parts(lengths, 8)) > len(less.parts(lengths, 8)) == 1


def test_the_smallest_machine_sets_the_limit_of_all(run, monkeypatch) -> None:
    trainer = run(train=False)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(
        trainer.accelerator, "gather", lambda own: torch.cat([own, torch.tensor([5.0], dtype=own.dtype)])
    )
    assert trainer._bounded().limit == 5.0


def test_a_part_weighs_the_tokens_that_count(run) -> None:
    """Those of tools are in completions, and not in the loss."""
    trainer = run(loss_type="bnpo", train=False)
    batch = {
        "prompt_ids": torch.zeros(2, 1),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]),
    }
    assert trainer._share(rows_of(batch, slice(0, 1)), batch) == pytest.approx(1 / 3)
    assert trainer._share(rows_of(batch, slice(1, 2)), batch) == pytest.approx(2 / 3)

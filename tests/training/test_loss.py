"""The training objective against trl's own, value and gradient, and rewards that are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from helpers.training import config, logged, make_trainer, problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import GRPOTrainer

from steer import SteerError
from steer.training.loss import (
    LOSSES,
    group_advantages,
    importance_weights,
    limited_shares,
    token_losses,
    token_weights,
    total_rewards,
)
from steer.training.steering_trainer import SteeringGRPOTrainer

NAN = float("nan")
# Both sides compute in float32, in sums of at most 8 x 6 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def trainer(build_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> SteeringGRPOTrainer:
    """A trainer whose methods of trl are called with inputs of the tests' own; it trains nothing."""
    tokenizer = tokenizer_of_characters()
    folder = tmp_path_factory.mktemp("run")
    args = config(folder, advantage="group", max_completion_length=6, gradient_accumulation_steps=2)
    made = make_trainer(build_tiny("llama"), tokenizer, args)
    made.model.train()
    made.current_gradient_accumulation_steps = 2  # transformers sets it when training begins
    return made


def tokenizer_of_characters() -> Any:
    from conftest import tiny_tokenizer

    return tiny_tokenizer.__wrapped__()


# ---- the loss


@st.composite
def updates(draw: Callable) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings, and the tensors of an update of two micro-batches of four rows and six tokens."""
    high = draw(st.none() | st.sampled_from([0.1, 0.28]))
    chosen = {
        "loss_type": draw(st.sampled_from(LOSSES)),
        "importance_sampling_level": draw(st.sampled_from(["token", "sequence"])),
        "beta": draw(st.sampled_from([0.0, 0.01, 1.0])),
        "use_bias_correction_kl": draw(st.booleans()),
        "epsilon": draw(st.sampled_from([0.0, 0.05, 0.2])),
        "epsilon_high": high,
        "delta": draw(st.none() | st.sampled_from([0.9, 1.1, 4.0])),
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lengths = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=8, max_size=8)))
    mask = (torch.arange(6)[None, :] < lengths[:, None]).long()
    log_probs = -2 * torch.rand(8, 6, generator=generator)
    near = draw(st.sampled_from([0.0, 0.1, 1.0]))  # 0: the policy that sampled is the one that is updated
    tensors = {
        "log_probs": log_probs,
        "old": log_probs + near * torch.randn(8, 6, generator=generator) if near else None,
        "reference": log_probs + 0.5 * torch.randn(8, 6, generator=generator),
        "advantages": torch.randn(8, generator=generator) * (torch.rand(8, generator=generator) > 0.2),
        "mask": mask,
        "weights": torch.rand(8, draw(st.sampled_from([1, 6])), generator=generator)
        if draw(st.booleans())
        else None,
    }
    return chosen, tensors


@given(updates())
@QUIET
def test_loss_and_gradient_equal_trls(trainer: SteeringGRPOTrainer, update: Any) -> None:
    chosen, data = update
    args = SimpleNamespace(**chosen, max_completion_length=6, per_device_train_batch_size=4)

    mine = data["log_probs"].clone().requires_grad_()
    mask = data["mask"]
    terms = token_losses(
        mine, data["advantages"], mask, args, data["old"], data["reference"], data["weights"]
    )
    loss = (terms.loss * token_weights(mask, args)).sum()
    loss.backward()

    theirs = data["log_probs"].clone().requires_grad_()
    expected = trl_loss(trainer, chosen, data, theirs)
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)


def trl_loss(
    trainer: SteeringGRPOTrainer, chosen: dict[str, Any], data: dict[str, Any], log_probs: torch.Tensor
) -> torch.Tensor:
    """The sum of trl's losses of the micro-batches."""
    mask, total = data["mask"], torch.zeros(())
    high = chosen["epsilon"] if chosen["epsilon_high"] is None else chosen["epsilon_high"]
    of_trainer = {
        "loss_type": chosen["loss_type"],
        "importance_sampling_level": chosen["importance_sampling_level"],
        "beta": chosen["beta"],
        "epsilon_low": chosen["epsilon"],
        "epsilon_high": high,
        "use_vllm": data["weights"] is not None,
        "current_gradient_accumulation_steps": 2,
    }
    of_args = {name: chosen[name] for name in ("delta", "use_bias_correction_kl")}
    for part in (slice(0, 4), slice(4, 8)):
        inputs = {
            "prompt_ids": torch.ones(4, 2, dtype=torch.long),
            "prompt_mask": torch.ones(4, 2, dtype=torch.long),
            "completion_ids": torch.ones(4, 6, dtype=torch.long),
            "completion_mask": mask[part],
            "advantages": data["advantages"][part],
            "num_items_in_batch": mask.sum(),
            "ref_per_token_logps": data["reference"][part],
        }
        if data["old"] is not None:
            inputs["old_per_token_logps"] = data["old"][part]
        if data["weights"] is not None:
            inputs["importance_sampling_ratio"] = data["weights"][part]
        scored = Mock(return_value=(log_probs[part], torch.zeros(4, 6), None))
        with (
            patch.multiple(trainer, **of_trainer, _get_per_token_logps_and_entropies=scored),
            patch.multiple(trainer.args, **of_args),
        ):
            total = total + GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return total


# ---- advantages and importance weights


def trl_generation(
    trainer: SteeringGRPOTrainer,
    scores: torch.Tensor,
    engine: dict[str, Any] | None = None,
    **of_trainer: Any,
) -> dict[str, torch.Tensor]:
    """What trl makes of 8 samples with rewards (rows, functions), and of an engine's log-probabilities."""
    lengths = engine["mask"].sum(1).tolist() if engine else [2] * 8
    drawn = [row[:n].tolist() for row, n in zip(engine["sampled"], lengths, strict=True)] if engine else None
    generated = ([[5, 6]] * 8, [[7] * n for n in lengths], None, ["x"] * 8, drawn, {}, None, [])
    count = scores.shape[1]
    changes = {
        "_generate": lambda prompts: generated,
        "_calculate_rewards": lambda *args: scores,
        "reward_weights": of_trainer.pop("reward_weights", torch.ones(count)),
        "reward_func_names": [str(i) for i in range(count)],
        "use_vllm": engine is not None,
        **of_trainer,
    }
    if engine:
        scored = (engine["log_probs"], None, None)
        changes["_get_per_token_logps_and_entropies"] = lambda *args, **kwargs: scored
    with patch.multiple(trainer, **changes):
        return GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "x"}] * 8)


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, NAN]), min_size=2, max_size=2), min_size=8, max_size=8
    ),
    st.sampled_from(["none", "group", "batch"]),
    st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=2),
)
@QUIET
def test_advantages_equal_trls(
    trainer: SteeringGRPOTrainer, scores: list[list[float]], scale: str, weights: list[float]
) -> None:
    expected = trl_generation(
        trainer, torch.tensor(scores), scale_rewards=scale, reward_weights=torch.tensor(weights)
    )
    rewards = total_rewards(torch.tensor(scores), torch.tensor(weights))
    found = group_advantages(rewards, 4, SimpleNamespace(advantage="group", scale_rewards=scale))
    # a standard deviation that rounding makes of equal rewards is divided by its own size plus 1e-4
    torch.testing.assert_close(found, expected["advantages"], rtol=1e-4, atol=1e-4)


@given(
    st.integers(0, 2**31),
    st.sampled_from(MODES),
    st.none() | st.sampled_from([0.0, 0.5, 0.9]),
    st.none() | st.sampled_from([1.0, 1.5, 3.0]),
    st.lists(st.integers(1, 6), min_size=8, max_size=8).filter(lambda lengths: max(lengths) == 6),
)
@QUIET
def test_importance_weights_equal_trls(
    trainer: SteeringGRPOTrainer,
    seed: int,
    mode: str,
    low: float | None,
    high: float | None,
    lengths: list[int],
) -> None:
    if mode.endswith("truncate") and low is None and high is None:
        return  # trl refuses it
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(6)[None, :] < torch.tensor(lengths)[:, None]).long()
    log_probs = -torch.rand(8, 6, generator=generator)
    sampled = log_probs + 0.5 * torch.randn(8, 6, generator=generator)
    sampled[torch.rand(8, 6, generator=generator) < 0.1] = NAN
    bounds = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    engine = {"mask": mask, "sampled": sampled, "log_probs": log_probs}
    expected = trl_generation(
        trainer, torch.zeros(8, 1), engine, vllm_importance_sampling_mode=mode, **bounds
    )["importance_sampling_ratio"]
    args = SimpleNamespace(vllm_importance_sampling_mode=mode, **bounds)
    weights, limited = importance_weights(log_probs, sampled, mask, args)
    torch.testing.assert_close(weights, expected, **CLOSE)
    free, _ = importance_weights(
        log_probs,
        sampled,
        mask,
        SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=None,
        ),
    )
    assert torch.equal(limited, ((weights != free) & mask.bool()))


def test_limited_shares() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    limited = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert limited_shares(limited, mask) == pytest.approx(
        {"limited_tokens": 5 / 8, "limited_sequences": 2 / 3}
    )
    assert limited_shares(limited & False, mask * 0) == {"limited_tokens": 0, "limited_sequences": 0}


# ---- rewards that are missing


@given(st.lists(st.none() | st.floats(-10, 10), min_size=12, max_size=12))
def test_leave_one_out_counts_the_scored_samples(values: list[float | None]) -> None:
    rewards = torch.tensor([NAN if v is None else v for v in values])
    found = group_advantages(rewards, 4, SimpleNamespace(advantage="loo", scale_rewards="none")).tolist()
    for start in range(0, 12, 4):
        group = values[start : start + 4]
        for i, value in enumerate(group):
            others = [v for j, v in enumerate(group) if j != i and v is not None]
            expected = value - sum(others) / len(others) if value is not None and others else 0.0
            assert found[start + i] == pytest.approx(expected, abs=1e-4)
    assert all(math.isfinite(x) for x in found)


def sparse(completion_ids: list[list[int]], number: list[int], **columns: Any) -> list[float | None]:
    """None for a third of the samples: one group with none scored, one with a single one, others mixed."""
    out: list[float | None] = []
    for i, ids in enumerate(completion_ids):
        out.append(None if i < 4 or i in (5, 6, 7) or (i + sum(ids)) % 3 == 0 else float(i % 5))
    return out


@pytest.mark.parametrize("advantage", ["loo", "group"])
def test_the_trainer_uses_these_advantages(run: Callable, advantage: str, monkeypatch: Any) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    score = SteeringGRPOTrainer._generate_and_score_completions

    def watch(self: Any, inputs: Any) -> Any:
        output = score(self, inputs)
        seen.append((self._scores, output["advantages"]))
        assert list(self._logs["advantages"])[-len(inputs) :] == pytest.approx(output["advantages"].tolist())
        return output

    monkeypatch.setattr(SteeringGRPOTrainer, "_generate_and_score_completions", watch)
    size = {"per_device_train_batch_size": 16, "advantage": advantage}
    trainer = run(reward=sparse, data=problems(16), **size)
    assert seen and logged(trainer, "reward")
    for scores, advantages in seen:
        assert scores.isnan().any()
        for group, found in zip(scores[:, 0].split(4), advantages.split(4), strict=True):
            known = group[~group.isnan()]
            mean = known.mean() if len(known) else torch.tensor(NAN)
            factor = len(known) / (len(known) - 1) if advantage == "loo" and len(known) > 1 else 1.0
            expected = torch.nan_to_num((group - mean) * factor)
            torch.testing.assert_close(found, expected, **CLOSE)


def test_an_unscored_sample_by_hand() -> None:
    rewards = torch.tensor([0.0, 1.0, 3.0, NAN])
    found = group_advantages(rewards, 4, SimpleNamespace(advantage="loo", scale_rewards="none"))
    assert found.tolist() == pytest.approx([-2.0, -0.5, 2.5, 0.0])


def test_settings_that_contradict_each_other_are_refused(tmp_path: Any) -> None:
    with pytest.raises(SteerError, match="multi_objective_aggregation"):
        config(tmp_path, multi_objective_aggregation="normalize_then_sum")
    config(tmp_path, multi_objective_aggregation="normalize_then_sum", advantage="group")


@pytest.mark.parametrize("sampling", [{"top_p": 0.8}, {"top_k": 5, "temperature": 0.7}], ids=str)
def test_ratios_of_truncated_samples_begin_at_one(run: Callable, sampling: dict, monkeypatch: Any) -> None:
    """Without an engine, both log-probabilities of a ratio are the trainer's, before truncation."""
    gaps: list[float] = []
    compute = GRPOTrainer._compute_loss

    def watch(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = compute(self, model, inputs)
        gap = (self._scored - inputs["old_per_token_logps"]) * inputs["completion_mask"]
        gaps.append(gap.abs().max().item())
        return loss

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", watch)
    run(num_iterations=2, max_steps=2, **sampling)
    assert gaps[0] < 1e-4  # one pass scores the rows together, the other by length
    assert max(gaps[1:]) > 1e-2  # the second update of the same samples

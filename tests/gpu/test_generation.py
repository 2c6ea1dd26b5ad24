"""Sampling and scoring on a GPU: fast paths against plain ones, on every architecture."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from helpers.gpu import DEVICE, on_gpu
from helpers.steering import fill
from helpers.training import SPREAD, ids_of
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

import steer
from steer.generation import sampler
from steer.generation.decoding import pad_left
from steer.generation.sampler import Sampling, uniforms
from steer.generation.scoring import add_group_scoring
from steer.generation.verify import fast_paths

pytestmark = on_gpu

PROMPTS = [[5, 9, 33], [7], [11, 3, 4, 80, 21, 60, 9], [42, 42, 8, 17]]
NEVER = 96  # ends no completion of these models


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def scorer(model: PreTrainedModel) -> PreTrainedModel:
    fill(steer.attach(model))
    add_fused_lm_head(model, 1.0, outputs=("log_probs", "entropy"))
    add_group_scoring(model)
    return model


def batch(device: str) -> dict[str, torch.Tensor]:
    """Two completions of each prompt, of unequal length."""
    ids, mask = pad_left([prompt for prompt in PROMPTS for _ in range(2)], torch.device(device))
    lengths = torch.tensor([3, 9, 14, 1, 6, 14, 2, 8])
    completions = torch.randint(3, 97, (8, 14), generator=torch.Generator().manual_seed(3))
    real = torch.arange(14) < lengths[:, None]
    return {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "completion_ids": completions.masked_fill(~real, 0).to(device),
        "completion_mask": real.long().to(device),
    }


def scored(model: PreTrainedModel, **how: bool) -> list[torch.Tensor]:
    """Log-probabilities of the batch, and the gradients of a weighted sum of them, in float64 on the CPU."""
    data = batch(str(model.device))
    log_probs = model(score_group=True, **data, **how).log_probs
    weights = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(
        (log_probs * weights.to(log_probs.device)).sum(), steer.attached(model).parameters()
    )
    return [x.detach().double().cpu() for x in (log_probs, *gradients)]


def distances(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_fast_path_is_used(build_tiny, architecture: str, dtype: torch.dtype) -> None:
    model = scorer(build_tiny(architecture, initializer_range=SPREAD)).to(DEVICE, dtype)
    reasons = {name: reason for name, reason in asdict(fast_paths(model)).items() if reason}
    assert not reasons


def test_scores_and_gradients_are_those_of_the_plain_way(build_tiny, architecture: str) -> None:
    model = scorer(build_tiny(architecture, initializer_range=SPREAD)).to(DEVICE)
    plain = scored(model, share=False, fused=False)
    assert max(distances(scored(model), plain)) < 1e-3  # float32 sums in another order


def test_bfloat16_loses_no_more_than_the_plain_way(build_tiny) -> None:
    """Both against float64 on the CPU."""
    exact = build_tiny("llama", initializer_range=SPREAD)
    rounded = scorer(copy.deepcopy(exact).to(torch.bfloat16).to(DEVICE))
    reference = scored(scorer(exact.to(torch.bfloat16).double()), share=False, fused=False)
    plain = distances(scored(rounded, share=False, fused=False), reference)
    fast = distances(scored(rounded), reference)
    assert max(plain) < 0.1, plain
    assert all(f < 2 * p + 1e-3 for f, p in zip(fast, plain, strict=True)), (fast, plain)


@torch.no_grad()
def test_the_greedy_sampler_equals_generate(build_tiny, architecture: str) -> None:
    model = build_tiny(architecture, initializer_range=SPREAD).to(DEVICE)
    fill(steer.attach(model))
    ids, mask = pad_left(PROMPTS, torch.device(DEVICE))
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "pad_token_id": 0,
        "eos_token_id": NEVER,
    }
    rows = model.generate(**given, do_sample=False, max_new_tokens=14)[:, ids.shape[1] :].tolist()
    got = sampler.rollout(model, PROMPTS, Sampling(14, (NEVER,), temperature=0.0))
    assert len({tuple(row) for row in rows}) > 1
    assert ids_of(got) == [row[: row.index(NEVER) + 1] if NEVER in row else row for row in rows]


def test_samples_do_not_depend_on_the_device(build_tiny) -> None:
    prompts = [PROMPTS[i] for i in (0, 2, 0, 1, 3, 0)]
    found = []
    for device in ("cpu", DEVICE):
        model = build_tiny("llama", initializer_range=SPREAD).to(device)
        fill(steer.attach(model))
        found.append(
            sampler.rollout(model, prompts, Sampling(12, (NEVER,)), uniforms(range(6), 12, seed=3, step=5))
        )
    assert ids_of(found[0]) == ids_of(found[1])
    for one, other in zip(*found, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-3)

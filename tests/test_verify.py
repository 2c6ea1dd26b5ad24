"""Fast paths of sampling and scoring: right on every model, or replaced by plain ones that are."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

import steer
from evals.architectures import tiny
from steer.train.decoding import pad_left
from steer.train.rollout import Sampling, rollout, uniforms
from steer.train.step import add_group_scoring
from steer.train.verify import fast_paths

# The last two have a common beginning with the first; they are longer than the tiny models' windows of 8.
PROMPTS = [[5, 9, 33], [7], [5, 9, 33, 80, 21, 60, 9, 12, 44, 10, 70], [5, 9, 80, 81, 8, 17]]
NEVER = 96
# What is known to be slow on an architecture, and a word of the reason; all others are fast.
SLOW = {
    "llama": {},
    "falcon": {},
    "gpt2": {},
    "deepseek_v3": {},
    "gemma2": {},
    "bloom": {},
    "mpt": {"common": "differ"},  # ALiBi by columns: padding between tokens counts
    "qwen3_next": dict.fromkeys(("scorer", "common"), "LinearAttentionLayer"),
    "falcon_h1": dict.fromkeys(("scorer", "common"), "LinearAttentionAndFullAttentionLayer"),
    "kimi_linear": dict.fromkeys(("scorer", "common"), "LinearAttentionLayer"),
    "minimax": dict.fromkeys(("sampler", "scorer", "common"), "MiniMaxCache"),
    "deepseek_v4": {
        "padding": "compress_rates",
        **dict.fromkeys(("sampler", "scorer", "common"), "DeepseekV4"),
    },
    "rwkv": {"padding": "differ|changes", **dict.fromkeys(("sampler", "scorer", "common"), "state instead")},
    "mamba": dict.fromkeys(("sampler", "scorer", "common"), "cache_params instead"),
    "llama4_text": {"head": "base_model"},
    "modernbert-decoder": {"head": "differs"},
}


@pytest.fixture(params=list(SLOW))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def ready(kind: str) -> PreTrainedModel:
    """A tiny model as the trainer prepares it."""
    model = tiny(kind)
    add_fused_lm_head(model, 0.7, outputs=("log_probs", "entropy"))
    add_group_scoring(model, 0.7)
    return model


def steered(model: PreTrainedModel, positions: str = "all") -> steer.SteeringVectors:
    vectors = steer.attach(model, steer.SteeringConfig(positions=positions))
    generator = torch.Generator().manual_seed(1)
    for parameter in vectors.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return vectors


def naive(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of one row, without padding, cache or any other row."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def test_what_is_fast_and_why_not(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = ready(kind)
    with caplog.at_level(logging.WARNING):
        found = fast_paths(model)
        assert fast_paths(model) is found
    reasons = {name: reason for name, reason in vars(found).items() if reason}
    assert reasons.keys() == SLOW[kind].keys()
    for name, word in SLOW[kind].items():
        assert any(part in reasons[name] for part in word.split("|")), reasons[name]
    # one line for each path that is replaced; the common beginning goes with the shared prompt
    lines = [r.getMessage() for r in caplog.records if r.name == "steer.train.verify"]
    assert len(lines) == len(reasons.keys() - ({"common"} if "scorer" in reasons else set()))
    assert all(line.startswith(type(model).__name__) for line in lines)


@torch.no_grad()
def test_samples_are_those_of_naive_passes(kind: str) -> None:
    model = tiny(kind)
    order = [2, 0, 0, 3, 1, 2]
    noise = uniforms(range(6), 8, 3, 5)
    prompts = [PROMPTS[i] for i in order]
    free = rollout(model, prompts, Sampling(8, (NEVER,)), noise)
    eos = free.ids[1][2]  # ends one row early: the others go on in a smaller batch
    done = rollout(model, prompts, Sampling(8, (eos,)), noise)
    greedy = rollout(model, prompts, Sampling(4, (NEVER,), temperature=0.0))
    assert min(map(len, done.ids)) < 8 and len({tuple(ids) for ids in free.ids}) > 3
    for prompt, ids, logps in zip(prompts, done.ids, done.logps, strict=True):
        table = torch.log_softmax(naive(model, prompt + ids), -1)[len(prompt) - 1 : -1]
        # float32 with padding and a cache in another order; logits reach 10
        expected = table.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-3, atol=2e-4)
    for prompt, ids in zip(prompts, greedy.ids, strict=True):
        for n, token in enumerate(ids):
            scores = naive(model, prompt + ids[:n])[-1]
            assert scores[token] > scores.max() - 1e-3


@pytest.mark.parametrize("share", [True, False])
def test_scores_are_those_of_naive_passes(kind: str, share: bool) -> None:
    model = ready(kind)
    order, lengths = [1, 0, 2, 0, 2, 3], [1, 9, 3, 6, 9, 4]
    options = fast_paths(model).scoring()
    options["share"] &= share
    torch.manual_seed(2)
    completions = [torch.randint(3, 97, (n,)).tolist() for n in lengths]
    prompt_ids, prompt_mask = pad_left([PROMPTS[i] for i in order], torch.device("cpu"))
    longest = max(lengths)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in completions])
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    got = model(
        score_group=True,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=ids,
        completion_mask=mask,
        **options,
    )
    for i, (prompt, row) in enumerate(zip((PROMPTS[j] for j in order), completions, strict=True)):
        table = torch.log_softmax(naive(model, prompt + row)[len(prompt) - 1 : -1] / 0.7, -1)
        expected = table.gather(1, torch.tensor(row)[:, None]).squeeze(1)
        entropy = -(table.exp() * table).sum(-1)
        torch.testing.assert_close(got.log_probs[i, : len(row)], expected, rtol=1e-3, atol=5e-4)
        torch.testing.assert_close(got.entropy[i, : len(row)], entropy, rtol=1e-3, atol=5e-4)
        assert (got.log_probs[i, len(row) :] == 0).all() and (got.entropy[i, len(row) :] == 0).all()

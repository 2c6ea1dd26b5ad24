"""Fast paths of sampling and scoring: right on every model, or replaced by plain ones that are."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from helpers.training import far, ids_of
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

import steer
from evals.architectures import tiny
from steer.errors import SteerError
from steer.generation import cpu
from steer.generation.decoding import pad_left
from steer.generation.sampler import Sampling, rollout, uniforms
from steer.generation.scoring import add_group_scoring
from steer.generation.trial import Trial
from steer.generation.verify import fast_paths

# The last two have a common beginning with the first; they are longer than the tiny models' windows of 8.
PROMPTS = [[5, 9, 33], [7], [5, 9, 33, 80, 21, 60, 9, 12, 44, 10, 70], [5, 9, 80, 81, 8, 17]]
NEVER = 96
BEFORE_5_19 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="there its logits change with other rows"
)
# What is known to be slow on an architecture, and a word of the reason; all others are fast.
SLOW = {
    "llama": {},
    "falcon": {},
    "gpt2": {},
    "deepseek_v3": {},
    "gemma2": {},
    "bloom": {},
    "mpt": {"common": "differ"},  # ALiBi by columns: padding between tokens counts
    # a recurrent state moves on over padding between tokens
    **{key: {"common": "differ"} for key in ("qwen3_next", "falcon_h1", "kimi_linear", "lfm2", "mamba2")},
    "minimax": dict.fromkeys(("sampler", "scorer", "common"), "MiniMaxCache"),
    "deepseek_v32": {},
    "deepseek_v4": {
        **dict.fromkeys(("padding", "sampler", "scorer", "common"), "compress_rates"),
    },
    "rwkv": {"padding": "differ|changes", **dict.fromkeys(("sampler", "scorer", "common"), "state instead")},
    "moshi": dict.fromkeys(("sampler", "scorer", "common"), "masks do not"),
    # a pass over several tokens begins with an empty state
    "mamba": dict.fromkeys(("scorer", "common"), "differ"),
    # the state is in the modules; logits are capped, which trl does not know of
    "recurrent_gemma": {
        **{"padding": "changes", "head": "differs"},
        **dict.fromkeys(("sampler", "scorer", "common"), "no cache"),
    },
    "xlstm": {
        **{"padding": "changes", "head": "differs"},
        **dict.fromkeys(("sampler", "scorer", "common"), "xLSTMCache"),
    },
    "llama4_text": {"head": "base_model"},
    "modernbert-decoder": {"head": "differs"},
}


# One for each reason; the others are in the slow tests.
FEW = (
    *("llama", "mpt", "qwen3_next", "minimax", "deepseek_v4", "rwkv", "mamba", "recurrent_gemma"),
    "llama4_text",
)


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FEW)) for kind in SLOW])
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
    lines = [r.getMessage() for r in caplog.records if r.name == "steer.generation.verify"]
    assert len(lines) == len(reasons.keys() - ({"common"} if "scorer" in reasons else set()))
    assert all(line.startswith(type(model).__name__) for line in lines)


@torch.no_grad()
def test_samples_are_those_of_naive_passes(kind: str) -> None:
    model = tiny(kind)
    order = [2, 0, 0, 3, 1, 2]
    noise = uniforms(range(6), 8, 3, 5)
    prompts = [PROMPTS[i] for i in order]
    free = rollout(model, prompts, Sampling(8, (NEVER,)), noise)
    eos = free[1].ids[2]  # ends one row early: the others go on in a smaller batch
    done = rollout(model, prompts, Sampling(8, (eos,)), noise)
    greedy = rollout(model, prompts, Sampling(4, (NEVER,), temperature=0.0))
    assert min(map(len, ids_of(done))) < 8 and len({tuple(ids) for ids in ids_of(free)}) > 3
    for prompt, one in zip(prompts, done, strict=True):
        ids, logps = one.ids, one.logps
        table = torch.log_softmax(naive(model, prompt + ids), -1)[len(prompt) - 1 : -1]
        # float32 with padding and a cache in another order; logits reach 10
        expected = table.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-3, atol=2e-4)
    for prompt, ids in zip(prompts, ids_of(greedy), strict=True):
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


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "mamba2", "falcon_h1", "deepseek_v32"])
def test_gradients_flow_through_the_state_of_a_shared_prompt(model_type: str) -> None:
    """Completions of one token too, after which a model would write over the state that it read."""
    model = ready(model_type)
    vectors = steered(model)
    assert fast_paths(model).scorer is None
    prompts = [PROMPTS[i] for i in (2, 0, 0, 2)]
    prompt_ids, prompt_mask = pad_left(prompts, torch.device("cpu"))
    ids = torch.tensor([[8, 0, 0], [50, 51, 52], [53, 0, 0], [54, 55, 0]])
    batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids}
    batch["completion_mask"] = (ids > 0).long()
    found = []
    for share in (True, False):
        scores = model(score_group=True, share=share, common=False, **batch).log_probs
        weights = torch.arange(1.0, 13.0).view(4, 3)
        found.append(torch.cat(torch.autograd.grad((scores * weights).sum(), vectors.parameters())))
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


# ---- what training does with it


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom", "rwkv", "modernbert-decoder"])
def test_the_plain_update_is_the_default_one(run, kind: str) -> None:
    # Prompts are of unequal length: padding that counted as a position moved GPT-2's vectors by 82 %.
    default, *others = (
        run(model=tiny(kind), optim="sgd", max_grad_norm=0.0, folder=str(n), **options).vectors.tensors()
        for n, options in enumerate(({}, {"share_prompts": False}, {"gradient_checkpointing": True}))
    )
    for other in others:
        assert far(other, default) < 1e-5
    assert all(t.norm() > 0 for t in default.values())


@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "first_completion"])
@pytest.mark.parametrize("kind", ["gpt2", "rwkv", "qwen3_next"])
def test_positions_are_the_same_on_plain_paths(kind: str, positions: str) -> None:
    model = ready(kind)
    vectors = steered(model, positions)
    options = fast_paths(model).scoring()
    prompts, rows = [PROMPTS[2], PROMPTS[0]], [[8, 9], [50, 51, 52, 53]]
    prompt_ids, prompt_mask = pad_left(prompts, torch.device("cpu"))
    ids = torch.tensor([[*rows[0], 0, 0], rows[1]])
    batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids}
    batch["completion_mask"] = (ids > 0).long()
    for share in {options["share"], False}:
        columns = prompt_ids.shape[1] if share else prompt_mask.sum(1)
        with vectors.prompt_length(columns):
            got = model(score_group=True, **batch, **{**options, "share": share})
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            with vectors.prompt_length(len(prompt)):
                table = torch.log_softmax(naive(model, prompt + row)[len(prompt) - 1 : -1] / 0.7, -1)
            expected = table.gather(1, torch.tensor(row)[:, None]).squeeze(1)
            torch.testing.assert_close(got.log_probs[i, : len(row)], expected, rtol=1e-3, atol=5e-4)
    with torch.no_grad():
        drawn = rollout(model, prompts * 2, Sampling(3, (NEVER,), temperature=0.0))
        for prompt, one in zip(prompts * 2, drawn, strict=True):
            row, logps = one.ids, one.logps
            with vectors.prompt_length(len(prompt)):
                table = torch.log_softmax(naive(model, prompt + row)[len(prompt) - 1 : -1], -1)
            expected = table.gather(1, torch.tensor(row)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-3, atol=5e-4)


def test_what_cannot_pad_on_the_left_is_not_padded_there(run) -> None:
    with pytest.raises(SteerError, match=r"padding on the left.*fast_sampler"):
        run(model=tiny("rwkv"), fast_sampler=False)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("llama4_text", "LM head"),
        ("granitemoe", "num_experts"),
        pytest.param("doge", "no router logits", marks=BEFORE_5_19),
    ],
)
def test_a_routers_loss_that_trl_cannot_compute_is_refused(run, kind: str, reason: str) -> None:
    with pytest.raises(SteerError, match=f"{reason}.*router_aux_loss_coef=0"):
        run(model=tiny(kind), router_aux_loss_coef=0.01)
    run(model=tiny(kind))


# ---- the trial itself


@pytest.mark.parametrize("kind", ["xlnet", "cpmant"])
def test_a_model_that_sees_later_tokens_is_refused(kind: str) -> None:
    with pytest.raises(SteerError, match=r"later tokens.*causal language model"):
        rollout(tiny(kind), PROMPTS, Sampling(2, (NEVER,), temperature=0.0))


@pytest.mark.parametrize("ends", [[2, 3, 9], None])
def test_several_end_tokens_or_none(ends: list[int] | None) -> None:
    model = tiny("llama", eos_token_id=ends)
    assert model.config.eos_token_id == ends
    assert not any(vars(fast_paths(model)).values())
    assert ends is None or not {2, 3, 9} & {token for row in Trial(model).rows for token in row}


def test_the_trial_leaves_no_trace_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("llama")
    vectors = steered(model, "completion")
    model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    passes: list[int] = []
    model.model.register_forward_pre_hook(lambda *args: passes.append(1))
    fast_paths(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert vectors._state.enabled and vectors._state.prompt_length is None
    assert all(p.grad is None for p in model.parameters())
    assert 0 < len(passes) <= 25  # of thirty tokens at most
    passes.clear()
    fast_paths(model)
    assert not passes


def broken_cache(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that get each other's keys and values."""
    original = DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, rows: original(self, rows.roll(1)))


def broken_attention(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is forgotten."""
    original = cpu.grouped_attention

    def forgetful(module, query, key, value, mask, *args, **kwargs):
        return original(module, query, key, value, torch.ones_like(mask), *args, **kwargs)

    monkeypatch.setattr(cpu, "grouped_attention", forgetful)


def broken_fused_attention(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences lose their padding mask."""
    original = cpu.scaled_dot_product_attention

    def forgetful(query, key, value, mask, **kwargs):
        return original(query, key, value, torch.zeros_like(mask), **kwargs)

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", forgetful)


def broken_gradient(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right outputs of long sequences, and a gradient that is not a number."""
    original = cpu.scaled_dot_product_attention

    def undefined(*args, **kwargs):
        out = original(*args, **kwargs)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * torch.nan)
        return out

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", undefined)


BROKEN = [("sampler", broken_cache)]
BROKEN += [("attention", breaks) for breaks in (broken_attention, broken_fused_attention, broken_gradient)]


@pytest.mark.parametrize(("path", "breaks"), BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_of_a_fast_path_is_found(path: str, breaks, dtype, monkeypatch, caplog) -> None:
    model = tiny("llama").to(dtype)
    breaks(model, monkeypatch)
    found = fast_paths(model)
    assert "differ" in getattr(found, path)
    assert path != "attention" or found.sampler is None  # the others are tried without it


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral", "gpt2", "falcon_h1", "qwen3_next"])
def test_bfloat16_is_as_fast_as_float32(kind: str) -> None:
    # A seed at which rounding chooses no other expert: logits of such tokens differ by half their size.
    exact, rounded = (vars(fast_paths(tiny(kind, seed=5).to(t))) for t in (torch.float32, torch.bfloat16))
    assert {name for name, why in exact.items() if why} == {name for name, why in rounded.items() if why}


def test_mixed_precision_is_as_fast(caplog: pytest.LogCaptureFixture) -> None:
    """Float32 weights, computed with in bfloat16 by the forward that accelerate makes."""
    model = ready("llama")
    forward = model.forward
    plain = vars(fast_paths(ready("llama")))

    def mixed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return convert_outputs_to_fp32(forward)(*args, **kwargs)

    model.forward = mixed
    assert model(torch.tensor([[5, 6]])).logits.dtype == torch.float32
    assert vars(fast_paths(model)) == plain
    assert not caplog.text

"""Sampling: equal to `generate()` where that is defined, and distributed as the softmax elsewhere."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from helpers.training import SPREAD, ids_of
from transformers import FalconConfig, FalconForCausalLM, LogitsProcessorList, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import steer
from steer.errors import SteerError
from steer.generation import cpu, sampler
from steer.generation.decoding import pad_left
from steer.generation.sampler import Sampling, draw_token, uniforms

PROMPTS = [[5, 9, 33], [7], [11, 3, 4, 80, 21, 60, 9], [42, 42, 8, 17]]
NEVER = 96  # no prompt holds it; as an end-of-sequence id it is used only where it is known not to be drawn


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest, build_tiny) -> PreTrainedModel:
    return steered(build_tiny(request.param, initializer_range=SPREAD))


@pytest.fixture
def llama(build_tiny) -> PreTrainedModel:
    return steered(build_tiny("llama", initializer_range=SPREAD))


def steered(model: PreTrainedModel, positions: str = "all", size: float = 0.5) -> PreTrainedModel:
    """With random vectors, so that a pass that forgets them differs."""
    vectors = steer.attach(model, steer.SteeringConfig(positions=positions))
    generator = torch.Generator().manual_seed(1)
    for parameter in vectors.parameters():
        parameter.data.normal_(0, size, generator=generator)
    return model


def generated(model: PreTrainedModel, prompts: list[list[int]], tokens: int, eos: int) -> list[list[int]]:
    """Greedy completions by transformers itself, cut after the first end-of-sequence token."""
    ids, mask = pad_left(prompts, torch.device("cpu"))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=eos,
        pad_token_id=0,
    )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def full_pass(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0):
    """log softmax(logits / T) of the completion, from one plain pass without padding or cache."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)
    return logps.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


# ---- greedy


@torch.no_grad()
def test_greedy_equals_generate_on_every_architecture(model: PreTrainedModel) -> None:
    # 14 new tokens pass the sliding window of 8 of the architectures that have one
    open_ended = generated(model, PROMPTS, 14, NEVER)
    assert len({tuple(row) for row in open_ended}) > 1, "rows are all the same: the test would prove little"
    # an end that occurs early in one row, so that the batch is compacted while others go on
    firsts = {token: row.index(token) for row in open_ended for token in row[:8] if token in row}
    ends = [t for t in firsts if any(t not in row for row in open_ended)] or [open_ended[0][3]]
    for eos in (NEVER, ends[0], ends[-1]):
        expected = generated(model, PROMPTS, 14, eos)
        for form in ("sdpa", "grouped"):
            if form == "grouped":
                with cpu.grouped(model):
                    got = sampler.rollout(model, PROMPTS, Sampling(14, (eos,), temperature=0.0))
            else:
                got = sampler.rollout(model, PROMPTS, Sampling(14, (eos,), temperature=0.0))
            assert ids_of(got) == expected, form
    assert any(len(row) < 14 for row in expected)


def test_repeated_prompts_give_the_same_greedy_text_in_the_given_order(llama: PreTrainedModel) -> None:
    order = [2, 0, 0, 3, 1, 2, 0]
    once = sampler.rollout(llama, PROMPTS, Sampling(10, (NEVER,), temperature=0.0))
    many = sampler.rollout(llama, [PROMPTS[i] for i in order], Sampling(10, (NEVER,), temperature=0.0))
    assert ids_of(many) == [once[i].ids for i in order]
    assert len({tuple(row) for row in ids_of(once)}) == len(PROMPTS)


def test_stops_at_max_new_tokens_without_an_end(llama: PreTrainedModel) -> None:
    done = sampler.rollout(llama, PROMPTS, Sampling(5, (NEVER,), temperature=0.0))
    assert [len(one.ids) for one in done] == [5] * 4 == [len(one.logps) for one in done]


def test_any_of_several_end_tokens_ends_a_row_and_is_kept(llama: PreTrainedModel) -> None:
    free = ids_of(sampler.rollout(llama, PROMPTS, Sampling(10, (NEVER,), temperature=0.0)))
    ends = (free[0][2], free[1][4])
    written = sampler.rollout(llama, PROMPTS, Sampling(10, ends, temperature=0.0))
    done = ids_of(written)
    assert [one.finished for one in written] == [row[-1] in ends for row in done]
    for row, whole in zip(done, free, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert row == whole[: first + 1]
    assert any(len(row) < 10 for row in done)


# ---- sampling: rows, seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(
    llama: PreTrainedModel, dtype: torch.dtype
) -> None:
    llama.to(dtype)
    prompts = [PROMPTS[i] for i in (0, 2, 0, 1, 3, 0)]
    free = sampler.rollout(llama, prompts, Sampling(12, (NEVER,)), uniforms(range(6), 12, 3, 5))
    eos = free[1].ids[2]  # ends one row early, so that later tokens come from a compacted batch
    sampling = Sampling(12, (eos,))
    together = sampler.rollout(llama, prompts, sampling, uniforms(range(6), 12, 3, 5))
    alone = [sampler.rollout(llama, [p], sampling, uniforms([r], 12, 3, 5)) for r, p in enumerate(prompts)]
    assert ids_of(together) == [one[0].ids for one in alone]
    assert len({tuple(together[i].ids) for i in (0, 2, 5)}) == 3, "samples of one prompt must differ"
    assert min(map(len, ids_of(together))) < 12


def test_uniforms_belong_to_the_row_and_differ_by_seed_and_step() -> None:
    whole = uniforms(range(10), 6, seed=1, step=2)
    assert torch.equal(uniforms([7, 3], 6, 1, 2), whole[[7, 3]])
    assert torch.equal(uniforms(range(10), 3, 1, 2), whole[:, :3])
    others = [uniforms(range(10), 6, *key) for key in ((1, 3), (2, 2), (2, 1), (1 + (1 << 32), 2))]
    tables = [whole, *others]
    drawn = torch.cat(tables).flatten()
    assert len(drawn.unique()) == drawn.numel(), "streams overlap"
    assert whole.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() < 1


def test_sampling_without_noise_is_refused_and_greedy_needs_none(llama: PreTrainedModel) -> None:
    sampler.rollout(llama, PROMPTS, Sampling(2, (NEVER,), temperature=0.0))
    with pytest.raises(AssertionError, match="noise"):
        sampler.rollout(llama, PROMPTS, Sampling(2, (NEVER,)))


# ---- sampling: the distribution


def test_frequencies_of_20000_draws_match_softmax() -> None:
    torch.manual_seed(0)
    logits, temperature, draws = torch.randn(40), 0.8, 20_000
    noise = uniforms(range(draws), 1, seed=0, step=0)[:, 0]
    token, logp = draw_token(logits.expand(draws, -1), temperature, LogitsProcessorList(), noise)
    probs = torch.softmax(logits.double() / temperature, -1)
    expected = probs * draws
    counts = torch.bincount(token, minlength=40).double()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    # 39 degrees of freedom: the 0.999 quantile of chi-square is 72.1; the fixed seed never flickers
    assert chi2 < 72.1
    assert torch.allclose(logp.double(), probs.log()[token], atol=1e-5)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}]
)
def test_tokens_of_probability_zero_are_never_drawn(filters: dict) -> None:
    torch.manual_seed(2)
    logits = torch.randn(200, 30) * 2
    # forbidden at the start, in the middle and at the end of the vocabulary, where inversion could slip
    logits[:, [0, 1, 14, 28, 29]] = -torch.inf
    warpers = Sampling(1, (), **filters).warpers()
    allowed = torch.softmax(warpers(None, logits.clone()), -1) > 0
    assert allowed.any(1).all() and not allowed.all()
    if "top_k" in filters:
        assert allowed.sum(1).max() <= filters["top_k"]
    largest = 1 - 2**-24  # the largest float32 below 1, and more than numpy ever draws
    edges = torch.tensor([0.0, 2**-149, 2**-24, 0.5, largest])
    for value in (*edges, *torch.rand(20)):
        token, logp = draw_token(logits, 1.0, warpers, value.expand(200).float())
        assert allowed.gather(1, token[:, None]).all(), value
        assert logp.isfinite().all()


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16)
    _, logp = draw_token(logits, 1.0, LogitsProcessorList(), torch.tensor([0.99]))
    assert logp.dtype == torch.float32
    assert logp.item() == pytest.approx(
        torch.log_softmax(torch.tensor([0.0, 1.0, 2.0]), -1)[2].item(), abs=1e-6
    )


# ---- log-probabilities


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_of_a_plain_pass(model: PreTrainedModel, temperature: float) -> None:
    noise = uniforms(range(8), 12, 0, 0)
    prompts = PROMPTS * 2
    free = sampler.rollout(model, prompts, Sampling(12, (NEVER,), temperature), noise)
    done = sampler.rollout(model, prompts, Sampling(12, (free[0].ids[4],), temperature), noise)
    assert min(map(len, ids_of(done))) < 12
    for prompt, one in zip(prompts, done, strict=True):
        ids, logps = one.ids, one.logps
        # Padding and cache sum in another order; float32 of logits of size 10 leaves some 1e-5 of that.
        assert np.allclose(logps, full_pass(model, prompt, ids, temperature), atol=3e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "first_completion"])
def test_positions_mean_the_same_with_and_without_the_cache(build_tiny, positions: str) -> None:
    model = steered(build_tiny("llama", initializer_range=SPREAD), positions)
    vectors = steer.attached(model)
    noise = uniforms(range(8), 8, 0, 0)
    prompts = PROMPTS * 2
    done = sampler.rollout(model, prompts, Sampling(8, (NEVER,)), noise)
    shares = []
    for prompt, one in zip(prompts, done, strict=True):
        ids, logps = one.ids, one.logps
        with vectors.prompt_length(len(prompt)):
            assert np.allclose(logps, full_pass(model, prompt, ids), atol=3e-5)
        with vectors.disabled():
            shares.append(np.allclose(logps, full_pass(model, prompt, ids), atol=1e-2))
    assert not all(shares), "the vectors did nothing"
    # greedy as well, against generate(), which finds the prompt's end by itself
    greedy = sampler.rollout(model, PROMPTS, Sampling(8, (NEVER,), temperature=0.0))
    assert ids_of(greedy) == generated(model, PROMPTS, 8, NEVER)


# ---- grouped attention


class Module(torch.nn.Module):
    """What transformers' sdpa function asks of the attention module."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def attention_inputs(groups: int, queries: int, keys: int, value_size: int = 8):
    torch.manual_seed(queries + keys)
    batch, heads, size = 3, 4, 8
    query = torch.randn(batch, heads, queries, size)
    key, value = (torch.randn(batch, groups, keys, width) for width in (size, value_size))
    column = torch.arange(keys)
    causal = column[None, :] <= torch.arange(queries)[:, None] + keys - queries
    real = column[None, :] >= torch.tensor([0, 2, 3])[:, None]  # left padding
    mask = causal & real[:, None, :]  # a query at padding may see nothing at all
    return query, key, value, mask[:, None]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (6, 6), (3, 9), (16, 20)])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("size", [8, 5])
def test_grouped_attention_equals_sdpa(
    groups: int, queries: int, keys: int, scaling: float | None, size: int, monkeypatch
) -> None:
    inputs = attention_inputs(groups, queries, keys, size)
    module = Module(4 // groups)
    expected, _ = cpu.sdpa_attention_forward(module, *inputs, scaling=scaling)
    fused = count(monkeypatch)
    got, weights = cpu.grouped_attention(module, *inputs, scaling=scaling)
    assert got.shape == expected.shape == (3, queries, 4, size) and weights is None and not fused
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (40, 44)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_attention_has_the_gradients_of_sdpa(queries: int, keys: int, groups: int) -> None:
    grads = []
    for function in (cpu.sdpa_attention_forward, cpu.grouped_attention):
        *tensors, mask = attention_inputs(groups, queries, keys)
        tensors = [t.requires_grad_() for t in tensors]
        out, _ = function(Module(4 // groups), *tensors, mask)
        out.square().sum().backward()
        grads.append([t.grad for t in tensors])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_keep_neither_scores_nor_copies(dtype: torch.dtype) -> None:
    *tensors, mask = attention_inputs(2, 200, 210)
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor.detach())
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return alive[-1]

    outputs = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(2):  # layers
            outputs.append(cpu.grouped_attention(Module(2), *tensors, mask)[0])
    small = sum(t.nbytes for t in [*tensors, *outputs])
    numbers = mask.numel() * dtype.itemsize  # of the mask, once for all layers
    sums = 2 * 4 * 3 * 4 * 200  # a float32 for each query and head of each layer
    assert sum(kept.values()) <= small + numbers + sums < 2 * 3 * 4 * 200 * 210 * dtype.itemsize


def test_long_or_unmasked_attention_goes_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def fused(module, query, *args, **kwargs):
        asked.append(query.shape)
        return query.transpose(1, 2), None

    monkeypatch.setattr(cpu, "sdpa_attention_forward", fused)
    query, key, value, mask = attention_inputs(2, 4, 6, value_size=5)
    cpu.grouped_attention(Module(2), query, key, value, mask)
    assert not asked
    cpu.grouped_attention(Module(2), query, key, value, None)
    cpu.grouped_attention(Module(2), query, key, value, mask, dropout=0.1)
    monkeypatch.setattr(cpu, "MAX_SCORES", 3 * 4 * 4 * 6 - 1)
    cpu.grouped_attention(Module(2), query, key, value, mask)
    assert len(asked) == 3


def test_what_the_grouped_form_does_not_know_goes_to_the_fused_kernel(monkeypatch) -> None:
    query, key, value, mask = attention_inputs(2, 4, 6)
    added = torch.zeros(mask.shape).masked_fill(~mask, -1e9)  # a float mask is added to the scores
    bias = torch.randn(1, 4, 4, 6)
    cases = [(2, added, {}), (2, mask, {"position_bias": bias})]
    for groups, given, options in cases:
        expected, _ = cpu.sdpa_attention_forward(Module(groups), query, key, value, given, **options)
        fused = count(monkeypatch)
        got, _ = cpu.grouped_attention(Module(groups), query, key, value, given, **options)
        assert fused and torch.equal(got, expected)


@torch.no_grad()
def test_grouped_models_compute_the_same(model: PreTrainedModel, monkeypatch) -> None:
    ids, mask = pad_left(PROMPTS * 2, torch.device("cpu"))
    plain = model(input_ids=ids, attention_mask=mask).logits
    fused = count(monkeypatch)
    with cpu.grouped(model):
        grouped = model(input_ids=ids, attention_mask=mask).logits
    assert not fused, "no layer used the grouped form"
    real = mask.bool()  # what stands at padding is never read
    # another order of the sums in float32: logits of size 10, three layers
    torch.testing.assert_close(grouped[real], plain[real], rtol=1e-4, atol=1e-4)


def count(monkeypatch) -> list[int]:
    """Filled with one number for each call that the fused kernel gets from the grouped form."""
    asked: list[int] = []
    original = cpu.sdpa_attention_forward
    monkeypatch.setattr(cpu, "sdpa_attention_forward", lambda *a, **k: asked.append(1) or original(*a, **k))
    return asked


def test_the_attention_function_comes_back_even_after_an_exception(llama: PreTrainedModel) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(SteerError), cpu.grouped(llama):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is cpu.grouped_attention
        with cpu.grouped(llama):
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is cpu.grouped_attention
        raise SteerError("stop")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert llama.config._attn_implementation == "sdpa"


def test_falcon_does_not_see_the_future() -> None:
    # its own code reads the mask as a float where the attention is not called "sdpa"
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = FalconForCausalLM(FalconConfig(**shape, initializer_range=SPREAD)).eval()
    ids, mask = pad_left(PROMPTS, torch.device("cpu"))
    other = ids.clone()
    other[:, -1] = 50
    with torch.no_grad(), cpu.grouped(model):
        one, two = (model(input_ids=row, attention_mask=mask).logits for row in (ids, other))
    real = mask[:, :-1].bool()
    assert (one[:, :-1][real] == two[:, :-1][real]).all()
    assert not torch.allclose(one[:, -1], two[:, -1], atol=1e-2)


def test_a_model_with_eager_attention_is_left_alone(build_tiny, monkeypatch) -> None:
    model = build_tiny("llama", attn_implementation="eager")
    ids, mask = pad_left(PROMPTS, torch.device("cpu"))
    monkeypatch.setattr(cpu, "_unknown", lambda *args: pytest.fail("the grouped form was asked"))
    with cpu.grouped(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_freed_memory_is_kept_and_then_returned() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    cpu.keep_freed_memory()
    tensors = [torch.ones(2_000_000) for _ in range(25)]  # 200 MB
    full = resident()
    del tensors
    kept = resident()
    cpu.return_freed_memory()
    assert full - kept < 50e6
    assert kept - resident() > 150e6


def test_nothing_is_registered_or_set_by_importing() -> None:
    # runs on a GPU import this module too
    code = (
        "from transformers import AttentionInterface as A; before = dict(A._global_mapping);"
        "from trl.kernels import chunked_logprob as c; tiles = c.TOKEN_CHUNK_SIZE;"
        "import ctypes; ctypes.CDLL = None;"  # mallopt cannot be reached
        "import steer.training.group_trainer, steer.training.sweep.trainer;"
        "assert A._global_mapping == before and c.TOKEN_CHUNK_SIZE == tiles"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

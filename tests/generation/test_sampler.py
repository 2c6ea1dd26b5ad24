"""Sampling: equal to `generate()` where that is defined, and distributed as the softmax elsewhere."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from helpers.training import SPREAD, ids_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, PreTrainedModel

import steer
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


def tokens_read(model: PreTrainedModel, seen: list[int]) -> None:
    """Let `seen` hold the number of tokens of each pass."""
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))


BEGINNING = [int(i) for i in torch.randint(3, 90, (60,), generator=torch.Generator().manual_seed(5))]


@torch.no_grad()
def test_a_common_beginning_is_read_once(model: PreTrainedModel) -> None:
    prompts = [[*BEGINNING, *prompt] for prompt in (*PROMPTS, [8, 8], [15])]
    sampling = Sampling(6, (NEVER,), temperature=0.0)
    whole = sampler.rollout(model, prompts, sampling)
    seen: list[int] = []
    tokens_read(model, seen)
    shared = sampler.rollout(model, prompts, sampling, share_beginning=True)
    assert ids_of(shared) == ids_of(whole)
    for one, other in zip(shared, whole, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=2e-4)
    # a window of 8 tokens would be shortened by padding between the tokens of a prompt
    narrow = model.config.model_type in ("gemma2", "gemma3_text", "mistral")
    assert seen[0] == (len(prompts) * 67 if narrow else 60)
    assert narrow or seen[1] == len(prompts) * 7


@torch.no_grad()
@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "first_completion"])
def test_a_prompt_is_read_whole_for_vectors_that_ask_where_it_ends(build_tiny, positions: str) -> None:
    model = steered(build_tiny("llama", initializer_range=SPREAD), positions, 3.0)
    prompts = [[*BEGINNING, *prompt] for prompt in (*PROMPTS, [8, 8], [15])]
    sampling = Sampling(6, (NEVER,), temperature=0.0)
    whole = sampler.rollout(model, prompts, sampling)
    shared = sampler.rollout(model, prompts, sampling, share_beginning=True)
    assert shared == whole


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


def test_mixed_precision_casts_each_weight_once(build_tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights in float32 are not cast again for each token."""
    model = build_tiny("llama", initializer_range=SPREAD)
    size = model.lm_head.weight.shape
    casts: list[torch.Size] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16:
                casts.append(made.shape)
            return made

    def drawn(tokens: int) -> list[list[int]]:
        casts.clear()
        with Casts():
            written = sampler.rollout(model, PROMPTS, Sampling(tokens, (NEVER,), temperature=0))
        return ids_of(written)

    sampler.rollout(model, PROMPTS, Sampling(1, (NEVER,), temperature=0))  # the model is tried at first
    plain = torch.autocast("cpu", torch.bfloat16)(model.forward)
    monkeypatch.setattr(model, "forward", plain)
    drawn(2)
    few = casts.count(size)
    written = drawn(12)
    assert 1 <= casts.count(size) <= few, "as many for twelve tokens as for two"
    monkeypatch.setattr(sampler, "_weights_cast_once", lambda device: nullcontext())
    assert drawn(12) == written and casts.count(size) >= few + 10


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


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("few", [1, 4, 10])  # of ten rows
def test_rows_drawn_a_few_at_a_time_are_the_same(
    monkeypatch: pytest.MonkeyPatch, few: int, temperature: float
) -> None:
    torch.manual_seed(0)
    logits, noise, warpers = torch.randn(10, 40), torch.rand(10), Sampling(1, (), top_k=7).warpers()
    whole = sampler._draw(logits, temperature, warpers, noise)
    monkeypatch.setattr(sampler, "cached_rows", lambda width: few)
    token, logp = draw_token(logits, temperature, warpers, noise)
    assert len(token.unique()) > 5
    assert torch.equal(token, whole[0]) and torch.equal(logp, whole[1])


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

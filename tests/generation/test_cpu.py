"""Attention on a CPU: equal to transformers' own, with its gradients; the LM head's inputs and rows."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain

import pytest
import torch
from conftest import ARCHITECTURES
from helpers.heads import contiguous_inputs
from helpers.training import SPREAD
from transformers import FalconConfig, FalconForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steer.errors import SteerError
from steer.generation import cpu
from steer.generation.decoding import pad_left

PROMPTS = [[5, 9, 33], [7], [11, 3, 4, 80, 21, 60, 9], [42, 42, 8, 17]]


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest, build_tiny) -> PreTrainedModel:
    return build_tiny(request.param, initializer_range=SPREAD)


@pytest.fixture
def llama(build_tiny) -> PreTrainedModel:
    return build_tiny("llama", initializer_range=SPREAD)


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


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_padding_are_sampled_by_the_products_too(
    groups: int, dtype: torch.dtype, monkeypatch
) -> None:
    """Without padding there is no mask: the fused kernel took ten times as long for a single query."""
    module = Module(4 // groups)
    query, key, value = (x.to(dtype) for x in attention_inputs(groups, 1, 9)[:3])
    expected, _ = cpu.sdpa_attention_forward(module, query, key, value, None)
    prompt = attention_inputs(groups, 6, 6)[:3]
    causal, _ = cpu.sdpa_attention_forward(module, *prompt, None)
    given_back: list[bool] = []

    def known(*args, **kwargs):
        given_back.append(True)
        return causal, None

    monkeypatch.setattr(cpu, "sdpa_attention_forward", known)
    got, _ = cpu.grouped_attention(module, query, key, value, None)
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got, expected, **tolerance)
    assert not given_back
    cpu.grouped_attention(module, *prompt, None)  # no mask means a causal one here
    assert given_back


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


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_are_not_rounded_in_half_precision(dtype: torch.dtype, queries: int) -> None:
    """A constant in keys and queries, as biases leave it there, moves all scores of a query alike."""
    query, key, value, mask = attention_inputs(2, queries, 24)
    query[..., 0] += 40
    key[..., 0] += 60
    halves = [x.to(dtype) for x in (query, key, value)]
    found = []
    for tensors, mixed in (([x.double() for x in halves], False), (halves, False), (halves, True)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast("cpu", dtype, enabled=mixed):
            out, _ = cpu.grouped_attention(Module(2), *leaves, mask)
        (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([out.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    truth, *others = found
    for exact, got in chain(*(zip(truth, other, strict=True) for other in others)):
        # with products rounded to 8 bits 0.2 to 0.3 in bfloat16
        assert (got - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_of_long_sequences_are_right_at_padding_and_the_same_each_time(
    dtype: torch.dtype, groups: int
) -> None:
    """Padding sees nothing at all: zeros, and no gradient. Two threads meet in one key."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        *tensors, mask = attention_inputs(groups, 150, 150)
        mask[2, :, :100] = False
        grads = []
        for _ in range(5):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
            out, _ = cpu.grouped_attention(Module(4 // groups), *leaves, mask)
            assert "Flash" in out.grad_fn.next_functions[0][0].next_functions[0][0].name()
            assert not out[2, :100].any()
            out.square().sum().backward()
            grads.append([t.grad for t in leaves])
    finally:
        torch.set_num_threads(threads)
    exact = [t.double().requires_grad_() for t in tensors]
    key, value = (t.repeat_interleave(4 // groups, 1) for t in exact[1:])
    scores = (exact[0] @ key.transpose(2, 3) * 8**-0.5).masked_fill(~mask, -1e300)
    (scores.softmax(-1) @ value).masked_fill(~mask.any(-1, keepdim=True), 0).square().sum().backward()
    for gradients in grads:
        assert all(torch.equal(one, first) for one, first in zip(gradients, grads[0], strict=True))
    for got, expected in zip(grads[0], exact, strict=True):
        torch.testing.assert_close(got.double(), expected.grad, rtol=1e-4, atol=1e-5)


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


def test_generate_gives_the_head_no_views(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    contiguous = contiguous_inputs(llama, monkeypatch)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with cpu.head_inputs_copied(llama):
        copied = llama.generate(ids, **settings)
    assert contiguous == [True] * 3
    contiguous.clear()
    assert torch.equal(llama.generate(ids, **settings), copied)
    assert contiguous == [False, True, True], "the last token of each prompt is a view"


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


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_thread_has_as_many_of_the_rows_worked_on_at_once(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for width in (1, 1000, cpu.CACHED // 2, 10 * cpu.CACHED):
        rows = cpu.cached_rows(width)
        assert rows >= threads and rows % threads == 0
        assert rows == threads or rows * width <= cpu.CACHED

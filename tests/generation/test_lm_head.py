"""The frozen LM head's two products against trl's three."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_logprob
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils

from steer import compat
from steer.generation import lm_head
from steer.generation.lm_head import FrozenHead, frozen_head

TOKENS, WIDTH, WORDS = 19, 16, 97
OUTPUTS = ("log_probs", "entropy")


def inputs(bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(WORDS, WIDTH)
    return hidden, weight, torch.randn(WORDS) if bias else None, torch.randint(0, WORDS, (TOKENS,))


@pytest.mark.parametrize("few", [2, 3, 256])  # rows at once of a tile
@pytest.mark.parametrize("tile", [7, 256])  # 19 tokens in tiles of 7, 7 and 5, and in one
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wanted", ["log_probs", "entropy", "both"])
def test_values_and_gradients_equal_trls(monkeypatch, few: int, tile: int, bias: bool, wanted: str) -> None:
    monkeypatch.setattr(lm_head, "TILE", tile)
    monkeypatch.setattr(lm_head, "cached_rows", lambda width: few)
    hidden, weight, offset, targets = inputs(bias)
    found = []
    for function in (FrozenHead, ChunkedLogProbFunction):
        # temperature, trl's width of a tile, no soft cap, a scale on the logits
        log_probs, entropy, *others = function.apply(
            hidden, weight, offset, targets, 0.7, 32, None, 1.3, OUTPUTS
        )
        assert others == [None] * 3
        generator = torch.Generator().manual_seed(1)
        parts = {name: torch.randn(TOKENS, generator=generator) for name in OUTPUTS}
        loss = sum(
            (value * parts[name]).sum()
            for name, value in zip(OUTPUTS, (log_probs, entropy), strict=True)
            if wanted in (name, "both")
        )
        found.append((log_probs, entropy, *torch.autograd.grad(loss, hidden)))
    # float32 sums over 97 words in another order; logits reach 20
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert found[0][2].norm() > 1


def test_equal_to_log_softmax_in_float64() -> None:
    hidden, weight, _, targets = inputs()
    hidden, weight = hidden.detach().double().requires_grad_(), weight.double()
    got, entropy, *_ = FrozenHead.apply(hidden, weight, None, targets, 0.7, 32, None, 1.0, OUTPUTS)
    table = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    expected = table.gather(1, targets[:, None])[:, 0]
    weights = torch.randn(TOKENS, dtype=torch.float64)
    (found,) = torch.autograd.grad((got * weights).sum(), hidden)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), hidden)
    # values leave as float32, as trl's do; gradients do not
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(table.exp() * table).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("few", [3, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_loses_no_more_than_trl_does(monkeypatch, few: int, bias: bool) -> None:
    monkeypatch.setattr(lm_head, "cached_rows", lambda width: few)
    hidden, weight, offset, targets = inputs(bias)
    rest = (offset, targets, 0.7, 32, None, 1.0, OUTPUTS)
    exact = tuple(None if x is None else x.double() for x in (hidden.bfloat16(), weight.bfloat16(), offset))
    table = torch.log_softmax((exact[0] @ exact[1].T + (0 if exact[2] is None else exact[2])) / 0.7, -1)
    expected = table.gather(1, targets[:, None])[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), hidden)
    off = []
    for function in (FrozenHead, ChunkedLogProbFunction):
        half = hidden.detach().bfloat16().requires_grad_()
        rounded = None if offset is None else offset.bfloat16()
        log_probs, entropy, *_ = function.apply(half, weight.bfloat16(), rounded, *rest[1:])
        assert log_probs.dtype == entropy.dtype == torch.float32
        (gradient,) = torch.autograd.grad(log_probs.sum(), half)
        assert gradient.dtype == torch.bfloat16
        off.append(((log_probs - expected).norm(), (gradient - slope).norm() / slope.norm()))
    # the same roundings in sums of another order: equal but for a tenth
    assert off[0][0] <= 1.1 * off[1][0] + 1e-3
    assert off[0][1] <= 1.1 * off[1][1] + 1e-3
    assert off[0][1] < 0.02


def test_under_autocast_both_products_are_in_its_dtype() -> None:
    hidden, weight, _, targets = inputs()
    rest = (None, targets, 0.7, 32, None, 1.0, OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, entropy, *_ = FrozenHead.apply(hidden, weight, *rest)
    (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
    half = hidden.detach().bfloat16().requires_grad_()
    expected, spread, *_ = FrozenHead.apply(half, weight.bfloat16(), *rest)
    (slope,) = torch.autograd.grad(expected.sum(), half)
    assert torch.equal(log_probs, expected) and torch.equal(entropy, spread)
    assert gradient.dtype == torch.float32 and torch.equal(gradient, slope.float())


class Sizes(TorchDispatchMode):
    """Numbers in the result of each operation, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            name = func.overloadpacket.__name__
            self.of[name] = max(self.of.get(name, 0), result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_the_products_no_table_has_more_than_a_few_rows(monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(lm_head, "cached_rows", lambda width: 3)
    hidden, weight, _, targets = inputs()
    with Sizes() as sizes:
        FrozenHead.apply(hidden.to(dtype), weight.to(dtype), None, targets, 0.7, 32, None, 1.0, OUTPUTS)
    assert sizes.of["mm"] == TOKENS * WORDS
    assert sizes.of["exp"] == 3 * WORDS
    whole = {name for name, size in sizes.of.items() if size >= TOKENS * WORDS}
    # of the product: the buffer that it is written to, and its rows
    assert whole <= {"mm", "new_empty", "empty", "slice", "t", "_to_copy"}, whole


def test_it_stands_in_only_where_it_computes_the_same(monkeypatch) -> None:
    taken: list[int] = []
    original = FrozenHead.apply
    monkeypatch.setattr(FrozenHead, "apply", lambda *args: taken.append(1) or original(*args))
    hidden, weight, _, targets = inputs()

    def run(hidden=hidden, weight=weight, softcap=None, outputs=OUTPUTS) -> int:
        taken.clear()
        utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32, softcap, 1.0, outputs)
        return len(taken)

    assert run() == 0
    with frozen_head():
        assert run() == 1
        assert run(softcap=30.0) == 0
        assert run(outputs=(*OUTPUTS, "is_top1")) == 0
        assert run(weight=weight.clone().requires_grad_()) == 0
        assert run(hidden=hidden.bfloat16(), weight=weight.bfloat16()) == 1
        assert run(hidden=hidden, weight=weight.bfloat16()) == 0
        with torch.no_grad():
            assert run() == 1
    assert run() == 0


def test_values_are_the_same_bits_with_and_without_a_gradient() -> None:
    # else a reference policy equal to the trained one would differ by rounding, which Adam makes a step of
    hidden, weight, _, targets = inputs()
    rest = (None, targets, 0.7, 32, None, 1.0, OUTPUTS)
    with frozen_head():
        trained = utils._ChunkedLogProbFunction.apply(hidden, weight, *rest)
        with torch.no_grad():
            reference = utils._ChunkedLogProbFunction.apply(hidden, weight, *rest)
    assert hidden.requires_grad and trained[0].requires_grad and not reference[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(trained[:2], reference[:2], strict=True))


def test_products_of_a_trained_head_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 numbers fit float32, so that only the sums are rounded: 2e-6 for 512 of them."""
    monkeypatch.setattr(chunked_logprob, "_addmm_fp32", chunked_logprob._addmm_fp32)
    before = torch.backends.mkldnn.matmul.fp32_precision
    compat.set_head_products()
    torch.manual_seed(0)
    for a, b in (((33, 512), (512, 97)), ((97, 512), (512, 33))):
        left, right = torch.randn(a, dtype=torch.bfloat16), torch.randn(b, dtype=torch.bfloat16)
        total = torch.ones(a[0], b[1])
        chunked_logprob._addmm_fp32(total, left, right)
        exact = 1 + left.double() @ right.double()
        assert (total - exact).abs().max() / exact.abs().max() < 2e-6
    single = torch.zeros(4, 4)  # float32 inputs keep their precision
    wide = torch.randn(4, 300)
    chunked_logprob._addmm_fp32(single, wide, wide.t())
    assert (single - wide.double() @ wide.t().double()).abs().max() < 1e-4
    assert torch.backends.mkldnn.matmul.fp32_precision == before

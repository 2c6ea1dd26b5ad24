"""Scoring a group with its prompts shared: the same numbers and gradients as trl's padded pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES
from helpers.training import SPREAD
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

import steer
from steer import compat
from steer.generation import cpu, scoring
from steer.generation.decoding import pad_left
from steer.generation.scoring import (
    FILL,
    PASS_OF_TRAINED_WEIGHTS,
    add_group_scoring,
    common_prefix,
    length_batches,
    pass_tokens,
)

TEMPERATURE = 0.7
# Groups of four in a shuffled order; prompts of unequal length, one a single token.
PROMPTS = [[5, 9, 33, 8], [7], [11, 3, 4, 80, 21, 60, 9, 12, 13, 14, 2]]
ORDER = [1, 0, 2, 0, 2, 1, 0, 1, 2, 2, 0, 1]
LENGTHS = [1, 17, 3, 9, 20, 1, 8, 2, 12, 5, 16, 20]


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def scorer(build_tiny, architecture: str, layers: object = "all", **steering: str) -> PreTrainedModel:
    """A model as the trainer prepares it, with random vectors."""
    model = build_tiny(architecture, initializer_range=SPREAD)
    randomise(steer.attach(model, steer.SteeringConfig(layers=layers, **steering)))
    add_fused_lm_head(model, TEMPERATURE, outputs=("log_probs", "entropy"))
    add_group_scoring(model)
    return model


def randomise(vectors: steer.SteeringVectors) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in vectors.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)


def batch(
    prompts: list[list[int]] = PROMPTS, order: list[int] = ORDER, lengths: list[int] = LENGTHS
) -> dict[str, torch.Tensor]:
    """What trl hands over: prompts padded on the left, completions on the right."""
    torch.manual_seed(3)
    width, longest = max(map(len, prompts)) + 2, max(lengths)  # two columns that are padding in every row
    rows = [prompts[i] for i in order]
    padding = torch.arange(longest)[None, :] >= torch.tensor(lengths)[:, None]
    return {
        "prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p in rows]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows]),
        "completion_ids": torch.randint(3, 97, (len(rows), longest)).masked_fill(padding, 0),
        "completion_mask": (~padding).long(),
    }


def plain(model: PreTrainedModel, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """trl's own way, as its `_get_per_token_logps_and_entropies` does it."""
    ids = torch.cat([data["prompt_ids"], data["completion_ids"]], 1)
    mask = torch.cat([data["prompt_mask"], data["completion_mask"]], 1)
    keep = data["completion_ids"].shape[1]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-keep] = -100
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type in ("gpt2", "gpt_neox"):
        # trl leaves positions out, so that they count padding, unlike in generate() and steer. That changes
        # what GPT-2 with its learned positions computes, and the float32 rounding of rotary ones.
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -keep:], out.entropy[:, -keep:]


def gradients(model: PreTrainedModel, *values: torch.Tensor) -> list[torch.Tensor]:
    """Of a sum with a weight of its own for every token, so that no two errors can cancel."""
    torch.manual_seed(5)
    total = sum((value * torch.randn(value.shape)).sum() for value in values)
    return list(torch.autograd.grad(total, steer.attached(model).parameters()))


def relative(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((g - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", [nullcontext, cpu.grouped])
def test_scores_and_gradients_equal_trls_padded_pass(build_tiny, architecture: str, form: Callable) -> None:
    model, data = scorer(build_tiny, architecture), batch()
    expected, entropy = plain(model, data)
    wanted = gradients(model, expected, entropy)
    with form(model):
        got = model(score_group=True, **data)
        found = gradients(model, got.log_probs, got.entropy)
    padding = data["completion_mask"] == 0
    assert (got.log_probs[padding] == 0).all() and (got.entropy[padding] == 0).all()
    # Float32: the shared pass sums attention and matrix products in another order. Logits reach 30 here, so
    # one rounding of them is 2e-6, and it grows by a small factor through three layers.
    torch.testing.assert_close(got.log_probs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-4, atol=1e-4)
    assert relative(found, wanted) < 1e-4
    assert all(g.norm() > 1e-3 for g in wanted)


def test_the_tiles_of_the_head_change_no_number(build_tiny, monkeypatch) -> None:
    found = []
    for size in (4096, 7):  # one tile for all tokens, and many
        monkeypatch.setattr(cpu, "HEAD_TILE", size)
        monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", None)  # put back after the test
        compat.set_head_tiles(cpu.HEAD_TILE)
        assert size == chunked_logprob.TOKEN_CHUNK_SIZE
        model, data = scorer(build_tiny, "llama"), batch()
        got = model(score_group=True, **data)
        found.append([got.log_probs, got.entropy, *gradients(model, got.log_probs, got.entropy)])
    # The same sums in float32, over other numbers of rows at once.
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def exact_head(model: PreTrainedModel) -> None:
    """The fused head's interface without its float32 sums."""

    def forward(self, labels=None, shift_labels=None, fused_lm_head=True, **inputs):
        hidden = self.base_model(**inputs, use_cache=False).last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        logits = self.get_output_embeddings()(hidden)
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        logps = torch.log_softmax(logits / TEMPERATURE, -1)
        chosen = logps.gather(-1, shift_labels.clamp(min=0)[..., None]).squeeze(-1)
        padding = shift_labels == -100
        entropy = -(logps.exp() * logps).sum(-1)
        return SimpleNamespace(
            log_probs=chosen.masked_fill(padding, 0), entropy=entropy.masked_fill(padding, 0)
        )

    model.forward = MethodType(forward, model)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_equal_to_rounding_in_float64(build_tiny, architecture: str) -> None:
    # The two ways differ by rounding alone: this is what says that the 1e-4 above hides no bug. trl's head
    # sums in float32, so a plain one stands in for it; the architectures are those whose norms have no
    # float32 inside. Scores leave as float32, gradients do not.
    model = build_tiny(architecture, initializer_range=SPREAD)
    randomise(steer.attach(model, steer.SteeringConfig(dtype="float64")))
    model.double()
    exact_head(model)
    add_group_scoring(model)
    data = batch()
    expected, entropy = plain(model, data)
    got = model(score_group=True, **data)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(got.log_probs.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-6, atol=1e-6)
    error = relative(gradients(model, got.log_probs, got.entropy), gradients(model, expected, entropy))
    assert error < 1e-9


@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "first_completion"])
def test_positions_are_the_same_in_the_shared_pass(build_tiny, positions: str) -> None:
    model = scorer(build_tiny, "llama", positions=positions)
    data = batch()
    vectors = steer.attached(model)
    width = data["prompt_ids"].shape[1]
    with vectors.prompt_length(width):
        expected, _ = plain(model, data)
        got = model(score_group=True, **data).log_probs
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert relative(gradients(model, got), gradients(model, expected)) < 1e-4
    with vectors.disabled():
        assert not torch.allclose(plain(model, data)[0], expected, atol=1e-2)


def test_windows_really_are_shorter_than_the_sequences(build_tiny) -> None:
    # Otherwise the comparisons above would not cover caches that forget.
    for architecture in ("mistral", "gemma2", "gemma3_text"):
        model = build_tiny(architecture)
        assert model.config.sliding_window < min(max(map(len, PROMPTS)), max(LENGTHS))
        cache = model(torch.ones(1, 20, dtype=torch.long), use_cache=True).past_key_values
        assert any(layer.keys.shape[2] < 20 for layer in cache.layers), architecture


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [4, 0, 2, 0], [3, 3, 3, 3]])
def test_prompts_of_one_token_and_empty_completions(build_tiny, lengths: list[int]) -> None:
    model = scorer(build_tiny, "llama")
    data = batch([[7], [9]], [0, 1, 1, 0], lengths)
    data["prompt_ids"], data["prompt_mask"] = data["prompt_ids"][:, -1:], data["prompt_mask"][:, -1:]
    expected, entropy = plain(model, data)
    got = model(score_group=True, **data)
    torch.testing.assert_close(got.log_probs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-4, atol=1e-4)
    assert relative(gradients(model, got.log_probs), gradients(model, expected)) < 1e-4


def test_only_empty_completions_still_give_a_gradient_of_zero(build_tiny) -> None:
    # mask_truncated_completions empties every row of a batch whose samples were all cut off; the backward
    # pass (and, under DDP, the other processes) must not stumble over it
    model = scorer(build_tiny, "llama")
    data = batch()
    data["completion_mask"] = torch.zeros_like(data["completion_mask"])
    got = model(score_group=True, **data)
    assert (got.log_probs == 0).all()
    assert all((g == 0).all() for g in gradients(model, got.log_probs))


@pytest.mark.parametrize("grad", [True, False])
def test_no_graph_below_the_lowest_trained_layer(build_tiny, architecture: str, grad: bool) -> None:
    model, data = scorer(build_tiny, architecture, layers="last"), batch()
    blocks = [module for name, module in model.named_modules() if name.endswith((".0", ".1", ".2"))]
    blocks = [b for b in blocks if any("attn" in n or "attention" in n for n, _ in b.named_children())]
    assert len(blocks) == 3
    seen: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for index, block in enumerate(blocks):
        block.register_forward_hook(
            lambda module, args, output, index=index: seen[index].append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    with torch.set_grad_enabled(grad):
        got = model(score_group=True, **data)
    # every pass: the shared prompts, then one per batch of lengths
    assert all(len(passes) >= 3 for passes in seen.values())
    assert not any(seen[0] + seen[1])
    assert all(flag is grad for flag in seen[2])
    assert got.log_probs.requires_grad is grad


def test_prompts_are_read_once(build_tiny) -> None:
    model, data = scorer(build_tiny, "llama"), batch()
    shapes: list[torch.Size] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    model(score_group=True, **data)
    # three distinct prompts without their last token, then the completions by length
    assert shapes[0] == (3, data["prompt_ids"].shape[1] - 1)
    assert [tuple(s) for s in shapes[1:]] == [(4, 20), (2, 12), (1, 8), (1, 5), (1, 3), (1, 2), (2, 1)]


# Prompts of unequal length that begin alike, as a chat template makes them; the second begins the first.
ALIKE = [[3, 4, 5, 6, 9, 33, 8], [3, 4, 5, 6, 9], [3, 4, 5, 6, 80, 21, 60, 9, 12]]


def test_what_all_prompts_begin_with_is_read_once(build_tiny, architecture: str, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "WORTH_A_PASS", 1)
    model, data = scorer(build_tiny, architecture), batch(ALIKE)
    shapes: list[torch.Size] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    got = model(score_group=True, **data)
    found = gradients(model, got.log_probs, got.entropy)
    width = data["prompt_ids"].shape[1]
    if getattr(model.config, "sliding_window", None):  # shorter than these sequences
        assert shapes[0] == (3, width - 1)
    else:
        assert [tuple(shape) for shape in shapes[:2]] == [(1, 4), (3, width - 5)]
    expected, entropy = plain(model, data)
    torch.testing.assert_close(got.log_probs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-4, atol=1e-4)
    assert relative(found, gradients(model, expected, entropy)) < 1e-4


@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "first_completion"])
def test_positions_behind_a_common_beginning(build_tiny, positions: str, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "WORTH_A_PASS", 1)
    model, data = scorer(build_tiny, "llama", positions=positions), batch(ALIKE)
    with steer.attached(model).prompt_length(data["prompt_ids"].shape[1]):
        expected, _ = plain(model, data)
        got = model(score_group=True, **data).log_probs
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert relative(gradients(model, got), gradients(model, expected)) < 1e-4


def test_one_prompt_alone_has_no_common_beginning_to_read(build_tiny, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "WORTH_A_PASS", 1)
    model, data = scorer(build_tiny, "llama"), batch(ALIKE[:1], [0] * 12)
    torch.testing.assert_close(
        model(score_group=True, **data).log_probs, plain(model, data)[0], rtol=1e-4, atol=1e-4
    )


@given(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=1, max_size=4))
def test_common_prefix(rows: list[list[int]]) -> None:
    ids, mask = pad_left(rows, torch.device("cpu"))
    found = common_prefix(ids, mask)
    assert all(row[:found] == rows[0][:found] for row in rows)
    shortest = min(map(len, rows))
    assert found < shortest
    assert found == shortest - 1 or len({row[found] for row in rows}) > 1


def test_other_calls_are_as_before(build_tiny) -> None:
    model = build_tiny("llama")
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    add_fused_lm_head(model, TEMPERATURE, outputs=("log_probs", "entropy"))
    add_group_scoring(model)
    assert torch.equal(model(ids).logits, before)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


# ---- batches by length


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_length_batches_partition_the_rows_and_keep_batches_full(lengths: list[int]) -> None:
    batches = length_batches(torch.tensor(lengths))
    rows = [row for chosen, _ in batches for row in chosen.tolist()]
    assert sorted(rows) == [i for i, n in enumerate(lengths) if n]
    for chosen, longest in batches:
        sizes = [lengths[i] for i in chosen.tolist()]
        assert max(sizes) == longest and min(sizes) >= FILL * longest
    # longest first, and a new batch only where the rule asks for one
    for (_, longest), (after, shorter) in pairwise(batches):
        assert shorter < FILL * longest and max(lengths[i] for i in after.tolist()) == shorter


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(0, 2000))
def test_a_batch_ends_only_where_that_saves_padding(lengths: list[int], worth: int) -> None:
    batches = length_batches(torch.tensor(lengths), worth)
    rows = [row for chosen, _ in batches for row in chosen.tolist()]
    assert sorted(rows) == [i for i, n in enumerate(lengths) if n]
    left = sum(n > 0 for n in lengths)
    for (chosen, longest), (_, shorter) in pairwise(batches):
        left -= len(chosen)
        assert (longest - shorter) * left >= worth


def test_trained_weights_make_fewer_batches(build_tiny: Callable) -> None:
    model = build_tiny("llama")
    assert pass_tokens(model) == PASS_OF_TRAINED_WEIGHTS  # all weights are trained
    model.requires_grad_(False)
    assert pass_tokens(model) == 0
    lengths = torch.tensor([100] * 8 + [50] * 8)
    assert [length for _, length in length_batches(lengths)] == [100, 50]
    assert [length for _, length in length_batches(lengths, PASS_OF_TRAINED_WEIGHTS)] == [100]

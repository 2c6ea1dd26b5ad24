"""The preallocated cache holds what transformers' own holds, and moves nothing for a token."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steer.generation.preallocated import ROOM, PreallocatedLayer, preallocated_cache

ROWS = 3
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.just("append"), st.integers(ROOM - 2, ROOM + 2)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=5)),
        st.tuples(st.just("select"), st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("copy"), st.none()),
    ),
    min_size=1,
    max_size=12,
)


@given(STEPS)
@torch.no_grad()
def test_a_layer_holds_what_a_dynamic_layer_holds(steps: list[tuple]) -> None:
    plain, ours, rows = DynamicLayer(), PreallocatedLayer(), ROWS
    generator = torch.Generator().manual_seed(0)
    returned: list[tuple[torch.Tensor, torch.Tensor]] = []  # with what it was then
    for what, how in steps:
        if what == "append":
            new = torch.randn(2, rows, 2, how, 4, generator=generator)
            for layer in (plain, ours):
                keys, values = layer.update(*new)
                assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
            returned += [(x, x.clone()) for x in (keys, values)]
        elif what in ("reorder", "select"):
            chosen = torch.tensor(how) % rows
            for layer in (plain, ours):
                (layer.reorder_cache if what == "reorder" else layer.batch_select_indices)(chosen)
            rows = len(chosen) if plain.get_seq_length() else rows
        elif what == "repeat":
            for layer in (plain, ours):
                layer.batch_repeat_interleave(how)
            rows = rows * how if plain.get_seq_length() else rows
        elif what == "copy":  # the one before is used by another, who appends to it
            plain, before, ours = copy.copy(plain), ours, copy.copy(ours)
            before.update(*torch.randn(2, rows, 2, 1, 4, generator=generator))
        elif plain.get_seq_length() > how:
            for layer in (plain, ours):
                layer.crop(-how)
        assert plain.get_seq_length() == ours.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(plain.keys, ours.keys) and torch.equal(plain.values, ours.values)
    for now, then in returned:  # nobody wrote over it
        assert torch.equal(now, then)


@torch.no_grad()
def test_a_token_moves_nothing() -> None:
    layer = PreallocatedLayer()
    layer.update(*torch.randn(2, ROWS, 2, 7, 4))
    place = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(*torch.randn(2, ROWS, 2, 1, 4))
    assert layer.keys.data_ptr() == place
    before = layer.keys.clone()
    layer.update(*torch.randn(2, ROWS, 2, 1, 4))  # no room left
    assert layer.keys.data_ptr() != place and torch.equal(layer.keys[..., :-1, :], before)


@torch.no_grad()
def test_memory_that_is_left_is_freed() -> None:
    layer = PreallocatedLayer()
    layer.update(*torch.randn(2, ROWS, 2, 7, 4))
    rooms = [weakref.ref(room.untyped_storage()) for room in layer._rooms]
    layer.reorder_cache(torch.tensor([0, 2]))
    assert [room() for room in rooms] == [None, None]


@torch.no_grad()
def test_other_numbers_are_promoted_as_by_concatenation() -> None:
    layers = DynamicLayer(), PreallocatedLayer()
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        new = torch.randn(2, ROWS, 2, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
        plain, ours = (layer.update(*new) for layer in layers)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_gradients_flow_through_what_was_appended() -> None:
    layer, leaf = PreallocatedLayer(), torch.randn(2, ROWS, 2, 7, 4).requires_grad_()
    with torch.no_grad():
        layer.update(*torch.ones(2, ROWS, 2, 7, 4))
    query = torch.ones(ROWS, 2, 1, 4, requires_grad=True)
    keys, _ = layer.update(*torch.ones(2, ROWS, 2, 7, 4))
    scores = (query * keys).sum()  # saves the keys, which no later token may change
    layer.update(*(leaf * 2))
    keys, values = layer.update(*(leaf * 3))
    (scores + keys.square().sum() + values.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, 2 * (2**2 + 3**2) * leaf.detach())
    torch.testing.assert_close(query.grad, torch.full_like(query, 14.0))


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_only_plain_layers_get_room(architecture: str, build_tiny: Callable) -> None:
    config = build_tiny(architecture).config.get_text_config()
    for own, ours in zip(DynamicCache(config=config).layers, preallocated_cache(config).layers, strict=True):
        assert type(ours) is (PreallocatedLayer if type(own) is DynamicLayer else type(own))

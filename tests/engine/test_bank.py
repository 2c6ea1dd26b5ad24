"""The bank of vectors without an engine: who gets what in a batch, and what may be pushed."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_engine import DEPTH, TOKENS, WIDTH, Block, Engine, vectors
from helpers.steering import message
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steer import SteerError, SteeringConfig
from steer.config import POSITIONS
from steer.engine import plugin
from steer.engine.bank import DEFAULT, Bank, Choice, pack, unpack
from steer.engine.client import Server, names, push, remove, returned_logprobs
from steer.kinds import SteeringState


def make(rows: int = 4) -> tuple[Bank, list[nn.Module]]:
    blocks = [Block() for _ in range(DEPTH)]
    return Bank(dict(enumerate(blocks)), DEPTH, WIDTH, rows, TOKENS, "cpu"), blocks


def batch(bank: Bank, parts: list[tuple[str, int, int]]) -> int:
    """Place a batch of (request, first position, tokens); returns how many tokens it has."""
    counts = torch.tensor([0, *(count for _, _, count in parts)])
    positions = torch.cat([torch.arange(first, first + count) for _, first, count in parts])
    bank.place([name for name, _, _ in parts], counts.cumsum(0).int(), positions)
    return len(positions)


def asks(**steering: Any) -> Choice:
    return Choice.of(SimpleNamespace(extra_args={"steering": steering}))


def test_a_fresh_bank_changes_no_bit() -> None:
    _, blocks = make()
    hidden = torch.randn(5, WIDTH)
    for block in blocks:
        out, residual = block(hidden)
        assert torch.equal(out, hidden)
        assert residual == "residual"


def test_every_token_gets_what_its_request_asked_for() -> None:
    bank, blocks = make()
    first, second, policy = vectors(1), vectors(2, [0, 2]), vectors(3)
    bank.push("first", first)
    bank.push("second", second)
    bank.push(DEFAULT, policy)
    bank.add_request("a", asks(name="first", scale=-2.0), 3)
    bank.add_request("b", Choice(), 4)
    bank.add_request("c", asks(name=None), 4)
    bank.add_request("d", asks(name="second"), 4)
    count = batch(bank, [("d", 0, 2), ("a", 0, 3), ("c", 7, 1), ("b", 9, 1)])
    zero = torch.zeros(WIDTH)
    for layer, block in enumerate(blocks):
        want = [second.get(layer, zero)] * 2 + [-2 * first[layer]] * 3 + [zero, policy[layer]]
        for shape in ((count, WIDTH), (1, count, WIDTH)):
            out, _ = block(torch.zeros(shape))
            assert torch.equal(out, torch.stack(want).view(shape))


def test_back_to_the_default_set_after_a_mixed_batch() -> None:
    bank, blocks = make()
    policy = vectors(3)
    bank.push(DEFAULT, policy)
    bank.add_request("base", asks(name=None), 4)
    batch(bank, [("base", 0, 4)])
    assert not blocks[0](torch.zeros(4, WIDTH))[0].any()
    bank.finish_request("base")
    bank.add_request("plain", Choice(), 4)
    batch(bank, [("plain", 0, 4)])
    assert torch.equal(blocks[0](torch.zeros(4, WIDTH))[0], policy[0].expand(4, -1))


@given(
    positions=st.sampled_from(sorted(POSITIONS)), prompt=st.integers(1, 12), cuts=st.sets(st.integers(1, 19))
)
def test_positions_are_those_of_the_trained_model(positions: str, prompt: int, cuts: set[int]) -> None:
    # However 20 tokens are cut into passes, each is steered as the state in transformers does it.
    bank, blocks = make()
    bank.push("set", {0: torch.ones(WIDTH)}, positions)
    bank.add_request("r", asks(name="set"), prompt)
    ends = [0, *sorted(cuts), 20]
    found = []
    for first, end in pairwise(ends):
        batch(bank, [("r", first, end - first)])
        found.append(blocks[0](torch.zeros(end - first, WIDTH))[0][:, 0] != 0)
    state = SteeringState(positions, 1.0)
    expected = torch.ones(20, dtype=torch.bool)
    if positions != "all":
        state.prompt_length = prompt
        state.place(20, None, torch.device("cpu"))
        assert state.mask is not None
        expected = state.mask[:, 0]
    assert torch.equal(torch.cat(found), expected)


def test_the_default_set_has_positions_too() -> None:
    bank, blocks = make()
    bank.push(DEFAULT, {0: torch.ones(WIDTH)}, "completion")
    bank.add_request("r", Choice(), 2)
    batch(bank, [("r", 0, 3)])
    assert blocks[0](torch.zeros(3, WIDTH))[0][:, 0].tolist() == [0, 0, 1]


def test_vectors_are_added_in_the_precision_of_the_stream() -> None:
    bank, blocks = make()
    pushed = vectors(5)
    bank.push(DEFAULT, pushed)
    hidden = torch.randn(4, WIDTH).bfloat16()
    out, _ = blocks[1](hidden)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, hidden + pushed[1].bfloat16())


def test_rows_are_reused_and_cleared() -> None:
    bank, blocks = make(rows=4)
    bank.push("a", vectors(1))
    bank.push("b", vectors(2))
    with pytest.raises(SteerError, match=r"no room for 'c'.*default, a, b"):
        bank.push("c", vectors(3))
    bank.remove("a")
    bank.push("c", {1: torch.ones(WIDTH)})
    bank.add_request("r", asks(name="c"), 1)
    batch(bank, [("r", 0, 1)])
    assert not blocks[0](torch.zeros(1, WIDTH))[0].any()  # what `a` had there is gone
    assert blocks[1](torch.zeros(1, WIDTH))[0].all()


def test_no_two_sets_share_a_version() -> None:
    bank, _ = make()
    seen = [bank.versions()[DEFAULT]]
    for name in (DEFAULT, "a", "a", DEFAULT):
        bank.push(name, vectors(1))
        seen.append(bank.versions()[name])
    bank.remove("a")
    bank.push("a", vectors(1))
    seen.append(bank.versions()["a"])
    bank.remove(DEFAULT)
    seen.append(bank.versions()[DEFAULT])
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({3: torch.zeros(WIDTH)}, "layer 3 does not exist.*0 to 2"),
        ({-1: torch.zeros(WIDTH)}, "layer -1 does not exist"),
        ({1: torch.zeros(WIDTH + 1)}, r"shape \(7,\).*\(6,\)"),
        ({1: torch.zeros(1, WIDTH)}, r"shape \(1, 6\)"),
        ({1: torch.zeros(WIDTH, dtype=torch.int64)}, "int64"),
        ({1: torch.full((WIDTH,), float("nan"))}, "layer 1 holds NaN"),
        ({1: torch.full((WIDTH,), float("inf"))}, "layer 1 holds NaN or Inf"),
    ],
)
def test_a_wrong_push_changes_nothing(wrong: dict[int, torch.Tensor], words: str) -> None:
    bank, _ = make()
    bank.push("set", vectors(1))
    before = {i: module.bank.clone() for i, module in bank.vectors.items()}
    with pytest.raises(SteerError, match=words) as error:
        bank.push("set", {**vectors(2), **wrong})
    message(error)
    assert all(torch.equal(module.bank, before[i]) for i, module in bank.vectors.items())
    assert bank.versions() == {DEFAULT: 0, "set": 1}


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a\n", "é", "x" * 201])
def test_wrong_names(name: str) -> None:
    with pytest.raises(SteerError, match="cannot name vectors"):
        make()[0].push(name, vectors(1))


@pytest.mark.parametrize(
    "given",
    [
        {"nmae": "a"},
        {"name": 3},
        {"scale": "2"},
        {"scale": float("nan")},
        {"scale": True},
        {"scale": 1e39},
        [3],
        3,
    ],
)
def test_wrong_requests(given: Any) -> None:
    with pytest.raises(SteerError, match="is not understood"):
        Choice.of(SimpleNamespace(extra_args={"steering": given}))


def test_what_a_request_may_say() -> None:
    said = [None, {}, {"steering": {}}, {"steering": "a"}, {"steering": None}, {"steering": {"scale": 2}}]
    found = [Choice.of(SimpleNamespace(extra_args=extra)) for extra in said]
    assert found == [Choice(), Choice(), Choice(), Choice(("a",)), Choice(()), Choice((DEFAULT,), 2.0)]
    assert Choice.of(None) == Choice()  # a request that is not sampled from


@given(st.dictionaries(st.integers(0, 200), st.integers(0, 5), max_size=4))
def test_packing(sizes: dict[int, int]) -> None:
    given = {layer: torch.randn(size) for layer, size in sizes.items()}
    found = unpack(pack(given))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[layer], given[layer]) for layer in given)


@given(st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda b: b.hex())))
def test_what_is_not_packed_vectors(text: str) -> None:
    with pytest.raises(SteerError, match="not a set of vectors"):
        unpack(text)


def test_push_reaches_every_stage(tmp_path: Any) -> None:
    engine = Engine()
    given = vectors(1)
    assert push(engine, given, name="set").bytes == DEPTH * WIDTH * 4
    assert names(engine) == [DEFAULT, "set"]
    assert returned_logprobs(engine) == "raw_logprobs"
    found = {i: m.bank[2] for stage in engine.stages for i, m in stage.vectors.items()}
    assert all(torch.equal(found[layer], given[layer]) for layer in given)
    with pytest.raises(SteerError, match="layer 7 does not exist"):
        push(engine, {7: torch.zeros(WIDTH)})
    remove(engine, "set")
    with pytest.raises(SteerError, match="no vectors named 'set'; the engine has default"):
        remove(engine, "set")


def test_a_removal_that_one_of_two_engines_refused_is_completed_later() -> None:
    engine = Engine(([0, 1, 2], [0, 1, 2]))
    push(engine, vectors(1), name="set")
    engine.busy = [1]
    for _ in range(2):  # the first engine forgets it, and keeps nobody from asking again
        with pytest.raises(SteerError, match="'set' is used"):
            remove(engine, "set")
    engine.busy = []
    remove(engine, "set")
    assert [list(stage.versions()) for stage in engine.stages] == [[DEFAULT]] * 2
    with pytest.raises(SteerError, match="no vectors named 'set'"):
        remove(engine, "set")


def test_prefixes_of_sets_for_some_tokens_are_kept_apart_by_the_length_of_the_prompt() -> None:
    engine, core = Engine(), SimpleNamespace()
    push(engine, vectors(1), name="all")
    push(engine, vectors(2), name="some", positions="completion")
    call = plugin._collective_rpc(
        lambda core, method, timeout, args, kwargs: engine.collective_rpc(method, args)
    )
    call(core, "steer_names")
    salt_of = plugin._preprocess_add_request(lambda core, request: request.cache_salt)

    def salt(tokens: int, *chosen: str) -> str | None:
        params = SimpleNamespace(extra_args={"steering": {"name": list(chosen)}})
        request = {"sampling_params": params, "prompt_token_ids": [5] * tokens, "cache_salt": None}
        return salt_of(core, SimpleNamespace(**request))

    assert salt(3) is None
    assert salt(3, "all") == salt(4, "all")
    for chosen in (["some"], ["all", "some"]):
        assert salt(3, *chosen) == salt(3, *chosen) != salt(4, *chosen)
    push(engine, vectors(2), name="some")
    call(core, "steer_names")
    assert salt(3, "some") == salt(4, "some")


@pytest.mark.parametrize(("site", "shift"), [("resid_post", 0), ("resid_pre", 1)])
def test_artifacts_bring_their_scale_and_positions(site: str, shift: int) -> None:
    from steer.artifact import Artifact

    config = SteeringConfig(
        layers="1-2",
        site=site,
        scale=0.5,
        positions="prompt",
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        model_type="llama",
    )
    given = {f"model.layers.{i}.steering.vector": v for i, v in vectors(1, [1, 2]).items()}
    engine = Engine()
    push(engine, Artifact(config, given))
    for stage in engine.stages:
        assert stage.entries[DEFAULT].positions == "prompt"
        for layer, module in stage.vectors.items():
            name = f"model.layers.{layer + shift}.steering.vector"
            assert torch.equal(module.bank[1], 0.5 * given.get(name, torch.zeros(WIDTH)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "attn_out"}, "not site='attn_out'; use resid_post"),
        ({"site": "resid_pre"}, "of layer 0"),
        ({"kind": "adaptive"}, "PEFT LoRA"),
    ],
)
def test_artifacts_that_the_engine_cannot_hold(changes: dict[str, Any], words: str) -> None:
    from steer.artifact import Artifact

    config = SteeringConfig(
        layers="0", hidden_size=WIDTH, num_hidden_layers=DEPTH, model_type="llama", **changes
    )
    with pytest.raises(SteerError, match=words) as error:
        push(Engine(), Artifact(config, {"model.layers.0.steering.vector": torch.ones(WIDTH)}))
    message(error)


def test_no_server() -> None:
    with pytest.raises(SteerError, match=r"no vLLM server answers at http://127\.0\.0\.1:9"):
        names(Server("http://127.0.0.1:9"))

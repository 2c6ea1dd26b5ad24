"""Path patching on every architecture, against plain runs of the model and a second implementation."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lens import PROBLEMS, Exact, subject_of, texts
from helpers.steering import layers_of, message

from evals.architectures import tiny
from steer import SteerError
from steer.lens import passes as lens_passes
from steer.lens.composition import likelihoods
from steer.lens.conditions import BASE, EVERYTHING, NONE, NOTHING, Condition, EffectPath, steered
from steer.lens.decomposition import decompose
from steer.lens.passes import passes, streams
from steer.lens.patching import (
    ROUTES,
    Patching,
    frozen_routes,
    group_routes,
    head_routes,
    kept,
    later_frozen,
    patch,
)
from steer.lens.sampling import complete
from steer.lens.subject import Subject
from steer.lens.token_shift import token_shift

# The same sums in another order: a tiny model's float32 logits, about 1 in size, agree to a few 1e-6.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@torch.no_grad()
def plain_logits(subject: Subject, row: Any) -> torch.Tensor:
    """One row through the model without conditions, padding or paths: (positions, vocabulary)."""
    ids = torch.tensor([row.ids])
    with subject.vectors.prompt_length(row.prompt):
        return subject.model(input_ids=ids, use_cache=False).logits[0, row.prompt - 1 : len(row.ids) - 1]


def lane_logits(subject: Subject, conditions: list[Condition]) -> list[torch.Tensor]:
    """By row: (conditions, positions, vocabulary)."""
    return [
        done.next_token(i) for done in passes(subject, texts(), conditions) for i in range(len(done.rows))
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_everything_is_the_steered_run_and_nothing_the_base_run(tiny_model, tiny_tokenizer, side) -> None:
    subject = subject_of(tiny_model, tiny_tokenizer, layers="0-1", padding_side=side)
    on = steered(subject)
    conditions = [BASE, on, Condition(on.layers, EVERYTHING, 0), Condition(on.layers, NOTHING, 0)]
    conditions += [Condition(NONE, EVERYTHING, 1), Condition(NONE, NOTHING, 1)]
    for row, logits in zip(texts(), lane_logits(subject, conditions), strict=True):
        with_vectors = plain_logits(subject, row)
        with subject.vectors.disabled():
            without = plain_logits(subject, row)
        assert (with_vectors - without).abs().max() > 0.01
        expected = (without, with_vectors, with_vectors, without, without, with_vectors)
        for condition, wanted in zip(logits, expected, strict=True):
            torch.testing.assert_close(condition, wanted, **TOLERANCE)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_everything_and_nothing_of_one_vector_at_every_site(build_tiny, tiny_tokenizer, site) -> None:
    for kind in ("llama", "gemma2"):
        subject = subject_of(build_tiny(kind), tiny_tokenizer, layers=1, site=site)
        on = steered(subject)
        conditions = [BASE, on, Condition(on.layers, EVERYTHING, 0), Condition(on.layers, NOTHING, 0)]
        for logits in lane_logits(subject, conditions):
            torch.testing.assert_close(logits[2], logits[1], **TOLERANCE)
            torch.testing.assert_close(logits[3], logits[0], **TOLERANCE)
            assert (logits[1] - logits[0]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["adaptive", "shared"])
def test_other_kinds_of_vector(tiny_llama, tiny_tokenizer, kind) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, kind=kind, rank=2, layers="0-1")
    one = Condition(frozenset([1]))
    conditions = [BASE, one, Condition(one.layers, EVERYTHING, 0), Condition(one.layers, NOTHING, 0)]
    for logits in lane_logits(subject, conditions):
        torch.testing.assert_close(logits[2], logits[1], **TOLERANCE)
        torch.testing.assert_close(logits[3], logits[0], **TOLERANCE)
        assert (logits[1] - logits[0]).abs().max() > 0.001


@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "first_completion"])
def test_only_the_steered_tokens_change(tiny_llama, tiny_tokenizer, positions) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers=0, positions=positions)
    on = steered(subject)
    for side in ("left", "right"):
        subject.padding_side = side
        conditions = [BASE, on, Condition(on.layers, EVERYTHING, 0), Condition(on.layers, NOTHING, 0)]
        for row, logits in zip(texts(), lane_logits(subject, conditions), strict=True):
            torch.testing.assert_close(logits[1], plain_logits(subject, row), **TOLERANCE)
            torch.testing.assert_close(logits[2], logits[1], **TOLERANCE)
            torch.testing.assert_close(logits[3], logits[0], **TOLERANCE)


@torch.no_grad()
def by_hand(subject: Subject, row: Any, open_parts: set[str]) -> torch.Tensor:
    """
    Llama's last layer and head written out for the vector of layer 1: the last layer's attention, its MLP and
    the final norm read a stream with the vector where they are open.
    """
    model, s = subject.model, subject.vectors.effective()[1]
    block = layers_of(model)[2]
    given: dict[str, Any] = {}

    def keep(module: Any, args: tuple, kwargs: dict) -> None:
        given.update(h=args[0] if args else kwargs["hidden_states"], rotary=kwargs["position_embeddings"])

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with subject.vectors.disabled():
        model(input_ids=torch.tensor([row.ids]), use_cache=False)
    handle.remove()
    h = given["h"]

    def attend(x: torch.Tensor) -> torch.Tensor:
        return block.self_attn(block.input_layernorm(x), given["rotary"], None)[0]  # no mask: causal

    def think(x: torch.Tensor) -> torch.Tensor:
        return block.mlp(block.post_attention_layernorm(x))

    attention = attend(h + s) if "attention" in open_parts else attend(h)
    mlp = think(h + s + attention) if "MLP" in open_parts else think(h + attend(h))
    out = h + attention + mlp + (s if "residual" in open_parts else 0)
    return model.lm_head(model.model.norm(out))[0, row.prompt - 1 : len(row.ids) - 1]


PARTS = {
    "attention only": {"attention"},
    "MLP only": {"MLP"},
    "residual only": {"residual"},
    "all but residual": {"attention", "MLP"},
    "all but attention": {"MLP", "residual"},
    "all but MLP": {"attention", "residual"},
}


@pytest.mark.parametrize("name", PARTS)
def test_routes_through_the_last_layer_are_those_written_by_hand(tiny_llama, tiny_tokenizer, name) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers=1)
    condition = Condition(frozenset([1]), ROUTES[name], 0)
    for row, logits in zip(texts(), lane_logits(subject, [BASE, condition]), strict=True):
        torch.testing.assert_close(logits[1], by_hand(subject, row, PARTS[name]), **TOLERANCE)


def test_heads_and_groups_add_up_to_the_attention(tiny_model, tiny_tokenizer) -> None:
    """All heads at once are the whole attention, and heads' outputs add up in the stream."""
    subject = subject_of(tiny_model, tiny_tokenizer, layers=0)
    on, only = steered(subject).layers, frozenset([1])
    heads, groups = head_routes(subject, 1), group_routes(subject, 1)
    assert set().union(*(effect_path.heads or set() for effect_path in groups.values())) == set(
        range(len(heads))
    )
    every = EffectPath(False, only, NONE, frozenset(range(len(heads))))
    conditions = [BASE, Condition(on, EffectPath(False, only, NONE), 0), Condition(on, every, 0)]
    conditions += [Condition(on, effect_path, 0) for effect_path in (*heads.values(), *groups.values())]
    for logits in lane_logits(subject, conditions):
        torch.testing.assert_close(logits[2], logits[1], **TOLERANCE)
        assert all((logits[3 + n] - logits[0]).abs().max() > 1e-5 for n in range(len(heads)))
    # After layer 1 the stream is linear in the heads, unless a norm stands between (Gemma, OLMo2).
    if tiny_model.config.model_type in ("gemma2", "gemma3_text", "olmo2"):
        return
    changes: dict[int, torch.Tensor] = {}

    def seen(layer: int, stream: torch.Tensor, batch: Any, starts: list[int]) -> None:
        changes[layer] = stream - stream[0]

    streams(subject, texts()[:1], conditions, seen, layers=[1])
    vector = subject.vectors.effective()[0]
    own = changes[1] - vector  # the vector itself is in the stream of every condition
    for part in (own[3 : 3 + len(heads)], own[3 + len(heads) :]):
        torch.testing.assert_close(part.sum(0), own[1], rtol=1e-3, atol=2e-5)


def test_the_change_of_the_last_stream_is_the_sum_of_its_parts(tiny_model, tiny_tokenizer) -> None:
    subject = subject_of(tiny_model, tiny_tokenizer, layers="0-1")
    found = decompose(subject, texts())
    assert found.tokens == 12
    # the largest error of one token, in units of its change: sums of some 10 float32 numbers
    assert found.error < 1e-4
    assert abs(sum(found.totals.values()) - 1) < 1e-4
    assert found.vectors[:2].abs().min() > 0
    assert found.vectors[2] == 0


def test_scores_of_the_ends_and_shares(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1")
    added, removed = (patch(subject, texts(), direction=direction) for direction in ("add", "remove"))
    for found in (added, removed):
        assert found["everything"] == pytest.approx(1, abs=1e-4)
        assert found["nothing"] == pytest.approx(0, abs=1e-4)
        assert found.positions == 12
        assert found.steered["kl"] == 0
        assert found.steered["agreement"] == 1
        assert found.base["kl"] > 0.001
        assert found.steered["logit_difference"] > found.base["logit_difference"]
        assert found.to_dict()["recovered"]["kl"][0] == pytest.approx(1, abs=1e-4)
    assert added.names == list(ROUTES)
    assert added["attention only"] != pytest.approx(removed["attention only"], abs=1e-6)
    # One vector in the middle of the others: base and steered both have those on.
    inside = patch(subject, texts(), {"everything": EVERYTHING}, layers=[0], others=True)
    alone = patch(subject, texts(), {"everything": EVERYTHING}, layers=[0])
    assert inside.base["logit_difference"] != pytest.approx(alone.base["logit_difference"])


def test_shares_of_no_effect_are_none_in_json() -> None:
    ends = {"logit_difference": 0.5, "kl": 0.0}
    one = torch.zeros(1)
    found = Patching([0], "add", ["everything"], one, one, one, None, ends, ends, 3)
    assert found.to_dict()["recovered"] == {"logit_difference": [None], "kl": [None]}


def test_what_many_changes_keep_along_one_path_is_as_in_a_patch_of_each(build_tiny, tiny_tokenizer) -> None:
    subject = subject_of(build_tiny("llama", initializer_range=0.3), tiny_tokenizer, layers="0-1")
    name, other = "all but MLP", {1: torch.ones(32)}
    ends = [Condition(frozenset([1])), Condition(frozenset([1]), directions=other), Condition(frozenset([0]))]
    found = kept(subject, texts(), ROUTES[name], ends)
    one = {name: ROUTES[name]}
    expected = [
        patch(subject, texts(), one, layers=end.layers, directions=end.directions)[name] for end in ends
    ]
    assert found == pytest.approx(expected, rel=1e-3)
    assert len({round(share, 2) for share in found}) == 3


def test_scores_do_not_depend_on_batch_size_or_padding(tiny_model, tiny_tokenizer) -> None:
    subject = subject_of(tiny_model, tiny_tokenizer, layers="0-1")
    reference = patch(subject, texts())
    for size, side in ((1, "left"), (21, "right")):
        subject.batch_size, subject.padding_side = size, side
        again = patch(subject, texts())
        for name in ("logit_difference", "kl"):
            torch.testing.assert_close(getattr(again, name), getattr(reference, name), rtol=1e-3, atol=1e-5)


def test_solving_along_a_route(tiny_llama, tiny_tokenizer) -> None:
    """
    Along everything the model writes what it writes with its vectors, along nothing what it writes without.
    """
    subject = subject_of(tiny_llama, tiny_tokenizer, std=2.0, layers="0-1")
    rows = subject.rows(PROBLEMS)
    base, on = complete(subject, rows, [BASE, steered(subject)])
    assert base != on
    layers = steered(subject).layers
    pairs = [BASE, Condition(layers, EVERYTHING, 0), BASE, Condition(layers, NOTHING, 2)]
    leader, everything, other, nothing = complete(subject, rows, pairs)
    assert everything == on == leader
    assert nothing == base == other
    # an answer that the steered model writes and the base model does not
    goal = [
        {"problem": p["problem"], "answer": a} for p, a in zip(PROBLEMS, subject.answers(on), strict=True)
    ]
    found = patch(subject, rows, problems=goal, grader=Exact())
    assert found.accuracy is not None
    assert found.steered["accuracy"] == 1
    assert found.accuracy[found.names.index("everything")] == 1
    assert found.accuracy[found.names.index("nothing")] == found.base["accuracy"] < 1


def test_later_layers_held(tiny_llama, tiny_tokenizer) -> None:
    """
    With the last layer held, what passes layer 1 and the residual stream meets the final norm; frozen from
    the vector on only the stream is left, and after the last layer nothing is frozen.
    """
    subject = subject_of(tiny_llama, tiny_tokenizer, layers=0)
    on = steered(subject).layers
    found = patch(subject, texts(), {**ROUTES, **frozen_routes(subject, 0)})
    assert list(frozen_routes(subject, 0, 2)) == ["frozen after 0", "frozen after 2"]
    assert found["frozen after 0"] == pytest.approx(found["residual only"], abs=1e-5)
    assert found["frozen after 2"] == pytest.approx(1, abs=1e-5)
    conditions = [
        BASE,
        Condition(on),
        Condition(on, later_frozen(1), 0),
        Condition(on, EffectPath(True, NONE, NONE), 0),
    ]
    for logits in lane_logits(subject, conditions):
        assert min((logits[2] - logits[n]).abs().max() for n in (0, 1, 3)) > 1e-4


def test_mistakes(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, kind="adaptive", layers="0-1")
    with pytest.raises(SteerError) as error:
        patch(subject, texts())
    assert "one layer at a time" in message(error)
    with pytest.raises(SteerError) as error:
        patch(subject, texts(), layers=[2])
    assert "[2] have no vector" in message(error)
    with pytest.raises(SteerError) as error:
        patch(subject, texts(), direction="up")
    assert "choose one of add, remove" in message(error)
    with pytest.raises(SteerError) as error:
        decompose(subject, texts())
    assert "these are adaptive" in message(error)
    with pytest.raises(SteerError) as error:
        complete(subject, texts(), [BASE, Condition(NONE, NOTHING, 0), Condition(NONE, NOTHING, 0)])
    assert "each needs its own" in message(error)


def test_memory_does_not_grow_with_the_number_of_texts(build_tiny, tiny_tokenizer, monkeypatch) -> None:
    """Kept logits of 60 more texts would be 200 MB and more; what is held after each pass does not grow."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads the memory in use from /proc, which Linux has")
    held: list[int] = []
    run = lens_passes.run

    def measured(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = run(*args, **kwargs)
        held.append(int(statm.read_text().split()[1]) * resource.getpagesize())
        return logits

    monkeypatch.setattr(lens_passes, "run", measured)
    subject = subject_of(build_tiny("llama", vocab_size=20_000), tiny_tokenizer, layers="0-1", batch_size=10)
    rows = texts([(4, 5)] * 64)
    condition = steered(subject)
    for analysis in (
        lambda: patch(subject, rows),
        lambda: token_shift(subject, rows * 3, texts=2),
        lambda: likelihoods(subject, rows * 3, [BASE, condition]),
    ):
        held.clear()
        analysis()
        assert len(held) >= 30
        assert max(held) - max(held[: len(held) // 8]) < 50e6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rwkv", "gpt2"])
def test_a_model_that_padding_on_the_left_changes_is_padded_on_the_right(kind: str, tiny_tokenizer) -> None:
    subject = subject_of(tiny(kind), tiny_tokenizer)
    for row, logits in zip(texts(), lane_logits(subject, [BASE, steered(subject)]), strict=True):
        torch.testing.assert_close(logits[1], plain_logits(subject, row), rtol=1e-4, atol=1e-4)
    if kind == "rwkv":  # which has no attention mask
        with pytest.raises(SteerError, match="unequal length"):
            complete(subject, texts(), [steered(subject)])
        subject.batch_size = 1
        assert len(complete(subject, texts(), [steered(subject)])[0]) == 3

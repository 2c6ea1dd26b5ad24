"""Conditions with directions of their own, and layers that several conditions share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.lens import subject_of, texts

from steer.lens.composition import likelihoods
from steer.lens.conditions import BASE, Condition, steered
from steer.lens.controls import directions as random_directions
from steer.lens.controls import random_vectors, values
from steer.lens.passes import passes
from steer.lens.patching import ROUTES, patch


def logits(subject, rows, conditions, share=False) -> torch.Tensor:
    """(conditions, positions, vocabulary) over all texts."""
    done = passes(subject, rows, conditions, share=share)
    return torch.cat([one.next_token(i) for one in done for i in range(len(one.rows))], 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "constant"},
        {"kind": "constant", "positions": "last_prompt", "scale": 0.5},
        {"kind": "constant", "site": "resid_pre"},
        {"kind": "adaptive"},
        {"kind": "shared", "rank": 2},
    ],
)
def test_directions_of_a_condition_are_those_of_vectors_with_these_values(
    build_tiny, tiny_tokenizer, fields
) -> None:
    subject = subject_of(build_tiny("llama", num_hidden_layers=4), tiny_tokenizer, std=1.0, **fields)
    drawn = random_vectors(subject.vectors, 3)
    with values(subject.vectors, drawn):
        directions = subject.vectors.effective()
        if fields["kind"] == "adaptive":
            directions = dict(
                zip(subject.layers, [t for n, t in drawn.items() if n.endswith(".vector")], strict=True)
            )
        wanted = logits(subject, texts(), [BASE, steered(subject), Condition(frozenset([1]))])
    on = steered(subject)
    mixed = [BASE, replace(on, directions=directions), Condition(frozenset([1]), directions=directions), on]
    found = logits(subject, texts(), mixed)
    torch.testing.assert_close(found[:3], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[3], logits(subject, texts(), [on])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral", "gpt_neox"])
def test_layers_below_the_first_difference_may_be_passed_once(build_tiny, tiny_tokenizer, model_type) -> None:
    subject = subject_of(build_tiny(model_type, num_hidden_layers=4), tiny_tokenizer, std=1.0)
    for conditions in (
        [BASE, Condition(frozenset([2])), Condition(frozenset([3]))],
        [Condition(frozenset([0])), Condition(frozenset([0, 3])), Condition(frozenset([0, 2, 3]))],
    ):
        found = logits(subject, texts(), conditions, share=True)
        torch.testing.assert_close(found, logits(subject, texts(), conditions), rtol=1e-4, atol=1e-5)
    assert subject.shares == {2: True}
    assert "forward" not in vars(subject.decoder.layers[0])
    calls: list[int] = []
    subject.decoder.layers[1].mlp.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    logits(subject, texts(), [BASE, *[Condition(frozenset([2]))] * 5], share=True)
    assert calls == [3]  # each text once


@pytest.mark.parametrize(
    "fields",
    [
        {"site": "resid_pre"},
        {"site": "mlp_out"},
        {"positions": "last_prompt"},
        {"kind": "adaptive"},
        {"kind": "shared", "rank": 2},
    ],
)
def test_sharing_layers_changes_nothing_for_any_vectors(build_tiny, tiny_tokenizer, fields) -> None:
    subject = subject_of(build_tiny("llama", num_hidden_layers=4), tiny_tokenizer, std=1.0, **fields)
    drawn = random_directions(subject.vectors, random_vectors(subject.vectors, 3))
    both = frozenset([0, 2])
    conditions = [Condition(frozenset([0])), Condition(both), Condition(both | {3}, directions={**drawn})]
    for some in (conditions[:2], conditions):
        found = logits(subject, texts(), some, share=True)
        torch.testing.assert_close(found, logits(subject, texts(), some), rtol=1e-4, atol=1e-5)


def test_a_model_whose_layers_depend_on_the_batch_shares_nothing(build_tiny, tiny_tokenizer) -> None:
    """Nothing fails in it, but the logits would be others."""
    subject = subject_of(build_tiny("llama", num_hidden_layers=4), tiny_tokenizer, std=1.0)
    subject.decoder.layers[0].mlp.register_forward_hook(lambda m, a, out: out * (1 + 0.1 * len(out)))
    conditions, rows = [BASE, Condition(frozenset([2]))], texts([(5, 4)] * 3)
    found = logits(subject, rows, conditions, share=True)
    assert subject.shares == {2: False}
    torch.testing.assert_close(found, logits(subject, rows, conditions), rtol=1e-4, atol=1e-5)


def test_a_model_whose_layers_read_earlier_ones_shares_nothing(build_tiny, tiny_tokenizer) -> None:
    subject = subject_of(build_tiny("llama", num_hidden_layers=4), tiny_tokenizer, std=1.0)
    kept = {}
    subject.decoder.layers[0].mlp.register_forward_hook(lambda m, a, out: kept.update(first=out))
    subject.decoder.layers[3].mlp.register_forward_hook(lambda m, a, out: out + 5 * kept["first"][: len(out)])
    conditions = [BASE, Condition(frozenset([2])), Condition(frozenset([2, 3]))]
    found = logits(subject, texts(), conditions, share=True)
    assert subject.shares == {2: False}
    torch.testing.assert_close(found, logits(subject, texts(), conditions), rtol=1e-4, atol=1e-5)


def test_likelihoods_in_any_order(build_tiny, tiny_tokenizer) -> None:
    subject = subject_of(build_tiny("llama", num_hidden_layers=4), tiny_tokenizer, std=1.0)
    conditions = [Condition(frozenset(some)) for some in ([3], [0, 3], [], [2], [1, 2], [3, 2])]
    found = likelihoods(subject, texts(), conditions)
    alone = torch.cat([likelihoods(subject, texts(), [condition]) for condition in conditions])
    torch.testing.assert_close(found, alone)
    subject.batch_size = 1
    torch.testing.assert_close(likelihoods(subject, texts(), conditions), alone)


def test_paths_of_other_directions(build_tiny, tiny_tokenizer) -> None:
    subject = subject_of(build_tiny("llama", num_hidden_layers=4), tiny_tokenizer, std=1.0)
    with values(subject.vectors, random_vectors(subject.vectors, 3)):
        wanted = patch(subject, texts(), ROUTES, layers=[2])
        directions = subject.vectors.effective()
    found = patch(subject, texts(), ROUTES, layers=[2], directions=directions)
    torch.testing.assert_close(found.recovered(), wanted.recovered(), rtol=1e-4, atol=1e-4)
    taken = patch(subject, texts(), ROUTES, layers=[2], directions=directions, direction="remove")
    assert taken["everything"] == pytest.approx(1, abs=1e-4)

"""Persistence against plain loops; directions along checkpoints; the controls."""

from __future__ import annotations

import pytest
import torch
from helpers.lens import subject_of, texts
from helpers.steering import layers_of, message
from torch.nn.functional import cosine_similarity

import steer
from steer import SteerError
from steer.artifact import Artifact
from steer.lens.controls import mean_difference, random_vectors, shuffled_layers, values
from steer.lens.directions import checkpoints, directions
from steer.lens.persistence import persistence


@torch.no_grad()
def changes(subject, row, layers) -> torch.Tensor:
    """Change of the stream (depth, tokens, width) that the vectors of `layers` make, with plain hooks."""
    found = []
    for on in (False, True):
        seen: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            for block in layers_of(subject.model)
        ]
        chosen = {
            n: t if on and int(n.split(".")[-3]) in layers else t * 0
            for n, t in subject.vectors.tensors().items()
        }
        with values(subject.vectors, chosen):
            subject.model(torch.tensor([row.ids]))
        for hook in hooks:
            hook.remove()
        found.append(torch.stack([stream[0] for stream in seen]))
    return found[1] - found[0]


def test_cosines_are_those_of_a_plain_loop(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1")
    rows = texts()
    sources = {"both": [0, 1], "first": [0]}
    found = persistence(subject, rows, sources, window=3)
    vectors = subject.vectors.effective()
    for n, layers in enumerate(sources.values()):
        moved = torch.cat(
            [changes(subject, row, layers)[:, 1:] for row in rows], 1
        )  # every token but the first
        for layer in range(3):
            mean = moved[layer].mean(0)
            expected = cosine_similarity(moved[layer], mean[None], dim=1).mean()
            torch.testing.assert_close(found.diff_diff[n, layer], expected, rtol=1e-4, atol=1e-5)
            if layer < 2:
                expected = cosine_similarity(moved[layer], vectors[layer][None], dim=1).mean()
                torch.testing.assert_close(found.diff_vector[n, layer], expected, rtol=1e-4, atol=1e-5)
        assert found.diff_vector[n, 2].isnan()  # no vector was trained there
    assert found.offsets == [-3, -2, -1, 0, 1, 2]
    # one position by hand: the first generated token of each text, source "first", layer 1
    at_first = torch.stack([changes(subject, row, [0])[1, row.prompt] for row in rows])
    every = torch.cat([changes(subject, row, [0])[1, 1:] for row in rows])
    expected = cosine_similarity(at_first, every.mean(0)[None], dim=1).mean()
    torch.testing.assert_close(found.diff_diff_at[1, 1, 3], expected, rtol=1e-4, atol=1e-5)
    assert found.tokens == sum(len(row.ids) - 1 for row in rows)


def test_a_constant_change_persists_fully_where_it_is_made(tiny_model, tiny_tokenizer) -> None:
    subject = subject_of(tiny_model, tiny_tokenizer, layers="0-1")
    found = persistence(subject, texts(), {"0": [0], "1": [1]})
    for n in (0, 1):
        assert found.diff_diff[n, n] == pytest.approx(1, abs=1e-4)
        assert found.diff_vector[n, n] == pytest.approx(1, abs=1e-4)
    assert found.diff_diff[1, 0].isnan()  # below its layer a vector changes nothing
    assert found.size[1, 0] == pytest.approx(0, abs=1e-6)


def test_the_change_is_compared_with_the_vectors_at_their_scale(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0-1")
    subject.vectors.scale = -2.0
    assert persistence(subject, texts(), {"0": [0]}).diff_vector[0, 0] == pytest.approx(1, abs=1e-4)


def test_persistence_does_not_depend_on_batch_size_or_padding(tiny_model, tiny_tokenizer) -> None:
    subject = subject_of(tiny_model, tiny_tokenizer, layers="0-1")
    sources = {str(n): [n % 2] for n in range(10)}  # more than run side by side
    reference = persistence(subject, texts(), sources)
    assert reference.diff_diff.shape == (10, 3)
    torch.testing.assert_close(
        reference.diff_diff[8:], reference.diff_diff[:2], rtol=1e-4, atol=1e-5, equal_nan=True
    )
    for size, side in ((1, "left"), (5, "right")):
        subject.batch_size, subject.padding_side = size, side
        again = persistence(subject, texts(), sources)
        for name in ("diff_diff", "diff_vector", "diff_diff_at"):
            one, two = getattr(again, name), getattr(reference, name)
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_the_mean_difference_is_that_of_the_streams(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="0,2")
    wanted, unwanted = texts(seed=1), texts(seed=2)
    made = mean_difference(subject, wanted, unwanted)

    @torch.no_grad()
    def mean(rows, layer):
        streams = []
        with subject.vectors.disabled():
            for row in rows:
                hook = layers_of(subject.model)[layer].register_forward_hook(
                    lambda m, a, out, row=row: streams.append(out[0, row.prompt :])
                )
                subject.model(torch.tensor([row.ids]))
                hook.remove()
        return torch.cat(streams).mean(0)

    for layer, own in subject.vectors.effective().items():
        direction = mean(wanted, layer) - mean(unwanted, layer)
        found = made[f"model.layers.{layer}.steering.vector"]
        torch.testing.assert_close(found, direction / direction.norm() * own.norm(), rtol=1e-4, atol=1e-5)
    subject.vectors.scale = -2.0  # which turns what is put in its place round
    for name, turned in mean_difference(subject, wanted, unwanted).items():
        torch.testing.assert_close(turned, -made[name])
    with pytest.raises(SteerError) as error:
        mean_difference(subject, [row.question for row in wanted], unwanted)
    assert "needs texts with completions" in message(error)


@pytest.mark.parametrize("where", [{"site": "mlp_out"}, {"kind": "adaptive"}], ids=str)
@torch.no_grad()
def test_the_mean_difference_is_read_where_the_vectors_stand(tiny_llama, tiny_tokenizer, where) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, layers="1", **where)
    sides = [texts(seed=1), texts(seed=2)]
    made = mean_difference(subject, *sides)["model.layers.1.steering.vector"]
    outputs: list[torch.Tensor] = []
    layers_of(subject.model)[1].mlp.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    means = []
    for rows in sides:
        outputs.clear()
        with subject.vectors.disabled():
            for row in rows:
                subject.model(torch.tensor([row.ids]))
        read = [out[row.prompt :] for out, row in zip(outputs, rows, strict=True)]
        means.append(torch.cat(read).mean(0))
    direction = means[0] - means[1]
    expected = direction / direction.norm() * made.norm()
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_shuffling_moves_every_direction(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    own = subject.vectors.effective()
    with values(subject.vectors, shuffled_layers(subject.vectors)):
        moved = subject.vectors.effective()
    unit = {layer: vector / vector.norm() for layer, vector in own.items()}
    for layer, vector in moved.items():
        torch.testing.assert_close(vector.norm(), own[layer].norm(), rtol=1e-5, atol=0)
        match = [other for other in own if torch.allclose(vector / vector.norm(), unit[other], atol=1e-6)]
        assert len(match) == 1
        assert match != [layer]
    steer.detach(tiny_llama)
    with pytest.raises(SteerError) as error:
        shuffled_layers(subject_of(tiny_llama, tiny_tokenizer, layers=1).vectors)
    assert "two layers or more" in message(error)


def test_values_are_put_back_after_a_failure(tiny_llama, tiny_tokenizer) -> None:
    vectors = subject_of(tiny_llama, tiny_tokenizer).vectors
    before = vectors.tensors()
    with pytest.raises(KeyError), values(vectors, random_vectors(vectors)):
        raise KeyError
    assert all(torch.equal(t, before[name]) for name, t in vectors.tensors().items())


def test_directions_along_checkpoints(tmp_path, tiny_llama, tiny_tokenizer) -> None:
    vectors = subject_of(tiny_llama, tiny_tokenizer).vectors
    for step in (10, 9):
        vectors.save(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").mkdir()  # a kill before anything was saved
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    now = Artifact(vectors.config, vectors.tensors())
    found = directions([*checkpoints(tmp_path), -2.0 * now])
    assert found.names == ["checkpoint-9", "checkpoint-10", "2"]
    own = vectors.effective()
    torch.testing.assert_close(found.norms[0], torch.stack([own[i].norm() for i in range(3)]))
    torch.testing.assert_close(found.norms[2], 2 * found.norms[0])
    torch.testing.assert_close(found.to_last[0], torch.full((3,), -1.0))
    expected = cosine_similarity(own[0], own[2], dim=0)
    torch.testing.assert_close(found.between_layers[0, 2], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(SteerError) as error:
        directions([now.layers(0, 1), now])
    assert "not the same layers" in message(error)

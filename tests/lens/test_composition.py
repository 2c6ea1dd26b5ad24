"""
Pairs, leave-one-out and scales against sets that were put together by hand; scale maps; transfer matrix.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.lens import PROBLEMS, Exact, subject_of, texts
from helpers.steering import fill, layers_of, message

import steer
from steer import SteerError
from steer.artifact import Artifact
from steer.lens import plots
from steer.lens.composition import Composition, compose, leave_one_out, likelihoods, scale_sweep
from steer.lens.conditions import BASE, Condition, steered
from steer.lens.sampling import complete, graded
from steer.lens.scale_maps import scale_maps
from steer.lens.scripts import script
from steer.lens.token_shift import PrefixSubstitution
from steer.lens.transfer_matrix import Entry, TransferMatrix, transfer_matrix
from steer.prompt import PromptSpec


def goal(subject, layers) -> list[dict[str, str]]:
    """The problems, with what the vectors of `layers` write for answers."""
    (rows,) = complete(subject, subject.rows(PROBLEMS), [Condition(frozenset(layers))])
    texts_ = subject.answers(rows)
    return [{"problem": p["problem"], "answer": text} for p, text in zip(PROBLEMS, texts_, strict=True)]


def test_chats_and_several_right_answers_are_read_as_in_training(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    turns = [("user", "1?"), ("assistant", "2"), ("user", "3?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    problem = {"problem": "3?", "answer": "none", "messages": chat}
    (row,) = subject.rows([problem])
    asked = "<s><|user|>1?</s><|assistant|>2</s><|user|>3?</s><|assistant|>"
    assert row.ids == tuple(subject.encode(asked))
    (written,) = complete(subject, [row], [steered(subject)])
    several = {**problem, "golds": ["none", *subject.answers(written)]}
    assert graded(subject, written, [several], Exact()).tolist() == [True]
    assert graded(subject, written, [problem], Exact()).tolist() == [False]


def test_pairs_are_what_two_vectors_do(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(
        tiny_llama, tiny_tokenizer, std=2.0, batch_size=4
    )  # more conditions than fit a batch
    found = compose(subject, goal(subject, [0, 2]), Exact(), [0, 1, 2])
    assert found.pairs[0, 2] == found.pairs[2, 0] == 1
    assert found.whole == found.together
    assert found.pairs.diagonal().tolist() == found.alone.tolist()
    assert found.base < 1
    assert found.pairs[0, 1] < 1
    rows = texts()
    finer = compose(subject, [], None, [0, 2], rows)
    pair = Condition(frozenset([0, 2]))
    assert finer.pairs[0, 1] == pytest.approx(likelihoods(subject, rows, [pair])[0].item(), abs=1e-5)
    assert (finer.measure, finer.problems) == ("nats a token", len(rows))


def test_the_published_score() -> None:
    alone = torch.tensor([0.2, 0.4], dtype=torch.float64)
    pairs = torch.tensor([[0.2, 0.5], [0.5, 0.4]], dtype=torch.float64)
    found = Composition([3, 7], alone, pairs, 0.5, whole=0.5, base=0.1, problems=10, joint=0.9)
    assert found.score[0, 1].item() == pytest.approx((0.5 - 0.4) / (0.9 - 0.4))
    assert found.told(0, 1) == "0.200"
    assert found.score.diagonal().isnan().all()
    assert found.to_dict()["score"][0] == [None, pytest.approx(0.2)]


def test_the_score_is_undefined_without_a_gain_of_the_jointly_trained_set() -> None:
    """Two layers that solve 0.947 and 0.920 alone and nothing together are not a pair that composes fully."""
    alone = torch.tensor([0.947, 0.920], dtype=torch.float64)
    pairs = torch.tensor([[0.947, 0.0], [0.0, 0.920]], dtype=torch.float64)
    found = Composition([2, 6], alone, pairs, 0.0, whole=0.0, base=0.0, problems=75, joint=0.907)
    for joint, why in (
        (0.907, "the jointly trained set has 0.907, the best of the two 0.947"),
        (0.947, "the jointly trained set has 0.947, the best of the two 0.947"),
        (None, "no jointly trained set was measured"),
    ):
        found = replace(found, joint=joint)
        assert found.score.isnan().all()
        assert found.to_dict()["score"] == [[None, None], [None, None]]
        assert found.told(0, 1) == f"undefined: {why}"
    assert replace(found, joint=0.95).score[0, 1] < 0


def test_a_sum_is_no_jointly_trained_set(build_tiny, tiny_tokenizer) -> None:
    subject = subject_of(build_tiny("llama"), tiny_tokenizer, std=2.0)
    assert compose(subject, goal(subject, [0, 1, 2]), Exact(), [0, 1]).joint == 1
    saved = Artifact(subject.vectors.config, subject.vectors.tensors())
    steer.detach(subject.model)
    summed = replace(subject, vectors=steer.load(saved + saved, subject.model))
    found = compose(summed, PROBLEMS, Exact(), [0, 1])
    assert found.joint is None
    assert found.told(0, 1) == "undefined: no jointly trained set was measured"


def test_a_loss_has_no_shares() -> None:
    """Of what vectors lose, neither an opening nor another model's vectors get a share."""
    worse = PrefixSubstitution(["To"], torch.tensor([0.5]), base=0.4, steered=0.3, problems=10)
    assert worse.share.isnan().all()
    accuracy = torch.tensor([[0.2, 0.6], [0.1, 0.8]], dtype=torch.float64)
    base = torch.tensor([0.3, 0.4], dtype=torch.float64)
    found = TransferMatrix(["a", "b"], accuracy, base, base, {}, 10)
    assert found.score[:, 0].isnan().all() and found.random_score[0].isnan()
    assert found.score[:, 1].tolist() == pytest.approx([0.5, 1])


@torch.no_grad()
def test_leaving_a_layer_out(tiny_model, tiny_tokenizer) -> None:
    """The likelihood without layer 1 is that of the model with the other vectors alone."""
    subject = subject_of(tiny_model, tiny_tokenizer)
    found = leave_one_out(subject, PROBLEMS, None, texts())
    assert found.accuracy.isnan().all()
    expected = {}
    for name, dropped in (("whole", ()), ("without 1", (1,)), ("base", (0, 1, 2))):
        steer.detach(tiny_model)
        vectors = fill(steer.attach(tiny_model, steer.SteeringConfig()))
        parameters = list(vectors.parameters())
        for layer in dropped:
            parameters[layer].zero_()
        total = 0.0
        for row in texts():
            logs = tiny_model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            total += sum(logs[n - 1, row.ids[n]].item() for n in range(row.prompt, len(row.ids)))
        expected[name] = total / 12
    assert found.likelihood[1].item() == pytest.approx(expected["without 1"], abs=1e-4)
    assert found.whole_likelihood == pytest.approx(expected["whole"], abs=1e-4)
    assert found.base_likelihood == pytest.approx(expected["base"], abs=1e-4)


def test_a_layer_without_a_vector_cannot_be_left_out(tiny_llama, tiny_tokenizer) -> None:
    with pytest.raises(SteerError) as error:
        leave_one_out(
            subject_of(tiny_llama, tiny_tokenizer, layers="0-1"), PROBLEMS, None, texts(), layers=[2]
        )
    assert "layers [2] have no vector to leave out" in message(error)


def test_leave_one_out_with_answers(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, std=2.0)
    found = leave_one_out(subject, goal(subject, [0, 1, 2]), Exact())
    assert found.whole == 1
    assert found.base < 1
    assert found.accuracy.min() < 1
    assert found.whole_likelihood > found.base_likelihood  # greedy answers of the whole set
    with pytest.raises(SteerError) as error:
        likelihoods(subject, [row.question for row in texts()], [BASE])
    assert "needs completions" in message(error)


def test_scale_sweep(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, std=1.0)
    subject.vectors.scale = 2.0
    wanted = goal(subject, [0, 1, 2])
    found = scale_sweep(subject, wanted, Exact(), [0.0, 1.0])  # in units of the subject's own scale
    assert found.accuracy.tolist()[1] == 1 > found.accuracy.tolist()[0]
    assert subject.vectors.scale == 2.0
    assert found.tokens.max() <= subject.max_new_tokens
    with pytest.raises(SteerError):
        scale_sweep(subject, wanted, Exact(), [])


def test_a_heat_strip_shows_each_layer_by_its_largest_but_the_first() -> None:
    figure = plots.strip([[90.0, 1.0, -4.0], [0.0, 0.0, 0.0]], ["<s>", "a", "b"], [3, 5], prompt=2)
    shown = figure.axes[0].images[0].get_array()
    assert shown.tolist() == [[22.5, 0.25, -1.0], [0.0, 0.0, 0.0]]


@torch.no_grad()
def test_scale_maps_are_the_readouts(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, kind="adaptive", layers="0,2")
    subject.vectors.scale = 3.0
    rows = texts()
    found = scale_maps(subject, rows, texts=2)
    assert [len(one.tokens) for one in found.maps] == [len(row.ids) for row in rows[:2]]
    inputs = []
    hook = layers_of(tiny_llama)[2].mlp.down_proj.register_forward_hook(lambda m, a, out: inputs.append(a[0]))
    tiny_llama(torch.tensor([rows[1].ids]))
    hook.remove()
    readout = subject.vectors.tensors()["model.layers.2.steering.readout"]
    torch.testing.assert_close(
        found.maps[1].coefficients[1], 3.0 * inputs[0][0] @ readout, rtol=1e-4, atol=1e-6
    )
    by_type: dict[str, list[torch.Tensor]] = {}
    for one, row in zip(scale_maps(subject, rows, texts=9).maps, rows, strict=True):
        for at in range(1, len(row.ids)):
            kind = {"digits": "digits", "code": "punctuation", "space": "space", "special": "special"}.get(
                script(one.tokens[at]), "words"
            )
            name = f"{'prompt' if at < row.prompt else 'answer'} {kind}"
            by_type.setdefault(name, []).append(one.coefficients[:, at])
    assert len(by_type) > 3
    values = torch.cat([torch.stack(found) for found in by_type.values()])
    within = sum(
        (torch.stack(found) - torch.stack(found).mean(0)).square().sum(0) for found in by_type.values()
    )
    expected = 1 - within / (values - values.mean(0)).square().sum(0)
    torch.testing.assert_close(found.explained, expected, rtol=1e-3, atol=1e-5)
    for name, expected, shown in zip(
        found.types, map(by_type.get, found.types), found.by_type.T, strict=True
    ):
        if expected is None:
            assert shown.isnan().all(), name
        else:
            torch.testing.assert_close(shown, torch.stack(expected).mean(0), rtol=1e-3, atol=1e-5)
    subject.batch_size, subject.padding_side = 1, "right"
    again = scale_maps(subject, rows)
    torch.testing.assert_close(again.mean, found.mean, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(again.std, found.std, rtol=1e-3, atol=1e-5)
    distances = (found.by_type - found.mean[:, None]).abs() / found.std[:, None]
    torch.testing.assert_close(found.apart, distances.mean(0), equal_nan=True)
    for readout in (0.0, 1.0):  # of layer 0, whose MLP gives every token the same
        layers_of(tiny_llama)[0].mlp.down_proj.register_forward_pre_hook(
            lambda m, a: (torch.full_like(a[0], 0.3),)
        )
        tensors = subject.vectors.tensors()
        tensors["model.layers.0.steering.readout"].fill_(readout)
        subject.vectors.set_tensors(tensors)
        flat = scale_maps(subject, rows)
        assert flat.std[0] == 0 and flat.explained[0].isnan()
        assert flat.apart.isnan().tolist() == found.apart.isnan().tolist()
    steer.detach(tiny_llama)
    with pytest.raises(SteerError) as error:
        scale_maps(subject_of(tiny_llama, tiny_tokenizer), rows)
    assert "constant ones give every token the same" in message(error)


def test_transfer_matrix(build_tiny, tiny_tokenizer) -> None:
    """Two copies of one model: each one's vectors do in the other what they do at home."""
    entries = []
    for name, std in (("one", 2.0), ("two", 1.5)):
        model = build_tiny("llama")
        subject = subject_of(model, tiny_tokenizer, std=std)
        saved = Artifact(subject.vectors.config, subject.vectors.tensors())
        wanted = goal(subject, [0, 1, 2]) if name == "one" else wanted  # noqa: F821
        steer.detach(model)
        entries.append(Entry(name, model, tiny_tokenizer, saved, PromptSpec("plain")))
    options = {"method": "direct", "rescale": False}
    found = transfer_matrix(entries, wanted, Exact(), max_new_tokens=4, **options)
    assert found.accuracy[0].tolist() == [1, 1]
    assert found.accuracy[1, 0] == found.accuracy[1, 1]
    assert found.score[0, 0] == 1
    assert found.random[0] < 1 and found.random_score[0] < 1
    assert not found.refused
    assert "steering_vectors" not in entries[0].model.__dict__
    wide = build_tiny("llama", hidden_size=16, head_dim=8)
    other = Entry("three", wide, tiny_tokenizer, entries[0].artifact, PromptSpec("plain"))
    with pytest.raises(SteerError):  # its own vectors do not fit: a mistake, not a refused transfer
        transfer_matrix([entries[0], other], wanted, Exact(), max_new_tokens=4, **options)
    with pytest.raises(SteerError) as error:
        transfer_matrix(entries[:1], wanted, Exact())
    assert "two models or more" in message(error)


def test_everything_on_is_the_plain_model(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    (rows,) = complete(subject, subject.rows(PROBLEMS), [steered(subject)])
    likely = likelihoods(subject, rows, [steered(subject), BASE])
    assert likely[0] > likely[1]

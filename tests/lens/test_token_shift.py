"""
Token shift and prefix substitution against one-row runs of the model; completions in conditions against
generate.
"""

from __future__ import annotations

import pytest
import torch
from helpers.heads import contiguous_inputs
from helpers.lens import PROBLEMS, Exact, subject_of, texts
from helpers.steering import message

from steer import SteerError
from steer.lens.conditions import BASE, Condition, steered
from steer.lens.sampling import complete
from steer.lens.subject import Row, pad, token_text
from steer.lens.token_shift import common_opening, prefix_substitution, token_shift


@torch.no_grad()
def both(subject, row: Row) -> torch.Tensor:
    """Probabilities (base and steered, tokens, vocabulary) of one row, without conditions."""
    ids = torch.tensor([row.ids])
    on = subject.model(ids).logits[0].softmax(-1)
    with subject.vectors.disabled():
        return torch.stack([subject.model(ids).logits[0].softmax(-1), on])


def test_shift_is_the_difference_of_two_runs(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    rows = texts()
    found = token_shift(subject, rows, texts=2, top=97)
    pairs = [both(subject, row) for row in rows]
    moved = [on - off for off, on in pairs]
    first = torch.stack([m[row.prompt - 1] for m, row in zip(moved, rows, strict=True)])
    assert found.count.tolist() == [3, 3, 2, 2, 1, 1]
    expected = first.abs().sum(-1).mean() / 2
    torch.testing.assert_close(found.variation[0].float(), expected, rtol=1e-4, atol=1e-6)
    fifth = moved[2][rows[2].prompt - 1 + 4].abs().sum() / 2
    torch.testing.assert_close(found.variation[4].float(), fifth, rtol=1e-4, atol=1e-6)
    at_first = [pair[:, row.prompt - 1] for pair, row in zip(pairs, rows, strict=True)]
    kl = torch.stack([(on * (on / off).log()).sum() for off, on in at_first])
    torch.testing.assert_close(found.kl[0].float(), kl.mean(), rtol=1e-3, atol=1e-6)
    by_id = {index: change for _, index, change in found.top}
    for index, value in enumerate(first.mean(0).tolist()):
        assert by_id[index] == pytest.approx(value, abs=1e-6)
    assert found.top[0][2] == max(by_id.values())
    assert found.bottom[0][2] == min(by_id.values())
    mass = found.variation * found.count
    assert found.first_share == pytest.approx((mass[0] / mass.sum()).item())
    text = found.texts[1]
    assert text.tokens == [token_text(tiny_tokenizer, i) for i in rows[1].ids]
    own = [moved[1][n - 1, rows[1].ids[n]].item() for n in range(1, len(rows[1].ids))]
    torch.testing.assert_close(text.change[1:], torch.tensor(own), rtol=1e-4, atol=1e-6)
    # the prompt's last tokens, aligned on the first generated one
    before = [m[row.prompt - 2].abs().sum() / 2 for m, row in zip(moved, rows, strict=True)]
    torch.testing.assert_close(found.before[-1].float(), torch.stack(before).mean(), rtol=1e-4, atol=1e-6)


def test_shift_of_prompts_alone_and_of_one_layer(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    prompts = [row.question for row in texts()]
    found = token_shift(subject, prompts, layers=[1])
    assert found.layers == [1]
    assert found.variation.shape == (1,)
    assert found.first_share == pytest.approx(1)
    # no vector at all: what rows of different conditions may differ by is the order of a float32 sum
    assert token_shift(subject, prompts, layers=[]).variation.max() < 1e-6 < found.variation.min()


def test_shift_does_not_depend_on_batch_size_or_padding(tiny_model, tiny_tokenizer) -> None:
    subject = subject_of(tiny_model, tiny_tokenizer, layers="0-1")
    reference = token_shift(subject, texts())
    for size, side in ((1, "left"), (4, "right")):
        subject.batch_size, subject.padding_side = size, side
        again = token_shift(subject, texts())
        torch.testing.assert_close(again.variation, reference.variation, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(again.before, reference.before, rtol=1e-3, atol=1e-5)


def test_long_completions_are_cut(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer)
    assert token_shift(subject, texts(), positions=3).count.tolist() == [3, 3, 2]


def test_completions_give_the_head_no_views(tiny_llama, tiny_tokenizer, monkeypatch) -> None:
    """A view of the prompts' last tokens makes torch copy the head for each row in bfloat16."""
    subject = subject_of(tiny_llama, tiny_tokenizer, std=1.0)
    contiguous = contiguous_inputs(subject.model, monkeypatch)
    complete(subject, subject.rows(PROBLEMS), [BASE, steered(subject)])
    assert len(contiguous) > 1 and all(contiguous)


def test_greedy_completions_are_those_of_plain_generation(tiny_model, tiny_tokenizer) -> None:
    subject = subject_of(tiny_model, tiny_tokenizer, std=1.0, layers="0-1", batch_size=2)
    rows = subject.rows(PROBLEMS)
    base, on = complete(subject, rows, [BASE, steered(subject)])
    for row, off_row, on_row in zip(rows, base, on, strict=True):
        ids = torch.tensor([row.ids])
        plain = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        expected = subject.model.generate(ids, attention_mask=torch.ones_like(ids), **plain)[0].tolist()
        assert list(on_row.ids) == expected
        with subject.vectors.disabled():
            expected = subject.model.generate(ids, attention_mask=torch.ones_like(ids), **plain)[0].tolist()
        assert list(off_row.ids) == expected
        assert off_row.prompt == on_row.prompt == row.prompt


def test_only_end_tokens_are_taken_from_the_models_generation_config(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, std=1.0)
    rows = subject.rows(PROBLEMS)
    expected = complete(subject, rows, [steered(subject)])
    written = sorted({token for row in expected[0] for token in row.completion})
    tiny_llama.generation_config.suppress_tokens = written
    assert complete(subject, rows, [steered(subject)]) == expected
    assert tiny_llama.generation_config.suppress_tokens == written


def test_samples_do_not_depend_on_the_batch_and_lanes_share_their_luck(tiny_llama, tiny_tokenizer) -> None:
    subject = subject_of(tiny_llama, tiny_tokenizer, batch_size=8)
    rows = subject.rows(PROBLEMS)
    same = [BASE, Condition(frozenset([0])), BASE]
    reference = complete(subject, rows, same, temperature=1.0, seed=3)
    assert reference[0] == reference[2] != reference[1]
    subject.batch_size = 1
    assert complete(subject, rows, [BASE], temperature=1.0, seed=3)[0] == reference[0]
    assert complete(subject, rows, [BASE], temperature=1.0, seed=4)[0] != reference[0]


def test_sampling_follows_the_distribution(tiny_llama, tiny_tokenizer) -> None:
    """
    400 draws of the first token: the share of the likelier half is its probability, within four deviations.
    """
    subject = subject_of(tiny_llama, tiny_tokenizer, std=2.0, max_new_tokens=1, batch_size=400)
    row = subject.row("1?")
    (drawn,) = complete(subject, [row] * 400, [steered(subject)], temperature=0.7)
    with torch.no_grad():
        logits = subject.model(torch.tensor([row.ids])).logits[0, -1]
    p = (logits / 0.7).softmax(-1)
    top = p.topk(20).indices.tolist()
    expected, share = p[top].sum().item(), sum(r.completion[0] in top for r in drawn) / 400
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_prefix_substitution(tiny_llama, tiny_tokenizer) -> None:
    """Forcing the whole steered answer upon the base model gives all of the gain, another text none."""
    subject = subject_of(tiny_llama, tiny_tokenizer, std=2.0)
    rows = subject.rows(PROBLEMS[:1])
    base, on = complete(subject, rows, [BASE, steered(subject)])
    (answer,), (other,) = subject.answers(on), subject.answers(base)
    assert answer != other
    goal = [{"problem": PROBLEMS[0]["problem"], "answer": answer}]
    found = prefix_substitution(subject, goal, [answer, "zzzz"], Exact())
    assert (found.base, found.steered) == (0, 1)
    assert found.accuracy.tolist() == [1, 0]
    assert found.share.tolist() == [1, 0]
    assert found.to_dict()["share"] == [1, 0]
    none = prefix_substitution(subject, goal, ["z"], Exact(), layers=[])
    assert none.share.isnan().all()
    assert none.to_dict()["share"] == [None]
    with pytest.raises(SteerError) as error:
        prefix_substitution(subject, goal, [], Exact())
    assert "needs an opening" in message(error)


def test_common_opening() -> None:
    rows = [Row((9, 1, 2, 3), 1), Row((9, 1, 2, 4), 1), Row((9, 1, 5), 1)]
    assert common_opening(rows, share=0.6) == (1, 2)
    assert common_opening(rows, share=0.9) == (1,)
    assert common_opening([Row((9,), 1)]) == ()


def test_padding_on_either_side() -> None:
    rows = [Row((5, 6, 7), 2), Row((8,), 1)]
    left, right = pad(rows, "left", 0), pad(rows, "right", 0)
    assert left.ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert right.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert left.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left.start.tolist() == [0, 2]
    assert right.start.tolist() == [0, 0]
    assert left.mask.sum() == right.mask.sum() == 4


def test_a_wrong_side_is_refused(tiny_llama, tiny_tokenizer) -> None:
    with pytest.raises(SteerError) as error:
        subject_of(tiny_llama, tiny_tokenizer, padding_side="top")
    assert "choose left or right" in message(error)

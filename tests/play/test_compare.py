"""Answers, token changes and next-token tables of `steer play`, against plain forward passes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, message

import steer
from steer import Artifact, SteerError, SteeringConfig
from steer.generation.sampler import Sampling, rollout, uniforms
from steer.mixture import BASE, Mix
from steer.play import compare
from steer.play.compare import CHAT, TEXT, Comparison
from steer.prompt import PromptSpec

ON = Mix({"one": 1})


def one(model: Any, **config: Any) -> Artifact:
    vectors = fill(steer.attach(model, SteeringConfig(**config)), 0.3)
    made = Artifact(vectors.config, vectors.tensors())
    steer.detach(model)
    return made


@pytest.fixture
def two(build_tiny: Any, tiny_tokenizer: Any) -> tuple[Comparison, Any, Artifact]:
    """A comparison, the same model with the vectors attached as usual, and the vectors."""
    plain = build_tiny("llama", initializer_range=0.3)
    made = one(plain, prompt=PromptSpec("boxed_short"), positions="completion")
    return Comparison(build_tiny("llama", initializer_range=0.3), tiny_tokenizer, {"one": made}), plain, made


def last(answers: Any) -> Any:
    *_, found = answers
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cached", [True, False])
def test_answers_are_those_of_the_sampler(two: Any, temperature: float, cached: bool) -> None:
    comparison, plain, made = two
    comparison._cached = cached
    prompt = comparison.prompt("1+1?", [], TEXT)
    sampling = Sampling(12, (2,), temperature)
    noise = uniforms([0], 12, 5, 0)
    (base,) = rollout(plain, [prompt], sampling, noise)
    steer.load(made, plain)
    (steered,) = rollout(plain, [prompt], sampling, noise)
    assert base.ids != steered.ids
    assert last(comparison.answer(prompt, BASE, sampling, 5)) == base.ids
    assert last(comparison.answer(prompt, ON, sampling, 5)) == steered.ids
    assert last(comparison.side_by_side(prompt, prompt, ON, sampling, 5)) == (base.ids, steered.ids)


def test_an_answer_grows_by_a_token_and_ends_with_the_stop_token(two: Any) -> None:
    comparison, _, _ = two
    prompt = comparison.prompt("1+1?", [], TEXT)
    sampling = comparison.sampling(12, 0.0)
    assert 2 in sampling.eos_token_ids
    steps = list(comparison.answer(prompt, ON, Sampling(12, (), 0.0)))
    assert [len(step) for step in steps] == [*range(1, 13)]
    assert all(step == steps[-1][: len(step)] for step in steps)
    stop = steps[-1][3]
    assert (
        last(comparison.answer(prompt, ON, Sampling(12, (stop,), 0.0)))
        == steps[-1][: steps[-1].index(stop) + 1]
    )


def test_changes_are_differences_of_log_probabilities(two: Any) -> None:
    comparison, plain, made = two
    prompt, answer = comparison.prompt("1+1?", [], TEXT), [40, 41, 7, 2]
    ids = torch.tensor([[*prompt, *answer]])

    def plain_scores() -> list[float]:
        scores = torch.log_softmax(logits(plain, ids)[0], -1)
        return [scores[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]

    base = plain_scores()
    with steer.load(made, plain).prompt_length(len(prompt)):
        steered = plain_scores()
    found = comparison.changes(prompt, answer, ON)
    assert [token.base for token in found] == pytest.approx(base, abs=1e-5)
    assert [token.steered for token in found] == pytest.approx(steered, abs=1e-5)
    assert [token.change for token in found] == pytest.approx(
        [s - b for s, b in zip(steered, base, strict=True)], abs=2e-5
    )
    assert max(abs(token.change) for token in found) > 0.1
    assert "".join(token.text for token in found) == comparison.tokenizer.decode(answer)
    assert comparison.changes(prompt, [], ON) == []


def test_the_next_tokens_are_the_most_likely_of_either(two: Any) -> None:
    comparison, plain, made = two
    prompt, answer = comparison.prompt("1+1?", [], TEXT), [40, 41]
    ids = torch.tensor([[*prompt, *answer]])
    base = torch.softmax(logits(plain, ids)[0, -1], -1)
    with steer.load(made, plain).prompt_length(len(prompt)):
        steered = torch.softmax(logits(plain, ids)[0, -1], -1)
    found = comparison.next_tokens(prompt, answer, ON, top=5)
    best = torch.maximum(base, steered).topk(5).indices.tolist()
    assert [token.text for token in found] == [comparison.tokenizer.decode([i]) for i in best]
    assert [token.base for token in found] == pytest.approx(base[best].tolist(), abs=1e-6)
    assert [token.steered for token in found] == pytest.approx(steered[best].tolist(), abs=1e-6)
    assert len(comparison.next_tokens(prompt, [], ON, top=500)) == 97


def test_users_at_once_get_what_each_gets_alone(two: Any) -> None:
    comparison, _, _ = two
    prompt = comparison.prompt("1+1?", [], TEXT)
    mixes = [ON, BASE, Mix({"one": -1}), Mix({"one": 2}, frozenset([1]))]

    def ask(mix: Mix) -> Any:
        answer = last(comparison.answer(prompt, mix, Sampling(16, (), 0.0)))
        return (
            answer,
            comparison.changes(prompt, answer, mix),
            comparison.next_tokens(prompt, answer[:4], mix),
        )

    alone = [ask(mix) for mix in mixes]
    assert len({str(answer) for answer, _, _ in alone}) > 1
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, mixes * 3)) == alone * 3


def test_a_generation_may_go_on_in_another_thread(two: Any) -> None:
    """As Gradio's do: each token of a stream may be asked for from another thread of its pool."""
    comparison, _, _ = two
    prompt = comparison.prompt("1+1?", [], TEXT)
    wanted = list(comparison.answer(prompt, ON, Sampling(4, (), 0.0)))
    answers = comparison.answer(prompt, ON, Sampling(4, (), 0.0))
    found = []
    for _ in range(4):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(next, answers).result())
        assert comparison.mixer.current == BASE
    assert found == wanted


def test_prompts_are_those_of_training_of_the_chat_or_plain(two: Any) -> None:
    comparison, _, _ = two
    assert comparison.ways == ["as in training: template boxed_short", CHAT, TEXT]
    told = [
        comparison.tokenizer.decode(comparison.prompt("7?", [("5?", "6")], way)) for way in comparison.ways
    ]
    ask = r" Give the answer as $\boxed{answer}$."
    assert told == [
        f"<s><|system|></s><|user|>5?{ask}</s><|assistant|>6</s><|user|>7?{ask}</s><|assistant|>",
        "<s><|user|>5?</s><|assistant|>6</s><|user|>7?</s><|assistant|>",
        "5?6\n7?",
    ]


def test_two_prompts_that_look_the_same_name_their_sets(build_tiny: Any, tiny_tokenizer: Any) -> None:
    model = build_tiny("llama")
    prompts = {
        "plain": PromptSpec(),
        "one": PromptSpec(examples=(("1+1?", "2"),)),
        "other": PromptSpec(examples=(("2+2?", "4"),)),
        "again": PromptSpec(examples=(("1+1?", "2"),)),
    }
    sets = {name: one(model, prompt=prompt) for name, prompt in prompts.items()}
    comparison = Comparison(model, tiny_tokenizer, sets)
    assert comparison.ways == [
        "as in training: template boxed",
        "as in training of one: template boxed, 1 worked example",
        "as in training of other: template boxed, 1 worked example",
        CHAT,
        TEXT,
    ]
    told = [tiny_tokenizer.decode(comparison.prompt("7?", [], way)) for way in comparison.ways[1:3]]
    assert "1+1?" in told[0] and "2+2?" in told[1]


def test_without_a_chat_template_text_goes_on(build_tiny: Any, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = None
    model = build_tiny("llama")
    assert Comparison(model, tiny_tokenizer, {"one": one(model)}).ways == [TEXT]


def test_what_cannot_be_asked_is_one_line(two: Any) -> None:
    comparison, _, _ = two
    for ask, line in [
        (lambda: comparison.prompt(" \n", [], TEXT), "the message is empty"),
        (lambda: comparison.prompt("1", [], "x"), "prompt 'x' is unknown; choose one of as in"),
        (lambda: last(comparison.answer([5] * 120, ON, Sampling(9, ()))), "120 tokens .* at most 8$"),
        (lambda: comparison.next_tokens([5], [], Mix({"two": 1})), "no set 'two'"),
    ]:
        with pytest.raises(SteerError, match=line) as error:
            ask()
        message(error)


def test_pieces_of_characters_stand_at_their_last_token(two: Any) -> None:
    comparison, _, _ = two

    class Bytes:
        """A token a byte."""

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    comparison.tokenizer = Bytes()
    assert comparison.pieces([*"aé".encode(), *"€b".encode()]) == ["a", "", "é", "", "", "€", "b"]
    assert comparison.pieces([97, 0xE2]) == ["a", "\ufffd"]
    assert compare.Comparison.pieces(comparison, []) == []


def test_an_answer_has_a_whole_number_of_tokens(two: tuple[Comparison, Any, Artifact]) -> None:
    assert two[0].sampling(3.0, 0.0).max_new_tokens == 3
    with pytest.raises(SteerError, match=r"2\.5 tokens") as error:
        two[0].sampling(2.5, 0.0)
    message(error)

"""The reward `majority`: votes, ties, what is no candidate, what is logged, when it warns."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import pytest

from steer.tasks.grading import MathGrader
from steer.tasks.majority import UPDATES, Majority
from steer.tasks.rewards import Correctness, guard, make_reward


def box(answer: str) -> str:
    return rf"So \boxed{{{answer}}}."


def reward(*groups: list[str | None], **columns: Any) -> list[list[float]]:
    """Of groups of boxed answers; None for a text without a box."""
    return judged(Majority(MathGrader()), *groups, **columns)


def judged(majority: Any, *groups: list[str | None], **columns: Any) -> list[list[float]]:
    prompts = [f"prompt {n}" for n, group in enumerate(groups) for _ in group]
    texts = ["no box" if answer is None else box(answer) for group in groups for answer in group]
    flat = iter(majority(prompts=prompts, completions=texts, **columns))
    return [[next(flat) for _ in group] for group in groups]


def test_the_most_frequent_answer_of_each_group_is_right() -> None:
    assert reward(["3", "4", "3", None], ["4", "4", "3", "x"]) == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert reward(["3"], ["4"]) == [[1], [1]]


def test_votes_are_counted_as_the_grader_compares() -> None:
    half = ["1", "1", "0.5", r"\frac{1}{2}", r"\frac12"]
    assert reward(half) == [[0, 0, 1, 1, 1]]
    assert reward(["x+1", "1 + x", "7"]) == [[1, 1, 0]]  # sympy decides
    assert reward(["5", "5 \\text{ apples}", "6"]) == [[1, 1, 0]]


def test_it_is_the_correctness_with_the_winner_as_reference() -> None:
    group = ["1,000", "1000", "7", "1000.0", r"10^3", "seven", "7"]
    expected = Correctness(MathGrader(), wrong=0.0)(
        ["p"] * len(group), [box(a) for a in group], answer=["1000"] * len(group)
    )
    assert reward(group) == [expected]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (["8", "9"], [1, 0]),
        (["9", "8"], [1, 0]),  # the first of the group
        (["8", "9", "9.0", "8"], [1, 0, 0, 1]),  # written the same way twice
        (["9", "9.0", "8", "8"], [0, 0, 1, 1]),
        (["9", "8", "8.0", "9.0"], [1, 0, 0, 1]),
    ],
)
def test_ties_are_broken_by_a_rule(group: list[str | None], expected: list[float]) -> None:
    for _ in range(3):
        assert reward(group) == [expected]


def test_what_is_no_candidate() -> None:
    assert reward([None, None, ""]) == [[0, 0, 0]]
    assert reward([None, " ", "7", None]) == [[0, 0, 1, 0]]
    # the question repeated wins nothing, and is not the answer either
    assert reward(["97 + 27", "97 + 27", r"97+27", "124"]) == [[0, 0, 0, 1]]
    assert reward([r"3 \times 4", r"3 \times 4", "12"]) == [[0, 0, 1]]
    for fine in (r"\frac{3}{4}", "-5", r"3\sqrt{2}", "1,000", r"x - 1", "2^{10}", "(1, 2)"):
        assert reward([fine, fine, "9"]) == [[1, 1, 0]], fine
    assert reward(["1" * 5000, "1" * 5000, "2"]) == [[0, 0, 1]]


@pytest.mark.parametrize("chat", [False, True])
def test_the_word_in_the_box_of_the_prompt_is_no_candidate(chat: bool) -> None:
    text = r"What is 3 + 4? Give the answer as $\boxed{answer}$."
    prompt = [{"role": "user", "content": text}] if chat else text
    majority = Majority(MathGrader())
    assert majority([prompt] * 4, [box(a) for a in ("answer", " answer ", "7", "answer")]) == [0, 0, 1, 0]
    assert majority([prompt] * 2, [box("answer"), box("answer")]) == [0, 0]
    # a number there is the answer to something: a worked example
    assert majority([r"2 + 2 is \boxed{4}. 3 + 1?"] * 2, [box("4"), box("4")]) == [1, 1]


def test_groups_are_runs_of_one_prompt() -> None:
    majority = Majority(MathGrader())
    chat, other = [{"role": "user", "content": "q"}], [{"role": "user", "content": "r"}]
    texts = [box(a) for a in ("1", "1", "2", "2", "2", "1")]
    prompts = [chat, chat, chat, other, other, list(other)]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert majority(prompts, messages) == [1, 1, 0, 1, 1, 0]


def test_what_is_logged() -> None:
    metrics: dict[str, list[float]] = defaultdict(list)
    extra: dict[str, list[str]] = {}
    reward(
        ["3", "3", "4", None],
        ["5", "5", "5", "5"],
        log_metric=lambda name, value: metrics[name].append(value),
        log_extra=extra.__setitem__,
    )
    assert metrics == {
        "majority/agreement": [pytest.approx(6 / 8)],
        "majority/distinct": [pytest.approx(1.5)],
        "majority/answered": [pytest.approx(7 / 8)],
    }
    assert extra == {"majority_answer": ["3"] * 4 + ["5"] * 4}


def test_a_collapse_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "steer")
    majority = Majority(MathGrader())
    judged(majority, ["3", "4", "5", "3"])
    for number in range(UPDATES + 3):
        assert bool(caplog.messages) == (number >= UPDATES), number
        judged(majority, ["3"] * 4)
    assert len(caplog.messages) == 1 and "agree (100% or more" in caplog.messages[0]
    assert "1.0 different answers where there were 3.0" in caplog.messages[0]


def test_agreement_from_the_start_is_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "steer")
    majority = Majority(MathGrader())
    for _ in range(UPDATES + 3):
        judged(majority, ["3"] * 4)
    assert not caplog.messages


def test_no_answers_at_all_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "steer")
    majority = Majority(MathGrader())
    for number in range(UPDATES + 3):
        assert bool(caplog.messages) == (number >= UPDATES), number
        judged(majority, [None] * 4)
    assert len(caplog.messages) == 1 and "no sample of the last" in caplog.messages[0]


def test_by_name_and_guarded() -> None:
    made = guard(make_reward("majority", MathGrader()))
    assert made.__name__ == "majority" and made.whole_groups
    assert judged(made, ["1", "1", "2"]) == [[1, 1, 0]]
    assert not guard(make_reward("format", MathGrader())).whole_groups

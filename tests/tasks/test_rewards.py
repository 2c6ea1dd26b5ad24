import asyncio
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.tasks.rewards import (
    REWARDS,
    Correctness,
    LengthPenalty,
    MathGrader,
    RandomReward,
    format_reward,
    guard,
    make_reward,
)


@pytest.fixture
def grader():  # plain numbers alone are graded here, so no worker ever starts
    with MathGrader() as made:
        yield made


def box(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def test_correctness_pays_and_logs(grader):
    extra, metrics = {}, {}
    reward = make_reward("correct", grader)
    rewards = reward(
        prompts=["p"] * 3,
        completions=[box("4"), [{"role": "assistant", "content": box("5")}], "?"],
        completion_ids=[[1]] * 3,
        answer=["4", "4", "4"],
        log_extra=extra.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert rewards == [1.0, -1.0, -1.0]
    assert extra == {"answer_given": ["4", "5", ""]}
    assert metrics == {"accuracy": pytest.approx(1 / 3)}
    assert reward.__name__ == "correctness"
    assert make_reward("correct01", grader)(["p"], ["?"], answer=["4"]) == [0.0]
    assert Correctness(grader, wrong=-0.5, right=2.0)(["p"] * 2, [box(1), box(2)], answer=["1", "1"]) == [
        2.0,
        -0.5,
    ]
    with pytest.raises(SteerError, match=r"needs a column 'answer'; the data set has \['solution'\]"):
        reward(["p"], ["c"], solution=["s"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"so $\boxed{4}$.", 1.0),
        (r"\[\boxed{\frac{1}{2}}.\] " + "\n", 1.0),
        (r"<answer>\boxed{4}</answer>", 1.0),
        (r"\boxed{4} and more", 0.0),
        (r"\boxed{3} \boxed{4}", 0.0),
        (r"\boxed{\boxed{4}}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{4", 0.0),
        ("4", 0.0),
        (r"\boxed{4}" + "." * 500_000 + "x", 0.0),
    ],
)
def test_format_reward(text, value):
    assert format_reward(["p"], [text]) == [value]
    assert make_reward("format", MathGrader())(["p"], [[{"role": "assistant", "content": text}]]) == [value]


def test_length_penalty():
    penalty = LengthPenalty(target_tokens=4, max_tokens=8)
    ids = [[0] * n for n in (0, 4, 5, 6, 8, 20)]
    assert penalty([""] * 6, [""] * 6, ids) == [0, 0, -0.25, -0.5, -1, -1]
    for target, most in ((8, 8), (-1, 8)):
        with pytest.raises(SteerError, match="expected 0 <= target < max"):
            LengthPenalty(target, most)


def test_random_reward_depends_on_the_process_seed_only():
    def calls(seed, text):
        random.seed(seed)
        return [RandomReward()(["p"] * 40, [text] * 40) for _ in range(3)]

    assert calls(1, "a") == calls(1, box(4)) != calls(2, "a")
    first, second, _ = calls(1, "a")
    assert first != second and set(first) == {0.0, 1.0}
    assert RandomReward(p=1.0)(["p"] * 9, ["c"] * 9) == [1.0] * 9
    with pytest.raises(SteerError, match=r"p=1.5"):
        RandomReward(p=1.5)


def test_make_reward_knows_what_it_lists():
    for name in REWARDS:
        arguments = {"target_tokens": 1, "max_tokens": 2} if name == "length_penalty" else {}
        assert callable(make_reward(name, MathGrader(), **arguments))
    with pytest.raises(
        SteerError,
        match="unknown reward 'corect'; expected one of correct, correct01, format, length_penalty, "
        "majority, random",
    ):
        make_reward("corect", MathGrader())


def returning(value):
    def mine(prompts, completions, **kwargs):
        return value

    return mine


@pytest.mark.parametrize(
    "value",
    [[1.0, None, 0], (True, torch.tensor(0.5), 1), torch.tensor([1.0, 2.0, 3.0]), np.arange(3)],
    ids=["list", "mixed", "tensor", "array"],
)
def test_guard_lets_good_rewards_through(value):
    guarded = guard(returning(value))
    expected = [None if v is None else float(v) for v in value]
    assert (
        guarded(prompts=["p"] * 3, completions=["c"] * 3, completion_ids=[[]] * 3, answer=["a"] * 3)
        == expected
    )
    assert guarded.__name__ == "mine"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "'mine' returned 2 rewards for 3 completions"),
        (1.0, "'mine' returned float, 1.0; expected a list of 3"),
        (None, "'mine' returned NoneType"),
        ([1.0, float("nan"), float("inf")], "returned 2 of 3 rewards that are not finite.*'nan' at index 1"),
        ([1.0, 1.0, float("-inf")], "'-inf' at index 2"),
        (["1", 1.0, 1.0], "'1' at index 0"),
        ([1.0, [2.0], 10**400], r"'\[2.0\]' at index 1"),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, "'mine' returned dict, .*'a': 1.0.*; expected a list of 3 numbers"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "'mine' returned dict"),  # its keys would do as rewards
        ({1.0, 2.0, 3.0}, "'mine' returned set"),
        ({1.0: 0, 2.0: 0, 3.0: 0}.keys(), "'mine' returned dict_keys"),
        ("123", "'mine' returned str, '123'"),
        (b"123", "'mine' returned bytes"),
        (torch.ones(3, 1), r"'mine' returned Tensor of shape \(3, 1\)"),
        (np.ones((1, 3)), r"'mine' returned ndarray of shape \(1, 3\)"),
        (torch.tensor(1.0), "'mine' returned Tensor, .* one value"),
        ([torch.ones(1), 1.0, 1.0], "at index 0"),
        ([np.ones((1, 1)), 1.0, 1.0], "at index 0"),
        ([1.0, 1e39, 1.0], r"'1e\+39' at index 1"),  # infinite in float32
        ([1.0, 1j, 1.0], "'1j' at index 1"),
    ],
)
def test_guard_stops_bad_rewards(value, message):
    with pytest.raises(SteerError, match=message) as caught:
        guard(returning(value))(["p"] * 3, ["c"] * 3)
    assert "\n" not in str(caught.value)


_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(0, 3), inner, max_size=4),
    max_leaves=6,
)


@given(_VALUES)
def test_guard_returns_finite_numbers_or_refuses(value):
    try:
        found = guard(returning(value))(["p"] * 3, ["c"] * 3)
    except SteerError as error:
        assert "'mine'" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(value, list) and len(found) == 3
        assert [x is None for x in found] == [x is None for x in value]
        assert all(x is None or torch.tensor(x).isfinite() for x in found)


def test_guard_keeps_async_functions_async():
    async def mine(prompts, completions, **kwargs):
        return [float("nan")]

    with pytest.raises(SteerError, match="'nan' at index 0"):
        asyncio.run(guard(mine)(["p"], ["c"]))
    assert asyncio.iscoroutinefunction(guard(mine))


def test_guard_names_callable_objects():
    assert guard(RandomReward()).__name__ == "random_reward"

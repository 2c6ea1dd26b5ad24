r"""Reward functions in trl's form: `f(prompts, completions, completion_ids, **columns) -> list of floats`.

Each completion is a string, or a list of messages whose last one is the model's.
"""

from __future__ import annotations

import functools
import inspect
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from typing import Any

from steer.errors import SteerError, shown
from steer.tasks.grading import MathGrader, Verdict, extract_boxed
from steer.tasks.majority import Majority, text_of

__all__ = [
    "REWARDS",
    "Correctness",
    "LengthPenalty",
    "Majority",
    "MathGrader",
    "RandomReward",
    "Verdict",
    "extract_boxed",
    "format_reward",
    "guard",
    "make_reward",
]

RewardFunction = Callable[..., list[float]]

REWARDS = {
    "correct": r"+1 when the \boxed answer is right, -1 otherwise",
    "correct01": r"1 when the \boxed answer is right, 0 otherwise",
    "format": r"1 when the text ends in its one and only \boxed answer, 0 otherwise",
    "length_penalty": "0 up to target_tokens, then linear to -1 at max_tokens (give both)",
    "majority": "1 when the boxed answer equals the most frequent one of its prompt's samples, 0 otherwise; "
    "reads no reference answers (records still have an `answer`)",
    "random": "1 or 0 by a coin, whatever the text: a control",
}


def make_reward(name: str, grader: MathGrader, **arguments: object) -> RewardFunction:
    """
    A built-in reward function.

    Args:
        name: a key of `REWARDS`.
        grader: judges the answers.
        arguments: keyword arguments of the reward, such as `wrong=-0.5` of "correct".

    Raises:
        SteerError: another name, or arguments that this reward does not take.
    """
    makers: dict[str, Callable[..., RewardFunction]] = {
        "correct": functools.partial(Correctness, grader),
        "correct01": functools.partial(Correctness, grader, wrong=0.0),
        "format": lambda: format_reward,
        "length_penalty": LengthPenalty,
        "majority": functools.partial(Majority, grader),
        "random": RandomReward,
    }
    if name not in makers:
        raise SteerError(f"unknown reward {name!r}; expected one of {', '.join(REWARDS)}")
    takes = list(inspect.signature(makers[name]).parameters)
    check_arguments(name, arguments, takes)
    numbers = {k: v for k, v in arguments.items() if isinstance(v, bool) or not isinstance(v, int | float)}
    if numbers:
        raise SteerError(f"reward {name!r} takes numbers as arguments, not {shown(numbers)}")
    try:
        return makers[name](**arguments)
    except TypeError as error:
        raise SteerError(
            f"reward {name!r} got arguments {shown(arguments)}; expected {', '.join(takes) or 'none'}"
        ) from error


def check_arguments(name: str, arguments: Collection[str], takes: Sequence[str]) -> None:
    """SteerError for an argument that a reward, which takes those of `takes`, does not have."""
    unknown = sorted(set(arguments) - set(takes))
    if unknown:
        near = get_close_matches(unknown[0], takes, 1)
        told = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(takes) or 'none'}"
        raise SteerError(f"reward {name!r} has no argument {', '.join(unknown)}{told}")


class Correctness:
    """
    `right` for a right answer and `wrong` for any other, judged by `grader` against column `answer`, or
    against `golds` where there is one: lists of answers of which any is right.
    """

    __name__ = "correctness"  # trl names its metrics after this

    def __init__(self, grader: MathGrader, wrong: float = -1.0, right: float = 1.0) -> None:
        self.grader, self.wrong, self.right = grader, wrong, right

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        if columns.get("answer") is None:
            raise SteerError(
                f"the correctness reward needs a column 'answer'; the data set has {sorted(columns)}"
            )
        golds = columns.get("golds") or columns["answer"]
        verdicts = self.grader.check([text_of(c) for c in completions], golds)
        if log_extra := columns.get("log_extra"):
            log_extra("answer_given", [v.answer if v.answer is not None else "" for v in verdicts])
        if (log_metric := columns.get("log_metric")) and verdicts:
            log_metric("accuracy", sum(v.correct for v in verdicts) / len(verdicts))
        return [self.right if v.correct else self.wrong for v in verdicts]


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# what may follow the box: punctuation and closing delimiters
_CLOSING = re.compile(r"(?:[\s$.,;:!*)\]\\]|</answer>)*")


def format_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    r"""1.0 for a text with exactly one \boxed, which is not empty and ends the text; 0.0 otherwise.

    After the box only whitespace, punctuation, closing math delimiters and </answer> may follow.
    """
    return [float(_ends_in_its_box(text_of(completion))) for completion in completions]


def _ends_in_its_box(text: str) -> bool:
    openings = [match.end() for match in _BOX.finditer(text)]
    content = extract_boxed(text)
    if len(openings) != 1 or content is None or not content.strip():
        return False
    return _CLOSING.fullmatch(text, openings[-1] + len(content) + 1) is not None


class LengthPenalty:
    """Soft overlong penalty (DAPO): 0 up to `target_tokens`, then linear to -1 at `max_tokens` and on."""

    __name__ = "length_penalty"

    def __init__(self, target_tokens: int, max_tokens: int) -> None:
        if not 0 <= target_tokens < max_tokens:
            raise SteerError(
                f"length penalty got target_tokens={target_tokens}, max_tokens={max_tokens}; "
                "expected 0 <= target < max"
            )
        self.target_tokens, self.max_tokens = target_tokens, max_tokens

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        **columns: Any,
    ) -> list[float]:
        span = self.max_tokens - self.target_tokens
        return [-min(1.0, max(0, len(ids) - self.target_tokens) / span) for ids in completion_ids]


class RandomReward:
    """
    A control that learns nothing from the text: 1.0 with probability `p`.

    Drawn from Python's own generator, which the trainer seeds for each process and keeps in its checkpoints.
    """

    __name__ = "random_reward"

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise SteerError(f"random reward got p={p}; expected a probability from 0 to 1")
        self.p = p

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        return [float(random.random() < self.p) for _ in completions]


def guard(reward_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`reward_fn` with its result checked: one finite number, or None for "does not apply", per completion.

    The wrapped function (async when `reward_fn` is) raises SteerError with the name and first bad place.
    """
    name = getattr(reward_fn, "__name__", type(reward_fn).__name__)

    if inspect.iscoroutinefunction(reward_fn) or inspect.iscoroutinefunction(type(reward_fn).__call__):

        async def checked_async(
            prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any
        ) -> Any:
            rewards = await reward_fn(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
            )
            return _checked(name, rewards, len(completions))

        checked: Callable[..., Any] = checked_async
    else:

        def checked_sync(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> Any:
            rewards = reward_fn(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
            )
            return _checked(name, rewards, len(completions))

        checked = checked_sync

    functools.update_wrapper(checked, reward_fn, assigned=("__doc__", "__module__"), updated=())
    checked.__name__ = name
    checked.whole_groups = getattr(reward_fn, "whole_groups", False)  # type: ignore[attr-defined]
    return checked


def _checked(name: str, rewards: Any, expected: int) -> list[float | None]:
    # Not what iterates over something else than one value a completion, in their order.
    shape = tuple(getattr(rewards, "shape", ()) or ())
    unordered = isinstance(rewards, Mapping | Set | str | bytes | bytearray)
    if unordered or len(shape) > 1 or not isinstance(rewards, Iterable):
        kind = type(rewards).__name__ + (f" of shape {shape}" if shape else "")
        text = " ".join(shown(rewards).split())
        raise SteerError(
            f"reward function {name!r} returned {kind}, {text}; expected a list of {expected} numbers"
        )
    try:
        values = list(rewards)
    except TypeError as error:  # a tensor without dimensions
        raise SteerError(
            f"reward function {name!r} returned {type(rewards).__name__}, {shown(rewards)}, which is one "
            f"value; expected a list of {expected} numbers"
        ) from error
    if len(values) != expected:
        raise SteerError(
            f"reward function {name!r} returned {len(values)} rewards for {expected} completions; "
            "expected one each"
        )
    numbers = [_finite(value) for value in values]
    bad = [
        i
        for i, (value, number) in enumerate(zip(values, numbers, strict=True))
        if value is not None and number is None
    ]
    if bad:
        raise SteerError(
            f"reward function {name!r} returned {len(bad)} of {expected} rewards that are not finite "
            f"numbers, first {str(values[bad[0]])[:50]!r} at index {bad[0]}; return a float, or None where "
            "it does not apply"
        )
    return numbers


_LARGEST = (2 - 2**-23) * 2.0**127  # of float32


def _finite(value: Any) -> float | None:
    """
    The value as a float; None when it is not a finite number of float32, in which rewards are added up. Takes
    numpy and torch scalars.
    """
    if value is None or isinstance(value, str | bytes) or getattr(value, "shape", None):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if abs(number) <= _LARGEST else None

"""
Rewards by name: built-in ones, and functions of the user's own out of a file or an installed module.

An entry is a name, or a mapping of a name and keyword arguments: `correct`, `my_rewards.py:brevity`,
`{name: "my_rewards.py:brevity", target: 50}`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import yaml

from steer.errors import SteerError, one_line, shown
from steer.tasks.grading import MathGrader
from steer.tasks.own_code import FORM, own_function
from steer.tasks.rewards import REWARDS, RewardFunction, check_arguments, make_reward

Entry = str | dict[str, Any]

# What a reward function is given beside the columns of the data set.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def reward_entries(given: object) -> list[Entry]:
    """
    Rewards as a config file or a command line names them, as a list of names and mappings.

    Args:
        given: a name, a mapping, or a list of these. A string that opens with a brace is a mapping in YAML.

    Raises:
        SteerError: no reward, or an entry that is neither a name nor a mapping with one.
    """
    entries = list(given) if isinstance(given, list | tuple) else [given]
    if not entries:
        raise SteerError(f"rewards is empty; name at least one of {', '.join(REWARDS)}, or {FORM}")
    return [_entry(one) for one in entries]


def _entry(given: Any) -> Entry:
    entry = given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            entry = yaml.safe_load(given)
        except yaml.YAMLError as error:
            raise SteerError(
                f"reward {shown(given)} is not YAML; write '{{name: length_penalty, target_tokens: 100, "
                "max_tokens: 200}'"
            ) from error
    if isinstance(entry, Mapping):
        named = isinstance(entry.get("name"), str)
        if not named or not all(isinstance(key, str) for key in entry):
            raise SteerError(f"reward {shown(given)} has no name; write '{{name: NAME, argument: value}}'")
        return dict(entry) if len(entry) > 1 else str(entry["name"])
    if not isinstance(entry, str) or not entry.strip():
        raise SteerError(f"reward {shown(given)} is not a name; give one of {', '.join(REWARDS)}, or {FORM}")
    return entry


def reward_names(entries: Sequence[Entry]) -> list[str]:
    """The name of each entry, without its arguments."""
    return [entry if isinstance(entry, str) else entry["name"] for entry in entries]


def load_rewards(
    entries: Sequence[Entry], grader: MathGrader, columns: Collection[str] | None = None
) -> list[RewardFunction]:
    """
    The reward functions that `entries` name. Of functions with the same name all but the first get a number,
    so that each has its own line in the logs.

    Args:
        entries: as `reward_entries` gives them.
        grader: judges the answers for the built-in rewards.
        columns: columns of the data set, which every function is called with. With None the calls are not
            checked.

    Raises:
        SteerError: a name, file, module or function that does not exist; arguments that the function does not
            take; a function that cannot be called with the columns.
    """
    functions: list[RewardFunction] = []
    seen: dict[str, int] = {}
    for entry in entries:
        name, arguments = _parts(entry)
        if ":" in name:
            function = _own(name, arguments)
            if columns is not None:
                _check_call(name, function, arguments, columns)
        else:
            function = _built_in(name, grader, arguments)
        label = getattr(function, "__name__", type(function).__name__)
        seen[label] = count = seen.get(label, 0) + 1
        if count > 1:
            function = _named(function, f"{label}_{count}")
        functions.append(function)
    return functions


def _parts(entry: Entry) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _built_in(name: str, grader: MathGrader, arguments: dict[str, Any]) -> RewardFunction:
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SteerError(f"unknown reward {name!r}{hint}; expected one of {', '.join(REWARDS)}, or {FORM}")
    return make_reward(name, grader, **arguments)


# ---- the user's own


def _own(name: str, arguments: dict[str, Any]) -> RewardFunction:
    made = own_function("reward", name)
    if inspect.isclass(made):
        return _constructed(name, made, arguments)
    if arguments:
        _check_arguments(name, made, arguments)
        return _partial(made, arguments, name.rpartition(":")[2])
    return made


def _constructed(name: str, kind: type, arguments: dict[str, Any]) -> RewardFunction:
    parameters = inspect.signature(kind).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        check_arguments(name, arguments, [p.name for p in parameters])
    try:
        made = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise SteerError(f"reward {name!r} with arguments {shown(arguments)}: {one_line(error)}") from error
    if not callable(made):
        raise SteerError(f"reward {name!r} is a class whose objects cannot be called; give it a __call__")
    return made


def _check_arguments(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse an argument that `function` does not name: `**columns` would take and ignore it."""
    takes = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in _GIVEN
    ]
    check_arguments(name, arguments, takes)


def _check_call(
    name: str, function: Callable[..., Any], arguments: dict[str, Any], columns: Collection[str]
) -> None:
    """Refuse a function that the trainer's call would fail on, before anything is sampled."""
    if both := sorted(set(arguments) & set(columns)):
        raise SteerError(
            f"reward {name!r}: {', '.join(both)} is given as an argument and is a column of the data set; "
            "rename one of them"
        )
    call = {*_GIVEN, *columns}
    try:
        inspect.signature(function).bind(**dict.fromkeys(call))
    except TypeError as error:
        raise SteerError(
            f"reward {name!r} cannot be called with {', '.join(sorted(call))} ({one_line(error)}); end its "
            "parameters with **columns, and name no column that is not there"
        ) from error


def _partial(function: Callable[..., Any], arguments: dict[str, Any], label: str) -> RewardFunction:
    made: Any = functools.partial(function, **arguments)
    made.__name__ = label
    return made


def _named(function: Any, label: str) -> RewardFunction:
    if inspect.isroutine(function):
        return _partial(function, {}, label)
    function.__name__ = label  # an object of its own for this entry
    return function

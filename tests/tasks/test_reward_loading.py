from __future__ import annotations

import asyncio
import multiprocessing
import sys
from pathlib import Path

import pytest

from steer.errors import SteerError
from steer.tasks.own_code import source_checksums
from steer.tasks.reward_loading import load_rewards, reward_entries, reward_names
from steer.tasks.rewards import LengthPenalty, MathGrader, guard

SOURCE = """
import multiprocessing


def brevity(completions, target=10, **columns):
    return [-abs(len(text) - target) / target for text in completions]


async def judge(completions, answer, **columns):
    return [float(gold in text) for gold, text in zip(answer, completions, strict=True)]


def narrow(completions, **columns):
    return [1.0]


def strict(completions, missing):
    return [1.0] * len(completions)


class Bonus:
    def __init__(self, value):
        self.value = value

    def __call__(self, completions, **columns):
        return [self.value] * len(completions)


def length(text):
    return float(len(text))


def parallel(completions, **columns):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(length, completions)


limit = 3
"""
COLUMNS = {"problem", "answer", "source"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with `own_rewards.py`; what is imported from it is forgotten afterwards."""
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def load(*entries, columns=COLUMNS):
    return load_rewards(reward_entries(list(entries)), MathGrader(), columns)


def call(function, completions, **columns):
    return function(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=[[1, 2, 3]] * len(completions),
        **columns,
    )


def test_entries_of_a_config_file_and_of_a_command_line_are_the_same() -> None:
    in_yaml = ["correct", {"name": "own_rewards.py:brevity", "target": 5}]
    assert reward_entries(["correct", "{name: own_rewards.py:brevity, target: 5}"]) == in_yaml
    assert reward_entries(in_yaml) == in_yaml
    assert reward_entries("correct") == reward_entries([{"name": "correct"}]) == ["correct"]


@pytest.mark.parametrize("given", [[], [3], [{"target": 5}], ["{name: [a"], ["{target: 5}"], [None], [" "]])
def test_entries_that_name_nothing_are_refused(given) -> None:
    with pytest.raises(SteerError, match="reward"):
        reward_entries(given)


def test_functions_classes_and_arguments(place: Path) -> None:
    file = "own_rewards.py"
    plain, changed, bonus = load(
        f"{file}:brevity",
        {"name": f"{place / file}:brevity", "target": 2},
        {"name": f"{file}:Bonus", "value": 0.5},
    )
    assert call(plain, ["x" * 10, ""]) == [0.0, -1.0]
    assert call(changed, ["xx", ""]) == [0.0, -1.0]
    assert call(bonus, ["a", "b"]) == [0.5, 0.5]
    assert (plain.__name__, changed.__name__) == ("brevity", "brevity_2")
    assert guard(changed).__name__ == "brevity_2"


def test_a_module_in_the_working_folder(place: Path) -> None:
    (place / "kit").mkdir()
    (place / "kit" / "__init__.py").touch()
    (place / "kit" / "scores.py").write_text("def one(completions, **columns):\n    return [1.0]\n")
    (function,) = load("kit.scores:one")
    assert call(function, ["a"]) == [1.0]
    assert set(source_checksums("reward", ["kit.scores:one", "correct"])) == {"kit.scores:one"}


def test_an_async_function_stays_async_with_arguments_and_a_number(place: Path) -> None:
    first, second = load("own_rewards.py:judge", "own_rewards.py:judge")
    for function in (guard(first), guard(second)):
        assert asyncio.iscoroutinefunction(function)
        assert asyncio.run(call(function, ["is 4", "is 5"], answer=["4", "4"])) == [1.0, 0.0]
    assert guard(second).__name__ == "judge_2"


def test_a_wrong_number_of_rewards_names_the_function(place: Path) -> None:
    (function,) = load("own_rewards.py:narrow")
    with pytest.raises(SteerError, match="'narrow' returned 1 rewards for 2 completions"):
        call(guard(function), ["a", "b"])


def test_processes_that_a_reward_starts_find_its_file(place: Path) -> None:
    before = set(multiprocessing.active_children())  # workers of graders in other tests
    (function,) = load("own_rewards.py:parallel")
    assert call(function, ["abc"]) == [3.0]
    assert set(multiprocessing.active_children()) <= before


def test_the_length_penalty_has_a_name() -> None:
    (penalty,) = load({"name": "length_penalty", "target_tokens": 1, "max_tokens": 5})
    assert isinstance(penalty, LengthPenalty)
    assert call(penalty, ["abc"]) == [-0.5]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("corect", "did you mean 'correct'"),
        ("own_rewards.py", "file.py:function"),
        ("own_rewards.py:brevty", "did you mean 'brevity'"),
        ("own_rewards.py:limit", "cannot be called"),
        ("own_rewards.py:strict", "end its parameters with"),
        ("other.py:brevity", "no file 'other.py'"),
        ("no_such_package.rewards:f", "cannot import no_such_package.rewards"),
        ("a b:c", "names no file and no module"),
        ({"name": "own_rewards.py:brevity", "goal": 5}, "has no argument goal; it has target"),
        ({"name": "own_rewards.py:judge", "answer": "4"}, "answer is given as an argument and is a column"),
        ({"name": "own_rewards.py:brevity", "targte": 5}, "no argument targte; did you mean target"),
        ({"name": "own_rewards.py:Bonus", "size": 5}, "no argument size; it has "),
        ({"name": "correct", "wrog": 0}, "no argument wrog; did you mean wrong"),
        ({"name": "length_penalty", "max_token": 5}, "did you mean max_tokens"),
        ({"name": "correct", "wrong": "none"}, "takes numbers"),
        ({"name": "format", "x": 1}, "no argument x; it has none"),
        ({"name": "length_penalty", "target_tokens": 5}, "expected target_tokens, max_tokens"),
        ({"name": "length_penalty", "target_tokens": 5, "max_tokens": 5}, "0 <= target < max"),
    ],
)
def test_what_cannot_work_is_one_line(place: Path, entry, message: str) -> None:
    with pytest.raises(SteerError, match=message) as error:
        load(entry)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_imported(place: Path) -> None:
    (place / "torn.py").write_text("def f(:\n")
    (place / "failing.py").write_text("import no_such_module\n")
    (place / "json.py").write_text("def f(completions, **columns): return [1.0]\n")
    for file, message in (("torn", "line 1"), ("failing", "no_such_module"), ("json", "rename the file")):
        with pytest.raises(SteerError, match=message):
            load(f"{file}.py:f")


def test_the_checksum_follows_the_text(place: Path) -> None:
    name = "own_rewards.py:brevity"
    before = source_checksums("reward", [name, "correct"])
    assert before == source_checksums("reward", reward_names([{"name": name, "target": 3}]))
    (place / "own_rewards.py").write_text(SOURCE + "\n# edited\n")
    assert source_checksums("reward", [name]).keys() == before.keys()
    assert source_checksums("reward", [name]) != before

"""Benchmarks: what their names and settings mean, where problems come from, and what a broken file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.steering import message
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.evaluation import benchmarks


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_settings_behind_colons_win_over_those_of_the_run():
    found = benchmarks.parse("gsm8k:limit=20:samples=0", samples=4, template="plain", limit=None)
    assert (found.limit, found.samples, found.template, found.max_new_tokens) == (20, 0, "plain", 1024)
    made = benchmarks.parse("arithmetic:operators=+*:digits=1:heldout=0.4:problems=75").arithmetic
    assert made is not None
    assert (made.operators, made.digits, made.heldout, made.problems) == ("+*", 1, 0.4, 75)
    own = benchmarks.parse("some/where/mine.jsonl")
    assert (own.name, own.file, own.hub) == ("mine", "some/where/mine.jsonl", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gsm9k", "unknown benchmark 'gsm9k'; expected one of gsm8k, math500"),
        ("gsm8k:limit", "'limit' is not a setting; write key=value"),
        ("gsm8k:digits=2", "'digits=2' is not a setting"),
        ("gsm8k:limit=few", "limit='few' is not a whole number"),
        ("gsm8k:limit=0", "limit=0 is below 1"),
        ("gsm8k:samples=-1", "samples=-1 is below 0"),
        ("gsm8k:template=nice", "unknown template 'nice'; expected one of boxed"),
        ("arithmetic:digits=9", "digits is 9; expected an integer from 1 to 4"),
        ("arithmetic:heldout=x", "heldout='x' is not a number"),
    ],
)
def test_mistakes_in_a_name(text, expected):
    with pytest.raises(SteerError, match=expected) as error:
        benchmarks.parse(text)
    message(error)


ARITHMETIC = {"train_data": "arithmetic", "operators": "+-", "digits": 2, "terms": 2, "heldout": 0.2}


@pytest.mark.parametrize(
    ("text", "run", "trained_on"),
    [
        ("data/mine.jsonl", {"train_data": "data/../data/mine.jsonl"}, True),
        ("data/mine.jsonl", {"train_data": "elsewhere/mine.jsonl"}, False),
        ("data/mine.jsonl", {"train_data": "arithmetic"}, False),
        ("data/mine.jsonl", {}, False),
        ("gsm8k", {"train_data": "gsm8k", "train_split": "train"}, False),
        ("gsm8k", {"train_data": "gsm8k", "train_split": "test"}, True),
        ("gsm8k:split=train", {"train_data": "gsm8k", "train_split": "train"}, True),
        ("math500", {"train_data": "math", "train_split": "train"}, False),
        ("math500", {"train_data": "math500", "train_split": "train"}, True),
        ("aime25", {"train_data": "math-ai/aime25", "train_split": "test"}, True),
        ("arithmetic", ARITHMETIC, False),
        ("arithmetic:heldout=0.1", ARITHMETIC, False),
        ("arithmetic:heldout=0.4", ARITHMETIC, True),
        ("arithmetic:heldout=0.4:operators=*", ARITHMETIC, False),
        ("arithmetic:heldout=0.4:terms=3", ARITHMETIC, False),
        ("arithmetic:heldout=0.4", {"train_data": "gsm8k", "train_split": "train", "heldout": 0.2}, False),
    ],
)
def test_what_vectors_were_trained_on_is_known_by_their_settings(text, run, trained_on):
    assert benchmarks.has_training_problems(benchmarks.parse(text), run) is trained_on


def test_a_local_file_of_a_known_benchmark_may_be_what_was_trained_on(tmp_path):
    gsm8k = benchmarks.parse("gsm8k")
    run = {"train_data": str(tmp_path / "gsm8k_test.jsonl")}
    assert benchmarks.has_training_problems(gsm8k, run, tmp_path)
    assert not benchmarks.has_training_problems(gsm8k, run, tmp_path / "other")


@given(st.text(alphabet="gsm8kath.:=limt0129jon_", max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_benchmark_or_one_line_of_error(text):
    try:
        benchmarks.parse(text)
    except SteerError as error:
        assert "\n" not in str(error)


def test_local_files_stand_in_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # never asked
    rows = [{"problem": f"{n}+1", "answer": n + 1} for n in range(9)]
    write(tmp_path / "gsm8k_test.jsonl", rows)
    found, digest = benchmarks.load(benchmarks.parse("gsm8k"), tmp_path)
    assert [(p.problem, p.answer) for p in found] == [(r["problem"], str(r["answer"])) for r in rows]
    own = benchmarks.load(benchmarks.parse(str(tmp_path / "gsm8k_test.jsonl")))
    assert own == (found, digest)
    with pytest.raises(SteerError, match=r"no file .*math500.jsonl; put the problems there as JSON lines"):
        benchmarks.load(benchmarks.parse("math500"), tmp_path)


def test_limits_are_nested_and_seeded(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"problem": str(n), "answer": "1"} for n in range(50)])
    few, many = (benchmarks.load(benchmarks.parse(f"{path}:limit={n}")) for n in (5, 20))
    assert many[0][:5] == few[0]
    assert few[1] == many[1], "the digest is that of the whole set"
    assert [p.problem for p in few[0]] != [str(n) for n in range(5)]


def test_ids_tell_problems_apart_and_not_spacing(tmp_path):
    rows = [{"problem": "a  b", "answer": "1"}, {"problem": "a c", "answer": "1"}]
    one = benchmarks.load(benchmarks.parse(str(write(tmp_path / "one.jsonl", rows))))[0]
    other = [{"problem": "a\nb", "answer": "1"}, {"problem": "a c", "answer": "2"}]
    two = benchmarks.load(benchmarks.parse(str(write(tmp_path / "two.jsonl", other))))[0]
    assert one[0].id == two[0].id
    assert len({p.id for p in one + two}) == 3


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "gsm8k_test.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n\n{"problem": "2+2", "ans\n')
    with pytest.raises(SteerError, match=r"gsm8k_test.jsonl, line 3 is not JSON") as error:
        benchmarks.load(benchmarks.parse("gsm8k"), tmp_path)
    message(error)
    path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "2+2"}\n')
    with pytest.raises(SteerError, match="record 2: no 'answer'"):
        benchmarks.load(benchmarks.parse("gsm8k"), tmp_path)


def test_another_sets_answers_are_refused(tmp_path):
    write(tmp_path / "gsm8k_test.jsonl", [{"problem": "x", "answer": "\\frac{1}{2}"}])
    with pytest.raises(SteerError, match=r"the answer of problem 1, .* is not an integer: is this another"):
        benchmarks.load(benchmarks.parse("gsm8k"), tmp_path)


HUB = {
    "openai/gsm8k": ("main", "test", {"question": "Q?", "answer": "Work.\n#### 1,234"}, "1234"),
    "HuggingFaceH4/MATH-500": (None, "test", {"problem": "Q?", "answer": "\\frac{1}{2}"}, "\\frac{1}{2}"),
    "HuggingFaceH4/aime_2024": (None, "train", {"problem": "Q?", "answer": "033"}, "033"),
    "math-ai/aime25": (None, "test", {"problem": "Q?", "answer": "70"}, "70"),
    "math-ai/amc23": (None, "test", {"question": "Q?", "answer": "27.0"}, "27.0"),
    "math-ai/minervamath": (None, "test", {"question": "Q?", "answer": "1.6"}, "1.6"),
    "math-ai/olympiadbench": (None, "test", {"question": "Q?", "final_answer": ["2"]}, "2"),
    "ChilleD/SVAMP": (None, "test", {"question_concat": "Q?", "Answer": "145.0"}, "145.0"),
}


@pytest.mark.parametrize("name", [name for name, b in benchmarks.KNOWN.items() if b.hub])
def test_hub_sets(name, monkeypatch):
    def load_dataset(hub, config, split):
        wanted_config, wanted_split, row, _ = HUB[hub]
        assert (config, split) == (wanted_config, wanted_split)
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    benchmark = benchmarks.parse(name)
    ((problem,), _) = benchmarks.load(benchmark)
    assert (problem.problem, problem.answer) == ("Q?", HUB[benchmark.hub][3])


def test_hub_troubles(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SteerError, match=r"did not give 'openai/gsm8k' .*no route.*--data-dir") as error:
        benchmarks.load(benchmarks.parse("gsm8k"))
    message(error)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"q": "1"}]))
    with pytest.raises(SteerError, match="has q, expected columns question and answer"):
        benchmarks.load(benchmarks.parse("gsm8k"))


@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k", 1319), ("math500", 500), ("aime24", 30), ("amc23", 40)]
)
def test_real_files(data_dir, name, count):
    found, _ = benchmarks.load(benchmarks.parse(name), data_dir)
    assert len({p.id for p in found}) == count


def test_arithmetic_is_the_held_out_half_of_training():
    from steer.tasks.arithmetic import Arithmetic

    found, digest = benchmarks.load(benchmarks.parse("arithmetic:digits=1:heldout=0.4:problems=20"))
    trained = Arithmetic("+-", 1, 2, 60, seed=3, heldout=0.4).generate("train")
    assert not {p.problem for p in found} & {row["problem"] for row in trained}
    more, same = benchmarks.load(benchmarks.parse("arithmetic:digits=1:heldout=0.4:problems=30"))
    assert more[:20] == found
    assert same == digest

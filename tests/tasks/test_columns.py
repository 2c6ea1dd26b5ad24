"""Data sets with columns of their own: other names, chats, several right answers, columns for the rewards."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.chat_templates import STYLES, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.prompt import PromptSpec
from steer.tasks.columns import FIELDS, columns_text, parse_columns
from steer.tasks.data import load_problems
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import format_prompt
from steer.tasks.rewards import Correctness

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]


@pytest.fixture(params=["jsonl", "json", "parquet", "hub"])
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`load_problems` of some rows, wherever they are kept."""

    def read(rows: list[dict[str, Any]], columns: str | None = None) -> list[dict[str, Any]]:
        path = str(tmp_path / f"rows.{request.param}")
        if request.param == "hub":
            path = "some/set"
            monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(rows))
        elif request.param == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif request.param == "json":
            Path(path).write_text(json.dumps(rows))
        else:
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_problems(path, columns=parse_columns(columns)).to_list()

    return read


def jsonl(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_columns_with_other_names(load) -> None:
    rows = [{"question": f"q{i}", "solution": str(i), "answer": "long text", "hint": "h"} for i in range(3)]
    found = load(rows, "problem=question,answer=solution")
    assert [(r["problem"], r["answer"], r["hint"]) for r in found] == [
        (f"q{i}", str(i), "h") for i in range(3)
    ]
    assert "solution" not in found[0] and "question" not in found[0]


def test_a_missing_column_names_those_that_exist(load) -> None:
    rows = [{"questions": "q", "answer": "1"}]
    with pytest.raises(
        SteerError, match=r"no column 'question' for 'problem'; the columns are questions, answer"
    ):
        load(rows, "problem=question")
    with pytest.raises(SteerError, match="did you mean 'questions'") as error:
        load(rows, "problem=question")
    assert "\n" not in str(error.value)
    with pytest.raises(SteerError, match=r"no 'problem'.*questions, answer.*--columns problem=COLUMN"):
        load(rows)


def test_a_chat_is_kept_and_its_last_turn_is_the_problem(load) -> None:
    rows = [
        {"prompt": CHAT, "answer": "4"},
        {"prompt": [{"role": "user", "content": "What is 2+2?"}], "answer": "4"},
    ]
    found = load(rows)
    assert [r["messages"] for r in found] == [row["prompt"] for row in rows], (
        "another system text: another problem"
    )
    assert {r["problem"] for r in found} == {"What is 2+2?"}
    named = load([{"chat": CHAT, "gold": "4"}], "prompt=chat,answer=gold")
    assert named[0]["messages"] == CHAT and "chat" not in named[0]


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        ["hello"],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": "hi", "tool_calls": "x"}],
        [*CHAT, {"role": "assistant", "content": "4"}],
        [{"role": "user", "content": " "}],
    ],
    ids=str,
)
def test_other_lists_are_no_chats(tmp_path: Path, prompt: Any) -> None:
    path = jsonl(tmp_path / "p.jsonl", json.dumps({"prompt": prompt, "answer": "4"}))
    with pytest.raises(SteerError, match=r"'prompt' (has the message|does not end)"):
        load_problems(path)


def test_a_prompt_that_is_text_is_refused_or_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "p.jsonl", json.dumps({"prompt": "2+2", "problem": "p", "answer": "4"}))
    with pytest.raises(SteerError, match="--columns problem=COLUMN"):
        load_problems(path, columns={"prompt": "prompt"})
    with caplog.at_level(logging.INFO):
        assert load_problems(path)[0]["problem"] == "p"
    assert "column 'prompt' is not passed to rewards" in caplog.text
    assert load_problems(path, columns={"problem": "prompt"})[0]["problem"] == "2+2"


def test_several_right_answers(load) -> None:
    rows = [{"problem": "p", "answer": ["1/2", "0.5"]}, {"problem": "q", "answer": ["3"]}]
    found = load(rows)
    assert [r["golds"] for r in found] == [["1/2", "0.5"], ["3"]]
    assert [r["answer"] for r in found] == ["1/2", "3"]
    assert "golds" not in load([{"problem": "p", "answer": ["1"]}])[0]


@pytest.mark.parametrize("answers", [[], [None], ["1", ""], ["1", ["2"]]])
def test_lists_without_an_answer_are_refused(tmp_path: Path, answers: list) -> None:
    path = jsonl(tmp_path / "p.jsonl", json.dumps({"problem": "p", "answer": answers}))
    with pytest.raises(SteerError, match="record 1: no 'answer'"):
        load_problems(path)


def test_golds_arrive_as_they_are_written(tmp_path: Path) -> None:
    written = ['"2024-05-01"', '"070"', '"1e-7"', "1e-7", "7", "0.10", '"x+1"', '["070", 7, "1e-7", 0.10]']
    path = jsonl(
        tmp_path / "p.jsonl", *(f'{{"problem": "p{i}", "answer": {w}}}' for i, w in enumerate(written))
    )
    found = load_problems(path)
    assert found["answer"] == ["2024-05-01", "070", "1e-7", "1e-7", "7", "0.10", "x+1", "070"]
    assert found[7]["golds"] == ["070", "7", "1e-7", "0.10"]


def test_other_columns_keep_their_values_and_types(tmp_path: Path) -> None:
    extra = [
        {"number": 3, "when": "2024-05-01", "flag": True, "pair": [1, 2], "test": {"in": 1, "out": ["a"]}},
        {"number": 4, "when": "1", "flag": False, "pair": [], "test": {"in": 2, "out": []}},
        {"when": "", "pair": [3]},
    ]
    rows = [{"problem": f"p{i}", "answer": "1", **row} for i, row in enumerate(extra)]
    found = load_problems(jsonl(tmp_path / "p.jsonl", *map(json.dumps, rows)))
    for name in ("number", "when", "flag", "pair", "test"):
        assert [row[name] for row in found] == [row.get(name) for row in extra], name
    kept = found.filter(lambda row: row["problem"] != "p0").map(lambda row: {"prompt": row["problem"]})
    assert [row["test"] for row in kept] == [extra[1]["test"], None]


def test_columns_of_several_types_become_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        '{"problem": "p", "answer": 1, "mixed": "070", "nested": {"a": 1.50}}',
        '{"problem": "q", "answer": 1, "mixed": 1e-7, "nested": {"b": "070"}}',
        '{"problem": "r", "answer": 1, "mixed": true, "nested": "070"}',
    ]
    with caplog.at_level(logging.INFO):
        found = load_problems(jsonl(tmp_path / "p.jsonl", *lines))
    found = found.map(lambda row: {"prompt": row["problem"]})
    assert found["mixed"] == ["070", "1e-7", "true"]
    assert [json.loads(text) for text in found["nested"]] == [{"a": 1.5}, {"b": "070"}, "070"]
    assert "'mixed' holds values of several types: rewards get them as text" in caplog.text
    assert "'nested' holds values of several types: rewards get them as JSON text" in caplog.text


def test_columns_that_no_data_set_holds_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"problem": "p", "answer": "1", "day": datetime.date(2024, 5, 1), "completion": "c"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
    with caplog.at_level(logging.INFO):
        found = load_problems(str(tmp_path / "p.parquet"))
    assert set(found.column_names) == {"problem", "answer", "source"}
    assert "'day' is not passed to rewards: it holds date" in caplog.text and "'completion'" in caplog.text


@given(st.dictionaries(st.sampled_from(FIELDS), st.from_regex(r"[a-z_ ]*[a-z]", fullmatch=True)))
def test_columns_are_read_as_they_are_written(columns: dict[str, str]) -> None:
    columns = {field: name.strip() for field, name in columns.items()}
    assert parse_columns(columns) == parse_columns(columns_text(columns)) == columns


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("problem", "has no '='"),
        ("problm=q", "did you mean 'problem'"),
        ("problem=a,problem=b", "not exactly one column"),
        ("problem=", "not exactly one column"),
        ({"problem": 3}, "not exactly one column"),
    ],
)
def test_columns_that_mean_nothing(given: Any, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        parse_columns(given)


def test_known_sources_have_their_own_columns() -> None:
    with pytest.raises(SteerError, match="'arithmetic' has its own"):
        load_problems("arithmetic", columns={"problem": "q"})


# ---- chats as prompts


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("template", ["boxed", "plain"])
def test_a_chat_is_laid_out_as_it_is(name: str, template: str) -> None:
    tokens = tokenizer(STYLES[name].template)
    text = format_prompt(CHAT, tokens, PromptSpec(template))
    assert text.count("Be brief.") == text.count("What is 2+2?") == 1 and "boxed" not in text
    assert text.endswith(STYLES[name].ending)
    if name != "reads the last turn alone":
        user = format_prompt(CHAT[1:], tokens, PromptSpec(template, prefix="So", examples=(("1+1", "2"),)))
        assert user.index("1+1") < user.index("What is 2+2?") and user.endswith("So")
    plain = tokens.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=True)
    assert format_prompt(CHAT[1:], tokens).removeprefix("<s>") == plain.lstrip().removeprefix("<s>")


def test_a_chat_needs_a_chat_template(tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(SteerError, match="a conversational prompt needs a chat template"):
        format_prompt(CHAT, tiny_tokenizer, PromptSpec("plain"))


# ---- grading against several answers

answers = st.lists(
    st.sampled_from(["1", "2", "0.5", r"\frac12", "x", "3,000", "1/2"]), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def grader():
    with MathGrader() as made:
        yield made


@settings(deadline=None, max_examples=50)
@given(answers, st.sampled_from(["1", "2", "0.5", "1/2", "3000", "y", ""]))
def test_right_means_that_any_answer_is_matched(grader: MathGrader, golds: list[str], given: str) -> None:
    text = rf"\boxed{{{given}}}"
    (together,) = grader.check([text], [golds])
    alone = grader.check([text] * len(golds), golds)
    assert together.correct == any(verdict.correct for verdict in alone)
    if not together.correct:
        assert together == alone[0]


def test_the_reward_reads_all_answers(grader: MathGrader) -> None:
    reward = Correctness(grader)
    texts = [r"\boxed{2}", r"\boxed{3}"]
    assert reward([""] * 2, texts, answer=["1", "1"], golds=[["1", "2"], ["1", "2"]]) == [1.0, -1.0]
    with pytest.raises(SteerError, match="completion 1 has no reference answer"):
        grader.check(texts, ["1", []])

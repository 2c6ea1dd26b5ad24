import json
import logging

import datasets
import pyarrow.parquet
import pytest
from helpers.paths import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.tasks.data import heldout_source, load_problems

REAL = SHARED / "data"


def write(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


ROWS = [
    {"problem": "One  plus\none?", "answer": 2, "level": "Level 5", "type": "Algebra", "extra": 1},
    {"problem": "One plus one? ", "answer": "2", "level": 5.0},
    {"problem": "Half of one?", "answer": 0.5, "level": 1, "source": "mine"},
    {"problem": "A long problem " * 9, "answer": r"\frac12", "level": "Level ?"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files_come_in_the_record_form(tmp_path, suffix, caplog):
    path = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        rows = [{**r, "answer": str(r["answer"]), "level": str(r.get("level"))} for r in ROWS]
        datasets.Dataset.from_list([{k: r.get(k) for k in ROWS[0] | {"source": 0}} for r in rows]).to_parquet(
            path
        )
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        write(path, ROWS)
    with caplog.at_level(logging.INFO, logger="steer"):
        data = load_problems(str(path))
    assert data["answer"] == ["2", "0.5", r"\frac12"]
    assert data["level"] == [5, 1, None]
    assert data["source"] == [path.name, "mine", path.name]
    assert set(data.column_names) == {"problem", "answer", "source", "level", "type", "extra"}
    assert "dropped 1 of 4 problems: removing duplicates" in caplog.text


def test_filters_and_decontamination(tmp_path, caplog):
    path = write(tmp_path / "p.jsonl", ROWS)
    assert load_problems(path, levels=[5])["answer"] == ["2"]
    assert load_problems(path, max_chars=50)["answer"] == ["2", "0.5"]
    benchmark = write(tmp_path / "b.jsonl", [{"problem": " Half\tof one?", "answer": "1"}])
    with caplog.at_level(logging.INFO, logger="steer"):
        assert load_problems(path, exclude=[benchmark])["answer"] == ["2", r"\frac12"]
    assert f"dropped 1 of 3 problems: excluding {benchmark}" in caplog.text
    with pytest.raises(
        SteerError, match=r"4 read, 3 after removing duplicates, 1 after keeping levels \[5\], 0 after"
    ):
        load_problems(path, levels=[5], max_chars=3)


def test_limit_shuffles_only_when_it_cuts(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"problem": f"p{i}", "answer": i} for i in range(50)])
    whole = load_problems(path)["problem"]
    assert whole == load_problems(path, limit=50, seed=3)["problem"] == [f"p{i}" for i in range(50)]
    some = load_problems(path, limit=10, seed=3)["problem"]
    assert len(set(some)) == 10 and some != whole[:10]
    assert (
        some == load_problems(path, limit=10, seed=3)["problem"] != load_problems(path, limit=10)["problem"]
    )
    with pytest.raises(SteerError, match="limit is 0"):
        load_problems(path, limit=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"problem": "a", "answer": "1"}\n\n{"problem": ', r"p.jsonl, line 3 is not JSON"),
        (
            "p.jsonl",
            '{"problem": "a", "answer": "1"}\n\n{"question": "b", "answer": "1"}',
            "record 3: no 'problem'.*question, answer",
        ),
        ("p.jsonl", '{"problem": "a", "answer": " "}', "record 1: no 'answer'"),
        ("p.jsonl", '{"problem": "a", "answer": [["1"]]}', "record 1: no 'answer'"),
        ("p.jsonl", "[1]", "record 1: a list; expected fields"),
        ("p.jsonl", "", r"no problems left from .*0 read"),
        ("p.json", "{", r"p.json \(.*\) is not JSON"),
        ("p.json", "{}", "p.json holds a dict; expected a list"),
        ("p.parquet", "no parquet", "cannot read"),
        ("p.csv", "problem,answer", "unknown source.*expected arithmetic, gsm8k"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SteerError, match=message) as caught:
        load_problems(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_name(tmp_path):
    with pytest.raises(SteerError, match="no file"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(SteerError, match="unknown source 'gsm9k'; expected arithmetic, gsm8k, math"):
        load_problems("gsm9k")


HUB = {
    "openai/gsm8k": {"question": "Q?", "answer": "Work it.\n#### 1,234"},
    "DigitalLearningGmbH/MATH-lighteval": {
        "problem": "M?",
        "solution": r"First \boxed{7}, then $\boxed{\frac{1}{\{2\}}}$.",
        "level": "Level 3",
        "type": "Algebra",
    },
    "HuggingFaceH4/MATH-500": {
        "problem": "M?",
        "solution": "s",
        "answer": "x",
        "subject": "Algebra",
        "level": 2,
    },
    "agentica-org/DeepScaleR-Preview-Dataset": {"problem": "D?", "answer": "3", "solution": ""},
    "some/set": {"problem": "S?", "answer": "4"},
}


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(path, config=None, split=None):
        calls.append((path, config, split))
        return datasets.Dataset.from_list([HUB[path]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "call", "record"),
    [
        (
            "gsm8k",
            ("openai/gsm8k", "main", "train"),
            {"problem": "Q?", "answer": "1234", "solution": "Work it."},
        ),
        (
            "math",
            ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
            {"answer": r"\frac{1}{\{2\}}", "level": 3, "type": "Algebra", "source": "math"},
        ),
        ("math500", ("HuggingFaceH4/MATH-500", None, "test"), {"answer": "x", "level": 2, "type": "Algebra"}),
        ("deepscaler", ("agentica-org/DeepScaleR-Preview-Dataset", None, "train"), {"answer": "3"}),
        ("some/set", ("some/set", None, "train"), {"answer": "4", "source": "some/set"}),
    ],
)
def test_hub_sources(hub, source, call, record):
    data = load_problems(source)
    assert hub == [call]
    assert record.items() <= data[0].items()


def test_exclude_reads_files_with_the_same_columns_or_without(tmp_path):
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(4)]
    mine, alike = write(tmp_path / "mine.jsonl", rows), write(tmp_path / "alike.jsonl", rows[1:2])
    plain = write(tmp_path / "plain.jsonl", [{"problem": "2+1", "answer": "3"}])
    found = load_problems(mine, columns={"problem": "question"}, exclude=[alike, plain])
    assert found["problem"] == ["0+1", "3+1"]


def test_exclude_reads_hub_sets_with_the_same_columns_or_without(tmp_path, monkeypatch):
    rows = [{"question": "1+1", "answer": "2"}, {"question": "5+5", "answer": "10"}]
    mine = write(tmp_path / "mine.jsonl", rows)
    sets = {"some/alike": rows[:1], "some/plain": [{"problem": "5+5", "answer": "10"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *args, **kwargs: sets[path])
    for name, kept in (("some/alike", "5+5"), ("some/plain", "1+1")):
        assert load_problems(mine, columns={"problem": "question"}, exclude=[name])["problem"] == [kept]


def test_exclude_reads_the_test_split_unless_told(hub):
    with pytest.raises(SteerError, match="1 after excluding some/set, 0 after excluding math500"):
        load_problems("math", exclude=["gsm8k:train", "some/set", "math500"])
    assert [c[2] for c in hub] == ["train", "train", "test", "test"]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [(r"So \boxed 7 it is", "7"), (r"$\boxed{a}$ and $\fbox{b}$", "a"), (r"\boxed{ x }", "x")],
)
def test_answers_of_math_solutions(hub, monkeypatch, solution, answer):
    monkeypatch.setitem(HUB["DigitalLearningGmbH/MATH-lighteval"], "solution", solution)
    assert load_problems("math")["answer"] == [answer]


@pytest.mark.parametrize("solution", [r"\boxed{1", "none", r"\boxed{}", r"\boxed"])
def test_math_solutions_without_an_answer(hub, monkeypatch, solution):
    monkeypatch.setitem(HUB["DigitalLearningGmbH/MATH-lighteval"], "solution", solution)
    with pytest.raises(SteerError, match="math, record 1: no 'answer'"):
        load_problems("math")


def test_unreachable_hub(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        SteerError, match=r"cannot load split 'train' of 'openai/gsm8k'.*no route.*local .jsonl"
    ) as caught:
        load_problems("gsm8k")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "least"), [("gsm8k_train", 7000), ("math_train", 7000), ("math500", 490)])
def test_real_files(name, least):
    path = REAL / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    data = load_problems(str(path), exclude=[str(REAL / "aime24.jsonl")])
    assert len(data) >= least
    if name.startswith("math"):
        assert set(data["level"]) <= {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    "number",
    ["1e-7", "0.10", "1.0", "-0", "1234567890123456789012", "9" * 5000, "1E+2", "3.14159265358979323"],
)
def test_numbers_keep_the_text_that_the_file_has(tmp_path, suffix, number):
    record = f'{{"problem": "p", "answer": {number}, "level": 5}}'
    path = tmp_path / f"p{suffix}"
    path.write_text(record if suffix == ".jsonl" else f"[{record}]")
    (row,) = load_problems(str(path))
    assert row["answer"] == number and row["level"] == 5


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("NaN", "NaN is not a number"),
        ("-Infinity", "-Infinity is not a number"),
        (r'"\ud800"', "surrogate"),
        ("[" * 300 + "]" * 300, "nested"),
        ("[" * 100_000 + "]" * 100_000, "recursion|nested"),
        ('"1", "answer": "2"', "'answer' is there twice"),
    ],
)
def test_json_that_means_nothing_is_one_line_with_its_place(tmp_path, suffix, value, named):
    record = f'{{"problem": "p", "answer": {value}}}'
    path = tmp_path / f"p{suffix}"
    good = '{"problem": "q", "answer": "1"}'
    path.write_text(f"{good}\n{record}\n" if suffix == ".jsonl" else f"[{good}, {record}]")
    place = "p.jsonl, line 2" if suffix == ".jsonl" else r"p.json \(.*\)"
    with pytest.raises(SteerError, match=rf"^{place} is not JSON \(.*({named})") as caught:
        load_problems(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("number", "text"),
    [(7.0, "7"), (0.5, "0.5"), (1e-7, "0.0000001"), (1e22, "1" + "0" * 22), (-2.5e-8, "-0.000000025")],
)
def test_floats_of_a_typed_column_are_written_out(tmp_path, number, text):
    path = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["p"], "answer": [number]}), path)
    assert load_problems(path)[0]["answer"] == text


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_float_that_is_no_number_is_refused(tmp_path, number):
    path = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["p"], "answer": [number]}), path)
    with pytest.raises(SteerError, match=f"record 1: 'answer' is {number}"):
        load_problems(path)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "problem": st.text(min_size=1),
                "answer": st.one_of(st.integers(), st.floats(), st.text("ab1"), st.none()),
            }
        ),
        max_size=3,
    ),
    st.binary(max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, records, noise):
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    lines = [json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join([*lines, noise]))
    try:
        rows = load_problems(str(path))
    except SteerError as error:
        assert "\n" not in str(error)
    else:
        assert all(row["answer"] not in ("nan", "inf", "-inf", "NaN", "Infinity") for row in rows)


def test_golds_stay_as_the_file_writes_them(tmp_path):
    """A reader that guesses types turns a date into a timestamp, and numbers beside strings into neither."""
    golds = ['"2024-05-01"', '"070"', "1e-7", "7", '"7"', '"x = 1"', "0.50", '"true"']
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"problem": "p{i}", "answer": {g}}}\n' for i, g in enumerate(golds)))
    assert load_problems(str(path))["answer"] == [gold.strip('"') for gold in golds]


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        ("arithmetic", None, "arithmetic"),
        ("arithmetic", "gsm8k", "gsm8k"),
        ("arithmetic", "none", None),
        ("mine.jsonl", None, None),
        ("mine.jsonl", "none", None),
        ("mine.jsonl", "arithmetic", "arithmetic"),
        (None, None, None),
    ],
)
def test_the_source_of_held_out_problems(
    train: str | None, held_out: str | None, expected: str | None
) -> None:
    assert heldout_source(train, held_out) == expected

"""Generated arithmetic: right answers, and splits that never overlap."""

import json
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.data import load_problems

shapes = st.builds(
    Arithmetic,
    operators=st.sampled_from(["+", "-", "*", "+-", "+-*", "*-"]),
    digits=st.integers(1, 4),
    terms=st.integers(2, 5),
    problems=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)


def expression(record):
    return re.fullmatch(r"What is (.+)\?", record["problem"])[1]


@given(shapes, st.sampled_from(["train", "heldout"]))
@settings(max_examples=40, deadline=None)
def test_arithmetic_answers_are_right(arithmetic, split):
    records = arithmetic.generate(split)
    assert len({r["problem"] for r in records}) == len(records) == arithmetic.problems
    for record in records:
        assert record["answer"] == str(eval(expression(record)))
        assert record["solution"] == f"{expression(record)} = {record['answer']}"
        operands = re.findall(r"\d+", record["problem"])
        assert len(operands) == arithmetic.terms
        assert all(1 <= int(n) < 10**arithmetic.digits for n in operands)
        assert record["level"] == arithmetic.digits and record["source"] == "arithmetic"
    assert records == arithmetic.generate(split)


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_splits_never_overlap_even_reordered(seed, other):
    def unordered(records):  # sums only, so the sorted operands are the problem
        return {tuple(sorted(re.findall(r"\d+", r["problem"]))) for r in records}

    fields = {"operators": "+", "digits": 1, "terms": 3}
    train = Arithmetic(**fields, problems=200, seed=seed).generate("train")
    held = Arithmetic(**fields, problems=60, seed=other).generate("heldout")
    assert not unordered(train) & unordered(held)


def test_commuted_products_and_sums_are_one_problem_to_the_split():
    sides = {"train": set(), "heldout": set()}
    for split, seen in sides.items():
        arithmetic = Arithmetic(operators="+*", digits=1, terms=3, problems=200, heldout=0.5)
        seen.update(map(expression, arithmetic.generate(split)))
    for text in sides["train"]:
        if found := re.fullmatch(r"(\d) \+ (\d) \* (\d)", text):
            a, b, c = found.groups()
            assert not {f"{b} * {c} + {a}", f"{c} * {b} + {a}", f"{a} + {c} * {b}"} & sides["heldout"]


def test_heldout_share_and_order_of_subtraction():
    every = {
        split: Arithmetic(operators="-", digits=2, problems=count, heldout=0.3).generate(split)
        for split, count in (("train", 6000), ("heldout", 2500))
    }
    assert {expression(r) for r in every["train"]}.isdisjoint(expression(r) for r in every["heldout"])
    assert any(int(r["answer"]) < 0 for r in every["train"])
    assert len(Arithmetic(operators="-", digits=1, problems=8, heldout=0.2).generate("heldout")) == 8


def test_arithmetic_does_not_depend_on_the_process():
    here = Arithmetic(operators="+-*", digits=3, terms=4, problems=5, seed=7).generate("train")
    code = (
        "import json; from steer.tasks.arithmetic import Arithmetic as A;"
        "print(json.dumps(A(operators='+-*', digits=3, terms=4, problems=5, seed=7).generate('train')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(out.stdout) == here
    # pinned, so that another Python version or an edit cannot change the data silently
    assert [expression(r) for r in Arithmetic(problems=3).generate()] == PINNED


PINNED = ["7 + 64", "31 - 5", "28 + 37"]


@pytest.mark.parametrize(("split", "heldout"), [("heldout", 0.002), ("train", 0.998)])
def test_a_small_share_of_a_large_space_is_found(split, heldout):
    found = Arithmetic(digits=4, terms=3, problems=30, heldout=heldout).generate(split)
    assert len({expression(record) for record in found}) == 30


def test_too_few_distinct_problems():
    with pytest.raises(
        SteerError, match=r"only [5-7][0-9] distinct train problems found.*500 were asked for"
    ):
        Arithmetic(operators="+", digits=1, problems=500).generate("train")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("operators", bad) for bad in ("+/", "", "++")],
        *[("digits", bad) for bad in (0, 5, 1.5)],
        *[("terms", bad) for bad in (1, 6)],
        ("problems", 0),
        *[("heldout", bad) for bad in (0.0, 1.0)],
    ],
)
def test_arithmetic_fields_are_checked(field, value):
    with pytest.raises(SteerError, match=f"arithmetic {field} (is|are) "):
        Arithmetic(**{field: value})


def test_arithmetic_as_a_source():
    data = load_problems("arithmetic", arithmetic=Arithmetic(problems=20))
    held = load_problems("arithmetic", "heldout", arithmetic=Arithmetic(problems=20))
    assert len(data) == 20 and set(data["problem"]).isdisjoint(held["problem"])
    assert data[0]["level"] == 2 and isinstance(data[0]["answer"], str)
    with pytest.raises(SteerError, match="arithmetic split is 'dev'"):
        Arithmetic().generate("dev")

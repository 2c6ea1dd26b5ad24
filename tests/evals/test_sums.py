"""The study of sums: no sum is on two sides, in whatever order, and the solutions add up."""

from __future__ import annotations

import hashlib

import pytest

from evals.sums import split, worked


def sums(rows: list[dict[str, str]]) -> set[tuple[tuple[str, str], ...]]:
    found = set()
    for row in rows:
        first, *rest = row["problem"].rstrip("?").split()[2:]
        found.add(tuple(sorted([("+", first), *zip(rest[::2], rest[1::2], strict=True)])))
    return found


@pytest.mark.parametrize("terms", [2, 5])
def test_no_sum_is_on_two_sides(terms: int) -> None:
    made = split(500, 40, 100, terms)
    assert {name: len(rows) for name, rows in made.items()} == {"train": 500, "validation": 40, "test": 100}
    train, validation, test = (sums(made[name]) for name in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    assert made == split(500, 40, 100, terms)
    for row in made["test"]:
        lines = row["solution"].splitlines()
        assert len(lines) == terms - 1
        assert lines[-1].endswith(f" = {row['answer']}")
        assert str(eval(row["problem"].removeprefix("What is ").rstrip("?"))) == row["answer"]
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right)


def test_worked() -> None:
    assert worked("What is 3 + 4 - 9 - 20?") == "3 + 4 = 7\n7 - 9 = -2\n-2 - 20 = -22"


def test_the_problems_of_committed_results() -> None:
    """The test problems that the committed gates were measured on, whatever is changed here."""
    rows = "".join(row["problem"] for row in split(3000, 400, 1000)["validation"])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "e450dcdf0ca0ddba"

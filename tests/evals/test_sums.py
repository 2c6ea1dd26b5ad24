"""The study of sums: no sum is on two sides, in whatever order."""

from __future__ import annotations

from evals.sums import split


def sums(rows: list[dict[str, str]]) -> set[tuple[str, ...]]:
    parts = [row["problem"].rstrip("?").split()[2:] for row in rows]
    return {(o, *(sorted((a, b)) if o == "+" else (a, b))) for a, o, b in parts}


def test_no_sum_is_on_two_sides() -> None:
    made = split(500, 40, 100)
    assert {name: len(rows) for name, rows in made.items()} == {"train": 500, "validation": 40, "test": 100}
    train, validation, test = (sums(made[name]) for name in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test
    assert made == split(500, 40, 100)
    first, operator, second = made["test"][0]["problem"].rstrip("?").split()[2:]
    assert made["test"][0]["answer"] == str(int(first) + int(second) * (1 if operator == "+" else -1))

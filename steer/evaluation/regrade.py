"""The lenient grades of runs that were made before answers were graded leniently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.evaluation.store import references
from steer.tasks.grading import MathGrader
from steer.tasks.lenient import extract_lenient

# What the grades are made from.
NEEDED = ("benchmark", "problem", "text", "correct", "how", "lenient")


def regrade(columns: dict[str, list[Any]], problems: Sequence[dict[str, Any]]) -> None:
    """
    Fill the gaps in `columns["lenient"]`. An answer in a box has its verdict already; the others are read
    again from their texts, and stay None where the file does not keep the text (`steer.evaluation.pack`).
    """
    lenient = columns["lenient"]
    missing = [row for row, verdict in enumerate(lenient) if verdict is None]
    boxed = [row for row in missing if columns["how"][row] != "no_answer"]
    for row in boxed:
        lenient[row] = columns["correct"][row]
    unread = [row for row in missing if lenient[row] is None and columns["text"][row]]
    if not unread:
        return
    golds = {(p["benchmark"], p["id"]): references(p) for p in problems}
    with MathGrader() as grader:
        verdicts = grader.check(
            [columns["text"][row] for row in unread],
            [golds[columns["benchmark"][row], columns["problem"][row]] for row in unread],
            extract_lenient,
        )
    for row, verdict in zip(unread, verdicts, strict=True):
        lenient[row] = verdict.correct

"""The lenient grades of runs that were made before answers were graded leniently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.evaluation.store import GREEDY, references
from steer.tasks.grading import MathGrader
from steer.tasks.lenient import extract_lenient

# What the grades are made from.
NEEDED = ("benchmark", "problem", "sample", "text", "correct", "how", "lenient")


def regrade(
    columns: dict[str, list[Any]], problems: Sequence[dict[str, Any]], kept: int | None = None
) -> None:
    """
    Fill the gaps in `columns["lenient"]`. An answer in a box has its verdict already; the others are read
    again from their texts, and stay None where the text is not kept: `kept` is how many samples of a problem
    certainly have theirs (`steer.evaluation.pack`), None for all.
    """
    lenient = columns["lenient"]
    missing = [row for row, verdict in enumerate(lenient) if verdict is None]
    boxed = [row for row in missing if columns["how"][row] != "no_answer"]
    for row in boxed:
        lenient[row] = columns["correct"][row]
    unread = [row for row in missing if lenient[row] is None]
    if kept is not None:  # an empty text of a later sample is no empty answer
        unread = [r for r in unread if columns["text"][r] or columns["sample"][r] < GREEDY + 1 + kept]
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

"""
A comparison's best elicited base: of all untrained methods (as prompted, with examples, more room, system
prompts, forced openings) the one that is best when its answers are read leniently. Others are compared with
it leniently too, so that nobody gains by the form of the answer alone. It is chosen on the problems that it
is scored on, which favours the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from steer.evaluation import scores
from steer.evaluation.collect import Cell, Collection
from steer.evaluation.store import references
from steer.tasks.elicited import constant_answer
from steer.tasks.grading import MathGrader


def best(cells: Sequence[Cell]) -> Cell | None:
    """The best elicited base among the methods of one benchmark and decoding; None where all are trained."""
    bases = [cell for cell in cells if cell.untrained and cell.read]
    return max(bases, key=lambda cell: float(cell.lenient.mean()), default=None)


def lenient_columns(cell: Cell, base: Cell | None, reference: Cell | None) -> dict[str, Any]:
    """What a row of `scores.json` holds of a method's lenient grades and of its gain over the best base."""
    if not cell.read:
        return {}
    columns: dict[str, Any] = {
        "lenient": asdict(scores.estimate(cell.lenient)),
        "lenient_by_seed": dict(zip(cell.method.seeds, cell.lenient.mean(1).tolist(), strict=True)),
        "lenient_samples": cell.read,
    }
    if base is None:
        return columns
    columns["best_base"] = base.method.name
    if cell is not base:
        columns["elicited_gain"] = asdict(scores.compare(cell.lenient, base.lenient))
        if reference is not None and reference is not cell and reference.read:
            share = scores.gain_share(cell.lenient, base.lenient, reference.lenient)
            columns["elicited_share"] = asdict(share) if share else None
            columns["reference"] = reference.method.name
    return columns


def constant_rows(collection: Collection) -> list[dict[str, Any]]:
    """The best constant answer of each benchmark, and its score on the compared problems."""
    rows = []
    with MathGrader() as grader:
        for benchmark in collection.benchmarks():
            cells = collection.cells(benchmark, True) or collection.cells(benchmark, False)
            if not cells:
                continue
            asked = [collection.problems[benchmark][key] for key in cells[0].problems]
            answer = constant_answer(str(problem["answer"]) for problem in asked)
            golds = [references(problem) for problem in asked]
            verdicts = grader.check([rf"\boxed{{{answer}}}"] * len(golds), golds)
            right = np.array([[verdict.correct for verdict in verdicts]], dtype=float)
            rows.append(
                {
                    "benchmark": benchmark,
                    "method": f"always {answer}",
                    "problems": len(golds),
                    "accuracy": asdict(scores.estimate(right)),
                }
            )
    return rows


def notes(collection: Collection, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What has to be known to read the lenient columns."""
    lines = []
    if not any(method.conditions["asked"] for method in collection.methods):
        lines.append(
            "no base was asked with worked examples: part of a gain over the base may be form alone; "
            "`steer eval --examples 8` measures that"
        )
    for benchmark, decoding in dict.fromkeys((row["benchmark"], row["decoding"]) for row in rows):
        of = [row for row in rows if (row["benchmark"], row["decoding"]) == (benchmark, decoding)]
        short = [row for row in of if row.get("lenient_samples", 0) < row["samples"]]
        if short:
            counts = ", ".join(f"{row['method']} {row.get('lenient_samples', 0)}" for row in short)
            lines.append(
                f"{benchmark}, {decoding}: lenient grades are on the first samples, whose texts are kept "
                f"({counts}, of {short[0]['samples']})"
            )
    return lines


def sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The best base of each benchmark and decoding, and what the trained methods gain over it."""
    lines = []
    reference = next((row["reference"] for row in rows if "reference" in row), None)
    for row in rows:
        if row.get("best_base") == row["method"]:
            e = row["lenient"]
            how = "greedily" if row["decoding"] == "greedy" else "sampled"
            lines.append(
                f"The best elicited base on {row['benchmark']}, {how}, is {row['method']}: {e['value']:.3f} "
                f"read leniently ({e['low']:.3f} to {e['high']:.3f})."
            )
        if "elicited_gain" in row and row["parameters"]:
            d, verdict = row["elicited_gain"]["difference"], row["elicited_gain"]["verdict"]
            said = "not shown to differ from" if verdict == scores.UNDECIDED else f"{verdict} than"
            text = (
                f"{row['method']} on {row['benchmark']}, {row['decoding']}: {said} the best elicited base, "
                f"both read leniently ({d['value']:+.3f}, {d['low']:+.3f} to {d['high']:+.3f})"
            )
            if row["method"] == reference and verdict != scores.BETTER:
                text += "; shares of its gain over that base are undefined"
            lines.append(f"{text}.")
    return lines

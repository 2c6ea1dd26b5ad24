"""
Methods side by side: a table with intervals, plots, and one page that a person can read.

    steer compare runs/eval runs/eval-full --reference full --out runs/page
    steer compare --config compare-tiny --help    # trains and measures the methods first

Writes `table.md`, `scores.json`, `accuracy.png`, `parameters.png`, `lengths.png` and `index.html`, which
holds everything and needs nothing else. Every method is paired with `--base`, problem by problem, with the
best elicited base (`steer.evaluation.best_base`), and all trained methods with one another; "better" and
"worse" are written only when the 95 % interval of the difference and its test both say so. What was trained
with one seed is one run: its intervals are over problems only, and the verdict is on that run, not on the
method.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from steer.arguments import Help
from steer.errors import SteerError, print_any_text
from steer.evaluation import best_base, scores, task_effects
from steer.evaluation.collect import Cell, Collection, collect
from steer.evaluation.tables import brevity, caution, pairs_table, sentences, single_runs, table
from steer.files import replace_files
from steer.outputs import add_force, output
from steer.stats import benjamini_hochberg


def score(collection: Collection, base: str, reference: str | None = None) -> list[dict[str, Any]]:
    """
    One dict for each benchmark, method and way of decoding, as `scores.json` holds them. Shares are in [0,
    1], lengths in tokens, estimates have value, low and high.
    """
    names = [method.name for method in collection.methods]
    for wanted in (base, reference):
        if wanted is not None and wanted not in names:
            raise SteerError(f"no method {wanted!r} in these runs; they have {', '.join(names)}")
    rows = []
    for benchmark in collection.benchmarks():
        for greedy in (True, False):
            cells = {cell.method.name: cell for cell in collection.cells(benchmark, greedy)}
            elicited, whole = best_base.best(list(cells.values())), cells.get(reference or "")
            for cell in cells.values():
                row = _row(benchmark, greedy, cell, cells.get(base), whole)
                rows.append(row | best_base.lenient_columns(cell, elicited, whole))
    if not rows:
        raise SteerError(
            "the runs hold no complete answers; give the same `steer eval` command again to go on with them"
        )
    return rows


def _row(
    benchmark: str, greedy: bool, cell: Cell, base: Cell | None, reference: Cell | None
) -> dict[str, Any]:
    correct = cell.array("correct")  # (seeds, problems, samples)
    seeds, problems, samples = correct.shape
    row: dict[str, Any] = {
        "benchmark": benchmark,
        "method": cell.method.name,
        "decoding": "greedy" if greedy else "sampled",
        "temperature": 0.0 if greedy else cell.method.conditions["temperature"],
        "parameters": cell.method.parameters,
        "seeds": seeds,
        "problems": problems,
        "samples": samples,
        "accuracy": asdict(scores.estimate(cell.values)),
        "by_seed": dict(zip(cell.method.seeds, cell.values.mean(1).tolist(), strict=True)),
        "tokens": float(cell.array("tokens").mean()),
        "truncated": float(cell.array("truncated").mean()),
        "unanswered": float((cell.array("how") == "no_answer").mean()),
    }
    if (loop := cell.loop) is not None:
        broken = loop | (cell.array("how") == "no_answer") | cell.array("truncated")
        row |= {"loops": float(loop.mean()), "broken": float(broken.mean())}
    if found := cell.method.side_effects:
        row["side_effects"] = {name: fmean(one[name] for one in found) for name in found[0]}
    if not greedy:
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < samples] + [samples]
        flat = correct.reshape(seeds * problems, samples)
        row["pass"] = {str(k): float(scores.pass_at_k(flat, k).mean()) for k in ks}
        answers = cell.array("answer").reshape(seeds * problems, samples)
        row["majority"] = float(scores.maj_at_k(flat, answers.tolist()).mean())
    row["one_seed"] = _one_seed(cell)
    if base is not None and base is not cell:
        row["gain"] = asdict(scores.compare(cell.values, base.values))
        row["one_seed"] = _one_seed(cell) or _one_seed(base)
        difference = cell.values.mean(0) - base.values.mean(0)
        row["gained"], row["lost"] = int((difference > 0).sum()), int((difference < 0).sum())
        if reference is not None and reference is not cell:
            share = scores.gain_share(cell.values, base.values, reference.values)
            row["gain_share"] = asdict(share) if share else None
            row["reference"] = reference.method.name
    return row


def _one_seed(cell: Cell) -> bool:
    """Whether this is a single run of training, so that nothing is known of other seeds."""
    return cell.method.parameters > 0 and len(cell.values) == 1


def pairs(collection: Collection) -> list[dict[str, Any]]:
    """
    Every two trained methods against each other, paired over the problems (`scores.compare`): one dict for
    each benchmark, way of decoding and pair, as `scores.json` holds them. `corrected_p` is corrected for the
    number of pairs of that benchmark and decoding (Benjamini and Hochberg), and the verdict goes by it.
    """
    rows: list[dict[str, Any]] = []
    for benchmark in collection.benchmarks():
        for greedy in (True, False):
            cells = [cell for cell in collection.cells(benchmark, greedy) if cell.method.parameters]
            both = list(combinations(cells, 2))
            compared = [scores.compare(one.values, other.values) for one, other in both]
            corrected = benjamini_hochberg([c.p for c in compared])
            for (one, other), c, p in zip(both, compared, corrected, strict=True):
                rows.append(
                    {
                        "benchmark": benchmark,
                        "decoding": "greedy" if greedy else "sampled",
                        "method": one.method.name,
                        "other": other.method.name,
                        "seeds": [len(one.values), len(other.values)],
                        "one_seed": _one_seed(one) or _one_seed(other),
                        **asdict(c),
                        "corrected_p": p,
                        "verdict": scores.verdict(c.difference.low, c.difference.high, p),
                    }
                )
    return rows


def report(
    folders: Sequence[str | Path],
    base: str = "base",
    reference: str | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """
    Write scores, plots and page of these runs to `out`, or the scores alone to a single run; then print the
    table.
    """
    rows, text = write(folders, base, reference, out)
    print(text)
    return rows


def write(
    folders: Sequence[str | Path],
    base: str = "base",
    reference: str | None = None,
    out: str | Path | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """The files of `report`. Returns the scores, and the text to print."""
    collection = collect(folders)
    base = collection.base(base)
    rows = score(collection, base, reference)
    against = pairs(collection)
    constants = best_base.constant_rows(collection)
    tasks = task_effects.rows(collection, base)
    collection.notes += brevity(rows, base) + single_runs(rows) + best_base.notes(collection, rows)
    told = [f"\n{table(rows, constants, base)}\n"]
    told += [f"{pairs_table(against)}\n"] if against else []
    told += [f"{task_effects.table(tasks, base)}\n"] if tasks else []
    said = [*sentences(rows, base), *best_base.sentences(rows), caution(rows, base), *collection.notes]
    told += [text for text in said if text]
    made = {
        "base": base,
        "reference": reference,
        "rows": rows,
        "constants": constants,
        "pairs": against,
        **({"side_effect_tasks": tasks} if tasks else {}),
        "notes": collection.notes,
        "sessions": collection.sessions,
    }
    target = Path(out if out is not None else folders[0])
    files = {"scores.json": (json.dumps(made, indent=2) + "\n").encode()}
    if out is not None:
        from steer.evaluation import page, plots

        figures = plots.draw(collection, rows)
        blocks = [table(rows, constants, base), *best_base.sentences(rows), pairs_table(against)]
        blocks.append(task_effects.table(tasks, base))
        files["table.md"] = ("\n\n".join(block for block in blocks if block) + "\n").encode()
        files |= {f"{name}.png": png for name, (png, _) in figures.items()}
        files["index.html"] = page.render(
            collection, rows, base, {name: svg for name, (_, svg) in figures.items()}, constants
        ).encode()
    try:
        target.mkdir(parents=True, exist_ok=True)
        replace_files({target / name: content for name, content in files.items()})
    except OSError as error:
        raise SteerError(f"cannot write to {target}: {error.strerror}; the runs are untouched") from error
    return rows, "\n".join(told)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="steer compare",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("runs", nargs="+", help="folders that `steer eval` wrote")
    parser.add_argument(
        "--base", default="base", help="the method that the others are compared with (default: base)"
    )
    parser.add_argument(
        "--reference", help="the method whose gain is the whole, e.g. full: shares of it are shown"
    )
    parser.add_argument("--out", required=True, help="folder for the table, the plots and the page")
    add_force(parser)
    args = parser.parse_args(argv)
    print_any_text()
    try:
        with output(args.out, args.replace, *args.runs, folder=True):
            _, text = write(args.runs, args.base, args.reference, args.out)
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{text}\n\npage  {Path(args.out) / 'index.html'}")  # a reader that is gone undoes nothing
    return 0

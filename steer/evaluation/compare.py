"""
Methods side by side: a table with intervals, plots, and one page that a person can read.

    python -m steer.evaluation.compare runs/eval runs/eval-full --reference full --out runs/page

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
from typing import Any

from steer.errors import SteerError, print_any_text
from steer.evaluation import best_base, scores
from steer.evaluation.collect import Cell, Collection, collect
from steer.evaluation.scores import Estimate
from steer.files import replace_file
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
            "the runs hold no complete answers; run steer.evaluation.run again to go on with them"
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
            found = [scores.compare(one.values, other.values) for one, other in both]
            corrected = benjamini_hochberg([c.p for c in found])
            for (one, other), c, p in zip(both, found, corrected, strict=True):
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


# ---- as text


def table(rows: Sequence[dict[str, Any]], constants: Sequence[dict[str, Any]] = ()) -> str:
    """The scores as Markdown, a table for each benchmark; `constants` are `best_base.constant_rows`'s."""
    blocks = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        of_benchmark = [row for row in rows if row["benchmark"] == benchmark]
        lines = [f"**{benchmark}**, {of_benchmark[0]['problems']} problems", ""]
        shown = [cells(group) for group in by_method(of_benchmark)]
        shown += [constant_cells(row) for row in constants if row["benchmark"] == benchmark]
        heads = columns(shown)
        grid = [heads, *[[row.get(head, "") for head in heads] for row in shown]]
        widths = [max(len(row[i]) for row in grid) for i in range(len(heads))]
        for number, row in enumerate(grid):
            lines.append("| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |")
            if not number:
                lines.append("|" + "|".join("-" * (w + 2) for w in widths) + "|")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def by_method(rows: Sequence[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """The rows of one benchmark grouped by method: {"greedy": row, "sampled": row}, either may be missing."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["method"], {})[row["decoding"]] = row
    return list(groups.values())


def cells(group: dict[str, dict[str, Any]]) -> dict[str, str]:
    """One method's line of the table, by column."""
    one = next(iter(group.values()))
    shown = {"method": one["method"], "trained numbers": f"{one['parameters']:,}"}
    if one["seeds"] > 1:
        shown["method"] += f" ({one['seeds']} seeds)"
    for decoding, row in group.items():
        name = "greedy" if decoding == "greedy" else "sampled"
        shown[name] = interval(row["accuracy"])
        if row["seeds"] > 1:
            shown[f"{name}, each seed"] = " ".join(f"{value:.3f}" for value in row["by_seed"].values())
        shown[f"{name} against base"] = gain(row)
        if row.get("gain_share"):
            shown[f"{name}, share of gain"] = interval(row["gain_share"])
        if "lenient" in row:
            shown[f"{name}, lenient"] = interval(row["lenient"])
            shown[f"{name} against elicited base"] = elicited_gain(row)
        if row.get("elicited_share"):
            shown[f"{name}, share of gain over elicited base"] = interval(row["elicited_share"])
        if decoding == "sampled" and row["samples"] > 1:
            shown["pass@k"] = f"{row['pass'][str(row['samples'])]:.3f} (k={row['samples']})"
            shown["maj@k"] = f"{row['majority']:.3f}"
    last = group.get("sampled", one)
    shown["tokens"] = f"{last['tokens']:.0f}"
    shown["cut off"] = f"{last['truncated']:.1%}"
    shown["no answer"] = f"{last['unanswered']:.1%}"
    return shown


def constant_cells(row: dict[str, Any]) -> dict[str, str]:
    """The line of the best constant answer."""
    text = interval(row["accuracy"])
    return {"method": row["method"], "trained numbers": "0", "greedy": text, "greedy, lenient": text}


def columns(lines: Sequence[dict[str, str]]) -> list[str]:
    """The columns that these lines of a table have, in reading order."""
    order = ["method", "trained numbers"]
    for name in ("greedy", "sampled"):
        order += [name, f"{name}, each seed", f"{name} against base", f"{name}, share of gain"]
        order += [f"{name}, lenient", f"{name} against elicited base"]
        order += [f"{name}, share of gain over elicited base"]
    order += ["pass@k", "maj@k", "tokens", "cut off", "no answer"]
    return [head for head in order if any(head in line for line in lines)]


def interval(estimate: dict[str, float] | Estimate) -> str:
    e = estimate if isinstance(estimate, Estimate) else Estimate(**estimate)
    return f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})"


def gain(row: dict[str, Any]) -> str:
    """The paired difference to the base, with its interval and verdict; "" for the base itself."""
    if "gain" not in row:
        return ""
    return f"{difference(row['gain']['difference'])} {told(row['gain']['verdict'], row)}"


def elicited_gain(row: dict[str, Any]) -> str:
    """The paired difference to the best elicited base, both graded leniently."""
    if "elicited_gain" not in row:
        return "the best elicited base" if row.get("best_base") == row["method"] else ""
    found = row["elicited_gain"]
    return f"{difference(found['difference'])} {told(found['verdict'], row)}"


def difference(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


def told(verdict: str, row: dict[str, Any]) -> str:
    """A verdict with what it is a verdict on, where that is one run of training."""
    return f"{verdict} (one seed)" if row["one_seed"] and verdict != scores.UNDECIDED else verdict


def pairs_table(rows: Sequence[dict[str, Any]]) -> str:
    """Trained methods against each other, as Markdown; empty where there are no two."""
    if not rows:
        return ""
    lines = ["**Trained methods against each other**, paired over the problems", ""]
    lines.append("| benchmark | decoding | method | minus | difference | p, corrected | |")
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        names = " | ".join(row[key] for key in ("benchmark", "decoding", "method", "other"))
        lines.append(
            f"| {names} | {difference(row['difference'])} | {row['corrected_p']:.2g} | "
            f"{told(row['verdict'], row)} |"
        )
    return "\n".join(lines)


def sentences(rows: Sequence[dict[str, Any]], base: str) -> list[str]:
    """What the table says, in words: one sentence for each comparison."""
    found = []
    for row in rows:
        if "gain" not in row:
            continue
        d, verdict = row["gain"]["difference"], row["gain"]["verdict"]
        how = "greedily" if row["decoding"] == "greedy" else f"at temperature {row['temperature']:g}"
        said = f"{'this run is ' if row['one_seed'] else ''}{verdict} than {base}"
        if verdict == scores.UNDECIDED:
            said = f"not shown to differ from {base}"
        text = (
            f"{row['method']} on {row['benchmark']}, {how}: {said} ({d['value']:+.3f}, 95 % interval "
            f"{d['low']:+.3f} to {d['high']:+.3f}; {row['gained']} problems gained, {row['lost']} lost)"
        )
        if share := row.get("gain_share"):
            text += f"; {share['value']:.0%} of {row['reference']}'s gain ({share['low']:.0%} to "
            text += f"{share['high']:.0%})"
        found.append(text + ".")
    return found


def brevity(rows: Sequence[dict[str, Any]], base: str) -> list[str]:
    """A note for each benchmark where the length limit cut the base off more often than others."""
    notes = []
    for row in rows:
        if row["method"] != base:
            continue
        others = [r for r in rows if (r["benchmark"], r["decoding"]) == (row["benchmark"], row["decoding"])]
        if row["truncated"] >= 0.1 + min(r["truncated"] for r in others):
            notes.append(
                f"{row['benchmark']}, {row['decoding']}: the length limit cut off {row['truncated']:.0%} of "
                f"the answers of {base}, more than of others; part of a gain may be brevity, which {base} "
                "with a larger --max-new-tokens would show"
            )
    return notes


def single_runs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A note on the methods that were trained with one seed."""
    names = dict.fromkeys(row["method"] for row in rows if row["seeds"] == 1 and row["parameters"])
    if not names:
        return []
    return [
        f"one seed of training: {', '.join(names)}. Their intervals are over problems only; another seed of "
        "the same method may differ by more than they say, and no method is shown to be better than another"
    ]


def caution(rows: Sequence[dict[str, Any]]) -> str:
    count = sum("gain" in row for row in rows)
    return (
        f"{count} comparisons with the base, each at the 95 % level: about one in twenty of those without a "
        "real difference would show one by chance."
        if count > 1
        else ""
    )


# ---- the command


def report(
    folders: Sequence[str | Path],
    base: str = "base",
    reference: str | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """
    Print the table of these runs; write scores, plots and page to `out`, or the scores alone to a single
    run.
    """
    collection = collect(folders)
    if base not in [m.name for m in collection.methods] and base == "base":
        base = collection.methods[0].name
    rows = score(collection, base, reference)
    against = pairs(collection)
    constants = best_base.constant_rows(collection)
    collection.notes += brevity(rows, base) + single_runs(rows) + best_base.notes(collection, rows)
    print(f"\n{table(rows, constants)}\n")
    if against:
        print(f"{pairs_table(against)}\n")
    said = [*sentences(rows, base), *best_base.sentences(rows), caution(rows), *collection.notes]
    for text in said:
        if text:
            print(text)
    found = {
        "base": base,
        "reference": reference,
        "rows": rows,
        "constants": constants,
        "pairs": against,
        "notes": collection.notes,
        "sessions": collection.sessions,
    }
    target = Path(out if out is not None else folders[0])
    files = {"scores.json": (json.dumps(found, indent=2) + "\n").encode()}
    if out is not None:
        from steer.evaluation import page, plots

        figures = plots.draw(collection, rows)
        blocks = [table(rows, constants), *best_base.sentences(rows), pairs_table(against)]
        files["table.md"] = ("\n\n".join(block for block in blocks if block) + "\n").encode()
        files |= {f"{name}.png": png for name, (png, _) in figures.items()}
        files["index.html"] = page.render(
            collection, rows, base, {name: svg for name, (_, svg) in figures.items()}, constants
        ).encode()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(target / name, content)
    except OSError as error:
        raise SteerError(f"cannot write to {target}: {error.strerror}; the runs are untouched") from error
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m steer.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="folders that steer.evaluation.run wrote")
    parser.add_argument(
        "--base", default="base", help="the method that the others are compared with (default: base)"
    )
    parser.add_argument(
        "--reference", help="the method whose gain is the whole, e.g. full: shares of it are shown"
    )
    parser.add_argument("--out", required=True, help="folder for the table, the plots and the page")
    args = parser.parse_args(argv)
    print_any_text()
    try:
        report(args.runs, args.base, args.reference, args.out)
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\npage  {Path(args.out) / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

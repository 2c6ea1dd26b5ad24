"""The scores of a comparison as text: Markdown tables, cells, and sentences with their cautions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.evaluation import scores
from steer.evaluation.scores import Estimate


def table(
    rows: Sequence[dict[str, Any]], constants: Sequence[dict[str, Any]] = (), base: str = "base"
) -> str:
    """
    The scores as Markdown, a table for each benchmark; `constants` are `best_base.constant_rows`'s, and
    `base` is the method that the others are compared with.
    """
    blocks = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        of_benchmark = [row for row in rows if row["benchmark"] == benchmark]
        lines = [f"**{benchmark}**, {of_benchmark[0]['problems']} problems", ""]
        shown = [cells(group, base) for group in by_method(of_benchmark)]
        shown += [constant_cells(row) for row in constants if row["benchmark"] == benchmark]
        heads = columns(shown, base)
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


def cells(group: dict[str, dict[str, Any]], base: str = "base") -> dict[str, str]:
    """One method's line of the table, by column."""
    one = next(iter(group.values()))
    shown = {"method": one["method"], "trainable parameters": f"{one['parameters']:,}"}
    if one["seeds"] > 1:
        shown["method"] += f" ({one['seeds']} seeds)"
    for decoding, row in group.items():
        name = "greedy" if decoding == "greedy" else "sampled"
        shown[name] = interval(row["accuracy"])
        if row["seeds"] > 1:
            shown[f"{name}, each seed"] = " ".join(f"{value:.3f}" for value in row["by_seed"].values())
        shown[f"{name} against {base}"] = gain(row)
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
    if "broken" in last:
        shown["in a loop"], shown["broken"] = f"{last['loops']:.1%}", f"{last['broken']:.1%}"
    if effects := one.get("side_effects"):
        shown["KL to the base"] = f"{effects['kl']:.4g}"
        shown["perplexity"] = f"{effects['perplexity']:.4g} (base {effects['base_perplexity']:.4g})"
    return shown


def constant_cells(row: dict[str, Any]) -> dict[str, str]:
    """The line of the best constant answer."""
    text = interval(row["accuracy"])
    return {"method": row["method"], "trainable parameters": "0", "greedy": text, "greedy, lenient": text}


def columns(lines: Sequence[dict[str, str]], base: str = "base") -> list[str]:
    """The columns that these lines of a table have, in reading order."""
    order = ["method", "trainable parameters"]
    for name in ("greedy", "sampled"):
        order += [name, f"{name}, each seed", f"{name} against {base}", f"{name}, share of gain"]
        order += [f"{name}, lenient", f"{name} against elicited base"]
        order += [f"{name}, share of gain over elicited base"]
    order += ["pass@k", "maj@k", "tokens", "cut off", "no answer", "in a loop", "broken"]
    order += ["KL to the base", "perplexity"]
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
    gain = row["elicited_gain"]
    return f"{difference(gain['difference'])} {told(gain['verdict'], row)}"


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
    lines = []
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
        lines.append(text + ".")
    return lines


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


def named(base: str) -> str:
    """What a sentence calls the method that the others are compared with."""
    return "the base" if base == "base" else base


def caution(rows: Sequence[dict[str, Any]], base: str = "base") -> str:
    count = sum("gain" in row for row in rows)
    return (
        f"{count} comparisons with {named(base)}, each at the 95 % level: about one in twenty of those "
        "without a real difference would show one by chance."
        if count > 1
        else ""
    )


# ---- the command

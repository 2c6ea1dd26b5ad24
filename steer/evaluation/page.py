"""
One HTML page that holds a comparison: what it says in words, the table, the plots, the problems gained and
lost, and every kept answer beside the others'. It loads nothing from anywhere, and a content policy says
so.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from steer.evaluation import best_base, scores
from steer.evaluation.collect import Collection, Row
from steer.evaluation.tables import by_method, caution, cells, columns, constant_cells
from steer.pages import asset, json_data, render_page

# Answers beyond this many characters are left out, problems gained or lost last; a page must open quickly.
MAX_CHARACTERS = 12_000_000
SAMPLES_SHOWN = 2
LISTED = 30

_NOTES = {
    "unevaluated": ", still a sum to do",
    "timeout": ", grading timed out",
    "crash": ", grading crashed",
    "too_long": ", answer too long to be graded",
}


def render(
    collection: Collection,
    rows: Sequence[dict[str, Any]],
    base: str,
    figures: Mapping[str, str],
    constants: Sequence[dict[str, Any]] = (),
) -> str:
    """
    The whole page as text. `rows` are `compare.score`'s, `figures` SVG texts by name, `constants`
    `best_base.constant_rows`'s.
    """
    methods = sorted((m.name for m in collection.methods), key=lambda name: name != base)
    every = _items(collection, methods, base)
    items = every[: _fitting(every)]
    left_out = len(every) - len(items)
    script = asset("comparison.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    notes = [*collection.notes, caution(rows, base)]
    if left_out:
        notes.append(f"the answers to {left_out} problems are left out of this page to keep it small")
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    shown = [figures[name] for name in ("accuracy", "parameters", "lengths") if name in figures]
    return render_page(
        "comparison",
        title=f"{', '.join(methods[1:]) or base} against {base}" if len(methods) > 1 else base,
        # of characters that need no escape in an attribute
        policy=Markup(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"),
        style=asset("comparison.css"),
        script=script,
        base=base,
        conditions=_conditions(collection),
        gains=[
            _gains(rows, "gain", f"Gain over {base}"),
            _gains(rows, "elicited_gain", "Gain over the best elicited base, all read leniently"),
        ],
        sentences=best_base.sentences(rows),
        tables=[_table(rows, benchmark, base, constants) for benchmark in benchmarks],
        how_to_read=_how_to_read(rows),
        wide=len(benchmarks) > 1,
        figures=[Markup(svg) for svg in shown],
        changes=_gained_and_lost(_compared(collection, every), items, methods, base),
        notes=[note for note in notes if note],
        sessions=[_session(session) for session in collection.sessions],
        data=json_data(
            {
                "methods": methods,
                "seeds": {method.name: len(method.seeds) for method in collection.methods},
                "benchmarks": list(dict.fromkeys(item["benchmark"] for item in items)),
                "decodings": list(
                    dict.fromkeys(d for item in items for a in item["answers"].values() for d in a)
                ),
                "items": items,
            }
        ),
    )


def _conditions(collection: Collection) -> str:
    one = collection.methods[0].conditions
    models = dict.fromkeys(m.conditions["model"] for m in collection.methods)
    text = f"{', '.join(models)}; sampled at temperature {one['temperature']:g}"
    if one["top_p"] < 1:
        text += f", top-p {one['top_p']:g}"
    return f"{text}; seed {one['seed']}; engine {one['engine']}, {one['dtype']} precision"


def _session(session: dict[str, Any]) -> dict[str, str]:
    versions = ", ".join(f"{name} {number}" for name, number in session["versions"].items())
    minutes = f"{session['seconds'] / 60:.1f} minutes"
    facts = f"{session['completions']} answers in {minutes}, {session['started']}; {versions}"
    return {"command": session["command"], "facts": facts}


def _gains(rows: Sequence[dict[str, Any]], key: str, title: str) -> dict[str, Any]:
    """Each method's "gain" or "elicited_gain": a line a method, a column for each benchmark and decoding."""
    heads = list(dict.fromkeys((row["benchmark"], row["decoding"]) for row in rows))
    lines: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        if key in row:
            lines.setdefault(row["method"], {})[row["benchmark"], row["decoding"]] = _gain(row, key)
    nothing = {"value": "", "small": []}
    shown = [{"name": name, "cells": [line.get(h, nothing) for h in heads]} for name, line in lines.items()]
    return {"title": title, "heads": ["method", *(", ".join(head) for head in heads)], "rows": shown}


def _gain(row: dict[str, Any], key: str) -> dict[str, Any]:
    d, share = row[key]["difference"], row.get("gain_share" if key == "gain" else "elicited_share")
    small = [f"{d['low']:+.3f} to {d['high']:+.3f}"]
    if key == "gain":
        small.append(f"{row['gained']} problems gained, {row['lost']} lost")
    if share:
        of = f"{row['reference']}'s ({share['low']:.0%} to {share['high']:.0%})"
        small.append(f"{share['value']:.0%} of {of}")
    verdict = row[key]["verdict"]
    kind = {scores.BETTER: "good", scores.WORSE: "bad"}.get(verdict, "")
    told = f"{verdict}, one seed" if kind and row["one_seed"] else verdict
    return {"value": f"{d['value']:+.3f}", "verdict": told, "kind": kind, "small": small}


def _table(
    rows: Sequence[dict[str, Any]], benchmark: str, base: str, constants: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The scores of one benchmark; intervals and training seeds are shown small under their numbers."""
    of = [row for row in rows if row["benchmark"] == benchmark]
    lines = [cells(group, base) for group in by_method(of)]
    lines += [constant_cells(row) for row in constants if row["benchmark"] == benchmark]
    kept = ("greedy", "greedy, lenient", "sampled", "sampled, lenient")
    heads = [head for head in columns(lines, base) if head in kept or not re.search(r",| against ", head)]
    shown = []
    for line in lines:
        fields = []
        for head in heads[1:]:
            value, _, rest = line.get(head, "").partition(" (")
            each = line.get(f"{head}, each seed")
            small = [rest.rstrip(")"), f"seeds {each}" if each else ""]
            fields.append({"value": value, "small": [text for text in small if text]})
        shown.append({"name": line["method"], "cells": fields})
    return {"title": f"{benchmark}, {of[0]['problems']} problems", "heads": heads, "rows": shown}


def _how_to_read(rows: Sequence[dict[str, Any]]) -> str:
    text = (
        "Small print under a number is its 95 % interval: over problems and training seeds where a method "
        "has several seeds (Student's t), over problems only where it has one (Wilson's for single greedy "
        "answers). A method is called better or worse when the interval of the paired difference leaves out "
        "zero and a paired test agrees; with one seed that is a verdict on one run, not on the method. "
    )
    if any(row["decoding"] == "sampled" for row in rows):
        text += (
            "Sampled is the mean over all samples of a problem, pass@k a right answer among k, maj@k that "
            "the most frequent of k answers is right. "
        )
    if any("lenient" in row for row in rows):
        text += (
            "Lenient takes the box, else what follows 'the answer is', else the last number; the best "
            "elicited base is the untrained method that is best by that. "
        )
    text += "Tokens, cut off and no answer are those of the sampled answers where there are any."
    return text


# ---- problems and answers


def _items(collection: Collection, methods: Sequence[str], base: str) -> list[dict[str, Any]]:
    """Each problem with its kept answers by method and decoding, changed ones first."""
    items = []
    for benchmark, problems in collection.problems.items():
        for key, problem in problems.items():
            answers: dict[str, dict[str, dict[str, Any]]] = {}
            for method in collection.methods:
                for seed in method.seeds:
                    samples = method.rows[seed].get(benchmark, {}).get(key, {})
                    for sample in sorted(samples)[: 1 + SAMPLES_SHOWN]:
                        label = "greedy" if sample < 0 else f"sample {sample + 1}"
                        if len(method.seeds) > 1 and seed != method.seeds[0]:
                            label += f", training seed {seed}"
                        answers.setdefault(method.name, {})[label] = _answer(samples[sample])
            if answers:
                item = {"benchmark": benchmark, **{k: problem[k] for k in ("id", "problem", "answer")}}
                items.append({**item, "answers": answers})
    # those that changed come first, so that they are what is kept when not all can be
    items.sort(key=lambda item: not any(_change(item, base, m) for m in methods))
    return items


def _fitting(items: Sequence[dict[str, Any]]) -> int:
    """How many of the items, from the first on, have room in a page."""
    size = 0
    for kept, item in enumerate(items):
        size += len(item["problem"]) + sum(
            len(a["text"]) for m in item["answers"].values() for a in m.values()
        )
        if size > MAX_CHARACTERS:
            return kept
    return len(items)


def _answer(row: Row) -> dict[str, Any]:
    return {
        "text": row["text"],
        "given": row["answer"],
        "correct": row["correct"],
        "how": row["how"],
        "tokens": row["tokens"],
        "truncated": row["truncated"],
        "note": _NOTES.get(row["how"], ""),
    }


def _change(item: dict[str, Any], base: str, method: str) -> int:
    """1 where the first answer of `method` is right and the base's wrong, -1 the other way round, else 0."""
    before, after = item["answers"].get(base, {}), item["answers"].get(method, {})
    shared = next((label for label in before if label in after), None)
    return int(after[shared]["correct"]) - int(before[shared]["correct"]) if shared else 0


def _compared(collection: Collection, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items whose problems the scores are of: those that all methods answered."""
    shared: set[tuple[str, str]] = set()
    for benchmark in collection.benchmarks():
        answered = collection.cells(benchmark, greedy=True) or collection.cells(benchmark, greedy=False)
        shared |= {(benchmark, key) for cell in answered for key in cell.problems}
    return [item for item in items if (item["benchmark"], item["id"]) in shared]


def _gained_and_lost(
    items: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]], methods: Sequence[str], base: str
) -> list[dict[str, Any]]:
    """What each method gains and loses among `items`, of which `kept` are in the page with their answers."""
    there = {(item["benchmark"], item["id"]) for item in kept}
    blocks = []
    for method in methods[1:]:
        for change, word, kind in ((1, "gained", "good"), (-1, "lost", "bad")):
            changed = [item for item in items if _change(item, base, method) == change]
            if changed:
                pairs = [_pair(item, base, method) for item in changed[:LISTED]]
                more = changed[LISTED:]
                below = sum((item["benchmark"], item["id"]) in there for item in more)
                blocks.append(
                    {"word": word, "kind": kind, "method": method, "count": len(changed)}
                    | {"pairs": pairs, "more": len(more), "below": below}
                )
    return blocks


def _pair(item: dict[str, Any], base: str, method: str) -> dict[str, Any]:
    label = next(name for name in item["answers"][base] if name in item["answers"][method])
    given = [(name, _shown(item["answers"][name][label])) for name in (base, method)]
    return {"problem": item["problem"], "answer": item["answer"], "given": given}


def _shown(answer: dict[str, Any]) -> str:
    given = answer["given"]
    return "no boxed answer" if given is None else given if len(given) < 80 else given[:80] + "…"

"""
One HTML page that holds a comparison: what it says in words, the table, the plots, the problems gained and
lost, and every kept answer beside the others'. It loads nothing from anywhere, and a content policy says
so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from steer.evaluation import best_base, scores
from steer.evaluation.collect import Collection, Row
from steer.evaluation.page_assets import SCRIPT, STYLE
from steer.evaluation.tables import by_method, caution, cells, columns, constant_cells

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
    title = f"{', '.join(methods[1:]) or base} against {base}" if len(methods) > 1 else base
    items, left_out = _items(collection, methods, base)
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    notes = [*collection.notes, caution(rows)]
    if left_out:
        notes.append(f"the answers to {left_out} problems are left out of this page to keep it small")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_conditions(collection))}</p>',
        _gains(rows, "gain", f"Gain over {base}"),
        _gains(rows, "elicited_gain", "Gain over the best elicited base, all read leniently"),
        *(f'<p class="soft">{escape(text)}</p>' for text in best_base.sentences(rows)),
        "<h2>Scores</h2>",
        *(
            _table(rows, benchmark, constants)
            for benchmark in dict.fromkeys(row["benchmark"] for row in rows)
        ),
        _how_to_read(rows),
        "<h2>Plots</h2>",
        _plots(rows, figures),
        _gained_and_lost(items, methods, base),
        _reader(),
        _notes(notes),
        _made_by(collection),
    ]
    data = {
        "methods": methods,
        "benchmarks": list(dict.fromkeys(item["benchmark"] for item in items)),
        "decodings": list(dict.fromkeys(d for item in items for a in item["answers"].values() for d in a)),
        "items": items,
    }
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(parts)
        + f'\n</main><script type="application/json" id="data">{_json(data)}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _conditions(collection: Collection) -> str:
    one = collection.methods[0].conditions
    models = dict.fromkeys(m.conditions["model"] for m in collection.methods)
    text = f"{', '.join(models)}; sampled at temperature {one['temperature']:g}"
    if one["top_p"] < 1:
        text += f", top-p {one['top_p']:g}"
    return f"{text}; seed {one['seed']}; engine {one['engine']}, {one['dtype']} precision"


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes if note)
    return f"<h2>Notes</h2><ul>{lines}</ul>" if lines else ""


def _made_by(collection: Collection) -> str:
    lines = []
    for session in collection.sessions:
        versions = ", ".join(f"{name} {number}" for name, number in session["versions"].items())
        minutes = f"{session['seconds'] / 60:.1f} minutes"
        facts = f"{session['completions']} answers in {minutes}, {session['started']}; {versions}"
        lines.append(
            f'<p class="facts"><code>{escape(session["command"])}</code><br>'
            f'<span class="soft">{escape(facts)}</span></p>'
        )
    return f"<h2>How it was made</h2>{''.join(lines)}"


def _gains(rows: Sequence[dict[str, Any]], key: str, title: str) -> str:
    """Each method's "gain" or "elicited_gain": a line a method, a column for each benchmark and decoding."""
    heads = list(dict.fromkeys((row["benchmark"], row["decoding"]) for row in rows))
    lines: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        if key in row:
            lines.setdefault(row["method"], {})[row["benchmark"], row["decoding"]] = _gain(row, key)
    if not lines:
        return ""
    head = "".join(f"<th>{escape(', '.join(column))}</th>" for column in heads)
    body = []
    for method, line in lines.items():
        fields = "".join(f"<td>{line.get(column, '')}</td>" for column in heads)
        body.append(f'<tr><td class="name">{escape(method)}</td>{fields}</tr>')
    return f"<h2>{escape(title)}</h2>{_framed(f'<th>method</th>{head}', ''.join(body))}"


def _gain(row: dict[str, Any], key: str) -> str:
    d, share = row[key]["difference"], row.get("gain_share" if key == "gain" else "elicited_share")
    small = [f"{d['low']:+.3f} to {d['high']:+.3f}"]
    if key == "gain":
        small.append(f"{row['gained']} problems gained, {row['lost']} lost")
    if share:
        of = escape(row["reference"])
        small.append(f"{share['value']:.0%} of {of}'s ({share['low']:.0%} to {share['high']:.0%})")
    return f"{d['value']:+.3f} {_badge(row[key]['verdict'], row['one_seed'])}" + "".join(
        f"<small>{t}</small>" for t in small
    )


def _badge(verdict: str, one_seed: bool) -> str:
    kind = {scores.BETTER: " good", scores.WORSE: " bad"}.get(verdict, "")
    text = f"{verdict}, one seed" if kind and one_seed else verdict
    return f'<span class="badge{kind}">{text}</span>'


def _table(rows: Sequence[dict[str, Any]], benchmark: str, constants: Sequence[dict[str, Any]] = ()) -> str:
    """The scores of one benchmark; intervals and training seeds stand small under their numbers."""
    of = [row for row in rows if row["benchmark"] == benchmark]
    lines = [cells(group) for group in by_method(of)]
    lines += [constant_cells(row) for row in constants if row["benchmark"] == benchmark]
    kept = ("greedy", "greedy, lenient", "sampled", "sampled, lenient")
    heads = [head for head in columns(lines) if head in kept or not re.search(r",| against ", head)]
    body = []
    for line in lines:
        fields = [f'<td class="name">{escape(line["method"])}</td>']
        for head in heads[1:]:
            value, _, rest = line.get(head, "").partition(" (")
            each = line.get(f"{head}, each seed")
            small = [rest.rstrip(")"), f"seeds {each}" if each else ""]
            fields.append(
                f"<td>{escape(value)}{''.join(f'<small>{escape(t)}</small>' for t in small if t)}</td>"
            )
        body.append(f"<tr>{''.join(fields)}</tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f"<h3>{escape(benchmark)}, {of[0]['problems']} problems</h3>{_framed(head, ''.join(body))}"


def _framed(head: str, body: str) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card scroll">{table}</div>'


def _plots(rows: Sequence[dict[str, Any]], figures: Mapping[str, str]) -> str:
    wide = " wide" if len({row["benchmark"] for row in rows}) > 1 else ""
    shown = [figures[name] for name in ("accuracy", "parameters", "lengths") if name in figures]
    return (
        f'<div class="plots{wide}">'
        + "".join(f'<figure class="card">{svg}</figure>' for svg in shown)
        + "</div>"
    )


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
    return f'<p class="soft">{text}</p>'


# ---- problems and answers


def _items(collection: Collection, methods: Sequence[str], base: str) -> tuple[list[dict[str, Any]], int]:
    """
    Each problem with its kept answers by method and decoding, changed ones first; and how many were left
    out.
    """
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
    kept, size = 0, 0
    for item in items:
        size += len(item["problem"]) + sum(
            len(a["text"]) for m in item["answers"].values() for a in m.values()
        )
        if size > MAX_CHARACTERS:
            break
        kept += 1
    return items[:kept], len(items) - kept


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


def _gained_and_lost(items: Sequence[dict[str, Any]], methods: Sequence[str], base: str) -> str:
    blocks = []
    for method in methods[1:]:
        for change, word in ((1, "gained"), (-1, "lost")):
            found = [item for item in items if _change(item, base, method) == change]
            if not found:
                continue
            pairs = "".join(_pair(item, base, method) for item in found[:LISTED])
            more = f'<p class="soft">and {len(found) - LISTED} more, below</p>' if len(found) > LISTED else ""
            kind = "good" if change > 0 else "bad"
            blocks.append(
                f'<details><summary><span class="badge {kind}">{word}</span> {escape(method)}: {len(found)} '
                f"problem{'s' * (len(found) > 1)}</summary>{pairs}{more}</details>"
            )
    if not blocks:
        return ""
    return f'<h2>Problems gained and lost</h2><div class="card">{"".join(blocks)}</div>'


def _pair(item: dict[str, Any], base: str, method: str) -> str:
    label = next(name for name in item["answers"][base] if name in item["answers"][method])
    given = " ".join(
        f"{escape(name)}: <code>{escape(_shown(item['answers'][name][label]))}</code>."
        for name in (base, method)
    )
    return (
        f'<div class="pair"><div class="problem">{escape(item["problem"])}</div><div class="soft">'
        f"Reference: <code>{escape(item['answer'])}</code>. {given}</div></div>"
    )


def _shown(answer: dict[str, Any]) -> str:
    given = answer["given"]
    return "no boxed answer" if given is None else given if len(given) < 80 else given[:80] + "…"


def _reader() -> str:
    verdicts = "".join(
        f'<option value="{v}">{text}</option>'
        for v, text in (
            ("all", "all"),
            ("gained", "gained: base wrong, method right"),
            ("lost", "lost: base right, method wrong"),
            ("both wrong", "both wrong"),
            ("right", "method right"),
            ("wrong", "method wrong"),
            ("cut off", "method cut off"),
            ("no answer", "method without an answer"),
        )
    )
    return (
        '<h2>Read the answers</h2><div class="controls">'
        '<label>benchmark<select id="benchmark"><option value="">all</option></select></label>'
        '<label>answers<select id="decoding"></select></label>'
        f'<label>show<select id="verdict">{verdicts}</select></label>'
        '<label>method<select id="method"></select></label>'
        '<label>problem contains<input id="search" type="search"></label>'
        '<span class="soft"><span id="count"></span>; keys j and k move</span></div>'
        '<div class="reader"><div class="card list" id="list"></div><div class="card" id="panel">'
        "<noscript>The answers need JavaScript; "
        "steer browse shows them in a terminal.</noscript>"
        "</div></div>"
    )

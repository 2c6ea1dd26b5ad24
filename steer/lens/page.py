"""A report as one HTML page: readable without scripts, nothing fetched, all text of models escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from steer.lens import plots
from steer.lens.findings import NOT_SEEN, SEEN, Finding
from steer.lens.patching import Patching
from steer.lens.report import Report
from steer.lens.token_shift import TextShift, TokenShift

STYLE = """
body { font: 16px/1.55 Georgia, "Times New Roman", serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 46rem; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0
.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; } .abstract { background: #f5f6f8; padding: .8rem
1.1rem; border-left: 4px solid #2166ac; } table { border-collapse: collapse; width: 100%; font: 13.5px/1.4
system-ui, sans-serif; margin: .8rem 0; } th, td { text-align: left; padding: .3rem .55rem; border-bottom: 1px
solid #e3e3e3; vertical-align: top; } td.n { text-align: right; font-variant-numeric: tabular-nums;
white-space: nowrap; } figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; display:
block; margin: 0 auto; } figcaption { font: 13px/1.45 system-ui, sans-serif; color: #444; margin-top: .35rem;
} .v { font: 600 12px/1.6 system-ui, sans-serif; padding: .1rem .5rem; border-radius: .8rem; white-space:
nowrap; } .seen { background: #d4edda; color: #14532d; } .not { background: #fbdfdf; color: #7f1d1d; }
.untestable { background: #e6e6e6; color: #333; } code, .tokens { font: 13px/1.9 ui-monospace, Menlo,
Consolas, monospace; overflow-wrap: anywhere; } .tokens span { padding: .12rem 0; border-radius: 2px; }
.tokens b { border-left: 2px solid #000; padding-left: 2px; font-weight: 400; } small { color: #555; }
"""


def render(report: Report) -> str:
    """The page, as text."""
    parts = [
        _head(report),
        _abstract(report),
        _trained(report),
        _accuracy(report),
        _findings(report.findings),
        _sections(report),
        _method(report),
    ]
    title = escape(f"What the vectors of {report.subject.vectors.config.base_model} do")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    config = report.subject.vectors.config
    count = sum(parameter.numel() for parameter in report.subject.vectors.parameters())
    return (
        f"<h1>What {count:,} trained numbers do to {escape(str(config.base_model))}</h1>\n<p><small>Steering "
        f"vectors ({escape(config.kind)}), {len(report.subject.layers)} of {config.depth} layers, read with "
        "the methods of <cite>Small Vectors, Big Effects</cite> (arXiv 2509.06608).</small></p>"
    )


def _abstract(report: Report) -> str:
    base, on = report.accuracy["base"], report.accuracy["steered"]
    shift: Any = report.results["token shift"]
    counts = {v: sum(f.verdict == v for f in report.findings) for v in {f.verdict for f in report.findings}}
    best = max(
        (v[0] for k, v in report.accuracy.items() if "random" in k or "shuffled" in k or "mean-diff" in k),
        default=0.0,
    )
    told = [
        f"With the vectors the model solves {_percent(on[0])} of {report.problems} problems (95 % interval "
        f"{_percent(on[1])} to {_percent(on[2])}), without them {_percent(base[0])}; of the control vectors "
        f"of equal length the best reach {_percent(best)}.",
        f"At the first generated token they move {_percent(shift.variation[0].item())} of the probability; "
        f"most of what is gained goes to {_token(shift.top[0][0])}, most is lost by "
        f"{_token(shift.bottom[0][0])}. {_percent(shift.first_share)} of the whole change along the answer "
        "sits on that first token.",
    ]
    patched = report.results.get("path patching, add")
    if isinstance(patched, Patching):
        told.append(
            "Of the effect on the logits, the attention layers alone recover "
            f"{_percent(patched['attention only'])}, the MLPs alone {_percent(patched['MLP only'])}, the "
            f"residual stream alone {_percent(patched['residual only'])}, and all but the residual stream "
            f"{_percent(patched['all but residual'])}."
        )
    told.append(
        f"Of the paper's {len(report.findings)} findings, {counts.get(SEEN, 0)} are seen here, "
        f"{counts.get(NOT_SEEN, 0)} are not, and {counts.get('not testable', 0)} cannot be tested on this "
        "artifact."
    )
    return f'<section class="abstract"><p>{" ".join(told)}</p></section>'


def _trained(report: Report) -> str:
    config = report.subject.vectors.config
    norms = list(report.subject.vectors.norms().values())
    rows = [
        (
            "base model",
            f"{config.base_model} ({config.model_type}, {config.depth} layers of width {config.width})",
        ),
        ("vectors", f"{config.kind}, layers {config.layers}, at {config.site}, positions {config.positions}"),
        ("length", f"{min(norms):.3g} to {max(norms):.3g} a layer, scale {config.scale:g}"),
        (
            "prompt",
            f"template {report.subject.template}"
            + (f", prefix {report.subject.prefix!r}" * bool(report.subject.prefix)),
        ),
    ]
    made = config.provenance or {}
    for part in ("run", "training"):
        values = made.get(part)
        if isinstance(values, dict):
            kept = [f"{k} {_short(v)}" for k, v in values.items() if v not in (None, "", [], {})]
            rows.append((part, ", ".join(kept)))
    samples = "".join(
        f"<tr><td>{escape(s['problem'])}</td><td><code>{escape(s['base'])}</code></td>"
        f"<td><code>{escape(s['steered'])}</code></td></tr>"
        for s in report.samples
    )
    return (
        f"<h2>What was trained</h2>\n{_table(None, rows)}\n"
        f"<table><thead><tr><th>problem</th><th>base</th><th>steered</th></tr></thead><tbody>{samples}</tbody></table>"
    )


def _accuracy(report: Report) -> str:
    rows = [
        (name, _percent(value), f"{_percent(low)} to {_percent(high)}")
        for name, (value, low, high) in report.accuracy.items()
    ]
    table = _table(("greedy answers", "accuracy", "95 % interval (Wilson)"), rows)
    return (
        f"<h2>What it gains</h2>\n<p>Accuracy on {report.problems} problems. Each control has vectors as "
        f"long as the trained ones, layer by layer.</p>\n{table}"
    )


def _findings(findings: Sequence[Finding]) -> str:
    classes = {SEEN: "seen", NOT_SEEN: "not"}
    rows = "".join(
        f"<tr><td>{escape(f.claim)}<br><small>Rule: {escape(f.rule)}</small></td>"
        f'<td><span class="v {classes.get(f.verdict, "untestable")}">{escape(f.verdict)}</span></td>'
        f"<td><small>{escape(f.why)}</small></td></tr>"
        for f in findings
    )
    return (
        "<h2>The paper’s findings, here</h2>\n<table><thead><tr><th>finding and rule</th><th>verdict</th>"
        f"<th>numbers</th></tr></thead><tbody>{rows}</tbody></table>"
    )


CAPTIONS = {
    "directions": "Lengths of the vectors by layer and checkpoint; cosines between the layers’ vectors.",
    "logit lens": "The tokens that each vector promotes most by itself: unembedding times vector, through "
    "the final norm’s scale. The layers between it and the output are skipped, so early "
    "layers’ readings say little.",
    "scripts": "Share of tokens in scripts other than plain Latin among the 50 most promoted and most "
    "suppressed of each layer, against the whole vocabulary.",
    "token shift": "How far the next-token distributions of the steered and the base model lie apart, along "
    "answers sampled from the steered model at temperature 1, and the largest changes at the "
    "first generated token.",
    "token shift, last layer": "The same with the last layer’s vector alone.",
    "prefix substitution": "The base model, untouched, with an opening forced upon its answer.",
    "path patching, add": "All vectors, allowed through some components alone; the others give what they "
    "give in the base run. “Everything” is the steered run, “nothing” the base run.",
    "path patching, remove": "The same from the other side: taken out of the steered run along each route.",
    "path patching, random vectors": "Control: random vectors of equal length, added.",
    "decomposition": "The change of the last residual stream at the tokens that predict the answer, as an "
    "exact sum: each part’s projection on the whole.",
    "penultimate layer": "The vector of the last layer but one, by itself, through the last layer’s parts.",
    "heads of the last "
    "layer": "That vector through one query head of the last attention, or one key-value group.",
    "paths by layer": "Single vectors: what passes through attention, MLPs or the residual stream alone.",
    "persistence, all vectors": "Cosine of each token’s change with the layer’s mean change (left) and with "
    "the vector trained at that layer (right), all vectors on.",
    "persistence, single vectors": "The same averaged over tokens, one vector on at a time.",
    "leave one out": "What is lost when one layer’s vector is left out: log-probability of right answers.",
    "single layers": "What one layer’s vector alone adds to the log-probability of right answers.",
    "composition": "Greedy accuracy with one layer’s vector (diagonal) and with two.",
    "scale sweep": "Greedy accuracy with all vectors multiplied; the band is the 95 % Wilson interval.",
    "scale maps": "How much of its vector each layer gives to each token of the first text.",
}


HEADINGS = {
    "directions": "The vectors themselves",
    "token shift": "Which tokens it moves, and where",
    "path patching, add": "Through which components",
    "persistence, all vectors": "Whether it persists",
    "leave one out": "Layer by layer",
    "composition": "Together, and at other scales",
}


def _sections(report: Report) -> str:
    parts = []
    for number, (name, result) in enumerate(report.results.items(), 1):
        if name in HEADINGS:
            parts.append(f"<h2>{HEADINGS[name]}</h2>")
        caption = f"<b>Figure {number}, {escape(name)}.</b> {CAPTIONS.get(name, '')}{_extra(name, result)}"
        alt = escape(f"Figure {number}: {name}", quote=True)
        parts.append(
            f'<figure><img alt="{alt}" src="{plots.data_uri(result.figure())}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
        if isinstance(result, Patching) and result.accuracy is not None:
            rows = [(n, _percent(a)) for n, a in zip(result.names, result.accuracy.tolist(), strict=True)]
            rows = [
                ("base", _percent(result.base["accuracy"])),
                *rows,
                ("steered", _percent(result.steered["accuracy"])),
            ]
            parts.append(_table(("problems solved when the model writes along the route", "accuracy"), rows))
        if isinstance(result, TokenShift) and result.texts:
            parts.append(_strips(result.texts))
    return "\n".join(parts)


def _extra(name: str, result: Any) -> str:
    if name == "decomposition":
        told = ", ".join(f"{escape(k)} {_percent(v)}" for k, v in result.totals.items())
        return f" In all: {told}. Largest error of the sum at any token: {result.error:.1e} of the change."
    if name == "composition":
        together, whole = _percent(result.together), _percent(result.whole)
        return f" All {len(result.layers)} together reach {together}, every vector {whole}."
    if name == "prefix substitution":
        told = ", ".join(
            f"{_token(opening)} gives {_percent(share)} of the gain"
            for opening, share in zip(result.openings, result.share.tolist(), strict=True)
        )
        return f" {told}."
    return ""


def _strips(texts: Sequence[TextShift]) -> str:
    """Each text with its tokens shaded by how far the distributions that predict them lie apart."""
    lines = []
    for text in texts[:3]:
        words = []
        for n, token in enumerate(text.tokens):
            distance, change = text.variation[n].item(), text.change[n].item()
            shown = escape(token).replace("\n", "↵")
            mark = f"<b>{shown}</b>" if n == text.prompt else shown
            hint = escape(f"distance {distance:.2f}, own probability {change:+.2f}", quote=True)
            words.append(
                f'<span title="{hint}" style="background:rgba(178,24,43,{distance * 0.75:.2f})">{mark}</span>'
            )
        lines.append(f'<p class="tokens">{"".join(words)}</p>')
    note = "<p><small>Shade: how far the steered distribution that predicts the token lies from the base one "
    note += "(total variation). A bar marks the first generated token.</small></p>"
    return "\n".join([*lines, note])


def _method(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    few = max(4, report.problems // 4)
    return (
        "<h2>How it was measured</h2>\n<p>All conditions run side by side in one batch through the "
        f"unmodified model, with exact hooks. Accuracies: greedy answers to {report.problems} problems "
        f"(pairs of layers and scales: half of them). Path patching, decomposition and persistence: {few} "
        "prompts with the steered model’s greedy answers, every token of the answer counted; single "
        "vectors: 4 to 8 of them. Effects of single vectors are those of a set that was trained together, "
        "unless the artifact has one layer.</p>\n" + (f"<ul>{notes}</ul>" if notes else "")
    )


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> str:
    top = f"<thead><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr></thead>" if head else ""
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if n and head else ''}>{escape(str(cell))}</td>" for n, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>{top}<tbody>{body}</tbody></table>"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def _token(text: str) -> str:
    return f"<code>“{escape(text)}”</code>"


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

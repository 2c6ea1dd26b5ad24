"""A report as one HTML page: readable without scripts, nothing fetched, all text of models escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from steer.lens import plots, prose
from steer.lens.findings import NOT_SEEN, SEEN, Finding, words
from steer.lens.prose import percent
from steer.lens.report import SINGLE, Report
from steer.lens.report_results import Paths
from steer.lens.scale_maps import ScaleMaps
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
details { font: 13px/1.45 system-ui, sans-serif; color: #555; } summary { cursor: pointer; color: #2166ac; }
td.bar { width: 30%; vertical-align: middle; } td.bar i { display: block; height: .8rem; background: #2166ac;
min-width: 1px; } td b { font-weight: 600; }
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
    title = escape(f"What the vectors of {report.subject.vectors.config.base_model_name_or_path} do")
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
        f"<h1>What {count:,} trainable parameters do to {escape(str(config.base_model_name_or_path))}</h1>\n"
        f"<p><small>Steering vectors ({escape(config.kind)}), {len(report.subject.layers)} of "
        f"{config.num_hidden_layers} "
        "layers, read with the methods of <cite>Small Vectors, Big Effects</cite> "
        "(arXiv 2509.06608).</small></p>"
    )


def _abstract(report: Report) -> str:
    return f'<section class="abstract"><p>{escape(prose.abstract(report))}</p></section>'


def _trained(report: Report) -> str:
    samples = "".join(
        f"<tr><td>{escape(s['problem'])}</td><td><code>{escape(s['base'])}</code></td>"
        f"<td><code>{escape(s['steered'])}</code></td></tr>"
        for s in report.samples
    )
    head = "<thead><tr><th>problem</th><th>base</th><th>steered</th></tr></thead>"
    return (
        f"<h2>What was trained</h2>\n<p>{escape(prose.trained(report))}</p>\n<table>{head}"
        f"<tbody>{samples}</tbody></table>\n{_provenance(report)}"
    )


def _provenance(report: Report) -> str:
    """Everything the artifact says of its making, folded."""
    rows = []
    for part, values in (report.subject.vectors.config.provenance or {}).items():
        if part != "results" and isinstance(values, dict):
            kept = [f"{k} {_short(v)}" for k, v in values.items() if v not in (None, "", [], {})]
            rows.append((part, ", ".join(kept)))
    summary = "<summary>all settings of the run</summary>"
    return f"<details>{summary}{_table(None, rows)}</details>" if rows else ""


def _accuracy(report: Report) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="bar"><i style="width:{100 * value:.1f}%"></i></td>'
        f'<td class="n">{percent(value)}</td><td class="n">{percent(low)} to {percent(high)}</td></tr>'
        for name, (value, low, high) in report.accuracy.items()
    )
    head = "<th>vectors</th><th></th><th>accuracy</th><th>95 % interval</th>"
    return (
        f"<h2>What it gains</h2>\n<p>Greedy accuracy on {report.problems} problems that were not trained on, "
        "with Wilson’s interval. Each control has vectors as long as the trained ones, layer by layer.</p>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _findings(findings: Sequence[Finding]) -> str:
    classes = {SEEN: "seen", NOT_SEEN: "not"}
    rows = "".join(
        f'<tr><td><span class="v {classes.get(f.verdict, "untestable")}">{escape(f.verdict)}</span></td>'
        f"<td>{escape(f.claim)}<details><summary>rule</summary>{escape(f.rule)}</details></td>"
        f"<td>{_numbers(f)}</td></tr>"
        for f in findings
    )
    return (
        "<h2>The paper’s findings, here</h2>\n<p>Each verdict follows from a rule that was fixed beforehand "
        "and asks for more than the control does.</p>\n<table><thead><tr><th></th><th>finding</th>"
        f"<th>measured, and the control</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _numbers(finding: Finding) -> str:
    if not finding.numbers:
        return f"<small>{escape(finding.why)}</small>"
    own = "<br>".join(f"{escape(words(k))} <b>{v:.3g}</b>" for k, v in finding.numbers.items())
    control = "<br>".join(f"{escape(words(k))} <b>{v:.3g}</b>" for k, v in finding.control.items())
    return f"{own}<br><small>{control}</small>"


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
    "path patching": "All vectors, allowed through some components alone; the others give what they give in "
    "the base run. “Everything” is the steered run, “nothing” the base run. Taken out of the steered run "
    "along the same routes; and random vectors of equal length, as shares of their own effect.",
    "later layers frozen": "All vectors on; attention and MLP of all layers after the one given are held at "
    "what they give in the base run.",
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
    "composition": "Log-probability of right answers with one layer’s vector (diagonal) and with two.",
    "scale sweep": "Greedy accuracy with all vectors multiplied; the band is the 95 % Wilson interval.",
    "scale maps": "How much of its vector each layer gives to each token of the first text.",
}


HEADINGS = {
    "directions": "The vectors themselves",
    "token shift": "Which tokens they move, and where",
    "path patching": "Through which components",
    "penultimate layer": "The last layers",
    "persistence, all vectors": "Whether the change persists",
    "leave one out": "Layer by layer",
    "composition": "Together, and at other scales",
}


def _sections(report: Report) -> str:
    parts = []
    for number, (name, result) in enumerate(report.results.items(), 1):
        if name in HEADINGS:
            parts.append(f"<h2>{HEADINGS[name]}</h2>")
        if told := prose.section(name, report):
            parts.append(f"<p>{escape(told)}</p>")
        caption = f"<b>Figure {number}, {escape(name)}.</b> {CAPTIONS.get(name, '')}{_extra(name, result)}"
        alt = escape(f"Figure {number}: {name}", quote=True)
        parts.append(
            f'<figure><img alt="{alt}" src="{plots.data_uri(result.figure())}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
        if isinstance(result, Paths) and (solved := result.first.accuracy) is not None:
            rows = [(n, percent(a)) for n, a in zip(result.first.names, solved.tolist(), strict=True)]
            parts.append(_table(("path along which the model writes", "problems solved"), rows))
        if isinstance(result, TokenShift) and result.texts:
            parts.append(_strips(result.texts))
        if isinstance(result, ScaleMaps):
            parts.append(_scale_strips(result))
    return "\n".join(parts)


def _extra(name: str, result: Any) -> str:
    if name == "decomposition":
        told = ", ".join(f"{escape(k)} {percent(v)}" for k, v in result.totals.items())
        return f" In all: {told}. Largest error of the sum at any token: {result.error:.1e} of the change."
    return ""


def _scale_strips(maps: ScaleMaps) -> str:
    """Each text with its tokens shaded by how much of all layers' vectors they get."""
    lines = []
    for one in maps.maps[:3]:
        size = one.coefficients.abs().mean(0)
        most = max(size[1:].max().item(), 1e-30)  # the first token is an attention sink, out of proportion
        shades = [min(1.0, value / most) for value in size.tolist()]
        hints = [f"mean size of the coefficient {value:.3g}" for value in size.tolist()]
        lines.append(_strip(one.tokens, one.prompt, shades, hints))
    note = "Shade: size of the coefficient, averaged over layers. A bar marks the first generated token."
    return "\n".join([*lines, f"<p><small>{note}</small></p>"])


def _strip(tokens: Sequence[str], prompt: int, shades: Sequence[float], hints: Sequence[str]) -> str:
    words = []
    for n, (token, shade, hint) in enumerate(zip(tokens, shades, hints, strict=True)):
        shown = escape(token).replace("\n", "↵")
        mark = f"<b>{shown}</b>" if n == prompt else shown
        colour = f"background:rgba(178,24,43,{shade * 0.75:.2f})"
        words.append(f'<span title="{escape(hint, quote=True)}" style="{colour}">{mark}</span>')
    return f'<p class="tokens">{"".join(words)}</p>'


def _strips(texts: Sequence[TextShift]) -> str:
    """Each text with its tokens shaded by how far the distributions that predict them lie apart."""
    lines = []
    for text in texts[:3]:
        pairs = list(zip(text.variation.tolist(), text.change.tolist(), strict=True))
        hints = [f"distance {distance:.2f}, own probability {change:+.2f}" for distance, change in pairs]
        lines.append(_strip(text.tokens, text.prompt, [distance for distance, _ in pairs], hints))
    note = "<p><small>Shade: how far the steered distribution that predicts the token lies from the base one "
    note += "(total variation). A bar marks the first generated token.</small></p>"
    return "\n".join([*lines, note])


def _method(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    few = max(SINGLE, report.problems // 5)
    return (
        "<h2>How it was measured</h2>\n<p>All conditions run side by side in one batch through the "
        "unmodified model, with exact hooks. Accuracies: greedy answers to "
        f"{report.problems} problems (scales and sampled answers: half of them). Path patching and "
        f"decomposition: {few} prompts with the steered model’s greedy answers, every token of the answer "
        f"counted; single vectors and random routes: {SINGLE} of them. Effects of single vectors are those "
        "of a set that was trained together, unless the artifact "
        "has one layer.</p>\n" + (f"<ul>{notes}</ul>" if notes else "")
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


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""A report in sentences: its abstract, how the vectors were made, and the main numbers as Markdown."""

from __future__ import annotations

from steer.lens.findings import UNTESTABLE, VERDICTS, Finding, told_null, words
from steer.lens.sections import SECTIONS
from steer.lens.study import Report
from steer.lens.words import percent

_CONTROLS = ("random", "layers", "mean-difference")  # how the names of control vectors begin


def abstract(report: Report) -> str:
    """The report in one paragraph."""
    base, on = report.accuracy["base"], report.accuracy["steered"]
    best = max(
        *(v[0] for k, v in report.accuracy.items() if k.split()[0] in _CONTROLS),
        *report.nulls["vectors_accuracy"].values,
    )
    told = [
        f"With the vectors the model solves {percent(on[0])} of {report.problems} problems (95 % interval "
        f"{percent(on[1])} to {percent(on[2])}), without them {percent(base[0])}; vectors of equal length "
        f"that were not trained for it reach {percent(best)} at best."
    ]
    for section in SECTIONS:
        first = next(iter(section.captions))
        if section.in_abstract and first in report.results:
            told += section.sentences(first, report)[:1]
    counts = [sum(finding.verdict == verdict for finding in report.findings) for verdict in VERDICTS]
    seen, not_specific, not_seen, untestable = counts
    told.append(
        f"Of {len(report.findings)} findings of the paper, {seen} are seen here, {not_specific} are seen but "
        f"not specific (random vectors do as much), {not_seen} are not seen, and {untestable} are untestable "
        "on this artifact."
    )
    return " ".join(told)


def trained(report: Report) -> str:
    """How the vectors were made, as far as the artifact tells."""
    config, made = report.subject.vectors.config, report.subject.vectors.config.provenance or {}
    run, how = made.get("run") or {}, made.get("training") or {}
    told = [
        f"{config.base_model_name_or_path} has {config.num_hidden_layers} layers and a hidden size of "
        f"{config.hidden_size}. After each of "
        f"{len(report.subject.layers)} of them a {config.kind} vector is added to the residual stream "
        f"(site {report.subject.site}, positions {config.positions}, scale {config.scale:g}); the model "
        "itself is frozen."
    ]
    if run.get("train_data"):
        detail = f", operators {run['operators']}" if run["train_data"] == "arithmetic" else ""
        told.append(f"They were trained on {run['train_data']}{detail}, {config.prompt or 'prompt unknown'}")
        if rewards := run.get("rewards"):
            told[-1] += f", rewarded for {' and '.join(map(str, rewards))}"
        if how.get("max_steps", -1) > 0:
            told[-1] += f", in {how['max_steps']} updates"
        if how.get("learning_rate"):
            told[-1] += f" at learning rate {how['learning_rate']:g}"
        told[-1] += "."
    return " ".join(told)


def markdown(report: Report) -> str:
    """The abstract, the accuracies and the findings as Markdown, for a README or a model card."""
    accuracies = "\n".join(
        f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |"
        for name, (value, low, high) in report.accuracy.items()
    )
    findings = "\n".join(
        f"| {f.claim} | {f.verdict} | {_measured(f)} | {_nulls(f)} |" for f in report.findings
    )
    return (
        f"{_plain(abstract(report))}\n\n| vectors ({report.problems} problems) | accuracy | 95 % interval "
        f"|\n|---|---|---|\n{_plain(accuracies)}\n\n"
        f"| the paper’s finding | here | measured | random vectors |\n|---|---|---|---|\n{_plain(findings)}\n"
    )


def _measured(finding: Finding) -> str:
    numbers = ", ".join(f"{words(name)} {value:.3g}" for name, value in finding.numbers.items())
    if finding.verdict != UNTESTABLE:
        return numbers
    return f"{finding.why} ({numbers})" if numbers else finding.why


def _nulls(finding: Finding) -> str:
    several = len(finding.null) > 1
    told = [f"{words(name)}: {told_null(n)}" if several else told_null(n) for name, n in finding.null.items()]
    return "; ".join(told)


def _plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("$", "\\$")

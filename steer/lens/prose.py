"""A report in sentences: what each section found, with the control beside it. Plain text from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from steer.lens.findings import NOT_SEEN, NOT_TESTABLE, SEEN, words
from steer.lens.report import Report

Sentences = list[str]
_CONTROLS = ("random", "layers", "mean-difference")  # how the names of control vectors begin


def abstract(report: Report) -> str:
    """The report in one paragraph."""
    base, on = report.accuracy["base"], report.accuracy["steered"]
    best = max(v[0] for k, v in report.accuracy.items() if k.split()[0] in _CONTROLS)
    told = [
        f"With the vectors the model solves {percent(on[0])} of {report.problems} problems (95 % interval "
        f"{percent(on[1])} to {percent(on[2])}), without them {percent(base[0])}; vectors of equal length "
        f"that were not trained for it reach {percent(best)} at best."
    ]
    told += _token_shift(report)[:1]
    if "prefix substitution" in report.results:
        told += _prefix(report)[:1]
    if "path patching" in report.results:
        told += _paths(report)[:1]
    counts = {v: sum(f.verdict == v for f in report.findings) for v in (SEEN, NOT_SEEN, NOT_TESTABLE)}
    told.append(
        f"Of {len(report.findings)} findings of the paper, {counts[SEEN]} are seen here, {counts[NOT_SEEN]} "
        f"are not, and {counts[NOT_TESTABLE]} cannot be tested on this artifact."
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
        f"(site {config.site}, positions {config.positions}, scale {config.scale:g}); the model itself is "
        "frozen."
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


def section(name: str, report: Report) -> str:
    """What the part that begins with the result `name` found; empty for parts that speak for themselves."""
    tell = _SECTIONS.get(name)
    return " ".join(tell(report)) if tell else ""


def _directions(report: Report) -> Sentences:
    found: Any = report.results["directions"]
    now = found.norms[-1].tolist()
    low, high = min(now), max(now)
    told = [
        f"The vectors are {low:.2f} to {high:.2f} long; the longest is that of layer "
        f"{found.layers[now.index(high)]}."
    ]
    if len(found.layers) > 1:
        neighbours = _mean(found.between_layers.diagonal(1))
        apart = _mean(found.between_layers[~torch.eye(len(found.layers), dtype=torch.bool)])
        told.append(f"Neighbouring layers have a cosine of {neighbours:.2f} on average, any two {apart:.2f}.")
    if len(found.names) > 1:
        first = found.names[0]
        told.append(
            f"At {first} they were {_mean(found.norms[0]) / _mean(found.norms[-1]):.0%} as long, and their "
            f"cosine with the final ones was {_mean(found.to_last[0]):.2f}: training mostly lengthens "
            "directions that are there early."
            if _mean(found.to_last[0]) > 0.7
            else f"At {first} their cosine with the final ones was {_mean(found.to_last[0]):.2f}."
        )
    return told


def _logit_lens(report: Report) -> Sentences:
    lens: Any = report.results["logit lens"]
    counts: Any = report.results["scripts"]
    told = [
        f"By itself, the vector of layer {lens.layers[-1]} promotes {quoted(lens.top_tokens[-1][:3])} and "
        f"suppresses {quoted(lens.bottom_tokens[-1][:3])}. The lens skips the layers between a vector and "
        "the output, so early layers’ readings say little."
    ]
    if "middle_foreign" in report.numbers:
        told.append(
            f"Among the 50 bottom tokens of the middle third, {_n(report, 'middle_foreign'):.1%} are in a "
            f"script other than plain Latin, of the vocabulary {_n(report, 'vocabulary_foreign'):.1%}, for "
            f"random vectors {_n(report, 'random_middle_foreign'):.1%}."
        )
    else:
        told.append(f"Of the vocabulary {counts.foreign_base:.1%} is in a script other than plain Latin.")
    return told


def _token_shift(report: Report) -> Sentences:
    shift: Any = report.results["token shift"]
    told = [
        f"At the first generated token the vectors move {percent(shift.variation[0].item())} of the "
        f"probability: {percent(shift.top[0][2])} to {quoted([shift.top[0][0]])}, most of it from "
        f"{quoted([token for token, *_ in shift.bottom[:2]])}; {percent(shift.first_share)} of the whole "
        "change along the answer sits on that first token."
    ]
    last: Any = report.results.get("token shift, last layer")
    if last is not None:
        told.append(
            f"The last layer’s vector alone moves {last.variation[0].item():.1%} there, and "
            f"{percent(last.first_share)} of what it changes is on the first token (a random vector of its "
            f"length: {percent(_n(report, 'random_last_first_share'))})."
        )
    return told


def _prefix(report: Report) -> Sentences:
    found: Any = report.results["prefix substitution"]
    shares = [
        f"{quoted([opening])} gives {percent(share)}"
        for opening, share in zip(found.openings, found.share.tolist(), strict=True)
        if not math.isnan(share)
    ]
    if not shares:
        return ["The vectors gain nothing, so a forced opening cannot give a share of it."]
    return [f"Forced upon the base model as the answer’s opening, of the vectors’ gain {_and(shares)}."]


def _paths(report: Report) -> Sentences:
    paths: Any = report.results["path patching"]
    found, random = paths.first, list(paths.parts.values())[-1]
    names = ("residual only", "attention only", "MLP only")
    words = [f"{name.removesuffix(' only')} {percent(found[name])}" for name in names]
    control = [percent(random[name]) for name in names]
    told = [
        "Of the effect on the logits, one path alone recovers: "
        f"{_and(words)} (random vectors: {_and(control)}); all but the residual stream "
        f"{percent(found['all but residual'])}."
    ]
    if found.accuracy is not None:
        solved = dict(zip(found.names, found.accuracy.tolist(), strict=True))
        told.append(
            "Writing along a path, the model solves "
            + _and([f"{percent(solved[n])} ({n})" for n in ("all but residual", "MLP only", "residual only")])
            + f", with everything {percent(solved['everything'])}."
        )
    return told


def _frozen(report: Report) -> Sentences:
    found: Any = report.results["later layers frozen"]
    half = next((layer for layer, s in zip(found.layers, found.share, strict=True) if s >= 0.5), None)
    if half is None:
        return []
    return [f"Half of the effect is there once the layers up to {half} may react, the later ones frozen."]


def _last_layers(report: Report) -> Sentences:
    paths: Any = report.results["penultimate layer"]
    found, random = paths.parts.values()
    return [
        f"The vector of the last layer but one keeps {percent(found['all but attention'])} of its effect "
        f"without the last attention and {percent(found['all but MLP'])} without the last MLP (random "
        f"vector: {percent(random['all but attention'])} and {percent(random['all but MLP'])})."
    ]


def _persistence(report: Report) -> Sentences:
    if "diff_diff" not in report.numbers:
        return []
    told = [
        f"One vector on at a time, the change of a token has a cosine of {_n(report, 'diff_diff'):.2f} with "
        f"the mean change in the layers above (random vectors: {_n(report, 'random_diff_diff'):.2f})."
    ]
    if report.numbers.get("diff_vector") is not None:
        told.append(
            f"With the vectors that were trained up there it has one of {_n(report, 'diff_vector'):.2f} "
            f"(layers shuffled: {_n(report, 'shuffled_diff_vector'):.2f})."
        )
    return told


def _layers(report: Report) -> Sentences:
    out: Any = report.results["leave one out"]
    single: Any = report.results["single layers"]
    lost = (out.whole_likelihood - out.likelihood).tolist()
    worst = sorted(range(len(lost)), key=lambda n: -lost[n])[:3]
    gains, randoms = single.gain.tolist(), single.random.tolist()
    best = max(range(len(gains)), key=lambda n: gains[n])
    return [
        "Left out, "
        + _and([f"layer {out.layers[n]} costs {lost[n]:.2f}" for n in worst])
        + f" nats a token; the set as a whole brings {out.whole_likelihood - out.base_likelihood:.2f}.",
        f"By itself the best layer, {single.layers[best]}, brings {gains[best]:.2f} (best random vector: "
        f"{max(randoms):.2f}); {percent(_n(report, 'layers_that_help'))} of the layers help (random: "
        f"{percent(_n(report, 'random_layers_that_help'))}).",
    ]


def _composition(report: Report) -> Sentences:
    found: Any = report.results.get("composition")
    if found is None:
        return []
    pairs = list(combinations(range(len(found.layers)), 2))
    missing = [found.told(i, j) for i, j in pairs if found.told(i, j).startswith("undefined")]
    told = [f"The pair score is {missing[0]} ({len(missing)} of {len(pairs)} pairs)."] if missing else []
    score, control = report.numbers.get("pair_gain"), report.numbers.get("random_pair_gain")
    if score is not None:
        random = "undefined" if control is None else percent(control)
        told.append(
            f"Adding a second layer to the better of two covers {percent(score)} of the way to the jointly "
            f"trained set on average (random vectors: {random})."
        )
    return told


def _scales(report: Report) -> Sentences:
    found: Any = report.results["scale sweep"]
    pairs = list(zip(found.accuracy.tolist(), found.scales, strict=True))
    most, best = max(pairs, key=lambda pair: (pair[0], -abs(pair[1] - 1)))
    return [f"Of the scales tried {best:g} is best, with {percent(most)} solved."]


_SECTIONS: dict[str, Callable[[Report], Sentences]] = {
    "directions": _directions,
    "logit lens": _logit_lens,
    "token shift": _token_shift,
    "prefix substitution": _prefix,
    "path patching": _paths,
    "later layers frozen": _frozen,
    "penultimate layer": _last_layers,
    "persistence, all vectors": _persistence,
    "leave one out": _layers,
    "composition": _composition,
    "scale sweep": _scales,
}


def markdown(report: Report) -> str:
    """The abstract, the accuracies and the findings as Markdown, for a README or a model card."""
    accuracies = "\n".join(
        f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |"
        for name, (value, low, high) in report.accuracy.items()
    )
    findings = "\n".join(
        f"| {f.claim} | {f.verdict} | {_numbers(f.numbers) or f.why} | {_numbers(f.control)} |"
        for f in report.findings
    )
    return (
        f"{_plain(abstract(report))}\n\n| vectors ({report.problems} problems) | accuracy | 95 % interval "
        f"|\n|---|---|---|\n{_plain(accuracies)}\n\n| the paper’s finding | here | measured | control |\n"
        f"|---|---|---|---|\n{_plain(findings)}\n"
    )


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{words(name)} {value:.3g}" for name, value in numbers.items())


def _plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("$", "\\$")


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def quoted(tokens: Sequence[str]) -> str:
    """Tokens in quotation marks, joined as in a sentence."""
    return _and([f"“{token}”".replace("\n", "↵") for token in tokens])


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _mean(values: torch.Tensor) -> float:
    return values.double().mean().item()


def _n(report: Report, name: str) -> float:
    value = report.numbers.get(name)
    return math.nan if value is None else value

"""
What a population of single layers found: a table, the plot of gain by layer, and the best layers in pairs.

    python -m steer.lens.layer_study runs/layer-sweep-demo       # sweep.json, sweep.md and sweep.png, again

`steer sweep` calls it at its end. Differences to the untrained model are paired over the problems,
as in `steer.evaluation.scores`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steer import artifact
from steer.arguments import Help
from steer.errors import SteerError
from steer.evaluation import scores
from steer.evaluation.plots import COLOURS
from steer.files import read_json, replace_file
from steer.prompt import PromptSpec
from steer.tasks.elicited import UNTRAINED, best_base, stages
from steer.training.run import read_results
from steer.training.sweep.halving import HALVING_FILE
from steer.training.sweep.run import MEMBERS, POPULATION_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steer.tasks.grading import MathGrader


def rows(folder: Path) -> list[dict[str, Any]]:
    """One record a member that has results, in the order of the population. SteerError when none has."""
    path = folder / POPULATION_FILE
    if not path.exists():
        raise SteerError(f"{folder} holds no {POPULATION_FILE}: it is not a run of `steer sweep`")
    base = _right(folder / "samples_before.json")
    halving = folder / HALVING_FILE
    rungs = read_json(halving) if halving.exists() else {}
    table_rows = []
    for name, own in read_json(path).items():
        place = folder / MEMBERS / name
        results = read_results(place)
        if not results:
            continue
        vectors = artifact.read(place / "vectors")
        layers = vectors.config.resolve_layers(vectors.config.num_hidden_layers or 1)
        row: dict[str, Any] = {
            "member": name,
            "layers": layers,
            "num_hidden_layers": vectors.config.num_hidden_layers,
            **{key: own["steering"][key] for key in ("kind", "site", "positions")},
            "learning_rate": own["training"]["lr_by_layer"] or own["training"]["learning_rate"],
            "seed": own["training"]["seed"],
            "rewards": own["rewards"],
            "updates": results["steps"],
            "stopped": results["stopped"],
            "reward": results["reward"],
            "rungs": {rung: record[name]["score"] for rung, record in rungs.items() if name in record},
            "norm": float(sum(v.norm() ** 2 for v in vectors.by_layer().values()) ** 0.5)
            if vectors.config.kind != "adaptive"
            else None,
        }
        answers = _right(place / "samples_after.json")
        if answers is not None and base is not None:
            row["accuracy"] = vars(scores.share(float(answers.sum()), answers.size))
            lenient = _right(place / "samples_after.json", "lenient")
            if not np.isnan(lenient).any():
                row["lenient"] = vars(scores.share(float(lenient.sum()), lenient.size))
            compared = scores.compare(answers[None, :], base[None, :])
            row["gain"] = {**vars(compared.difference), "p": compared.p, "verdict": compared.verdict}
        table_rows.append(row)
    if not table_rows:
        raise SteerError(f"no member of {folder} has results yet; let `steer sweep` finish first")
    return table_rows


def _right(path: Path, grade: str = "correct") -> Any:
    """The verdicts of a file of answers, "correct" or "lenient"; NaN where a run of old has none."""
    if not path.exists():
        return None
    return np.array([answer.get(grade) for answer in read_json(path)], dtype=float)


def report(folder: Path, title: str) -> str:
    """Write `sweep.json`, `sweep.md` and `sweep.png` into `folder`; the table as text."""
    members = rows(folder)
    results = read_results(folder)
    base = {stage: results[stage] for stage in (*UNTRAINED, "constant") if stage in results}
    record: dict[str, Any] = {"title": title, "untrained": base.get("before"), "members": members}
    record["base"] = base
    pairs = folder / "pairs.json"
    if pairs.exists():
        record["pairs"] = with_correlations(with_scores(read_json(pairs), members), folder)
    text = table(members, base)
    text += rates_table(members)
    if "pairs" in record:
        text += "\n" + pairs_table(record["pairs"])
    replace_file(folder / "sweep.json", (json.dumps(record, indent=1) + "\n").encode())
    replace_file(folder / "sweep.md", f"# {title}\n\n{text}".encode())
    plot(members, base, folder / "sweep.png", title)
    return text


def table(members: Sequence[dict[str, Any]], base: dict[str, Any]) -> str:
    """
    Markdown: a row for each score of the untrained model (`base`, by stage) and one for each member, each a
    single run of training.
    """
    span = "95 % interval"
    head = ["member", "learning rate", "updates", "reward", "accuracy", span, "gain", span]
    head += ["read leniently", span]
    lines = ["Each member is one seed of training: the intervals are over problems only.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, s in stages(base, ""):
        cells = [name, "", "", "", f"{s['accuracy']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}", "", ""]
        if s.get("lenient") is not None:
            cells += [f"{s['lenient']:.3f}", f"{s['lenient_low']:.3f} to {s['lenient_high']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for row in members:
        cells = [row["member"], _figure(row["learning_rate"]), str(row["updates"]), f"{row['reward']:.3f}"]
        for key in ("accuracy", "gain", "lenient"):
            e = row.get(key)
            cells += [f"{e['value']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}"] if e else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if (best := best_base(base)) is not None:
        lines += ["", f"The best elicited base is {best[0]}, read leniently: {best[1]['lenient']:.3f}."]
    stopped = [f"{row['member']}: {row['stopped']}" for row in members if row["stopped"]]
    if stopped:
        lines += ["", "Stopped early:", "", *(f"- {line}" for line in stopped)]
    return "\n".join(lines) + "\n"


def rates_table(members: Sequence[dict[str, Any]]) -> str:
    """
    Markdown: the score of single layers of each third of the depth when they were halved first, by learning
    rate, and what became of those that went on (of several in a layer the one with the best training reward);
    empty where there is nothing to compare.
    """
    single = [r for r in members if len(r["layers"]) == 1 and r["rungs"]]
    rates = _rates(single)
    if len(rates) < 2:
        return ""
    rung, num_hidden_layers = min(single[0]["rungs"], key=int), single[0]["num_hidden_layers"]
    ended: dict[int, dict[str, Any]] = {}
    for r in sorted(single, key=lambda r: r["reward"]):
        if r["stopped"] is None and "accuracy" in r:
            ended[r["layers"][0]] = r
    lines = ["", f"Mean score at update {rung} by learning rate, and held-out accuracy of each layer's best:"]
    head = ["layers", *(f"{rate:g}" for rate in rates), "median at the end", "best at the end"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for third in np.array_split(np.arange(num_hidden_layers), 3):
        inside = [r for r in single if r["layers"][0] in third and rung in r["rungs"]]
        by_rate = [[r["rungs"][rung] for r in inside if r["learning_rate"] == rate] for rate in rates]
        cells = [f"{np.mean(values):.3f}" if values else "" for values in by_rate]
        last = {i: ended[i]["accuracy"]["value"] for i in third.tolist() if i in ended}
        if last:
            best = max(last, key=lambda i: last[i])
            cells += [f"{np.median([*last.values()]):.3f}", f"{last[best]:.3f} (layer {best})"]
        lines.append(f"| {third[0]} to {third[-1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_scores(pairs: dict[str, Any], members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    The record of pairs with the published score. The jointly trained set is the member of all layers that is
    best on the held-out problems, `joint_member`; where there is none the scores are undefined. Scores in the
    record are not used: older ones have the sum of the layers' vectors for the jointly trained set.
    """
    from steer.lens.composition import Composition

    joint = jointly_trained(members)
    known = {k: pairs[k] for k in ("layers", "together", "whole", "base", "problems", "measure")}
    alone, values = (torch.tensor(pairs[k], dtype=torch.float64) for k in ("alone", "pairs"))
    whole = joint["accuracy"]["value"] if joint else None
    scored = Composition(**known, alone=alone, pairs=values, joint=whole)
    several = combinations(range(len(scored.layers)), 2)
    told = {f"{scored.layers[i]} and {scored.layers[j]}": scored.told(i, j) for i, j in several}
    return {**pairs, **scored.to_dict(), "told": told, "joint_member": joint and joint["member"]}


def with_correlations(pairs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """
    The record of pairs, as `with_scores` returns it, with Spearman's correlations of scores and gains with
    the cosine of the vectors, which are in `folder`, and with the distance of the layers.
    """
    from steer.lens.composition import Composition
    from steer.lens.pair_correlation import pair_correlations

    own: dict[int, torch.Tensor] = {}
    for name in pairs["norms"]:
        own |= artifact.read(folder / MEMBERS / name / "vectors").by_layer()
    known = {k: pairs[k] for k in ("layers", "together", "whole", "base", "problems", "measure", "joint")}
    alone, values = (torch.tensor(pairs[k], dtype=torch.float64) for k in ("alone", "pairs"))
    found = pair_correlations(Composition(**known, alone=alone, pairs=values), own)
    return {**pairs, "correlations": found.to_dict(), "correlations_told": found.rows()}


def jointly_trained(members: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """
    The member of all layers with the best held-out accuracy among those that were trained to the end, at the
    site and with the rewards of `best_layers`.
    """
    like = best_layers(members, 1)[0]
    able = [
        r
        for r in members
        if len(r["layers"]) == r["num_hidden_layers"] and r["stopped"] is None and "accuracy" in r
    ]
    same = [r for r in able if all(r[k] == like[k] for k in ("kind", "rewards", "site", "positions"))]
    return max(same, key=lambda r: r["accuracy"]["value"]) if same else None


def pairs_table(pairs: dict[str, Any]) -> str:
    """
    Markdown: accuracy of the best layers' vectors, each alone on the diagonal, two of them elsewhere, and the
    score of each pair.
    """
    layers = pairs["layers"]
    lines = ["Best layers, trained alone, in pairs (alone on the diagonal):", ""]
    lines.append("| layer | " + " | ".join(map(str, layers)) + " |")
    lines.append("|---" * (len(layers) + 1) + "|")
    for layer, values in zip(layers, pairs["pairs"], strict=True):
        lines.append(f"| {layer} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines += ["", f"All {len(layers)} together: {pairs['together']:.3f}, on {pairs['problems']} problems."]
    whole = "all layers trained together - best of the two"
    lines += ["", f"Score of a pair, (pair - best of the two) / ({whole}):", ""]
    lines += [f"- layers {name}: {told}" for name, told in pairs["told"].items()]
    lines += ["", "Spearman's correlation over the pairs:", ""]
    lines += [f"- {measure} with {against}: {told}" for measure, against, told in pairs["correlations_told"]]
    return "\n".join(lines) + "\n"


def _rates(members: Sequence[dict[str, Any]]) -> list[float]:
    """The learning rates of members that have one for all their layers, the lowest first."""
    return sorted({row["learning_rate"] for row in members if isinstance(row["learning_rate"], float)})


def _figure(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def plot(members: Sequence[dict[str, Any]], base: dict[str, Any], path: Path, title: str) -> None:
    """
    A PNG of single-layer members by layer: held-out accuracy with 95 % intervals, the training reward and,
    where layers were trained at several rates, the rates. Members of several layers are lines across; those
    that were stopped early are hollow, and have no place among the accuracies.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    single = [row for row in members if len(row["layers"]) == 1]
    several = [row for row in members if len(row["layers"]) > 1]
    panels = 3 if len(_rates(single)) > 1 else 2
    figure, axes = pyplot.subplots(panels, 1, figsize=(8, 3.25 * panels), layout="constrained", sharex=True)
    figure.suptitle(title)
    top, middle = axes[:2]
    colour: dict[str, str] = {}
    for row in sorted(single, key=lambda row: _figure(row["learning_rate"])):
        key = _series(row, single)
        shade = colour.setdefault(key, COLOURS[len(colour) % len(COLOURS)])
        x, done = row["layers"][0], row["stopped"] is None
        style = {"color": shade, "markerfacecolor": shade if done else "none", "markersize": 5 if done else 3}
        if done and (e := row.get("accuracy")):
            error = [[e["value"] - e["low"]], [e["high"] - e["value"]]]
            top.errorbar(x, e["value"], error, fmt="o", capsize=2, **style)
        middle.plot(x, row["reward"], "o", **style)
        if panels == 3:
            axes[2].plot(x, row["learning_rate"], "o", **style)
    for n, row in enumerate(row for row in several if row["stopped"] is None):
        shade = COLOURS[(len(colour) + n) % len(COLOURS)]
        if e := row.get("accuracy"):
            top.axhline(e["value"], color=shade, linestyle="--", linewidth=1, label=row["member"])
            top.axhspan(e["low"], e["high"], color=shade, alpha=0.08, linewidth=0)
        middle.axhline(row["reward"], color=shade, linestyle="--", linewidth=1, label=row["member"])
    if before := base.get("before"):
        top.axhline(before["accuracy"], color="#6b7280", linewidth=1, label="untrained")
    if (best := best_base(base)) is not None:
        top.axhline(
            best[1]["lenient"], color="#6b7280", linewidth=1, linestyle=":", label="best elicited base"
        )
    for key, shade in colour.items():
        for panel in (top, middle):
            panel.plot([], [], "o", color=shade, label=key)
    top.set_ylabel("held-out accuracy, 95 % interval")
    middle.set_ylabel("training reward at the end")
    if panels == 3:
        axes[2].set_yscale("log")
        axes[2].set_ylabel("learning rate (hollow: stopped early)")
    axes[-1].set_xlabel("layer of the vector")
    for panel in axes:
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        if 0 < len(handles) <= 12:
            panel.legend(handles, labels, fontsize=8, frameon=False, loc="best")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _series(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """What tells a single-layer member from others of its layer: members of one series share a colour."""
    differing = ("kind", "site", "positions", "seed", "rewards")
    keys = [key for key in differing if len({str(other[key]) for other in others}) > 1]
    if len({o["layers"][0] for o in others}) < len(others):
        keys.append("learning_rate")
    return ", ".join(f"{k} {_figure(row[k])}" for k in keys) or "one layer alone"


def best_layers(members: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """
    The `count` members, of different layers, with the best training reward among the constant single-layer
    ones that were trained to the end, at the site and with the rewards of the first.
    """
    able = [r for r in members if len(r["layers"]) == 1 and r["kind"] == "constant" and r["stopped"] is None]
    if not able:
        return []
    same = [r for r in able if all(r[k] == able[0][k] for k in ("rewards", "site", "positions"))]
    ranked = sorted(same, key=lambda row: -row["reward"])
    by_layer: dict[int, dict[str, Any]] = {}
    for row in ranked:
        by_layer.setdefault(row["layers"][0], row)
    return list(by_layer.values())[:count]


def compose_pairs(
    folder: Path,
    best: Sequence[dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grader: MathGrader,
    problems: list[dict[str, Any]],
    prompt: PromptSpec,
    tokens: int,
) -> None:
    """
    Try the vectors of the members `best` (of `rows`) alone, in pairs and together, as `steer lens compose`
    does, into `pairs.json`; not again when it holds these already.
    """
    import steer
    from steer.lens.composition import compose
    from steer.lens.subject import Subject

    path = folder / "pairs.json"
    tried = {row["member"]: row["norm"] for row in best}
    if path.exists() and read_json(path)["norms"] == tried:
        return
    parts = [artifact.read(folder / MEMBERS / name / "vectors") for name in tried]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    vectors = steer.load(total, model)
    try:
        subject = Subject(vectors, tokenizer, prompt, max_new_tokens=tokens)
        composition = compose(subject, problems, grader, label="best layers in pairs")
    finally:
        steer.detach(model)
    replace_file(path, (json.dumps({"norms": tried, **composition.to_dict()}, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("folder", type=Path, help="folder of a run of `steer sweep`")
    parser.add_argument("--title", help="of the table and the plot (default: as it was)")
    args = parser.parse_args()
    before = args.folder / "sweep.json"
    known = read_json(before)["title"] if before.exists() else args.folder.name
    try:
        print(report(args.folder, args.title or known))
    except SteerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

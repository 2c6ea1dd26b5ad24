"""Tables and plot of `evals.sae_study`, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from steer.stats import t_quantile

INTERACTIONS = {
    "kron-m2n4": "mAND",
    "kron-m2n4-relu_product": "product of ReLUs",
    "kron-m2n4-product": "plain product",
}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the 95 % interval by Student's t over seeds; None for one seed."""
    if len(values) < 2:
        return values[0], None
    return mean(values), t_quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5


def cell(values: Sequence[float | None], digits: int = 4, sign: str = "") -> str:
    """`mean ± half` of the values; empty where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    middle, half = interval(known)
    return f"{middle:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def rows_of(results: dict[str, Any], size: int, stage: str, name: str) -> list[dict[str, Any]]:
    """The measurements of one SAE, a seed each, in the order of the seeds."""
    return [part[stage][name] for _, part in _parts(results, size) if name in part.get(stage, {})]


def _parts(results: dict[str, Any], size: int) -> list[tuple[int, dict[str, Any]]]:
    """The seeds of one size of dictionary, each with its results, in the order of the seeds."""
    keys = [key.split("/") for key in results["passes"]]
    seeds = sorted(int(seed) for own, seed in keys if own == str(size))
    return [(seed, results["passes"][f"{size}/{seed}"]) for seed in seeds]


def explained(row: dict[str, Any], k: int) -> float:
    """Explained variance at l0 = k, of a threshold SAE with all its features."""
    values = row["explained"]
    return float(values.get(str(k), values.get(k)))


def markdown(results: dict[str, Any]) -> str:
    """The tables: equal tokens, equal FLOPs, KronSAE's interaction, and explained variance over l0."""
    facts = results["facts"]
    lines = [
        f"{facts['model']}, layer {facts['layer']}: {facts['cache_tokens']:,} distinct activations of "
        f"{' and '.join(facts['texts'])} in batches of {facts['batch']:,}, measured on "
        f"{facts['heldout_tokens']:,} held-out activations. Mean and 95 % interval over seeds (Student's t); "
        "differences are from TopK with the same seed. FLOPs are those of a token's forward pass, of TopK. "
        f"An SAE is flat where its held-out explained variance rose by less than {facts['threshold']} over "
        "the last 20 % of the steps at a constant learning rate; the rise is that of the seed with the "
        "largest. FLOPs, absorption and dead features of HierarchicalTopK are those of all "
        f"{max(facts['l0'])} active features.",
    ]
    for size in facts["dictionaries"]:
        lines += ["", *_training_lines(results, size), "", *_equal_tokens(results, size)]
        lines += ["", *_equal_flops(results, size)]
    size = facts["dictionaries"][0]
    lines += ["", *_interactions(results, size), "", *_heads(results, size), "", *_over_l0(results, size)]
    return "\n".join(lines) + "\n"


def _training_lines(results: dict[str, Any], size: int) -> list[str]:
    ends = []
    for seed, part in _parts(results, size):
        gained = (part["outcome"]["decay_gained"] or {}).get("topk")
        text = f"seed {seed} {part['outcome']['stopped']} after {part['tokens']:,} tokens"
        ends.append(text + ("" if gained is None else f" (the decay gave TopK {gained:+.4f})"))
    return [f"Dictionary of {size:,} features: {'; '.join(ends)}."]


HEAD = (
    "encoder weights | FLOPs | tokens | l0 | explained variance | difference | loss recovered | absorption | "
    "dead"
)


def _row(label: str, rows: list[dict[str, Any]], topk: list[dict[str, Any]], k: int, limit: float) -> str:
    base = topk[0]["forward_flops"]
    paired = zip(rows, topk, strict=False)
    differences: list[float | None] = [explained(row, k) - explained(other, k) for row, other in paired]
    recovered = [row["loss_recovered"].get(str(k), row["loss_recovered"].get(k)) for row in rows]
    rises = [row["rise"] for row in rows]
    rise = max(rises) if None not in rises else None
    flat = "unknown" if rise is None else f"{'flat' if rise < limit else 'not flat'}, {rise:+.4f}"
    # the prefix of k features of a HierarchicalTopK with more
    l0 = [min(float(row["l0"]), k) if row["config"]["activation"] == "topk" else row["l0"] for row in rows]
    cells = [
        f"{rows[0]['encoder_parameters']:,}",
        f"{rows[0]['forward_flops'] / base:.3f}",
        f"{mean(row['trained_tokens'] for row in rows):,.0f}",
        f"{mean(l0):.1f}",
        cell([explained(row, k) for row in rows]),
        "" if rows is topk else cell(differences, sign="+"),
        cell(recovered),
        cell([row["absorption"] for row in rows], 3),
        cell([row["dead"] for row in rows], 3),
        flat,
    ]
    return f"| {label} | " + " | ".join(cells) + " |"


def _equal_tokens(results: dict[str, Any], size: int) -> list[str]:
    facts = results["facts"]
    topk = rows_of(results, size, "equal_tokens", "topk")
    names = [name for name in _names(results, size) if not name.startswith("topk-l0")]
    lines = [f"| {size:,}, equal tokens | {HEAD} | rise |", "|---" * 11 + "|"]
    for name in names:
        rows = topk if name == "topk" else rows_of(results, size, "equal_tokens", name)
        lines.append(_row(name, rows, topk, facts["k"], facts["threshold"]))
    return lines


def _equal_flops(results: dict[str, Any], size: int) -> list[str]:
    facts = results["facts"]
    topk = rows_of(results, size, "equal_tokens", "topk")
    lines = [f"| {size:,}, equal FLOPs | {HEAD} | rise |", "|---" * 11 + "|"]
    lines.append(_row("topk", topk, topk, facts["k"], facts["threshold"]))
    for name in ("kron-m2n4", "kron-m4n4"):
        rows = rows_of(results, size, "equal_flops", name)
        if rows:
            lines.append(_row(name, rows, topk, facts["k"], facts["threshold"]))
    return lines


def _names(results: dict[str, Any], size: int) -> list[str]:
    parts = [part for key, part in results["passes"].items() if key.split("/")[0] == str(size)]
    return list(parts[0]["equal_tokens"])


def _interactions(results: dict[str, Any], size: int) -> list[str]:
    k = results["facts"]["k"]
    base = rows_of(results, size, "equal_tokens", "kron-m2n4")
    lines = [f"| {size:,}, KronSAE m=2 n=4 | explained variance | difference from mAND |", "|---|---|---|"]
    for name, label in INTERACTIONS.items():
        rows = rows_of(results, size, "equal_tokens", name)
        paired = zip(rows, base, strict=False)
        differences: list[float | None] = [explained(row, k) - explained(other, k) for row, other in paired]
        shown = "" if name == "kron-m2n4" else cell(differences, sign="+")
        lines.append(f"| {label} | {cell([explained(row, k) for row in rows])} | {shown} |")
    return lines


def _heads(results: dict[str, Any], size: int) -> list[str]:
    """Correlations of features within heads and between them; results of an earlier version have none."""
    title = f"| {size:,}, correlation of two features | in one head | in one random head | in two heads |"
    lines = [title, "|---|---|---|---|"]
    for name in _names(results, size):
        rows = [row.get("head_correlation") for row in rows_of(results, size, "equal_tokens", name)]
        found = [row for row in rows if row is not None]
        if found:
            cells = [cell([row[key] for row in found], 3) for key in ("within", "random", "between")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def over_l0(results: dict[str, Any], size: int, name: str, n: int) -> list[float]:
    """Explained variance at l0 = n by seed: of a TopK trained for it, or of one hierarchical SAE."""
    k = results["facts"]["k"]
    own = name if name != "topk" or n == k else f"topk-l0={n}"
    return [explained(row, n) for row in rows_of(results, size, "equal_tokens", own)]


def _over_l0(results: dict[str, Any], size: int) -> list[str]:
    l0 = results["facts"]["l0"]
    lines = [f"| {size:,}, explained variance | " + " | ".join(f"l0 = {n}" for n in l0) + " |"]
    lines.append("|---" * (len(l0) + 1) + "|")
    labels = {"topk": "TopK, trained for each l0", "hierarchical": "HierarchicalTopK, one SAE"}
    for name, label in {**labels, "hierarchical-kron": "HierarchicalTopK with KronSAE, one SAE"}.items():
        cells = [cell(over_l0(results, size, name, n)) for n in l0]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Held-out explained variance over tokens (first seed), and over l0 with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    facts = results["facts"]
    size = facts["dictionaries"][0]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    part = results["passes"][f"{size}/0"]
    for name in _names(results, size):
        if not name.startswith("topk-l0"):
            points = [(step * facts["batch"], values[name]) for step, values in part["history"]]
            left.plot(*zip(*points, strict=True), label=name, linewidth=1)
    left.axvline(part["outcome"]["decay_start"] * facts["batch"], color="gray", linestyle="--")
    left.set_xlabel("tokens; dashed: the learning rate begins to decay")
    left.set_ylabel("held-out explained variance, all active features")
    left.legend(fontsize=7)
    for name, mark in (("topk", "o--"), ("hierarchical", "s-"), ("hierarchical-kron", "^-")):
        found = [interval(over_l0(results, size, name, n)) for n in facts["l0"]]
        heights = [middle for middle, _ in found]
        halves = [half or 0.0 for _, half in found]
        right.errorbar(facts["l0"], heights, halves, fmt=mark, capsize=3, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(facts["l0"], [str(n) for n in facts["l0"]])
    right.set_xlabel("l0")
    right.set_ylabel("explained variance")
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

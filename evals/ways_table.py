"""The table and the plot of `evals.ways`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.results_page import markdown, signed, value

TITLES = {
    "grpo": "GRPO",
    "grpo-from-mean": "GRPO from a mean difference",
    "majority": "GRPO, majority reward",
    "sft": "SFT on right samples",
    "dpo": "DPO on right and wrong samples",
    "mean": "mean difference alone",
}
HEADER = ["", "greedy, boxed", "each seed", "greedy, leniently", "over the best elicited base, leniently",
          "KL to the base", "perplexity", "broken answers"]  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    """
    The record of a study as Markdown: a row for each method that has scores, the base and the elicited base
    first; the differences between methods; and what was chosen, was impossible, and took how long.
    """
    rows = {row["method"]: row for row in record["rows"] if row["decoding"] == "greedy"}
    order = [*(name for name in rows if name not in TITLES), *(name for name in TITLES if name in rows)]
    blocks = [markdown(HEADER, [_cells(record, rows[name]) for name in order])]
    if against := [_against(pair) for pair in record["pairs"] if "grpo" in (pair["method"], pair["other"])]:
        header = ["", "minus GRPO, greedy, boxed", "p, corrected", ""]
        blocks.append(markdown(header, against))
    notes = [
        f"{TITLES[method]}: {one['what']} {one['value']:g}, chosen among "
        + ", ".join(f"{tried} ({accuracy:.3f})" for tried, accuracy in one["tried"].items())
        for method, one in record["chosen"].items()
    ]
    notes += [f"not made: {name}: {reason}" for name, reason in record["impossible"].items()]
    cells = record["cells"].values()
    minutes, cpu = (sum(one[name] for one in cells) / 60 for name in ("seconds", "cpu_seconds"))
    took = f"{minutes:.0f} minutes, {cpu:.0f} minutes of processor time"
    notes.append(f"{took}; of what was stopped, since its last start")
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in notes)]) + "\n"


def _cells(record: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    name = row["method"]
    seeds = row["by_seed"]
    gain = row.get("elicited_gain")
    effects = side_effects(record, name)
    kl = perplexity = ""
    if effects:
        kl, perplexity = (_mean_and_range([one[key] for one in effects]) for key in ("kl", "perplexity"))
    return [
        TITLES.get(name, name),
        value(row["accuracy"]),
        ", ".join(f"{x:.3f}" for x in seeds.values()) if len(seeds) > 1 else "",
        value(row["lenient"]),
        signed(gain["difference"]) if gain else "the best elicited base",
        kl,
        perplexity,
        f"{row['broken']:.1%}",
    ]


def side_effects(record: Mapping[str, Any], method: str) -> list[dict[str, float]]:
    """What was measured of each seed of a method."""
    return [one for name, one in record["side_effects"].items() if name.partition("#")[0] == method]


def _mean_and_range(values: list[float]) -> str:
    text = f"{fmean(values):.3g}"
    return f"{text} ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else text


def _against(pair: Mapping[str, Any]) -> list[str]:
    """A paired difference, turned so that GRPO is what is subtracted."""
    difference, other, verdict = pair["difference"], pair["method"], pair["verdict"]
    if other == "grpo":
        other = pair["other"]
        low, high = -difference["high"], -difference["low"]
        difference = {"value": -difference["value"], "low": low, "high": high}
        verdict = {"better": "worse", "worse": "better"}.get(verdict, verdict)
    return [TITLES.get(other, other), signed(difference), f"{pair['corrected_p']:.2g}", verdict]


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Accuracy against the KL to the base: a small mark for each seed, a large one for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {row["method"]: row for row in record["rows"] if row["decoding"] == "greedy"}
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (method, title) in enumerate(TITLES.items()):
        if method not in rows:
            continue
        row, color = rows[method], f"C{number}"
        kl = {name.partition("#")[2]: one["kl"] for name, one in record["side_effects"].items()
              if name.partition("#")[0] == method}  # fmt: skip
        axes.scatter([kl[seed] for seed in row["by_seed"]], row["by_seed"].values(), s=14, color=color)
        accuracy = row["accuracy"]
        spread = [[accuracy["value"] - accuracy["low"]], [accuracy["high"] - accuracy["value"]]]
        axes.errorbar(
            fmean(kl.values()), accuracy["value"], spread, fmt="o", ms=8, color=color, capsize=3, label=title
        )
    for name, style in zip((name for name in rows if name not in TITLES), ("--", ":", "-."), strict=False):
        axes.axhline(rows[name]["accuracy"]["value"], linestyle=style, color="grey", label=name)
    axes.set_xlabel("KL to the base on neutral text, nats a token")
    axes.set_ylabel("greedy accuracy on held-out problems, boxed")
    axes.set_xscale("symlog", linthresh=1e-2)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

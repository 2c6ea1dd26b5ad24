"""
Write docs/results.md: the prose of `results_page.md.jinja` with tables made from the files in evals/results.

    python -m evals.results_page --out docs/results.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2

RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "results_page.md.jinja"
# Groups of layers in the table of the layer study, and the columns of learning rates.
THIRDS = {"0 to 9": range(10), "10 to 19": range(10, 20), "20 to 29": range(20, 30)}
RATES = (0.1, 0.3, 1.0)


def render(results: Path = RESULTS) -> str:
    """The whole page, as Markdown, from the result files in `results`."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
    environment.filters.update(three=lambda x: f"{x:.3f}", count=lambda x: f"{x:,}")

    def table(file: str, number: int = 0) -> str:
        """The table at position `number` in a Markdown file under `results`."""
        return tables((results / file).read_text())[number]

    def opening(file: str) -> str:
        """The text before the first table of a Markdown file under `results`."""
        return (results / file).read_text().partition("\n|")[0].strip()

    def data(file: str) -> Any:
        return json.loads((results / file).read_text())

    template = environment.from_string(TEMPLATE.read_text())
    made = template.render(
        table=table,
        opening=opening,
        gate=gate,
        budget=budget,
        seeds=seeds,
        first_above=first_above,
        data=data,
        demo_table=demo(data("demo/results.json"), {c: data(f"control-{c}/results.json") for c in CONTROLS}),
        comparison_table=comparison(
            data("compare-tiny/scores.json"), (results / "compare-tiny/training.md").read_text()
        ),
        gsm8k_table=gsm8k(data("gsm8k-coder-1.5b/scores.json")),
        layers_table=layers(data("layer-sweep/sweep.json"), data("layer-sweep/halving.json")),
        sweep_table=sweep_cost(data("population-speed/population-speed.json")),
        transfer_table=transfer(data("transfer.json")),
        contention_table=contention(data("contention/contention.json")),
        profile=data("speed/update-profile.json"),
        speed_table=re.sub(r"@float32", "", table("speed/speed.md")),
    )
    return made.rstrip() + "\n"


def tables(text: str) -> list[str]:
    """The Markdown tables in `text`, first one first."""
    return [found.strip() for found in re.findall(r"(?:^\|.*\|[ ]*\n?)+", text, re.MULTILINE)]


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def interval(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]"


def value(found: dict[str, float] | None) -> str:
    """`{"value", "low", "high"}` as 0.676 [0.124, 1.000]; nothing for None."""
    return f"{found['value']:.3f} {interval(found['low'], found['high'])}" if found else ""


def signed(found: dict[str, float]) -> str:
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


CONTROLS = {
    "random": ("vectors trained with a random reward", "`make control`"),
    "format": ("vectors trained with a reward for the box alone", "`make control REWARD=format`"),
}


def demo(results: dict[str, Any], controls: dict[str, dict[str, Any]]) -> str:
    names = {
        "before": "untrained, as prompted",
        "longer": "untrained, {max_new_tokens} tokens instead of 16",
        "elicited": "untrained, {examples} worked examples in the prompt, {max_new_tokens} tokens",
        "constant": "always the same answer, {answer}",
        "after": "**steering vectors**",
    }
    rows = [
        [
            name.format(**results[stage]),
            f"{results[stage]['accuracy']:.3f} {interval(results[stage]['low'], results[stage]['high'])}",
            f"{results[stage]['lenient']:.3f} "
            + interval(results[stage]["lenient_low"], results[stage]["lenient_high"]),
            "`make demo`",
        ]
        for stage, name in names.items()
    ]
    for control, (name, command) in CONTROLS.items():
        after = controls[control]["after"]
        rows.append([name, f"{after['accuracy']:.3f} {interval(after['low'], after['high'])}", "", command])
    return markdown(["", "boxed answer, 95 % interval", "read leniently, 95 % interval", "command"], rows)


def comparison(scores: dict[str, Any], training: str) -> str:
    made = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in tables(training)[0].splitlines()
    ]
    how = {line[0]: (line[2], line[5]) for line in made[2:]}  # learning rate and minutes
    rows = []
    sampled = {row["method"]: row for row in scores["rows"] if row["decoding"] == "sampled"}
    for row in scores["rows"]:
        if row["decoding"] != "greedy":
            continue
        name, seeds = row["method"], row["by_seed"]
        gain = row.get("elicited_gain")
        rows.append(
            [
                f"**{name}**" if name == "steering" else name,
                f"{row['parameters']:,}",
                value(row["accuracy"]),
                value(row["lenient"]),
                ", ".join(f"{x:.2f}" for x in seeds.values()) if len(seeds) > 1 else "",
                signed(gain["difference"]) if gain else "the best elicited base",
                value(sampled[name]["accuracy"]),
                *how.get(name, ("", "")),
            ]
        )
    for row in scores["constants"]:
        # a constant answer is right for the same problems, however it is read
        rows.append([row["method"], 0, *[value(row["accuracy"])] * 2, "", "", "", "", ""])
    header = ["method", "trainable parameters", "greedy, boxed", "greedy, leniently", "each seed"]
    header += ["over the best elicited base, leniently", "temperature 1, boxed", "rate", "minutes"]
    return markdown(header, rows)


def gsm8k(scores: dict[str, Any]) -> str:
    names = {"base": "base, 300 tokens", "steering": "steering vectors", "base-600": "base, 600 tokens"}
    rows = [
        [
            names[row["method"]],
            f"{row['parameters']:,}",
            value(row["accuracy"]),
            signed(row["gain"]["difference"]) if "gain" in row else "",
            round(row["tokens"]),
            f"{row['truncated']:.1%}",
        ]
        for row in scores["rows"]
    ]
    header = ["", "trainable parameters", "greedy, 95 % interval", "against the base", "tokens", "cut off"]
    return markdown(header, rows)


def gate(scores: dict[str, Any], base: str) -> str:
    """The methods of a gate, and how far each is from the best elicited base."""
    trained = {"full": "full fine-tune", "steering": "steering vectors"}

    def name(row: dict[str, Any]) -> str:
        if row["method"] not in trained:
            return str(row["method"]).replace("base", base, 1)
        seeds = "one seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
        return f"{trained[row['method']]}, {seeds}"

    rows = [
        [
            name(row),
            value(row["accuracy"]),
            value(row["lenient"]),
            signed(row["elicited_gain"]["difference"])
            if "elicited_gain" in row
            else "the best elicited base",
            round(row["tokens"]),
        ]
        for row in scores["rows"]
    ]
    return markdown(
        ["", "greedy, boxed", "leniently", "over the best elicited base, leniently", "tokens"], rows
    )


def budget(measured: dict[str, Any]) -> str:
    """Hours of a comparison: measured seconds of an update times the updates of its sweep and its runs."""
    rows = []
    for run in measured["runs"]:
        plan = measured["plans"][run["subject"]]
        updates = plan["sweep"] + plan["run"] * plan["seeds"]
        seconds = run["seconds_per_update"]
        longest, whole = seconds * plan["run"] / 60, seconds * updates / 3600
        rows.append([run["subject"], run["arm"], f"{seconds:.0f}", f"{longest:.0f}", updates, f"{whole:.1f}"])
    return markdown(
        ["subject", "arm", "s an update", "minutes a run", "updates in all", "hours in all"], rows
    )


def seeds(sweep: dict[str, Any]) -> str:
    """A population whose members differ in their seeds: held-out accuracy, reward of the last updates."""
    rows = [
        [m["seed"], value(m["accuracy"]), value(m["lenient"]), f"{m['reward']:.2f}"]
        for m in sorted(sweep["members"], key=lambda m: m["seed"])
    ]
    return markdown(["seed", "greedy, boxed", "leniently", "reward of the last five updates"], rows)


def first_above(curves: dict[str, list[float]], share: float) -> list[int]:
    """The number of the update, from 1, with which each curve is first above `share`; its length if never."""
    return [
        next((number for number, x in enumerate(curve, 1) if x > share), len(curve))
        for curve in curves.values()
    ]


def layers(sweep: dict[str, Any], halving: dict[str, Any]) -> str:
    single = {m["member"]: m for m in sweep["members"] if len(m["layers"]) == 1}
    rung = halving["16"]
    rows = []
    for name, group in THIRDS.items():
        members = [m for m in single.values() if m["layers"][0] in group]
        by_rate = [
            fmean(rung[m["member"]]["score"] for m in members if m["learning_rate"] == rate) for rate in RATES
        ]
        ends: dict[int, float] = {}
        for m in members:
            if m["updates"] == 40:  # equal scores on training problems let two rates of a layer go on
                ends[m["layers"][0]] = max(ends.get(m["layers"][0], 0.0), m["accuracy"]["value"])
        best = max(ends, key=ends.__getitem__)
        cells = [f"**{x:.3f}**" if x == max(by_rate) else f"{x:.3f}" for x in by_rate]
        rows.append([name, *cells, f"{median(ends.values()):.3f}", f"{ends[best]:.3f} (layer {best})"])
    whole = [m for m in sweep["members"] if len(m["layers"]) > 1 and m["updates"] == 40]
    for m in whole:
        rows.append(
            [f"all together, at {m['learning_rate']}", "", "", "", "", f"{m['accuracy']['value']:.3f}"]
        )
    header = ["layers", *(f"training problems, update 16, rate {rate}" for rate in RATES)]
    return markdown([*header, "held-out at the end, median", "best"], rows)


def sweep_cost(found: dict[str, Any]) -> str:
    solo, together = found["solo"][0], found["together"][0]
    titles = {"wall": "wall clock", "training": "training alone", "cpu": "CPU seconds"}
    rows = [
        *(
            [title, *(f"{side[f'{key}_seconds']:.0f} s" for side in (solo, together)), f"{ratio:.2f}"]
            for key, title in titles.items()
            if (ratio := found.get(f"{key}_ratio"))  # records of old do not tell training apart
        ),
        [
            "peak memory",
            f"{solo['memory_bytes'] / 1e9:.2f} GB (one run)",
            f"{together['memory_bytes'] / 1e9:.2f} GB",
            f"{found['memory_ratio']:.2f}",
        ],
    ]
    members = found["settings"]["members"]
    return markdown([f"{members} members", "one after another", "together", "ratio"], rows)


def contention(record: dict[str, Any]) -> str:
    rows = []
    for name, seconds in record["seconds"].items():
        if name.startswith("default, beside "):
            others = name.removeprefix("default, beside ")
            runs = ", ".join(f"{taken:.1f}" for taken in seconds)
            rows.append([others, f"{median(seconds):.1f}", runs, f"{record['ratios'][name]:.2f}"])
    return markdown(["other processes", "seconds, median", "each run", "times alone"], rows)


def transfer(found: dict[str, Any]) -> str:
    rows = [
        [
            row["model"],
            row["vectors"],
            f"{row['score']['accuracy']:.3f} {interval(row['score']['low'], row['score']['high'])}",
            f"{row['log_probability']:.1f}",
        ]
        for row in found["rows"]
    ]
    return markdown(["model", "vectors", "accuracy, 95 % interval", "log p"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evals.results_page", description="Write the page of results from evals/results."
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="(default: %(default)s)")
    parser.parse_args().out.write_text(render())


if __name__ == "__main__":
    main()

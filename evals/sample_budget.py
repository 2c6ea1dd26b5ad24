"""
Do dynamic sampling and pass rates of problems reach an accuracy with fewer updates, samples or minutes?

    python -m evals.sample_budget --out evals/results/sample-budget     # about 90 minutes on two cores

The demo's task is trained plainly, with `dynamic_sampling_rounds` and with `pass_rate_floor`, with the same
seeds. Greedy accuracy is measured every few updates on problems split off the training set, and drawn against
updates, samples and minutes of training. Runs follow each other, one process at a time; what is in `--out` is
not trained again, and a run that was cut goes on from its last checkpoint in `--work`. Run it on an idle
machine: minutes are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from steer.arguments import count, whole
from steer.files import replace_file
from steer.training.run import read_results
from steer.versions import versions

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "dynamic": ["--dynamic_sampling_rounds", "3"],
    "pass-rate": ["--pass_rate_floor", "0.2"],
}
AXES = {"updates": "updates", "samples": "samples drawn", "minutes": "minutes of training"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="what is trained (default: all)"
    )
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--updates", type=count, default=40, help="updates of each run (default: 40)")
    parser.add_argument("--every", type=count, default=4, help="updates between validations (default: 4)")
    parser.add_argument("--config", default="demo", help="what is trained (default: demo)")
    parser.add_argument("--goal", type=float, default=0.8, help="accuracy to reach (default: 0.8)")
    parser.add_argument("--out", type=Path, required=True, help="folder for sample-budget.json, .md and .png")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/sample-budget"), help="run folders (default: %(default)s)"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sample-budget.json"
    settings = {"config": args.config, "updates": args.updates, "every": args.every}
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**settings, "runs": {}}
    if {name: record[name] for name in settings} != settings:
        sys.exit(f"error: {path} holds runs with other settings; give another --out, or remove it")
    for seed in args.seeds:
        for variant in args.variants:
            name = f"{variant}-{seed}"
            if name in record["runs"]:
                continue
            record["runs"][name] = {
                "variant": variant,
                "seed": seed,
                "versions": versions("steer", "torch", "transformers", "trl"),
                **train(args, variant, seed),
            }
            replace_file(path, (json.dumps(record, indent=1) + "\n").encode())
    runs = [*record["runs"].values()]
    text = table(runs, args.goal)
    replace_file(args.out / "sample-budget.md", text.encode())
    print(text)
    plot(runs, args.goal, args.out / "sample-budget.png")


def train(args: argparse.Namespace, variant: str, seed: int) -> dict[str, list[float]]:
    """One run in a process of its own; its curves."""
    folder = args.work / f"{variant}-{seed}"
    command = [sys.executable, str(ROOT / "recipes" / "grpo_steer.py"), "--config", args.config]
    command += ["--output_dir", str(folder), "--seed", str(seed), "--max_steps", str(args.updates)]
    command += ["--validate_every", str(args.every), "--validation", "0.3", "--eval_data", "none"]
    print(f"training {variant}, seed {seed}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [*command, *VARIANTS[variant]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        sys.exit(f"error: {variant}, seed {seed} failed:\n{done.stderr[-3000:]}")
    state = folder / f"checkpoint-{args.updates}" / "trainer_state.json"
    log = [row for row in json.loads(state.read_text())["log_history"] if "reward" in row]
    settings = json.loads((folder / "run.json").read_text())["training"]
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    rows //= settings.get("num_iterations", 1)
    return curves(log, read_results(folder)["validation"]["history"], rows)


def curves(
    log: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]], rows: int
) -> dict[str, list[float]]:
    """
    What is drawn of a run.

    Args:
        log: a row for each update.
        validations: rows with `step` and `accuracy`, the untrained model's first.
        rows: samples of an update, where none is drawn again.

    Returns:
        `accuracy` at each validation, with the `updates`, `samples` and `minutes` of training before it; and
        `flat`, the share of groups without an advantage in each update.
    """
    counted = any("dynamic_sampling/samples" in row for row in log)
    # updates that follow another of the same generation count none
    drawn = (row.get("dynamic_sampling/samples", 0) if counted else rows for row in log)
    samples = [0.0, *accumulate(drawn)]
    minutes = [0.0, *accumulate(row["seconds/wall"] / 60 for row in log)]
    steps = [row["step"] for row in validations]
    return {
        "accuracy": [round(row["accuracy"], 4) for row in validations],
        "updates": steps,
        "samples": [samples[step] for step in steps],
        "minutes": [round(minutes[step], 3) for step in steps],
        "flat": [round(row["frac_reward_zero_std"], 4) for row in log],
    }


def reached(run: dict[str, Any], axis: str, goal: float) -> float | None:
    """The updates, samples or minutes until the first validation at `goal` or above; None where none is."""
    for value, accuracy in zip(run[axis], run["accuracy"], strict=True):
        if accuracy >= goal:
            return value
    return None


def table(runs: Sequence[dict[str, Any]], goal: float) -> str:
    """Medians over seeds; a run that does not reach the goal counts as above its own end."""
    head = ["variant", "seeds", f"reached {goal:g}", *(f"{axis} to it" for axis in AXES)]
    lines = [[*head, "flat groups", "last accuracy, each seed"], ["---"] * (len(head) + 2)]
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        medians = []
        for axis in AXES:
            ends = [(reached(run, axis, goal), run[axis][-1]) for run in mine]
            # runs that did not reach the goal come last
            ordered = sorted((end is None, last if end is None else end) for end, last in ends)
            censored, value = ordered[(len(ordered) - 1) // 2]
            shown = f"{value:.3g}" if axis == "minutes" else f"{value:,.0f}"
            medians.append(f"over {shown}" if censored else shown)
        succeeded = sum(reached(run, "updates", goal) is not None for run in mine)
        flat = statistics.mean(value for run in mine for value in run["flat"])
        last = ", ".join(f"{run['accuracy'][-1]:.2f}" for run in mine)
        lines.append([variant, str(len(mine)), f"{succeeded} of {len(mine)}", *medians, f"{flat:.0%}", last])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(runs: Sequence[dict[str, Any]], goal: float, path: Path) -> None:
    """Accuracy against updates, samples and minutes: each seed thin, the median of the seeds bold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        for i, variant in enumerate(dict.fromkeys(run["variant"] for run in runs)):
            mine = [run for run in runs if run["variant"] == variant]
            for run in mine:
                panel.plot(run[axis], run["accuracy"], color=f"C{i}", linewidth=0.7, alpha=0.5)
            middle = [
                [statistics.median(values) for values in zip(*(run[key] for run in mine), strict=True)]
                for key in (axis, "accuracy")
            ]
            panel.plot(*middle, color=f"C{i}", linewidth=2, label=variant)
        panel.axhline(goal, color="grey", linewidth=0.7, linestyle=":")
        panel.set_xlabel(title)
    panels[0].set_ylabel("greedy accuracy")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

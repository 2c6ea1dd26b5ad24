"""What a comparison of methods shows: tables, plots and page of its finished runs, and each run's curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer.evaluation import compare, plots
from steer.evaluation.pack import read_packed
from steer.evaluation.plan import Plan
from steer.files import read_json, replace_file


def write_report(files: Sequence[Path], plan: Plan) -> None:
    """Write tables, plots and page of the packed runs in `files` to the plan's `out`; print the tables."""
    about = [read_packed(file)["about"] for file in files]
    trained = [one for one in about if "method" in one]
    reference = plan.reference if plan.reference in {one["method"] for one in trained} else None
    compare.report(files, "base", reference, plan.out)
    table = _training_table(trained)
    print(f"\n{table}")
    replace_file(Path(plan.out, "training.md"), f"{table}\n".encode())
    curves: dict[str, list[list[float]]] = {}
    for one in trained:
        if one["curve"]["accuracy"]:  # given answers are not sampled
            curves.setdefault(one["method"], []).append(one["curve"]["accuracy"])
    if curves:
        replace_file(Path(plan.out, "training.png"), plots.curves(curves))
    print(f"\npage  {Path(plan.out, 'index.html')}")


def _training_table(trained: Sequence[dict[str, Any]]) -> str:
    """What each method's runs took, in Markdown: means over its seeds."""
    lines = ["| method | trainable parameters | learning rate | seeds | updates | minutes | CPU minutes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(one["method"] for one in trained):
        of = [one for one in trained if one["method"] == name]
        results = [one["results"] for one in of]
        wall, cpu = (
            sum(r[key] for r in results) / len(results) / 60
            for key in ("training_seconds", "training_cpu_seconds")
        )
        lines.append(
            f"| {name} | {results[0]['trained_numbers']:,} | {of[0]['learning_rate']:g} | "
            f"{', '.join(str(one['seed']) for one in of)} | {results[0]['steps']} | {wall:.1f} | {cpu:.1f} |"
        )
    return "\n".join(lines)


def curve(folder: Path) -> dict[str, list[float]]:
    """Reward, accuracy and length of the samples, by update; kept where the log is gone with checkpoints."""
    from steer.training.resuming import log_history

    kept, log = folder / "curve.json", folder / "log.json"  # of a member of a population
    history = read_json(log) if log.exists() else log_history(folder)
    if not history and kept.exists():
        return json.loads(kept.read_text())
    keys = {"reward": "reward", "accuracy": "accuracy", "length": "completions/mean_length"}
    rows = [row for row in history if "reward" in row]
    found = {
        name: [round(row[key], 4) for row in rows if row.get(key) is not None] for name, key in keys.items()
    }
    replace_file(kept, json.dumps(found).encode())
    return found

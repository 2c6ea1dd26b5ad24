"""
How much slower is training beside other busy processes?

    python -m evals.contention --out evals/results/contention       # about ten minutes on two cores

Each round trains the demo for a few updates alone, beside one and beside two busy single-threaded processes.
Every run is a new process, as `steer train` starts it, and medians over the rounds are compared. Run it on an
idle machine. `--spin-counts` repeats each run with other settings of GOMP_SPINCOUNT: how often a thread that
waits at a barrier looks before it sleeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer.arguments import count, whole
from steer.threads import busy_cpus, usable_cpus
from steer.versions import versions

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--neighbours", type=whole, nargs="+", default=[0, 1, 2], help="busy processes (default: 0 1 2)"
    )
    parser.add_argument("--rounds", type=count, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--steps", type=count, default=3, help="updates of a run (default: 3)")
    parser.add_argument("--config", default="demo", help="what is trained (default: demo)")
    parser.add_argument("--spin-counts", type=whole, nargs="+", default=[], help="also with these")
    parser.add_argument("--out", type=Path, help="folder for contention.json")
    args = parser.parse_args()
    variants: dict[str, dict[str, str]] = {"default": {}}
    variants |= {f"spin count {n}": {"GOMP_SPINCOUNT": str(n)} for n in args.spin_counts}
    busy = busy_cpus(1.0)
    if busy > 0.2:
        sys.exit(f"error: {busy:.1f} CPUs are busy with other work; run this on an idle machine")
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for others in args.neighbours:
            for name, environment in variants.items():
                with neighbours(others):
                    took = update_seconds(args.config, args.steps, environment)
                seconds.setdefault(f"{name}, beside {others}", []).append(took)
                print(f"{name}, beside {others}: {took:.1f} s an update", file=sys.stderr, flush=True)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    first = f"default, beside {args.neighbours[0]}"
    print("| threads | seconds of an update | times the first |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.1f} | {value / medians[first]:.2f} |")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"settings": vars(args) | {"out": None}, "cpus": usable_cpus()}
        record |= {"seconds": seconds, "ratios": {n: v / medians[first] for n, v in medians.items()}}
        record["versions"] = versions("steer", "torch", "transformers", "trl")
        (args.out / "contention.json").write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute on one thread each, until the block ends."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def update_seconds(config: str, steps: int, environment: dict[str, str]) -> float:
    """Train so many updates in a new process: seconds of an update, start and end of the program left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recipes" / "grpo_steer.py"), "--config", config]
        command += ["--output_dir", folder, "--max_steps", str(steps), "--eval_data", "none"]
        known = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: the run failed:\n{done.stderr[-3000:]}")
        results = json.loads((Path(folder) / "results.json").read_text())
        return float(results["training_seconds"]) / steps


if __name__ == "__main__":
    main()

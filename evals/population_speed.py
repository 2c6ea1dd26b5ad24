"""
Is a population cheaper than its members one after another? The same runs both ways.

    python -m evals.population_speed --out evals/results/population-speed      # minutes on two cores

Every run is a process of its own, begun from nothing: N of `recipes/grpo_steer.py`, each with one layer, and
one of `recipes/layer_sweep.py` with the N layers. Nothing is scored. They take turns for `--rounds` rounds,
the next begun by the other side, and medians are compared: wall clock and CPU seconds of whole processes,
seconds of training alone, and the peak memory of the population and of the largest single run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "recipes" / "configs" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--members", type=int, default=8, help="single layers, evenly spread (default: 8)")
    parser.add_argument("--depth", type=int, default=30, help="layers of the model (default: 30)")
    parser.add_argument("--steps", type=int, default=5, help="updates of each (default: 5)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of an update (default: 4)")
    parser.add_argument("--samples", type=int, default=8, help="samples of a prompt (default: 8)")
    parser.add_argument("--rounds", type=int, default=1, help="how often all is measured (default: 1)")
    parser.add_argument("--dtype", default="float32", help="precision of the base (default: float32)")
    parser.add_argument("--out", type=Path, help="folder for population-speed.json")
    args = parser.parse_args()
    layers = [i * args.depth // args.members for i in range(args.members)]
    settings = yaml.safe_load(DEMO.read_text())
    settings |= {
        "model_dtype": args.dtype,
        "max_steps": args.steps,
        "num_generations": args.samples,
        "per_device_train_batch_size": args.prompts * args.samples,
        "eval_data": "none",
        "samples_shown": 0,
        "use_cpu": True,
        "learning_rate": 0.01,
    }
    found: dict[str, list[dict[str, float]]] = {"solo": [], "together": []}
    apart: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        config = place / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        for turn in range(args.rounds):
            folder = place / str(turn)
            folder.mkdir()
            for side in ("solo", "together") if turn % 2 else ("together", "solo"):
                found[side].append((alone if side == "solo" else population)(config, folder, layers))
            for layer in layers:
                member = folder / "together" / "members" / f"layer-{layer}"
                apart.append(distance(folder / f"layer-{layer}" / "vectors", member / "vectors"))
    names = {
        "wall_seconds": "wall clock",
        "training_seconds": "training alone",
        "cpu_seconds": "CPU seconds",
        "memory_bytes": "peak memory",
    }
    record: dict[str, Any] = {"settings": vars(args) | {"out": None}, **found, "distances": apart}
    print(f"vectors of the two ways are up to {max(apart):.1%} of their length apart\n")
    print(f"| {args.members} members | one after another | together | ratio |\n|---|---|---|---|")
    for key, title in names.items():
        a, b = (statistics.median(r[key] for r in rounds) for rounds in found.values())
        record[key.partition("_")[0] + "_ratio"] = a / b
        shown = [f"{x / 1e9:.2f} GB (one run)" if key == "memory_bytes" else f"{x:.0f} s" for x in (a, b)]
        print(f"| {title} | {shown[0]} | {shown[1].removesuffix(' (one run)')} | {a / b:.2f} |")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "population-speed.json").write_text(json.dumps(record, indent=1) + "\n")


def alone(config: Path, folder: Path, layers: list[int]) -> dict[str, float]:
    """A run for each layer, one after another: their sums, and the largest memory."""
    runs = [run("grpo_steer.py", config, folder / f"layer-{i}", ["--layers", str(i)]) for i in layers]
    total = {key: sum(r[key] for r in runs) for key in ("wall_seconds", "training_seconds", "cpu_seconds")}
    return total | {"memory_bytes": max(r["memory_bytes"] for r in runs)}


def population(config: Path, folder: Path, layers: list[int]) -> dict[str, float]:
    """One run of all layers."""
    chosen = ["--each_layer", ",".join(map(str, layers)), "--winners", "0"]
    return run("layer_sweep.py", config, folder / "together", chosen)


def run(recipe: str, config: Path, folder: Path, changes: list[str]) -> dict[str, float]:
    """One process from its start to its end."""
    command = [sys.executable, str(ROOT / "recipes" / recipe), "--config", str(config)]
    command += ["--output_dir", str(folder), *changes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    log = folder.with_suffix(".log")
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"error: {recipe} failed:\n{log.read_text()[-3000:]}")
    print(f"{folder.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    members = [*folder.glob("members/*/results.json")] or [folder / "results.json"]
    return {
        "wall_seconds": seconds,
        "training_seconds": sum(json.loads(file.read_text())["training_seconds"] for file in members),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory_bytes": usage.ru_maxrss * 1024.0,
    }


def distance(one: Path, other: Path) -> float:
    """
    How far the vectors of the two ways are apart, of their length. Not nothing: in a large vocabulary
    rounding makes one rare token into its neighbour now and then, and the samples differ from there.
    """
    left, right = (load_file(folder / "steering.safetensors") for folder in (one, other))
    return max(float(torch.dist(v, right[name]) / v.norm().clamp(min=1e-12)) for name, v in left.items())


if __name__ == "__main__":
    main()

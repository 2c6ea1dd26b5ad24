"""
A DiffSAE of trained vectors: features of the difference that steering makes over sampled completions, which
of them go with right answers, and what one of them does to accuracy. Part of `evals/sae.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import steer
from steer.data import Arithmetic, load_problems
from steer.files import replace_file
from steer.grading import Checker
from steer.models import load_model, load_tokenizer
from steer.prompts import render
from steer.sae import SAEConfig, save_sae
from steer.sae.activations import Reader, read_all
from steer.sae.browser import write_browser
from steer.sae.cache import HeldActivations
from steer.sae.evaluate import quality
from steer.sae.features import Completion, analyse, shifted
from steer.sae.trainer import SAETrainer, TrainConfig
from steer.train.cpu import grouped
from steer.train.evaluation import answer_greedily, score
from steer.train.rollout import Sampling, rollout, uniforms

ROWS = 256  # completions sampled at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vectors", default="runs/demo/vectors", help="diff: artifact (default: %(default)s)"
    )
    parser.add_argument("--diff-layer", type=int, default=20, help="diff: layer (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=48, help="diff: completions of a problem")
    parser.add_argument(
        "--diff-features", type=int, default=512, help="diff: dictionary (default: %(default)s)"
    )
    parser.add_argument("--diff-k", type=int, default=8, help="diff: active features (default: %(default)s)")
    parser.add_argument("--diff-epochs", type=int, default=40, help="diff: passes (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Sample, train, compare, intervene; write `diff.json`, `features.html` and the SAE."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype="float32")
    vectors = steer.load(args.vectors, model, tokenizer=tokenizer)
    trained: dict[str, Any] = (vectors.config.provenance or {}).get("run", {})

    def frame(problem: str) -> str:
        template = trained.get("template", "boxed_short")
        return render(problem, tokenizer, template, trained.get("prefix", ""))

    settings = {k: trained[k] for k in ("operators", "digits", "terms", "heldout") if k in trained}
    length = (vectors.config.provenance or {}).get("training", {}).get("max_completion_length", 16)
    eos = (tokenizer.eos_token_id,)
    problems = {
        split: load_problems("arithmetic", split, arithmetic=Arithmetic(**settings, problems=count)).to_list()
        for split, count in (("train", trained.get("generated_problems", 87)), ("heldout", 75))
    }
    with Checker() as checker:
        completions = _sample(model, tokenizer, problems["train"], frame, checker, length, eos, args.samples)
        reader = Reader(model, args.diff_layer, what="difference")
        rows = read_all(reader, [c.window() for c in completions if c.ids])
        right = sum(c.correct for c in completions)
        print(
            f"{len(completions)} completions, {right} right, {len(rows)} differences at layer {reader.layer}"
        )
        source = {**reader.describe(), "vectors": str(args.vectors)}
        stream = HeldActivations(rows, source, epochs=args.diff_epochs)
        tokens = len(rows) // 512 * 512 * args.diff_epochs
        training = TrainConfig(tokens=tokens, batch_size=512, dead_after=len(rows), lr=2e-3)
        config = SAEConfig(rows.shape[1], args.diff_features, args.diff_k)
        sae = SAETrainer({"diff": config}, stream, training).train()["diff"]
        explained = quality(sae, [rows])
        print(
            f"DiffSAE: explained variance {explained.explained[args.diff_k]:.4f}, dead {explained.dead:.3f}"
        )
        features = analyse(sae, reader, tokenizer, completions)
        best = next((f for f in features if f.difference > 0), features[0])
        write_browser(
            out / "features.html",
            features,
            f"What the vectors change at layer {reader.layer}",
            f"{len(features)} features of a DiffSAE of {args.vectors} on {args.model}: firing in {right} "
            f"right and "
            f"{len(completions) - right} wrong completions, one-digit arithmetic, temperature 1.",
        )
        save_sae(sae, out / "diff-sae")

        def accuracy(direction: torch.Tensor | None, steered: bool, label: str) -> dict[str, Any]:
            off = nullcontext() if steered else vectors.disabled()
            change = nullcontext() if direction is None else shifted(model, args.diff_layer, direction)
            with off, change:
                answered = answer_greedily(
                    model, tokenizer, problems["heldout"], frame, checker, length, eos, label
                )
            found = asdict(score(answered))
            print(f"{label:44} {found['accuracy']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
            return found

        effect = _effects(accuracy, sae.W_dec.detach(), best.index, best.mean, best.strongest, rows.mean(0))
    summary = {k: v for k, v in asdict(best).items() if k != "snippets"}
    content = {
        "vectors": str(args.vectors),
        "layer": reader.layer,
        "completions": len(completions),
        "right": right,
        "differences": len(rows),
        "sae": {"features": args.diff_features, "k": args.diff_k, **explained.to_dict()},
        "tested_features": len(features),
        "significant": sum(f.q < 0.05 for f in features),
        "top_feature": summary,
        "accuracy": effect,
    }
    replace_file(out / "diff.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"browser  {out / 'features.html'}\nresults  {out / 'diff.json'}")


def _effects(
    accuracy: Callable[[torch.Tensor | None, bool, str], dict[str, Any]],
    table: torch.Tensor,
    top: int,
    mean: float,
    strongest: float,
    difference: torch.Tensor,
) -> dict[str, Any]:
    """
    Greedy accuracy on held-out problems with the top feature added to the base or taken from the steered.
    """
    other = table[(top + 1) % len(table)]
    changes: dict[str, tuple[torch.Tensor | None, bool]] = {
        "base": (None, False),
        "base + mean difference of this layer": (difference, False),
        "base + top feature, mean strength": (mean * table[top], False),
        "base + top feature, largest strength": (strongest * table[top], False),
        "base + another feature, largest strength": (strongest * other, False),
        "steered": (None, True),
        "steered - top feature, mean strength": (-mean * table[top], True),
        "steered - top feature, largest strength": (-strongest * table[top], True),
        "steered - another feature, largest strength": (-strongest * other, True),
    }
    return {label: accuracy(direction, steered, label) for label, (direction, steered) in changes.items()}


def _sample(
    model: Any,
    tokenizer: Any,
    problems: list[dict[str, Any]],
    frame: Callable[[str], str],
    checker: Checker,
    length: int,
    eos: tuple[int, ...],
    samples: int,
) -> list[Completion]:
    """`samples` graded completions of each problem by the steered model, at temperature 1."""
    prompts = [tokenizer(frame(row["problem"]), add_special_tokens=False)["input_ids"] for row in problems]
    asked = [
        (prompt, row["answer"]) for prompt, row in zip(prompts, problems, strict=True) for _ in range(samples)
    ]
    found = []
    with grouped(model):
        for start in tqdm(range(0, len(asked), ROWS), desc="sampling", unit="batch"):
            part = asked[start : start + ROWS]
            noise = uniforms(range(start, start + len(part)), length, 0, 0)
            ids = rollout(model, [prompt for prompt, _ in part], Sampling(length, eos), noise).ids
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            verdicts = checker.check(texts, [answer for _, answer in part])
            found += [
                Completion(list(prompt), list(tokens), verdict.correct)
                for (prompt, _), tokens, verdict in zip(part, ids, verdicts, strict=True)
            ]
    return found

"""
A DiffSAE of trained vectors: features of the difference that steering makes over sampled completions, which
of them go with right answers, and what one of them does to accuracy. Part of `evals/sae.py`.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import steer
from steer.files import replace_file
from steer.generation.sampler import Sampling, rollout, uniforms
from steer.models import load_model, load_tokenizer
from steer.prompt import recorded
from steer.sae import SAE, SAEConfig, save_sae
from steer.sae.activations import Reader
from steer.sae.browser import write_browser
from steer.sae.cache import HeldActivations
from steer.sae.evaluate import quality
from steer.sae.features import Feature, GradedCompletion, analyse, of_equal_mass, read_completions
from steer.sae.intervene import answer_without, shifted
from steer.sae.schedule import TrainConfig
from steer.sae.trainer import SAETrainer
from steer.stats import wilson
from steer.stop_tokens import stop_token_ids
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.data import load_problems
from steer.tasks.grading import MathGrader
from steer.tasks.lenient import extract_lenient
from steer.tasks.prompts import choose_prompt, formatter

ROWS = 256  # completions sampled at once
SETS = 5  # of other features that are ablated beside those of right answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vectors", default="runs/demo/vectors", help="diff: artifact (default: %(default)s)"
    )
    parser.add_argument("--diff-layer", type=int, default=20, help="diff: layer (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="diff: completions of a problem")
    parser.add_argument(
        "--diff-features", type=int, default=512, help="diff: dictionary (default: %(default)s)"
    )
    parser.add_argument("--diff-k", type=int, default=8, help="diff: active features (default: %(default)s)")
    parser.add_argument("--diff-epochs", type=int, default=40, help="diff: passes (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Sample, train, compare, intervene; write `diff.json`, `diff.md`, `features.html` and the SAE."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with MathGrader() as grader:
        subject = Subject(args.model, args.vectors, grader)
        completions = subject.sample(args.samples)
        right = sum(c.correct for c in completions)
        reader = Reader(subject.model, args.diff_layer, what="difference")
        rows = read_completions(reader, completions)
        print(f"{len(completions)} completions, {right} right, {len(rows)} differences")
        sae = _train(args, reader, rows)
        explained = quality(sae, [rows])
        print(
            f"DiffSAE: explained variance {explained.explained[args.diff_k]:.4f}, dead {explained.dead:.3f}"
        )
        features = analyse(sae, reader, subject.tokenizer, completions, rows=rows)
        write_browser(
            out / "features.html",
            features,
            f"What the vectors change at layer {reader.layer}",
            f"{len(features)} features of a DiffSAE of {args.vectors} on {args.model}: firing in {right} "
            f"right and {len(completions) - right} wrong completions of {len(subject.problems)} problems, "
            "temperature 1.",
        )
        save_sae(sae, out / "diff-sae")
        top, wrong = _first(features, 1), _first(features, -1)
        other = min(
            [f for f in features if f.q > 0.5 and f.index not in (top.index, wrong.index)] or features[-1:],
            key=lambda f: abs(f.right + f.wrong - top.right - top.wrong),
        )
        table, good = sae.W_dec.detach(), [f.index for f in features if f.q < 0.05 and f.difference > 0]
        compared = _comparable(features, good)
        sets = [of_equal_mass(features, compared, seed) for seed in range(SETS)] if compared else []
        of_right = {f"{len(good)} features": good}
        if compared and compared != good:
            of_right[f"{len(compared)} surest features"] = compared
        changes = {
            "base": Change(steered=False),
            "base + mean difference of this layer": Change(steered=False, added=rows.mean(0)),
            "base + top feature, mean strength": Change(steered=False, added=top.mean * table[top.index]),
            "base + top feature, largest strength": Change(
                steered=False, added=top.strongest * table[top.index]
            ),
            "steered": Change(),
            "steered, top feature ablated": Change(ablated=[top.index]),
            "steered, top feature of wrong answers ablated": Change(ablated=[wrong.index]),
            "steered, another as frequent feature ablated": Change(ablated=[other.index]),
            **{
                f"steered, the {which} of right answers ablated": Change(ablated=some)
                for which, some in of_right.items()
            },
            **{
                f"steered, {len(compared)} others ablated, set {n}": Change(ablated=others)
                for n, others in enumerate(sets, 1)
            },
            f"steered, all {len(table)} features ablated": Change(ablated=list(range(len(table)))),
        }
        accuracy: dict[str, dict[str, float]] = {}
        for label, change in changes.items():
            accuracy[label] = subject.accuracy(change, sae, reader)
            print("{:52} {accuracy:.3f} ({low:.3f} to {high:.3f})".format(label, **accuracy[label]))
    content = {
        "vectors": str(args.vectors),
        "model": args.model,
        "layer": reader.layer,
        "problems": len(subject.problems),
        "completions": len(completions),
        "right": right,
        "differences": len(rows),
        "sae": {"features": args.diff_features, "k": args.diff_k, **explained.to_dict()},
        "tested_features": len(features),
        "significant": sum(f.q < 0.05 for f in features),
        "top_feature": _facts(top),
        "top_feature_of_wrong_answers": _facts(wrong),
        "other_feature": _facts(other),
        "mass": {
            "right answers": _mass(features, compared),
            "others": [_mass(features, one) for one in sets],
        },
        "heldout_problems": len(subject.heldout),
        "accuracy": accuracy,
    }
    replace_file(out / "diff.json", (json.dumps(content, indent=1) + "\n").encode())
    replace_file(out / "diff.md", markdown(content).encode())
    print(f"browser  {out / 'features.html'}\nresults  {out / 'diff.json'}")


@dataclass(frozen=True)
class Change:
    """A model whose accuracy is measured: steered or not, with a direction added or features ablated."""

    steered: bool = True
    added: torch.Tensor | None = None
    ablated: list[int] | None = None


class Subject:
    """The model with its vectors, and the problems, prompts and limits that they were trained with."""

    def __init__(self, model: str, vectors: str, grader: MathGrader):
        self.tokenizer, self.model = load_tokenizer(model), load_model(model, dtype="float32")
        self.vectors = steer.load(vectors, self.model, tokenizer=self.tokenizer)
        self.grader = grader
        provenance = self.vectors.config.provenance
        self.trained = recorded(provenance, "run")
        self.length: int = recorded(provenance, "training").get("max_completion_length", 16)
        self.format_prompt = formatter(choose_prompt({vectors: self.vectors.config.prompt}), self.tokenizer)
        self.eos = stop_token_ids(self.tokenizer, self.model.generation_config)
        names = ("operators", "digits", "terms", "heldout")
        settings = {k: self.trained[k] for k in names if k in self.trained}
        self.problems, self.heldout = (
            load_problems("arithmetic", split, arithmetic=Arithmetic(**settings, problems=count)).to_list()
            for split, count in (("train", self.trained.get("generated_problems", 87)), ("heldout", 75))
        )

    def prompts(self, problems: list[dict[str, Any]]) -> list[list[int]]:
        framed = [self.format_prompt(row["problem"]) for row in problems]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in framed]

    def sample(self, samples: int) -> list[GradedCompletion]:
        """`samples` graded completions of each training problem by the steered model, at temperature 1."""
        asked = [
            (prompt, row["answer"])
            for prompt, row in zip(self.prompts(self.problems), self.problems, strict=True)
            for _ in range(samples)
        ]
        found = []
        for start in tqdm(range(0, len(asked), ROWS), desc="sampling", unit="batch"):
            part = asked[start : start + ROWS]
            noise = uniforms(range(start, start + len(part)), self.length, 0, 0)
            sampling = Sampling(self.length, self.eos)
            drawn = rollout(self.model, [prompt for prompt, _ in part], sampling, noise)
            ids = [one.ids for one in drawn]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            verdicts = self.grader.check(texts, [answer for _, answer in part])
            found += [
                GradedCompletion(list(prompt), list(tokens), verdict.correct)
                for (prompt, _), tokens, verdict in zip(part, ids, verdicts, strict=True)
            ]
        return found

    def accuracy(self, change: Change, sae: SAE, reader: Reader) -> dict[str, float]:
        """Greedy accuracy on the held-out problems, with its 95 % interval."""
        if change.ablated is None:
            off = nullcontext() if change.steered else self.vectors.disabled()
            added = nullcontext() if change.added is None else shifted(self.model, reader.layer, change.added)
            with off, added:
                sampling = Sampling(self.length, self.eos, temperature=0.0)
                drawn = rollout(self.model, self.prompts(self.heldout), sampling)
                ids = [one.ids for one in drawn]
        else:
            prompts = self.prompts(self.heldout)
            ids = answer_without(sae, reader, change.ablated, prompts, self.length, self.eos)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        golds = [row["answer"] for row in self.heldout]
        hits = sum(verdict.correct for verdict in self.grader.check(texts, golds))
        lenient = sum(verdict.correct for verdict in self.grader.check(texts, golds, extract_lenient))
        low, high = wilson(hits, len(texts))
        return {"accuracy": hits / len(texts), "low": low, "high": high, "lenient": lenient / len(texts)}


def _train(args: argparse.Namespace, reader: Reader, rows: torch.Tensor) -> SAE:
    source = {**reader.describe(), "vectors": str(args.vectors)}
    stream = HeldActivations(rows, source, epochs=args.diff_epochs)
    tokens = len(rows) // 512 * 512 * args.diff_epochs
    training = TrainConfig(tokens=tokens, batch_size=512, dead_after=len(rows), lr=2e-3)
    config = SAEConfig(rows.shape[1], args.diff_features, args.diff_k)
    return SAETrainer({"diff": config}, stream, training).train()["diff"]


def _comparable(features: list[Feature], good: list[int]) -> list[int]:
    """
    The surest of the features of right answers, at most half as many as there are others that `of_equal_mass`
    chooses from: so sets of as many others differ, and their mass can be made alike.
    """
    others = sum(f.index not in good and f.q >= 0.05 for f in features)
    return good[: others // 2]


def _mass(features: list[Feature], some: list[int]) -> float:
    """Their share of the mean strength of all tested features."""
    return sum(f.mean for f in features if f.index in some) / sum(f.mean for f in features)


def _first(features: list[Feature], sign: int) -> Feature:
    """The feature that fires more often, most surely, in right (sign 1) or wrong (-1) completions."""
    return next((f for f in features if sign * f.difference > 0), features[0])


def _facts(feature: Feature) -> dict[str, Any]:
    return {k: v for k, v in asdict(feature).items() if k != "snippets"}


def markdown(content: dict[str, Any]) -> str:
    """The table of docs/results.md."""
    sae = content["sae"]
    lines = [
        f"{content['model']} with {content['vectors']}, layer {content['layer']}: "
        f"{content['completions']:,} completions of {content['problems']} problems, "
        f"{content['right']:,} right; "
        f"{content['differences']:,} differences; DiffSAE of {sae['features']} features, l0 = {sae['k']}, "
        f"explained variance {sae['explained'][sae['k']]:.3f}. {content['tested_features']} features tested, "
        f"{content['significant']} with a corrected p below 0.05.",
        "",
        f"| greedy, {content['heldout_problems']} held-out problems | accuracy | 95 % interval | leniently |",
        "|---|---|---|---|",
    ]
    for label, row in content["accuracy"].items():
        lenient = f"{row['lenient']:.3f}" if "lenient" in row else ""
        span = f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(f"| {label} | {row['accuracy']:.3f} | {span} | {lenient} |")
    mass = content["mass"]
    if mass["others"]:
        others = ", ".join(f"{one:.3f}" for one in mass["others"])
        lines += [
            "",
            f"Mass, as a share of the mean strength of all tested features: the surest features of right "
            f"answers {mass['right answers']:.3f}, the sets of others {others}.",
        ]
    return "\n".join(lines) + "\n"

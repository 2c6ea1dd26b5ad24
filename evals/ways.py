"""
Six ways to get a vector, at the same number of samples: accuracy, and side effects on neutral text.

    python -m evals.ways --out evals/results/ways     # about an hour on two idle cores
    python -m evals.ways --tiny --out /tmp/ways       # everything on a tiny random model, under a minute

The task is the demo's. A budget is a number of answers that a model draws for training problems: `--updates`
updates of 64. Each method has as many with each seed:

    grpo            reinforcement learning on them
    mean            mean activation of the right ones minus that of the wrong ones, among those of `grpo`
    sft             supervised training on the right ones among those of `grpo`
    dpo             preferences between right and wrong ones among those of `grpo`
    grpo-from-mean  the mean difference of those of the first quarter of `grpo` as the start of reinforcement
                    learning for the other three quarters
    majority        reinforcement learning with the most frequent answer of a group as the right one

The rate of reinforcement learning is what `steer train --find_lr` recommended with another seed
(evals/results/find-lr). The rate of `sft` and `dpo` and the strength of `mean` are the best of a few with
another seed, by greedy accuracy on the training problems; the smaller one where two are equal. Then
`steer eval` scores all vectors on the held-out problems, with side effects, beside the base and the elicited
base.

What is finished is not done again, and a training run that was stopped goes on from its checkpoint in
`--work`. The table is written after each part; `--parts` chooses some of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.arguments import count, whole
from steer.errors import SteerError
from steer.files import read_json, replace_file
from steer.threads import machine, prepare_environment
from steer.versions import versions

if TYPE_CHECKING:
    from steer.training.run_settings import RunSettings

FOUND = Path(__file__).parent / "results" / "find-lr" / "find_lr.json"
# In the order in which they are trained: the methods after the first need its samples, or nothing.
PARTS = ("grpo", "mean", "sft", "dpo", "grpo-from-mean", "majority")


@dataclass(frozen=True)
class Plan:
    """What is trained. `configs`: of `steer train`, by its method."""

    configs: dict[str, str]
    rate: float  # of reinforcement learning
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 3  # the one that rates and strengths are chosen with
    updates: int = 32
    rows: int = 64  # samples of an update
    start: float = 0.25  # share of the budget that a mean difference to start from is made of
    answer_updates: int = 16  # of sft and dpo
    answer_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)  # tried, of sft and dpo
    shares: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)  # tried: length of a mean difference (`steer extract`)

    @property
    def start_updates(self) -> int:
        return max(1, round(self.start * self.updates))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for ways.json, ways.md and ways.png")
    parser.add_argument(
        "--work", type=Path, help="folder of the runs (default: runs/ways; with --tiny OUT/work)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all, in this order)"
    )
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--updates", type=count, help="the budget, in updates of 64 samples (default: 32)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and a small budget")
    args = parser.parse_args(arguments)
    prepare_environment()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    work = args.work or (args.out / "work" if args.tiny else Path("runs/ways"))
    work.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        from evals.ways_tiny import tiny_configs

        small: dict[str, Any] = {
            "start": 0.5,
            "answer_updates": 2,
            "answer_rates": (0.05, 0.1),
            "shares": (0.1, 1.0),
        }
        configs = tiny_configs(work / "tiny")
        plan = Plan(configs, 0.05, tuple(args.seeds), updates=args.updates or 4, **small)
    else:
        configs = {"grpo": "demo", "sft": "demo-sft", "dpo": "demo-dpo"}
        rate = json.loads(FOUND.read_text())["recommended"]["learning_rate"]
        plan = Plan(configs, rate, tuple(args.seeds), updates=args.updates or Plan.updates)
    if plan.tuning_seed in plan.seeds:
        sys.exit(f"error: seed {plan.tuning_seed} chooses rates and strengths; give others as --seeds")
    if len(set(plan.seeds)) < len(plan.seeds):
        sys.exit(f"error: --seeds {' '.join(map(str, plan.seeds))} has a seed twice; give each of them once")
    if plan.updates <= plan.start_updates:
        sys.exit(f"error: --updates {plan.updates} leaves none after a mean difference to start from; give 2")
    study = Study(plan, args.out, work)
    for part in args.parts:
        study.make(part)
        print(study.report(), flush=True)


class Study:
    """The plan, and what of it is done."""

    def __init__(self, plan: Plan, out: Path, work: Path) -> None:
        self.plan, self.out, self.work = plan, out, work
        self.file = out / "ways.json"
        out.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(asdict(plan)))
        self.record: dict[str, Any] = {"settings": settings, "cells": {}, "impossible": {}, "chosen": {}}
        if self.file.exists():
            self.record = read_json(self.file)
            if self.record["settings"] != settings:
                sys.exit(f"error: {self.file} holds a study with other settings; give another --out")

    def make(self, part: str) -> None:
        """Train, or extract, all vectors of a part that are not there."""
        plan = self.plan
        make: Callable[[int], object] = {
            "grpo": self.grpo, "mean": self.mean, "sft": lambda seed: self.answers("sft", seed),
            "dpo": lambda seed: self.answers("dpo", seed), "grpo-from-mean": self.from_mean,
            "majority": self.majority,
        }[part]  # fmt: skip
        if part in ("mean", "sft", "dpo"):
            self.grpo(plan.tuning_seed)
            self.choose(part)
        elif part == "grpo":
            make(plan.tuning_seed)
        for seed in plan.seeds:
            if part in ("mean", "sft", "dpo", "grpo-from-mean"):
                self.grpo(seed)  # whose samples it uses
            make(seed)

    def cell(self, name: str, made: Path, make: Callable[[], object], needed: bool = False) -> None:
        """
        Make what is to lie at `made` unless it does, and record the time it took. What cannot be made is
        recorded with the reason, and ends the program where all else needs it.
        """
        if name in self.record["cells"] and made.exists():
            return
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        self.record["impossible"].pop(name, None)
        try:
            with (self.work / "log.txt").open("a") as file, redirect_stdout(file):
                make()
        except SteerError as error:
            if needed:
                sys.exit(f"error: {name}: {error}")
            self.record["impossible"][name] = str(error)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        self.record["cells"][name] = {
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "versions": versions("steer", "torch", "transformers", "trl"),
            "machine": machine(),
        }
        self.save()

    def save(self) -> None:
        replace_file(self.file, (json.dumps(self.record, indent=1) + "\n").encode())

    def vectors(self, method: str, seed: int) -> Path:
        if method == "majority":
            return self.work / method / "members" / f"seed-{seed}" / "vectors"
        return self.work / f"{method}-{seed}" / "vectors"

    # ---- the ways

    def grpo(self, seed: int) -> None:
        made, kept = (
            self.vectors("grpo", seed),
            ["--log_completions", "true", "--num_completions_to_print", "0"],
        )
        rate, updates = self.plan.rate, self.plan.updates
        make = partial(self.train, "grpo", made.parent, seed, rate, updates, *kept)
        self.cell(f"grpo-{seed}", made, make, needed=True)

    def majority(self, seed: int) -> None:
        """All seeds at once, when the first is asked for."""
        from steer.cli import layer_sweep

        words = self.words("grpo", self.work / "majority", self.plan.rate, self.plan.updates)
        words += ["--rewards", "majority", "format", "--winners", "0", "--seeds", *map(str, self.plan.seeds)]
        self.cell("majority", self.vectors("majority", seed), lambda: layer_sweep.main(words))

    def mean(self, seed: int) -> None:
        share = self.record["chosen"]["mean"]["value"]
        made = self.vectors("mean", seed)
        self.cell(f"mean-{seed}", made, lambda: self.extract(self.work / f"grpo-{seed}", made, share))

    def answers(self, method: str, seed: int) -> None:
        rate, made = self.record["chosen"][method]["value"], self.vectors(method, seed)
        self.cell(f"{method}-{seed}", made, partial(self.train_answers, method, made.parent, seed, rate))

    def from_mean(self, seed: int) -> None:
        """The first updates of the run of `grpo` give the start; the rest of the budget is trained."""
        first, share = self.plan.start_updates, self.share()

        def make() -> None:
            run, folder = self.work / f"grpo-{seed}", self.work / f"start-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "completions").mkdir(parents=True)
            shutil.copy(run / "run.json", folder)
            for path in sorted((run / "completions").glob("*.parquet"))[:first]:
                shutil.copy(path, folder / "completions")
            self.extract(folder, folder / "vectors", share)
            left = self.plan.updates - first
            start = ["--init", str(folder / "vectors")]
            self.train("grpo", made.parent, seed, self.plan.rate, left, *start)

        made = self.vectors("grpo-from-mean", seed)
        self.cell(f"grpo-from-mean-{seed}", made, make)

    def share(self) -> float:
        """The strength of a mean difference, chosen where that was not done."""
        self.grpo(self.plan.tuning_seed)
        self.choose("mean")
        return self.record["chosen"]["mean"]["value"]

    # ---- rates and strengths

    def choose(self, method: str) -> None:
        """The rate or strength of a method, on training problems, with the seed that is not reported."""
        if method in self.record["chosen"]:
            return
        folder = self.work / f"tuning-{method}"
        candidates = self.strengths(folder) if method == "mean" else self.rates(method, folder)
        values, vectors = candidates
        problems = ["--benchmarks", str(self.training_problems), "--no-base", "--examples", "0"]
        scores = folder / "eval" / "scores.json"
        self.cell(
            f"tuning-{method}", scores, lambda: self.evaluate(scores.parent, *vectors, *problems), needed=True
        )
        rows = {row["method"]: row["accuracy"]["value"] for row in read_json(scores)["rows"]}
        best = max(values, key=lambda name: (rows[name], -values[name]))
        self.record["chosen"][method] = {
            "what": "share" if method == "mean" else "rate",
            "value": values[best],
            "tried": {f"{value:g}": round(rows[name], 4) for name, value in values.items()},
        }
        self.save()

    def strengths(self, folder: Path) -> tuple[dict[str, float], list[str]]:
        """The variants of `steer eval` with their strengths, and the words that ask for them."""
        run, made = self.work / f"grpo-{self.plan.tuning_seed}", folder / "vectors"
        self.cell("tuning-mean, vectors", made, lambda: self.extract(run, made, 1.0), needed=True)
        values = {"mean" if share == 1 else f"mean x{share:g}": share for share in self.plan.shares}
        return values, ["--vectors", f"mean={made}", "--scales", *map(str, values.values())]

    def rates(self, method: str, folder: Path) -> tuple[dict[str, float], list[str]]:
        """The same of learning rates: vectors trained with each, where that is possible."""
        seed, sources = self.plan.tuning_seed, {}
        for rate in self.plan.answer_rates:
            name = f"tuning-{method}, rate {rate:g}"
            made = folder / f"{rate:g}" / "vectors"
            self.cell(name, made, partial(self.train_answers, method, made.parent, seed, rate))
            if made.exists():
                sources[f"{rate:g}"] = rate, f"{rate:g}={made}"
        if not sources:
            reasons = [text for name, text in self.record["impossible"].items() if f"-{method}," in name]
            sys.exit(f"error: no rate of {method} can be trained: {reasons[0]}")
        values = {name: rate for name, (rate, _) in sources.items()}
        return values, ["--vectors", *(source for _, source in sources.values())]

    @cached_property
    def training_problems(self) -> Path:
        from steer.training.problems import problems

        file = self.work / "training.jsonl"
        train, _ = problems(self.settings.run)
        replace_file(file, "".join(json.dumps(row) + "\n" for row in train).encode())
        return file

    @cached_property
    def settings(self) -> RunSettings:
        """Of the runs of reinforcement learning."""
        from steer.cli import train

        return train.parse(self.words("grpo", self.work, self.plan.rate, self.plan.updates))

    # ---- the commands

    def words(self, method: str, folder: Path, rate: float, updates: int) -> list[str]:
        words = ["--config", self.plan.configs[method], "--output_dir", str(folder)]
        words += ["--learning_rate", str(rate), "--max_steps", str(updates), "--eval_data", "none"]
        if method == "grpo":
            words += ["--per_device_train_batch_size", str(self.plan.rows)]
        return words

    def train(self, method: str, folder: Path, seed: int, rate: float, updates: int, *more: str) -> None:
        from steer.cli import train

        train.main([*self.words(method, folder, rate, updates), "--seed", str(seed), *more])

    def train_answers(self, method: str, folder: Path, seed: int, rate: float) -> None:
        """By `sft` or `dpo`, on the samples of reinforcement learning with this seed."""
        source = ["--train_data", str(self.work / f"grpo-{seed}")]
        self.train(method, folder, seed, rate, self.plan.answer_updates, *source)

    def extract(self, run: Path, out: Path, share: float) -> None:
        """A mean difference of the right and wrong samples of a run, in all layers."""
        from steer.extract import from_contrast, read_completions

        model, tokenizer = self.settings.run.load(self.settings.run.model_dtype)
        contrast = read_completions(run, tokenizer, "training")
        made = from_contrast(model, tokenizer, contrast, tokens="completion", share=share, batch_size=32)
        made.save_pretrained(out)

    def evaluate(self, out: Path, *words: str) -> None:
        from steer.evaluation import options, run

        of, limit = self.settings.run, self.settings.training.max_completion_length
        asked = ["--model", of.model, "--dtype", of.model_dtype, "--max-new-tokens", str(limit)]
        asked += ["--samples", "0", "--out", str(out), *words]
        run.evaluate(options.parser("").parse_args(asked), asked)

    # ---- the table

    def report(self) -> str:
        """Score what is there on the held-out problems; write the table and the plot."""
        from evals.ways_table import plot, table

        plan, of = self.plan, self.settings.run
        there = [
            f"{method}#{seed}={self.vectors(method, seed)}"
            for method in PARTS
            for seed in plan.seeds
            if self.vectors(method, seed).exists()
        ]
        if not there:
            return "no vectors yet"
        data = asdict(of.arithmetic(of.eval_limit))
        benchmark = ":".join(["arithmetic", *(f"{name}={value}" for name, value in data.items())])
        out = self.work / "eval"
        words = ["--vectors", *there, "--benchmarks", benchmark, "--side-effects"]
        self.cell(
            f"scores of {len(there)} vectors",
            out / "scores.json",
            lambda: self.evaluate(out, *words),
            needed=True,
        )
        scored = read_json(out / "scores.json")
        self.record |= {name: scored[name] for name in ("rows", "constants", "pairs")}
        self.record["side_effects"] = read_json(out / "run.json")["side_effects"]
        self.save()
        text = table(self.record)
        replace_file(self.out / "ways.md", text.encode())
        plot(self.record, self.out / "ways.png")
        return text


if __name__ == "__main__":
    main()

"""
Which learning rate: short runs at each of several, scored on problems that are split off the training set for
this alone. Held-out problems take no part.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from steer.errors import SteerError
from steer.files import held, read_json, replace_file
from steer.training.arguments import SweepArguments
from steer.training.recipe import Recipe, train_run
from steer.training.run import RESULTS_FILE
from steer.training.run_settings import RunSettings
from steer.training.settings import unpublished
from steer.training.validation import split

log = logging.getLogger("steer")

SWEEP_FILE = "sweep.json"
# On what the rates are scored, written before the first trial.
SCORED_FILE = "scored_on.json"
# Share of the training problems that a sweep validates on where nothing is said.
SHARE = 0.3


def choose(
    settings: RunSettings,
    sweep: SweepArguments,
    recipe: Recipe,
    problems: Dataset,
) -> float:
    """
    The rate among `sweep.lr_sweep` with the best validation accuracy; of equals the smallest. What each one
    reached is kept in `sweep.json`, and a sweep that was stopped goes on where it was.
    """
    training = settings.training
    rates = sorted(set(sweep.lr_sweep or ()))
    if not rates or rates[0] <= 0:
        raise SteerError(f"lr_sweep={sweep.lr_sweep} names no rates above zero")
    if training.lr_by_layer is not None:
        raise SteerError("lr_sweep and lr_by_layer both set the learning rates; drop one of them")
    folder = Path(f"{training.output_dir}-sweep")
    train, validation = split(problems, settings.run.validation or SHARE)
    if PartialState().is_main_process:
        asked = {
            "validation": settings.run.validation or SHARE,
            "validation_samples": sweep.validation_samples,
        }
        with held(folder, "--output_dir"):
            _claim(folder, asked, len(validation) * sweep.validation_samples)
    tried: list[dict[str, Any]] = []
    # scored at its end, not on the way
    run = replace(settings.run, validate_every=None, validation=None, keep_best=False, patience=None)
    for rate in rates:
        one = unpublished(training)
        one.learning_rate, one.output_dir = rate, str(folder / f"lr-{rate:g}")
        one.max_steps = sweep.sweep_steps or training.max_steps
        log.info("learning rate %g, on %d validation problems", rate, len(validation))
        samples = sweep.validation_samples
        trial = replace(settings, run=run, training=one)
        results = train_run(trial, recipe, train, validation, ("after",), samples)
        gc.collect()  # trainers are cycles of references, and the next one needs their memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tried.append(
            {
                "learning_rate": rate,
                "accuracy": results["after"]["accuracy"],
                **{key: results[key] for key in ("steps", "training_seconds", "training_cpu_seconds")},
            }
        )
        if PartialState().is_main_process:
            place = Path(one.output_dir)  # its scores are kept, its weights are not
            for heavy in (*place.glob("checkpoint-*"), place / recipe.artifact):
                shutil.rmtree(heavy, ignore_errors=True)
    best = max(tried, key=lambda row: (row["accuracy"], -row["learning_rate"]))["learning_rate"]
    record = {
        "chosen": best,
        "validation_problems": len(validation),
        "samples": sweep.validation_samples,
        "seed": training.seed,
        "tried": tried,
    }
    if PartialState().is_main_process:
        replace_file(folder / SWEEP_FILE, (json.dumps(record, indent=2) + "\n").encode())
    for row in tried:
        log.info("learning rate %-8g validation accuracy %.3f", row["learning_rate"], row["accuracy"])
    if len(rates) > 1 and best in (rates[0], rates[-1]):
        side, way = ("smallest", "smaller") if best == rates[0] else ("largest", "larger")
        log.info("the best rate is the %s that was tried: a %s one may be better still", side, way)
    return best


def _claim(folder: Path, asked: dict[str, float], answers: int) -> None:
    """
    Keep on what the rates of a sweep are scored.

    Args:
        folder: of the sweep.
        asked: the settings that choose the problems and the number of answers to each.
        answers: those of a trial in all.

    Raises:
        SteerError: a trial in the folder was scored on others, which would not compare.
    """
    path, results = folder / SCORED_FILE, sorted(folder.glob(f"lr-*/{RESULTS_FILE}"))
    begun = results or [*folder.glob("lr-*/checkpoint-*")]
    known = read_json(path) if begun and path.exists() else asked  # an older version kept none
    changed = [
        f"{name} was {known[name]}, now {value}" for name, value in asked.items() if known[name] != value
    ]
    for file in results:
        scored = read_json(file).get("after", {}).get("problems", answers)
        if scored != answers:
            changed.append(f"{file.parent.name} was scored on {scored} answers, now {answers}")
    if changed:
        raise SteerError(
            f"{folder} holds rates that were scored on other problems: {changed[0]}; remove the folder, or "
            "give another --output_dir"
        )
    replace_file(path, (json.dumps(asked, indent=2) + "\n").encode())

"""`steer train --find_lr`: short runs at several learning rates, and the command with the one to use."""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import SchedulerType

import steer
from steer.errors import SteerError
from steer.evaluation.side_effects import BaseText
from steer.files import held, read_json, replace_file
from steer.recipe_files import LAUNCHER
from steer.sites import find_decoder
from steer.tasks.rewards import MathGrader
from steer.training import init
from steer.training.arguments import FinderArguments, PopulationArguments, setting_of
from steer.training.config import SteeringGRPOConfig
from steer.training.run_settings import RunSettings
from steer.training.settings import unpublished
from steer.training.sweep import find_rate
from steer.training.sweep.find_rate import Choice, Trial
from steer.training.sweep.halving import reward_of
from steer.training.sweep.run import MEMBERS, claim_sweep_dir, train_members
from steer.training.sweep.study import Study
from steer.vectors import SteeringVectors
from steer.versions import versions

log = logging.getLogger("steer")

RECORD, PLOT = "find_lr.json", "find_lr.png"
CONSTANT = SchedulerType("constant_with_warmup")


def find_lr(settings: RunSettings, arguments: Sequence[str]) -> None:
    """
    Train the population of rates, or what is missing of it, and recommend one.

    Args:
        settings: what the command line says.
        arguments: that command line.

    Raises:
        SteerError: settings that have no part in it; no rate is usable.
    """
    asked = settings.finder
    assert asked is not None
    if given := _changed(settings.population):
        raise SteerError(
            f"find_lr tries rates of one run; leave out what a population has: {', '.join(given)}"
        )
    if given := _changed(settings.rates):
        raise SteerError(
            "find_lr and lr_sweep both look for a learning rate; leave out find_lr, or what lr_sweep has: "
            + ", ".join(given)
        )
    if settings.run.dry_run:
        raise SteerError("dry_run is for one run; leave out find_lr")
    folder = Path(f"{settings.training.output_dir}-find-lr")
    with held(folder, "--output_dir") if PartialState().is_main_process else nullcontext():
        _find(folder, settings, asked, arguments)


def _changed(part: Any) -> list[str]:
    """The names of the settings of a part that are not at their defaults."""
    return [] if part is None else [f.name for f in fields(part) if getattr(part, f.name) != f.default]


def _find(folder: Path, settings: RunSettings, asked: FinderArguments, arguments: Sequence[str]) -> None:
    main_process, steps = PartialState().is_main_process, asked.find_lr_steps or find_rate.STEPS
    processes = PartialState().num_processes
    short = _short(settings, folder, steps, processes)
    with MathGrader() as grader:
        # held-out problems are loaded to leave them out of those that are trained on
        study = replace(Study.load(folder, short, grader), held_out=None)
        num_hidden_layers = find_decoder(study.model).num_hidden_layers
        layers = settings.steering_config().resolve_layers(num_hidden_layers)
        trials = find_rate.trials(settings.training, asked.find_lr_rates, layers, num_hidden_layers)
        members = [_member(short, trial) for trial in trials]
        for member in members:
            member.training.layer_rates(layers, num_hidden_layers)  # names no layer that is not there
        if main_process:
            claim_sweep_dir(folder, short, members, {member.member for member in members})
        PartialState().wait_for_everyone()
        train_members(study, members)
    if not main_process:
        return
    for trial, member in zip(trials, members, strict=True):
        place = folder / MEMBERS / member.member
        logged = read_json(place / "log.json")[:steps]
        rewards = [reward_of(row) for row in logged]
        trial.rewards = [reward for reward in rewards if reward is not None]
        trial.stopped = read_json(place / "results.json")["stopped"]
        if None in rewards:
            raise SteerError(
                f"learning rate {trial.learning_rate:g}: no sample of update {rewards.index(None) + 1} was "
                "scored (the rewards returned None), and rates are compared at every update; give rewards "
                "that score every answer"
            )
    _measure(study, trials, members, growth(settings.training, len(study.train), steps, processes))
    choice = find_rate.choose(trials, steps)
    if settings.training.lr_by_layer is not None:  # find_lr_rates does not go with it
        choice = replace(choice, note=choice.note.replace("with find_lr_rates", "in lr_by_layer"))
    _leave(folder, settings, trials, choice, steps, layers, num_hidden_layers, arguments)


def _short(settings: RunSettings, folder: Path, steps: int, processes: int) -> RunSettings:
    """The settings that all rates share."""
    default = settings.unset().training
    training = unpublished(settings.training)
    training.output_dir, training.max_steps = str(folder), steps
    # a rate is on one process, with the batch that the run has on all of them
    training.gradient_accumulation_steps *= processes
    training.steps_per_generation *= processes
    # a schedule that decays would do so within these updates
    training.lr_scheduler_type, training.lr_scheduler_kwargs = CONSTANT, default.lr_scheduler_kwargs
    if training.warmup_steps >= 1:  # of the whole run: these updates would not reach the rate
        training.warmup_steps = default.warmup_steps
    training.report_to = default.report_to  # a population takes no other
    # rates are compared on the same problems, which it would choose by what each rate has learned
    training.pass_rate_floor = default.pass_rate_floor
    run = replace(settings.run, validate_every=None, validation=None, keep_best=False, patience=None)
    return replace(
        settings, run=run, training=training, population=PopulationArguments(halve_at=[steps // 2])
    )


def _member(short: RunSettings, trial: Trial) -> RunSettings:
    training = copy.copy(short.training)
    for name, value in recommended(training, trial).items():
        setattr(training, name, value)
    return replace(short, training=training, member=f"lr-{trial.learning_rate:g}")


def growth(training: SteeringGRPOConfig, problems: int, steps: int, processes: int = 1) -> float:
    """How many times the updates of the short runs the whole run has, at most `MAX_GROWTH`."""
    updates = training.max_steps
    if updates <= 0:
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        updates = ceil(training.num_train_epochs * (problems // (rows // training.num_generations)))
    return min(max(1.0, updates / steps), find_rate.MAX_GROWTH)


def _measure(study: Study, trials: Sequence[Trial], members: Sequence[RunSettings], growth: float) -> None:
    """The KL of each rate's vectors to the base on neutral text, for positions that it has."""
    if members[0].steering.positions not in ("all", "completion"):
        return
    text = BaseText(study.model, study.tokenizer)
    start = 0.0
    if source := study.run.init:
        vectors = steer.attach(study.model, members[0].steering_config())
        init.start(vectors, init.read(source, str(study.folder)), source)
        start = _kl(text, vectors)
    for trial, member in zip(trials, members, strict=True):
        vectors = steer.load(study.folder / MEMBERS / member.member / "vectors", study.model)
        trial.kl, trial.kl_at_start, trial.growth = _kl(text, vectors), start, growth


def _kl(text: BaseText, vectors: SteeringVectors) -> float:
    """Of vectors on the model, which are then taken off."""
    with vectors.prompt_length(1):
        found = text.measure().kl
    steer.detach(text.model)
    return found


def _leave(
    folder: Path,
    settings: RunSettings,
    trials: Sequence[Trial],
    choice: Choice,
    steps: int,
    layers: Sequence[int],
    num_hidden_layers: int,
    arguments: Sequence[str],
) -> None:
    """Write record and plot, and print what they say."""
    training, last = settings.training, find_rate.smoothed(steps)
    best = choice.trial
    found = {} if best is None else recommended(training, best)
    record = {
        "recommended": found or None,
        "next": _next(arguments, found) if found else None,
        "note": choice.note,
        "rule": find_rate.RULE,
        "layers": {
            "trained": [layers[0], layers[-1]],
            "of": num_hidden_layers,
            "middle_of_the_grid": find_rate.middle_rate(training, layers, num_hidden_layers),
        },
        "steps": steps,
        "halved_at": steps // 2,
        "seed": training.seed,
        "trials": [
            {
                "learning_rate": trial.learning_rate,
                "reward": trial.reward(last),
                "updates": len(trial.rewards),
                "kl": trial.kl,
                "kl_at_start": trial.kl_at_start,
                "kl_growth": trial.growth,
                "why_not": choice.why_not.get(trial.learning_rate),
                "rewards": trial.rewards,
            }
            for trial in trials
        ],
        "run": asdict(settings.run),
        "versions": versions("steer", "torch", "transformers", "trl"),
    }
    replace_file(folder / RECORD, (json.dumps(record, indent=1, default=str) + "\n").encode())
    find_rate.plot(trials, choice, steps, folder / PLOT, f"{settings.run.model} on {settings.run.train_data}")
    print(f"\n{'rate':>10}{'reward':>10}{'updates':>10}{'KL':>10}")
    for trial in trials:
        kl = "" if trial.kl is None else f"{trial.kl:.3g}"
        told = "recommended" if trial is best else choice.why_not[trial.learning_rate]
        row = f"{trial.learning_rate:>10g}{trial.reward(last):>10.3f}{len(trial.rewards):>10}{kl:>10}"
        print(f"{row}  {told}")
    print(f"\nrecord    {folder / RECORD}\nplot      {folder / PLOT}")
    if best is None:
        raise SteerError(choice.note)
    print(f"{choice.note}\n" if choice.note else "")
    processes = PartialState().num_processes
    where = f", on {processes} processes" if processes > 1 and LAUNCHER not in os.environ else ""
    print(f"Run next{where}:\n  {record['next']}\n")


def recommended(training: SteeringGRPOConfig, trial: Trial) -> dict[str, Any]:
    """The rates of a trial, as settings. `training`: the run's."""
    if training.lr_by_layer is None:
        return {"learning_rate": trial.learning_rate}
    # the rate beside a table is that of layers which it does not name
    table = find_rate.scaled(training.lr_by_layer, trial.factor)
    return {"learning_rate": trial.learning_rate, "lr_by_layer": table}


def _next(arguments: Sequence[str], found: dict[str, Any]) -> str:
    """The command line with the finder off, the rates that were found, and the launcher."""
    words: list[str] = []
    dropped = {*(field.name for field in fields(FinderArguments)), *found}
    skipping = False
    for word in arguments:
        if (name := setting_of(word)) is not None:
            skipping = name in dropped
        if not skipping:
            words.append(word)
    words += ["--find_lr", "false"]  # a config file may have it, and its other settings
    for name, value in found.items():
        words += [f"--{name}", str(value)]
    if launcher := os.environ.get(LAUNCHER):
        words += ["--launcher", launcher]
    return shlex.join(["steer", "train", *words])

"""
Train steering vectors on math problems: by reinforcement learning, on given answers, or by preferences.

    steer train --config demo
    steer train --config demo-sft
    steer train --method sft --config demo-sft --train_data runs/demo --eval_data arithmetic
    steer train --config demo-dpo
    steer train --config demo --max_steps 2 --output_dir runs/dry
    steer train --config demo --rewards random --reward_weights 1.0 --output_dir runs/control-random
    steer train --config demo --learning_rates 1e-3 3e-3 1e-2 --output_dir runs/rates
    steer train --config deepscaler-qwen2.5-math-7b --launcher ddp
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo_steer.py \\
        --config recipes/configs/deepscaler-qwen2.5-math-7b.yaml

The config is a YAML file or the name of one of steer's. Without a launcher one device trains; `--launcher`, a
file of accelerate or the name of one of steer's, starts `accelerate launch`, as the last command does itself.
Every setting of a config file can be overridden on the command line. `--init DIR` starts from an artifact,
such as one of `steer extract`. `--find_lr true` recommends a learning rate from short runs, and exits.
`--lr_sweep` chooses one first, on problems split off the training set, and trains with it. `--method sft`
trains on answers: solutions of problems, or the right answers that a run kept. `--method dpo` trains on pairs
of a right and a wrong answer. A run that was stopped goes on where it was when it is started again with the
same settings; a finished one says so. The output folder ends up with `vectors/` (the artifact),
`results.json`, `training.png`, the graded answers and the checkpoints. With `population`, `each_layer`,
`learning_rates` or `seeds` many sets of vectors are trained at once, as `steer sweep` does and explains.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from steer import artifact
from steer.cli.find_lr import find_lr
from steer.cli.layer_sweep import train_population
from steer.errors import SteerError
from steer.prompt import recorded
from steer.tasks.elicited import STAGES
from steer.training import answers, init, recipe
from steer.training import run as runs
from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.answer_trainers import SteeringDPOTrainer, SteeringSFTTrainer
from steer.training.arguments import FinderArguments, PopulationArguments, SweepArguments
from steer.training.dry_run import dry_run
from steer.training.problems import problems
from steer.training.rate_search import choose
from steer.training.recipe import Recipe
from steer.training.resuming import newest_checkpoint
from steer.training.run_settings import RunSettings, TrainingConfig
from steer.training.steering_mixin import SteeringTrainerMixin, push
from steer.training.steering_trainer import SteeringGRPOTrainer


def main(arguments: Sequence[str]) -> None:
    settings = parse(arguments)
    recipe.begin(settings)
    training, rates = settings.training, settings.rates
    if settings.finder and settings.finder.find_lr:
        return find_lr(settings, arguments)
    if settings.population and settings.population.asked:
        if rates and rates.lr_sweep:
            raise SteerError(
                "lr_sweep chooses one rate for one set of vectors; a population takes several at once as "
                "learning_rates"
            )
        return train_population(settings, arguments)
    chosen = vectors(settings)
    train: Dataset | None
    train, held_out = problems(settings.run) if training.method == "grpo" else answers.load(settings)
    if settings.run.dry_run and train is not None:
        return dry_run(settings, chosen, train, held_out)
    if rates and rates.lr_sweep and train is not None:
        training.learning_rate = choose(settings, rates, chosen, train)
        if rates.sweep_only:
            return
    recipe.train_run(settings, chosen, train, held_out)
    if PartialState().is_main_process:
        folder = Path(training.output_dir)
        write_scores(folder)
        recipe.report(folder, settings.run, chosen)
        first = islice(held_out or train or ({"problem": "What is 2 + 3?"},), 8)
        problem = min((row["problem"] for row in first), key=len)
        print(f"\nUse them:\n  {use(settings, folder / 'vectors', problem)}\n")
        if training.push_to_hub:  # the folder names the repository, as in transformers
            repo_id = training.hub_model_id or folder.absolute().name
            print(f"On the hub: {push(artifact.read(folder / 'vectors'), repo_id, training)}\n")


def use(settings: RunSettings, vectors: Path, problem: str) -> str:
    """The command that puts a problem to the trained vectors."""
    run = settings.run
    words = [Path(sys.executable).with_name("steer"), "generate", run.model, "--vectors", vectors]
    words += ["--prompt", " ".join(problem.split())]
    words += ["--revision", run.model_revision] if run.model_revision else []
    words += ["--base-adapter", run.base_adapter] if run.base_adapter else []
    words += ["--trust-remote-code"] if settings.training.trust_remote_code else []
    return shlex.join(map(str, words))


def parse(arguments: Sequence[str]) -> RunSettings:
    """The settings, from --config and the other words of a command line."""
    more = {"rates": SweepArguments, "finder": FinderArguments, "population": PopulationArguments}
    settings = RunSettings.parse("grpo_steer", __doc__, arguments, **more)
    if settings.finder is not None:
        settings.finder.check(arguments)
    return settings


def vectors(settings: RunSettings) -> Recipe:
    """What this recipe trains."""

    origin: dict[str, Any] = {}

    def make(model: Any, rewards: Any, training: TrainingConfig, **data: Any) -> SteeringTrainerMixin:
        steering = settings.steering_config()
        trainer: SteeringTrainerMixin
        if isinstance(training, SteeringSFTConfig):
            trainer = SteeringSFTTrainer(model, training, steering, **data)
        elif isinstance(training, SteeringDPOConfig):
            trainer = SteeringDPOTrainer(model, training, steering, **data)
        else:
            trainer = SteeringGRPOTrainer(model, rewards, training, steering, **data)
        trainer.uploads_saved = False  # `main` does so, with the scores
        if source := settings.run.init:
            saved = init.read(source, settings.training.output_dir)
            init.start(trainer.vectors, saved, source, data["processing_class"])
        made = replace(settings, training=training).provenance()
        trainer.vectors.config.provenance = {**made, "data": origin} if origin else made
        return trainer

    def examples(train: Any, held_out: Any, tokenizer: Any, model: Any) -> Dataset:
        rows, known = answers.examples(settings, train, held_out, tokenizer, model)
        begun = newest_checkpoint(settings.training.output_dir, artifact.read)
        if begun is not None:
            answers.check_unchanged(recorded(artifact.read(begun).config.provenance, "data"), known)
        origin.update(known)
        return rows

    given = None if settings.training.method == "grpo" else examples
    return Recipe("steered", "vectors", make, artifact.read, settings.run.model_dtype, given)


def write_scores(folder: Path) -> None:
    """Write the scores into the finished artifact and its card."""
    results = runs.read_results(folder)
    vectors = artifact.read(folder / "vectors")
    scores = {stage: results[stage] for stage in STAGES if stage in results}
    if not scores:
        return
    known = {**(vectors.config.provenance or {}), "results": scores}
    if known == vectors.config.provenance:
        return
    artifact.write(folder / "vectors", replace(vectors, config=replace(vectors.config, provenance=known)))

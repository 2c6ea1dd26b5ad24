"""
Train steering vectors by reinforcement learning on math problems.

    accelerate launch recipes/grpo_steer.py --config recipes/configs/demo.yaml
    accelerate launch recipes/grpo_steer.py --config recipes/configs/demo.yaml \\
        --rewards random --reward_weights 1.0 --output_dir runs/control-random
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo_steer.py \\
        --config recipes/configs/deepscaler-qwen2.5-math-7b.yaml
    accelerate launch recipes/grpo_steer.py --config recipes/configs/demo.yaml \\
        --max_steps 2 --output_dir runs/dry
    accelerate launch recipes/grpo_steer.py --config recipes/configs/demo.yaml \\
        --learning_rates 1e-3 3e-3 1e-2 --output_dir runs/rates

Every setting of a config file can be overridden on the command line. `--lr_sweep` chooses the learning rate
first, on problems split off the training set. A run that was stopped goes on where it was when it is started
again with the same settings; a finished one says so. The output folder ends up with `vectors/` (the
artifact), `results.json`, `training.png`, the graded answers and the checkpoints. With `population`,
`each_layer`, `learning_rates` or `seeds` many sets of vectors are trained at once, as recipes/layer_sweep.py
does and explains.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

import steer
from steer import artifact
from steer.cli.layer_sweep import train_population
from steer.errors import SteerError
from steer.tasks.elicited import STAGES
from steer.training import recipe
from steer.training import run as runs
from steer.training.config import SteeringGRPOConfig
from steer.training.rate_search import SweepArguments, choose
from steer.training.recipe import Recipe
from steer.training.run import RunConfig, SteeringArguments
from steer.training.steering_trainer import SteeringGRPOTrainer
from steer.training.sweep.grid import PopulationArguments
from steer.versions import versions


def main() -> None:
    run, steering, training, sweep, population = parse()
    recipe.begin(run, training)
    if population.asked:
        if sweep.lr_sweep:
            raise SteerError(
                "lr_sweep chooses one rate for one set of vectors; a population takes several at once as "
                "learning_rates"
            )
        return train_population(run, training, population)
    chosen = vectors(run, steering)
    train, held_out = recipe.problems(run)
    if sweep.lr_sweep:
        training.learning_rate = choose(run, training, sweep, chosen, train)
        if sweep.sweep_only:
            return
    recipe.train_run(run, training, chosen, train, held_out)
    if PartialState().is_main_process:
        folder = Path(training.output_dir)
        write_scores(folder)
        recipe.report(folder, run, chosen)
        command = [Path(sys.executable).with_name("steer"), "generate", run.model]
        command += ["--vectors", folder / "vectors", "--prompt", "What is 7 + 5?"]
        print(f"\nUse them:\n  {shlex.join(map(str, command))}\n")


def parse() -> tuple[
    RunConfig, steer.SteeringConfig, SteeringGRPOConfig, SweepArguments, PopulationArguments
]:
    """The parts of the settings, from --config and the command line."""
    parts = (RunConfig, SteeringArguments, SteeringGRPOConfig, SweepArguments, PopulationArguments)
    run, chosen, *others = recipe.parse(parts, __doc__, "grpo_steer.py")
    return run, steer.SteeringConfig(**asdict(chosen)), *others


def vectors(run: RunConfig, steering: steer.SteeringConfig) -> Recipe:
    """What this recipe trains."""

    def make(model: Any, rewards: Any, training: SteeringGRPOConfig, **data: Any) -> SteeringGRPOTrainer:
        trainer = SteeringGRPOTrainer(model, rewards, training, replace(steering), **data)
        trainer.vectors.config.provenance = provenance(run, training)
        return trainer

    return Recipe("steered", {"steering": asdict(steering)}, "vectors", make, artifact.read, run.model_dtype)


def provenance(run: RunConfig, training: SteeringGRPOConfig) -> dict[str, Any]:
    """What the artifact says of its making."""
    names = "learning_rate lr_by_layer advantage loss_type beta num_generations generation_batch_size "
    names += "max_completion_length temperature max_steps seed chat_template_kwargs"
    return {
        "recipe": "grpo_steer",
        "run": asdict(run),
        "training": {name: getattr(training, name) for name in names.split()},
        "versions": versions("steer", "torch", "transformers", "trl"),
    }


def write_scores(folder: Path) -> None:
    """Write the scores into the finished artifact and its card."""
    results = runs.read_results(folder)
    vectors = artifact.read(folder / "vectors")
    scores = {stage: results[stage] for stage in STAGES if stage in results}
    known = {**(vectors.config.provenance or {}), "results": scores}
    if known == vectors.config.provenance:
        return
    artifact.write(folder / "vectors", replace(vectors, config=replace(vectors.config, provenance=known)))

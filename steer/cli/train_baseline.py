"""
Train what steering vectors are compared with, exactly as they are trained: a full fine-tune, or LoRA, BEFT or
TinyLoRA of peft. Data, rewards, samples, budget and logs are those of `steer train`.

    steer train-baseline --config demo --method full --model_dtype float32 \\
        --lr_sweep 3e-6 1e-5 3e-5 --output_dir runs/demo-full
    steer train-baseline --config demo --method lora --lora_rank 4 --learning_rate 1e-3 \\
        --output_dir runs/demo-lora
    steer train-baseline --config demo --method beft --target_modules down_proj --output_dir runs/demo-beft
    accelerate launch recipes/grpo_baseline.py --config recipes/configs/demo.yaml --method lora

`--lr_sweep` chooses the learning rate on problems split off the training set, and keeps what each rate
reached in `OUTPUT_DIR-sweep/sweep.json`. A run that was stopped goes on where it was when it is started again
with the same settings; a finished one says so. The output folder ends up with `adapter/` (peft's format) or
`model/` (a whole model), `results.json`, `training.png`, the graded answers and the checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from steer.config import SteeringArguments
from steer.errors import SteerError
from steer.training import recipe
from steer.training.arguments import SweepArguments
from steer.training.baselines import Baseline, BaselineGRPOTrainer, readable
from steer.training.config import SteeringGRPOConfig
from steer.training.dry_run import dry_run
from steer.training.problems import problems
from steer.training.rate_search import choose
from steer.training.recipe import Recipe
from steer.training.run_settings import RunSettings

log = logging.getLogger("steer")

# Above this a full fine-tune by policy gradients falls apart.
FULL_RATE = 1e-4


def main(arguments: Sequence[str]) -> None:
    # A config may be one of `steer train`'s; what it says of vectors is read and plays no part.
    settings = parse(arguments)
    recipe.begin(settings)
    training, rates = settings.training, settings.rates
    if settings.run.init:
        raise SteerError(f"init={settings.run.init} is of vectors, and none are trained here; leave it out")
    if settings.steering != SteeringArguments():
        log.info("no vectors are trained here: %s plays no part", settings.steering)
    chosen = trained(settings)
    train, held_out = problems(settings.run)
    if settings.run.dry_run:
        return dry_run(settings, chosen, train, held_out)
    if rates and rates.lr_sweep:
        training.learning_rate = choose(settings, rates, chosen, train)
        if rates.sweep_only:
            return
    elif chosen.name == "full" and training.learning_rate > FULL_RATE:
        log.warning(
            "learning_rate=%g is a rate for vectors; a full fine-tune needs about a thousandth (--lr_sweep)",
            training.learning_rate,
        )
    recipe.train_run(settings, chosen, train, held_out)
    if PartialState().is_main_process:
        recipe.report(Path(training.output_dir), settings.run, chosen)


def parse(arguments: Sequence[str]) -> RunSettings:
    """The settings, from --config and the other words of a command line."""
    more = {"baseline": Baseline, "rates": SweepArguments}
    return RunSettings.parse("grpo_baseline", __doc__, arguments, **more)


def trained(settings: RunSettings) -> Recipe:
    """What this recipe trains; SteerError for a full fine-tune of weights that would swallow its updates."""
    run, baseline = settings.run, settings.baseline
    assert baseline is not None
    full = baseline.method == "full"
    if full and run.model_dtype not in ("float32", "auto"):
        raise SteerError(
            f"model_dtype={run.model_dtype} with method=full: small updates are lost in weights of that "
            "precision; set --model_dtype float32, and --bf16 true to compute in bfloat16 on a GPU"
        )

    if full and (run.load_in_4bit or run.load_in_8bit):
        raise SteerError("quantised weights take no full fine-tune; leave load_in_4bit and load_in_8bit out")

    def make(model: Any, rewards: Any, training: SteeringGRPOConfig, **data: Any) -> BaselineGRPOTrainer:
        return BaselineGRPOTrainer(model, rewards, training, baseline, **data)

    artifact, dtype = ("model", "float32") if full else ("adapter", run.model_dtype)
    return Recipe(baseline.method, artifact, make, readable, dtype)

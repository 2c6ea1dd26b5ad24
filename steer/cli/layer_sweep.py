"""
Train many sets of steering vectors at once on one frozen model: every layer alone, learning rates, controls.

    steer sweep --config layer-sweep-demo
    steer sweep --config demo --learning_rates 1e-3 3e-3 1e-2 --output_dir runs/rates
    steer sweep --config layer-sweep-demo --halve_at 10 20 --output_dir runs/halved
    steer sweep --config deepscaler-qwen2.5-math-7b-single-layer --each_layer all --launcher ddp
    accelerate launch recipes/layer_sweep.py --config recipes/configs/layer-sweep-demo.yaml

All settings of `steer train` are here too, and a member of the population ends up with the vectors that
`steer train` gives it alone. A run that was stopped goes on where it was when it is started again; members
may be added to it (a longer list, more layers or rates), and `--only NAME` goes on with some. Several
processes divide the members among them.

The output folder ends up with `members/NAME/vectors` (an artifact each), `sweep.md`, `sweep.json` and
`sweep.png` (the table, and gain by layer with 95 % intervals) and `pairs.json` (the best layers in pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState

from steer.errors import SteerError
from steer.files import held
from steer.lens import layer_study
from steer.sites import find_decoder
from steer.tasks.rewards import MathGrader
from steer.training import recipe
from steer.training.arguments import PopulationArguments
from steer.training.run_settings import RunSettings
from steer.training.sweep import grid
from steer.training.sweep.run import claim_sweep_dir, train_members
from steer.training.sweep.study import Study


def main(arguments: Sequence[str]) -> None:
    settings = RunSettings.parse("layer_sweep", __doc__, arguments, population=PopulationArguments)
    recipe.begin(settings)
    train_population(settings, arguments)


def train_population(settings: RunSettings, arguments: Sequence[str]) -> None:
    """
    Train the members, or what is missing of them, and print the table. All share the command line
    `arguments`, which gave the settings.
    """
    if settings.run.dry_run:
        raise SteerError(
            "dry_run is for one run; leave out what asks for a population, and try a member alone"
        )
    folder = Path(settings.training.output_dir)
    with held(folder, "--output_dir") if PartialState().is_main_process else nullcontext():
        _train_population(folder, settings, arguments)


def _train_population(folder: Path, settings: RunSettings, arguments: Sequence[str]) -> None:
    run, asked = settings.run, settings.population
    assert asked is not None
    main_process = PartialState().is_main_process
    with MathGrader() as grader:
        study = Study.load(folder, settings, grader)
        everyone = grid.members(settings, find_decoder(study.model).num_hidden_layers, arguments)
        now = grid.chosen(everyone, asked.only)
        if main_process:
            claim_sweep_dir(folder, settings, everyone, {member.member for member in now})
        PartialState().wait_for_everyone()
        train_members(study, now)
        if not main_process:
            return
        best = layer_study.best_layers(layer_study.rows(folder), asked.winners) if asked.winners else []
        if len(best) > 1 and study.held_out is not None:
            tokens = settings.training.max_completion_length
            layer_study.compose_pairs(
                folder, best, study.model, study.tokenizer, grader, study.held_out, study.prompts, tokens
            )
    print(f"\n{layer_study.report(folder, f'{run.model} on {run.train_data}')}")
    print(f"table     {folder / 'sweep.md'}, {folder / 'sweep.json'}\nplot      {folder / 'sweep.png'}")
    print(f"vectors   {folder / 'members'}/NAME/vectors\n")

"""
Train steering vectors by reinforcement learning on math problems.

    accelerate launch recipes/grpo_steer.py --config recipes/configs/demo.yaml
    accelerate launch recipes/grpo_steer.py --config recipes/configs/demo.yaml \\
        --rewards random --reward_weights 1.0 --output_dir runs/control-random
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo_steer.py \\
        --config recipes/configs/deepscaler-qwen2.5-math-7b.yaml
    accelerate launch recipes/grpo_steer.py --config recipes/configs/demo.yaml \\
        --max_steps 2 --output_dir runs/dry

Every setting of a config file can be overridden on the command line. A run that was stopped goes on where it
was when it is started again with the same settings; a finished one says so. The output folder ends up with
`vectors/` (the artifact), `results.json`, `training.png`, the graded answers and the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging as transformers_logging
from trl import TrlParser

import steer
from steer import artifact
from steer.data import load_problems
from steer.errors import SteerError
from steer.files import replace_file
from steer.models import fast_dtype, load_model, load_tokenizer
from steer.prompts import render
from steer.rewards import Checker, make_reward
from steer.train import run as runs
from steer.train.config import SteeringGRPOConfig
from steer.train.evaluation import Answered, Score, answer_greedily, score
from steer.train.report import plot_training, sample_answers, score_table
from steer.train.run import RunConfig, SteeringArguments
from steer.train.trainer import SteeringGRPOTrainer, last_checkpoint

log = logging.getLogger("steer")


def main() -> None:
    run, steering, training = parse()
    main_process = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s")
    transformers_logging.set_verbosity_error()
    for noisy in ("httpx", "accelerate", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    folder = Path(training.output_dir)
    if training.reward_weights is not None and len(training.reward_weights) != len(run.rewards):
        raise SteerError(
            f"{len(training.reward_weights)} reward_weights for {len(run.rewards)} rewards "
            f"({', '.join(run.rewards)}); give one for each"
        )
    if main_process:
        runs.claim(folder, runs.settings(run, steering, training))
    PartialState().wait_for_everyone()

    train_problems, eval_problems = problems(run)
    tokenizer = load_tokenizer(run.model, revision=run.model_revision)
    model = load_model(
        run.model,
        revision=run.model_revision,
        dtype=run.model_dtype,
        attn_implementation=run.attn_implementation,
    )
    frame = lambda problem: render(problem, tokenizer, run.template, run.prefix)  # noqa: E731
    train_problems = train_problems.map(lambda row: {"prompt": frame(row["problem"])}, desc="framing prompts")
    with Checker() as checker:
        trainer = SteeringGRPOTrainer(
            model,
            [make_reward(name, checker) for name in run.rewards],
            training,
            steering,
            train_dataset=train_problems,
            processing_class=tokenizer,
        )
        trainer.vectors.config.provenance = provenance(run, training)
        if trainer.is_fsdp_enabled and eval_problems is not None:
            raise SteerError(
                "a sharded model is not evaluated in training; pass --eval_data none, score it later"
            )

        def evaluate(stage: str) -> None:
            results = runs.read_results(folder)
            if eval_problems is None or stage in results:
                return
            state = PartialState()
            mine = answer_greedily(
                trainer.accelerator.unwrap_model(trainer.model),
                tokenizer,
                eval_problems[state.process_index :: state.num_processes],
                frame,
                checker,
                training.max_completion_length,
                trainer.eos_token_ids,
                label=f"held-out problems, {stage}",
            )
            answered = [a for turn in zip_longest(*gather_object([mine])) for a in turn if a is not None]
            if not main_process:
                return
            replace_file(
                folder / f"samples_{stage}.json", json.dumps([asdict(a) for a in answered], indent=1).encode()
            )
            runs.write_results(folder, {**results, stage: asdict(score(answered))})

        done = runs.read_results(folder)
        asked = [training.max_steps, training.num_train_epochs]
        if done.get("asked") == asked and (eval_problems is None or "after" in done):
            log.info("this run is finished; its results:")
        else:
            with trainer.vectors.disabled():
                evaluate("before")
            PartialState().wait_for_everyone()
            train(trainer, folder, asked)
            PartialState().wait_for_everyone()
            evaluate("after")
        if main_process:
            seal(folder)
            report(folder, run, trainer)


def parse() -> tuple[RunConfig, steer.SteeringConfig, SteeringGRPOConfig]:
    """The three parts of the settings, from --config and the command line."""
    parts = [runs.escape_percents(part) for part in (RunConfig, SteeringArguments, SteeringGRPOConfig)]
    usage = "accelerate launch recipes/grpo_steer.py --config FILE [--setting VALUE ...]"
    parser = TrlParser(parts, description=__doc__, usage=usage, formatter_class=_Help)
    parser.error = _refuse
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; see recipes/configs")
    try:
        run, chosen, training = parser.parse_args_and_config()[:3]
    except FileNotFoundError as error:
        raise SteerError(
            f"no config file {error.filename}; those that come with steer are in recipes/configs"
        ) from error
    except yaml.YAMLError as error:
        raise SteerError(f"the config file is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # trl and transformers on unknown or contradictory settings
        raise SteerError(" ".join(str(error).split())) from error
    if run.model_dtype == "fast":  # what it means here is what the run is continued with, wherever that is
        run.model_dtype = fast_dtype()
    return run, steer.SteeringConfig(**asdict(chosen)), training


def problems(run: RunConfig) -> tuple[Any, list[dict[str, Any]] | None]:
    """Training problems as a data set, and held-out ones as a list (None when there are none)."""
    with PartialState().main_process_first():
        train = load_problems(
            run.train_data,
            run.train_split,
            limit=run.train_limit,
            levels=run.levels,
            max_chars=run.max_problem_chars,
            exclude=run.exclude,
            arithmetic=run.arithmetic(run.generated_problems),
        )
        source = run.eval_data or ("arithmetic" if run.train_data == "arithmetic" else "none")
        if source == "none":
            return train, None
        split = "heldout" if source == "arithmetic" else run.eval_split
        held_out = load_problems(
            source, split, limit=run.eval_limit, arithmetic=run.arithmetic(run.eval_limit)
        )
    kept = {" ".join(text.split()) for text in held_out["problem"]}
    unseen = train.filter(lambda row: " ".join(row["problem"].split()) not in kept)
    if len(unseen) < len(train):
        log.info(
            "%d training problems are among the held-out ones and were dropped", len(train) - len(unseen)
        )
    if not len(unseen):
        raise SteerError(
            f"every problem of {run.train_data} is held out too; train and test on different files"
        )
    return unseen, held_out.to_list()


def train(trainer: SteeringGRPOTrainer, folder: Path, asked: list[float]) -> None:
    """
    Train to the end, from the last whole checkpoint when there is one; the artifact lands in `vectors/`.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(folder / "vectors"))
    if trainer.accelerator.is_main_process:
        results = runs.read_results(folder)
        results.pop("after", None)
        seconds = sum(row.get("step_time") or 0 for row in trainer.state.log_history)
        size = sum(p.numel() for p in trainer.vectors.parameters())
        results.update(
            asked=asked,
            steps=trainer.state.global_step,
            training_seconds=round(seconds, 1),
            trained_numbers=size,
        )
        runs.write_results(folder, results)


def provenance(run: RunConfig, training: SteeringGRPOConfig) -> dict[str, Any]:
    """What the artifact says of its making."""
    names = "learning_rate lr_by_layer advantage loss_type beta num_generations generation_batch_size "
    names += "max_completion_length temperature max_steps seed"
    return {
        "recipe": "grpo_steer",
        "run": asdict(run),
        "training": {name: getattr(training, name) for name in names.split()},
        "versions": {name: version(name) for name in ("steer", "torch", "transformers", "trl")},
    }


def seal(folder: Path) -> None:
    """Write the scores into the finished artifact and its card."""
    results = runs.read_results(folder)
    vectors = artifact.read(folder / "vectors")
    scores = {stage: results[stage] for stage in ("before", "after") if stage in results}
    known = {**(vectors.config.provenance or {}), "results": scores}
    if known == vectors.config.provenance:
        return
    artifact.write(folder / "vectors", replace(vectors, config=replace(vectors.config, provenance=known)))


def report(folder: Path, run: RunConfig, trainer: SteeringGRPOTrainer) -> None:
    """Print the table, some answers, and where everything is; draw the curves."""
    results = runs.read_results(folder)
    checkpoint = last_checkpoint(folder)
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"] if checkpoint else []
    plot_training(
        trainer.state.log_history or history, folder / "training.png", f"{run.model} on {run.train_data}"
    )
    if "before" in results and "after" in results:
        before, after = (
            [Answered(**row) for row in _read(folder / f"samples_{s}.json")] for s in ("before", "after")
        )
        print(f"\n{sample_answers(before, after, run.samples_shown)}\n")
        print(score_table(Score(**results["before"]), Score(**results["after"])))
    size = sum(file.stat().st_size for file in (folder / "vectors").iterdir())
    vectors = trainer.vectors
    print(
        f"\nvectors   {folder / 'vectors'}  ({len(vectors.layers)} x {vectors.config.width} numbers, "
        f"{size / 1000:.0f} KB)"
        f"\nresults   {folder / 'results.json'}"
        f"\ncurves    {folder / 'training.png'}"
        f"\ntraining  {results['steps']} updates in {results['training_seconds'] / 60:.1f} minutes"
        f"\n\nUse them:\n  {Path(sys.executable).with_name('steer')} generate {run.model} "
        f"--vectors {folder / 'vectors'} --prompt 'What is 7 + 5?'\n"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def _refuse(message: str) -> NoReturn:
    raise SteerError(f"{message}; --help lists the settings")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the text above."""


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")

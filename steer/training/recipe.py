"""
The steps of a training run around its trainer: load problems and model, score before and after, train from
the last checkpoint, and report.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch.distributed import DistBackendError
from transformers.utils import logging as transformers_logging

from steer.errors import SteerError, print_any_text
from steer.evaluation.heldout import Answered, constant, score, ways
from steer.files import held, read_json, replace_file
from steer.models import context_length
from steer.prompt import PromptSpec
from steer.sharded import shape
from steer.tasks.elicited import UNTRAINED, choose
from steer.tasks.prompts import Question
from steer.tasks.reward_loading import load_rewards, reward_names
from steer.tasks.rewards import MathGrader
from steer.tasks.tools import load_tools
from steer.threads import machine
from steer.training import init
from steer.training import run as runs
from steer.training.problems import Problems, asked, check_held_out
from steer.training.resuming import log_history, newest_checkpoint
from steer.training.run import RunConfig
from steer.training.run_settings import RunSettings
from steer.training.settings import check_recipe, idle, refusals
from steer.training.summary import plot_training, sample_answers, score_table, validation_line
from steer.training.tool_calls import asker
from steer.training.validation import SHARE, Validation, answer_together, split
from steer.versions import versions

log = logging.getLogger("steer")


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how it lies on disk."""

    name: str  # of the trained model in tables
    artifact: str  # folder inside the run's that holds what was trained
    make: Callable[..., Any]  # (model, reward functions, training, data, tokenizer)
    readable: Callable[[Path], object]  # raises OSError or ValueError for a damaged checkpoint
    dtype: str  # precision the base is loaded in
    # (problems, held-out problems, tokenizer, model): the rows of a trainer that is given answers; None for
    # one that samples them, which is given prompts and rewards
    examples: Callable[..., Dataset] | None = None


# What torch's backends say when a process on the other side of a connection is gone.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout")


def start(main: Callable[[], object]) -> None:
    """Run the `main` of a recipe. A `SteerError` ends the program with its one line."""
    print_any_text()
    try:
        main()
        leave_processes()
    except SteerError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        lost = isinstance(error, DistBackendError) or any(text in str(error) for text in _GONE)
        state = PartialState()
        if not lost or state.num_processes == 1:
            raise
        reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()).splitlines()[0].split(". ")[0]
        print(
            f"\nerror: process {state.process_index} of {state.num_processes} lost another one ({reason}); "
            "see why that one ended, and start the same command again on all machines: the run goes on from "
            "its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the usual way out would wait for the process that is gone


def leave_processes() -> None:
    """Leave the other processes of a run, and end the threads that were connected to them.

    The trainer refers to the process group and is part of a reference cycle, so the group and gloo's threads
    would outlive the interpreter. A thread that frees a tensor then needs the interpreter and aborts the
    process: "terminate called without an active exception".
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()


# ---- before the run


def begin(settings: RunSettings) -> None:
    """Quiet the libraries, and check what can be checked before anything is loaded."""
    run, training = settings.run, settings.training
    main_process = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s")
    transformers_logging.set_verbosity_error()
    for noisy in ("httpx", "accelerate", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # trl reads it under its old name at each step
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    check_recipe(training)
    for name, why in idle(training).items():
        log.info("%s=%r plays no part: %s", name, getattr(training, name), why)
    searching = settings.rates is not None and settings.rates.lr_sweep
    if run.validation is not None and not (run.validate_every or searching):
        log.info("validation=%r plays no part: set validate_every, or lr_sweep", run.validation)
    if run.examples < 0:
        raise SteerError(f"examples is {run.examples}; expected the number of worked examples, 0 for none")
    if training.method == "grpo":
        _check_sampling(settings)


def _check_sampling(settings: RunSettings) -> None:
    """What can be checked of a run that samples answers and rewards them."""
    run, training = settings.run, settings.training
    if training.use_vllm and (run.load_in_4bit or run.load_in_8bit):
        raise SteerError(
            "load_in_4bit and load_in_8bit quantise the model that is trained, and vLLM would sample from "
            "another one; set use_vllm=false"
        )
    population = settings.population is not None and settings.population.asked
    if settings.population is not None:
        settings.population.check(bool(run.validate_every), single=settings.recipe == "grpo_steer")
    # with an adapter vLLM loads the folder of the merged weights, which has no revisions
    named = run.model_revision and not run.base_adapter
    if training.use_vllm and training.vllm_mode == "colocate" and named and not population:
        raise SteerError(
            f"model_revision={run.model_revision!r} with use_vllm: trl starts vLLM with the main revision, "
            "which would sample from another model; download the revision and give its folder as the model"
        )
    names, weights = reward_names(run.rewards), training.reward_weights
    if weights is not None and len(weights) != len(names):
        raise SteerError(
            f"{len(weights)} reward_weights, {weights}, for {len(names)} rewards ({', '.join(names)}); give "
            "one for each with --reward_weights, also where the config file has others"
        )
    weighted = zip(weights or [1.0] * len(names), names, strict=True)
    if run.tools:
        _check_tools(settings)
    elif training.max_tool_calling_iterations is not None:
        raise SteerError(
            f"max_tool_calling_iterations={training.max_tool_calling_iterations} has no effect without "
            "tools; name some with --tools, or leave it out"
        )
    log.info("reward: %s", " + ".join(f"{weight:g} x {name}" for weight, name in weighted))


def _check_tools(settings: RunSettings) -> None:
    """SteerError for what a run whose model calls tools cannot do."""
    run, training = settings.run, settings.training
    load_tools(run.tools)
    population = settings.population is not None and settings.population.asked
    if population or (settings.finder is not None and settings.finder.find_lr):
        what = "a population" if population else "find_lr, which trains a population,"
        raise SteerError(f"{what} draws one turn of each answer and calls no tools; leave tools out")
    if run.examples:
        raise SteerError(
            f"examples={run.examples} would show the elicited base answers without a call; set --examples 0 "
            "with tools"
        )
    log.info("tools: %s (answers are sampled with generate())", ", ".join(run.tools))
    if training.sample_rows:
        log.info("sample_rows=%s plays no part: generate() samples", training.sample_rows)


# ---- the run


def train_run(
    settings: RunSettings,
    recipe: Recipe,
    train: Dataset | None,
    held_out: Problems | None,
    stages: Sequence[str] = (*UNTRAINED, "after"),
    samples: int = 0,
) -> dict[str, Any]:
    """
    Carry out the run in its `output_dir`, or what is missing of it, and return its results.

    `train` are the problems to train on; None where the recipe's answers are to problems of a run or a file.
    `held_out` problems are answered greedily in each of `stages`: "before", "longer" (a longer limit) and
    "elicited" (and worked examples) with the untrained model. With `samples` each is answered that often at
    temperature 1 instead. SteerError when the folder holds another run.
    """
    folder = Path(settings.training.output_dir)
    with held(folder, "--output_dir") if PartialState().is_main_process else nullcontext():
        return _train_run(folder, settings, recipe, train, held_out, stages, samples)


def _train_run(
    folder: Path,
    settings: RunSettings,
    recipe: Recipe,
    train: Dataset | None,
    held_out: Problems | None,
    stages: Sequence[str],
    samples: int,
) -> dict[str, Any]:
    if not settings.run.validate_every:  # what a choice of the rate validates on is not part of the run
        settings = replace(settings, run=replace(settings.run, validation=None))
    run, training, state = settings.run, settings.training, PartialState()
    length = [training.max_steps, training.num_train_epochs]
    if state.is_main_process:
        runs.claim_output_dir(folder, settings.identity(), settings.defaults(), length)
    state.wait_for_everyone()
    done = runs.read_results(folder)
    if done.get("asked") == length and (held_out is None or "after" in done):
        log.info("this run is finished; its results:")
        return done

    model, tokenizer = run.load(recipe.dtype, training.trust_remote_code)
    tools = load_tools(run.tools)
    format_problem = asker(settings.prompt, tokenizer, tools)
    limit = training.max_completion_length
    data: Any = train
    validation: Problems = []
    if recipe.examples is None:
        data = asked(data, held_out, settings.prompt, tokenizer, model, limit, tools)
    if run.validate_every:
        data, validation = split(data, run.validation or SHARE)
        log.info("%d problems to validate on, %d to train on", len(validation), len(data))
    if recipe.examples is not None:
        check_held_out(held_out, format_problem, tokenizer, model, limit)
        check_held_out(validation, format_problem, tokenizer, model, limit, "validation problems")
        data = recipe.examples(data, held_out, tokenizer, model)
    with MathGrader() as grader:
        columns = set(data.column_names) - {"prompt"}
        rewards = load_rewards(run.rewards, grader, columns) if recipe.examples is None else []
        with refusals():
            more: dict[str, Any] = {"tools": tools} if tools else {}
            trainer = recipe.make(
                model, rewards, training, train_dataset=data, processing_class=tokenizer, **more
            )
        if run.init and state.is_main_process:
            init.keep(run.init, training.output_dir)
        if trainer.sharded and held_out is not None:
            raise SteerError(
                "a sharded model is not evaluated in training; pass --eval_data none, score it later"
            )

        validator = None
        if run.validate_every:
            validator = Validation(
                trainer, validation, format_problem, grader, run.validate_every, run.keep_best, run.patience
            )
            trainer.add_callback(validator)

        way: dict[str, tuple[PromptSpec, int]] = {}
        if held_out is not None:
            examples = choose(train or (), run.examples, [row["problem"] for row in held_out])
            context = context_length(model.config)
            way = ways(settings.prompt, limit, examples, held_out, tokenizer, context)

        def evaluate(stage: str) -> None:
            wanted = stage in stages and stage in way and stage not in runs.read_results(folder)
            if held_out is not None and wanted:
                ask = asker(way[stage][0], tokenizer, tools)
                _evaluate(folder, stage, trainer, ask, held_out, way[stage], grader, samples)

        with trainer.reference():
            for stage in UNTRAINED:
                evaluate(stage)
        if held_out is not None and run.examples and "before" in stages and state.is_main_process:
            always = constant(held_out, grader)
            runs.write_results(folder, {**runs.read_results(folder), "constant": always})
        state.wait_for_everyone()
        _train(trainer, recipe, folder, length, validator)
        state.wait_for_everyone()
        evaluate("after")
    state.wait_for_everyone()
    return runs.read_results(folder)


def _evaluate(
    folder: Path,
    stage: str,
    trainer: Any,
    format_problem: Callable[[Question], Any],
    held_out: Problems,
    way: tuple[PromptSpec, int],
    grader: MathGrader,
    samples: int,
) -> None:
    state = PartialState()
    prompts, limit = way
    rows = [row for row in held_out for _ in range(samples or 1)]
    answered = answer_together(
        trainer,
        rows,
        format_problem,
        grader,
        limit,
        f"held-out problems, {stage}",
        temperature=1.0 if samples else 0.0,
    )
    if not state.is_main_process:
        return
    kept = json.dumps([asdict(a) for a in answered], indent=1).encode()
    replace_file(folder / f"samples_{stage}.json", kept)
    if prompts.examples:
        replace_file(folder / "examples.json", json.dumps(prompts.examples, indent=1).encode())
    scored = {**asdict(score(answered)), "max_new_tokens": limit, "examples": len(prompts.examples)}
    runs.write_results(folder, {**runs.read_results(folder), stage: scored})


def _train(
    trainer: Any,
    recipe: Recipe,
    folder: Path,
    length: list[float],
    validator: Validation | None = None,
) -> None:
    """
    Train to the end, from the last whole checkpoint when there is one; what was trained lands in the run's
    folder.
    """
    checkpoint = newest_checkpoint(folder, recipe.readable)
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    validated = {"validation": validator.finish()} if validator else {}
    trainer.save_model(str(folder / recipe.artifact))
    trainer.save_state()
    if not trainer.accelerator.is_main_process:
        return
    results = runs.read_results(folder)
    results.pop("after", None)
    history = trainer.state.log_history
    results.update(
        **validated,
        asked=length,
        steps=trainer.state.global_step,
        training_seconds=logged_seconds(history, "seconds/wall"),
        training_cpu_seconds=logged_seconds(history, "seconds/cpu"),
        trained_numbers=sum(shape(p).numel() for p in trainer.model.parameters() if p.requires_grad),
        versions=versions("steer", "torch", "transformers", "trl", "peft"),
        machine=machine(),
    )
    runs.write_results(folder, results)


def logged_seconds(history: Sequence[dict[str, Any]], name: str) -> float:
    """The sum over all updates of what a row of the log has as the mean over those since the row before."""
    total, last = 0.0, 0
    for row in history:
        if row.get(name) is not None:
            total += row[name] * (row["step"] - last)
            last = row["step"]
    return round(total, 3)


def report(folder: Path, run: RunConfig, recipe: Recipe) -> None:
    """Print the table, some answers, and where everything is; draw the curves."""
    results = runs.read_results(folder)
    history = log_history(folder)
    validated = results.get("validation", {}).get("history", [])
    plot_training(history, folder / "training.png", f"{run.model} on {run.train_data}", validated)
    if "before" in results and "after" in results:
        before, after = (
            [Answered(**row) for row in read_json(folder / f"samples_{s}.json")] for s in ("before", "after")
        )
        print(f"\n{sample_answers(before, after, run.samples_shown, recipe.name)}\n")
        print(score_table(results, recipe.name))
    size = sum(file.stat().st_size for file in (folder / recipe.artifact).iterdir())
    print(
        f"\n{recipe.artifact:10}{folder / recipe.artifact}  "
        f"({results['trained_numbers']:,} trainable parameters, {size / 1000:,.0f} KB)"
        f"\nresults   {folder / runs.RESULTS_FILE}"
        f"\ncurves    {folder / 'training.png'}"
        f"\ntraining  {results['steps']} updates in {results['training_seconds'] / 60:.1f} minutes"
    )
    if "validation" in results:
        print(f"validated {validation_line(results['validation'])}")

"""`--dry_run`: what a run would train, and its memory and time estimated from two small timed updates."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from steer.sharded import shape
from steer.tasks.prompts import formatter, question
from steer.tasks.reward_loading import load_rewards, reward_names
from steer.tasks.rewards import MathGrader
from steer.tasks.tools import load_tools
from steer.training.config import SteeringGRPOConfig
from steer.training.estimate import memory, shape_of
from steer.training.group_trainer import GroupGRPOTrainer
from steer.training.problems import asked
from steer.training.recipe import Recipe
from steer.training.run_settings import RunSettings
from steer.training.settings import unpublished
from steer.training.tool_calls import with_tools
from steer.training.validation import SHARE, split

# Longest answer, in tokens, of the timed updates.
TOKENS = 64
GB = 1e9


def dry_run(
    settings: RunSettings, recipe: Recipe, train: Dataset, held_out: Sequence[dict[str, Any]] | None
) -> None:
    """
    Print what the run would train, and exit before anything is written to its folder.

    Args:
        settings: the run's.
        recipe: what is trained.
        train: the training problems.
        held_out: the held-out problems.
    """
    run, training = settings.run, settings.training
    model, tokenizer = run.load(recipe.dtype, training.trust_remote_code)
    tools = load_tools(run.tools)
    limit = training.max_completion_length
    data = asked(train, held_out, settings.prompt, tokenizer, model, limit, tools)
    validation: list[dict[str, Any]] = []
    if run.validate_every:
        data, validation = split(data, run.validation or SHARE)
    size = next(iter(model.parameters())).element_size()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with MathGrader() as grader, tempfile.TemporaryDirectory() as folder:
        rewards = load_rewards(run.rewards, grader, set(data.column_names) - {"prompt"})
        trainer = recipe.make(
            model,
            rewards,
            small(training, folder),
            train_dataset=data,
            processing_class=tokenizer,
            **({"tools": tools} if tools else {}),
        )
        trained = sum(shape(p).numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
        last = [row for row in trainer.state.log_history if "reward" in row][-1]
    if not PartialState().is_main_process:
        return

    group = training.num_generations
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    every = rows * PartialState().num_processes
    prompts, steps = every // group, updates(training, len(data))
    # of a chat with tools the column has the turns
    put = formatter(with_tools(settings.prompt, tools) if tools else settings.prompt, tokenizer)
    texts = [put(question(row)) for row in data.select(range(min(len(data), 200)))]
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    timed = group * last["completions/mean_length"]
    seconds = last["seconds/wall"] * rows * limit / timed
    more = training.dynamic_sampling_rounds
    again = f", and up to {more} more rounds of samples, whose time is not in it" if more else ""

    counts = f"{len(data)} to train on, {len(validation)} to validate on, {len(held_out or [])} held out"
    names, weights_of = reward_names(run.rewards), training.reward_weights or [1.0] * len(run.rewards)
    lines = [
        ("model", f"{run.model}" + (f" with {run.base_adapter} merged" if run.base_adapter else "")),
        ("trained", f"{recipe.name}: {trained:,} parameters" + _layers(trainer)),
        ("problems", counts),
        ("rewards", ", ".join(f"{w:g} x {name}" for name, w in zip(names, weights_of, strict=True))),
        ("update", f"{prompts} prompts x {group} answers of up to {limit} tokens: {every * limit:,} tokens"),
        ("memory", _memory(trainer, training, weights, trained, size, longest + limit)),
        ("time", f"at most {_duration(seconds)} an update, {_duration(seconds * steps)} for {steps} updates"),
        ("", f"(from an update of {group} answers of {last['completions/mean_length']:.0f} tokens: "
             f"{last['seconds/wall']:.2f} s; answers that end early take less"
             + (", and vLLM is faster" if training.use_vllm else "") + f"{again})"),
        ("reward there", f"{last['reward']:.3f}"),
    ]  # fmt: skip
    print("\nA prompt in full:\n" + "-" * 60 + f"\n{texts[0]}\n" + "-" * 60)
    for name, text in lines:
        print(f"{name:14}{text}")


def updates(training: SteeringGRPOConfig, problems: int) -> int:
    """The updates of a run over that many problems, as transformers counts them."""
    if training.max_steps > 0:
        return training.max_steps
    generations = problems // (training.generation_batch_size // training.num_generations)
    batches = generations * training.num_iterations * training.steps_per_generation
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def sampled_rows(training: SteeringGRPOConfig) -> int:
    """The rows that a process draws at once."""
    rows = training.generation_batch_size // training.world_size
    return min(training.sample_rows or rows, rows)


def small(training: SteeringGRPOConfig, folder: str) -> SteeringGRPOConfig:
    """The settings of two updates of one prompt each, which leave nothing behind outside of `folder`."""
    smaller = unpublished(training)
    smaller.output_dir, smaller.max_steps, smaller.warmup_steps = folder, 2, 0
    smaller.per_device_train_batch_size = smaller.generation_batch_size = training.num_generations
    smaller.generation_batch_size *= PartialState().num_processes
    smaller.gradient_accumulation_steps = smaller.steps_per_generation = 1
    smaller.max_completion_length = min(TOKENS, training.max_completion_length)
    # one round of samples of the problems as they come: what is timed, and the reward that is told
    smaller.dynamic_sampling_rounds, smaller.pass_rate_floor = 0, 1.0
    smaller.logging_steps, smaller.save_strategy = 1, type(training.save_strategy)("no")
    smaller.use_vllm, smaller.disable_tqdm = False, True
    return smaller


def _layers(trainer: Any) -> str:
    vectors = getattr(trainer, "vectors", None)
    return "" if vectors is None else f", at layers {vectors.config.layers} ({vectors.config.site})"


def _memory(
    trainer: GroupGRPOTrainer,
    training: SteeringGRPOConfig,
    weights: int,
    trained: int,
    size: int,
    tokens: int,
) -> str:
    sizes = shape_of(trainer.model.config)
    text = f"weights {weights / GB:.2f} GB"
    if sizes is not None:
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        at_once = min(training.update_rows or training.per_device_train_batch_size, rows)
        sampled = sampled_rows(training) * tokens
        parts = memory(sizes, weights, trained, size, sampled, at_once * tokens)
        if bound := trainer.update_memory:
            parts["update"] = int(min(bound.cost.fixed + bound.cost.token * at_once * tokens, bound.limit))
        held = parts["weights"] + parts["optimizer"]
        most = held + max(parts["sampling"], parts["update"])
        text = (
            f"about {most / GB:.2f} GB a device: weights and optimizer {held / GB:.2f}, sampling "
            f"{parts['sampling'] / GB:.2f}, update {parts['update'] / GB:.2f}"
        )
    if torch.cuda.is_available():
        text += f"; measured in the small updates {torch.cuda.max_memory_allocated() / GB:.2f}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"

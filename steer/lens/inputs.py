"""What `steer lens` works on: model and vectors, problems and answers, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import steer
from steer import artifact
from steer.base_adapter import artifact_base
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.lens.conditions import BASE, steered
from steer.lens.controls import mean_difference, random_readouts, random_vectors, shuffled_layers
from steer.lens.sampling import complete, graded
from steer.lens.subject import Row, Subject
from steer.models import load_model, load_tokenizer
from steer.prompt import PromptSpec, recorded
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.columns import parse_columns
from steer.tasks.data import has_own_columns, has_splits, heldout_source, load_problems
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import DEFAULT_PROMPT, choose_prompt

Records = list[dict[str, Any]]


def read_subject(args: argparse.Namespace) -> Subject:
    """The model with the artifact in it, asked as in its training unless told otherwise."""
    source = artifact.read(args.artifact)
    source.config.refuse_condition("steer lens")
    trust = args.trust_remote_code
    name, revision = artifact_base(source.config, args.model, args.revision, args.base_adapter, trust)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust)
    model = load_model(name, dtype=args.dtype, revision=revision, trust_remote_code=trust)
    vectors = steer.load(source, model, tokenizer=tokenizer)
    # analyses that read no problems have none of these settings
    prompt = read_prompt(args, args.artifact, source) if hasattr(args, "template") else DEFAULT_PROMPT
    length, size = answer_limit(args, source), getattr(args, "batch_size", 128)
    return Subject(vectors, tokenizer, prompt, length, size)


def read_prompt(args: argparse.Namespace, source: str, trained: artifact.Artifact) -> PromptSpec:
    """The prompt of an artifact, with what the command line says."""
    asked = (args.template, args.prefix, args.chat_template_kwargs)
    return choose_prompt({source: trained.config.prompt}, DEFAULT_PROMPT, *asked)


def answer_limit(args: argparse.Namespace, trained_vectors: artifact.Artifact) -> int:
    """The limit on an answer: as given, else as in training, else 256."""
    trained = recorded(trained_vectors.config.provenance, "training").get("max_completion_length")
    return getattr(args, "max_new_tokens", None) or trained or 256


def read_problems(args: argparse.Namespace, provenance: dict[str, Any] | None) -> Records:
    """
    `args.problems` problems of `args.data`, else held-out ones of the run that trained the vectors, read as
    the run read them. Those of generated arithmetic are of the kind the vectors were trained on.

    Raises:
        SteerError: problems that cannot be read, and a run without held-out ones.
    """
    run = recorded(provenance, "run")
    source, split, columns = (args.data, "test", None) if args.data else _held_out(run)
    arithmetic = None
    if source == "arithmetic":
        known = {field.name for field in fields(Arithmetic)} - {"problems", "seed"}
        options = {name: run[name] for name in known & set(run)}
        arithmetic = Arithmetic(problems=args.problems, **options)
    split = "heldout" if source == "arithmetic" else args.split or split
    columns = parse_columns(args.columns or columns)
    return load_problems(source, split, limit=args.problems, arithmetic=arithmetic, columns=columns).to_list()


def _held_out(run: Mapping[str, Any]) -> tuple[str, str, Any]:
    """
    Source, split and columns of what a run measured on, by its settings; where it measured on nothing, those
    of what else its training data has.
    """
    train, split = run.get("train_data"), run.get("eval_split") or "test"
    if source := heldout_source(train, run.get("eval_data")):
        own = run.get("columns") if has_own_columns(source) else None
        return source, split, run.get("eval_columns") or own
    if not train:
        raise SteerError("the artifact does not say what it was trained on; give --data, such as gsm8k")
    if not has_splits(train) or split == run.get("train_split"):
        raise SteerError(
            f"the vectors were trained on {train} and their run held no problems out; give --data, such as "
            "gsm8k"
        )
    return train, split, run.get("columns")


def read_both(args: argparse.Namespace) -> tuple[Subject, Records]:
    subject = read_subject(args)
    problems = read_problems(args, subject.vectors.config.provenance)
    apply_control(args, subject, problems)
    return subject, problems


def apply_control(
    args: argparse.Namespace, subject: Subject, problems: Sequence[dict[str, Any]] = ()
) -> None:
    """Put the control that was asked for in the place of the trained vectors."""
    chosen = getattr(args, "control", None)
    if chosen == "random":
        subject.vectors.set_tensors(random_vectors(subject.vectors, args.seed))
    elif chosen == "random-readout":
        subject.vectors.set_tensors(random_readouts(subject.vectors, args.seed))
    elif chosen == "shuffled":
        subject.vectors.set_tensors(shuffled_layers(subject.vectors, args.seed))
    elif chosen == "mean-difference":
        base, wanted = complete(subject, subject.rows(problems), [BASE, steered(subject)], label="answers")
        subject.vectors.set_tensors(mean_difference(subject, wanted, base, "mean difference"))


def write_answers(subject: Subject, problems: Records, temperature: float = 0.0, seed: int = 0) -> list[Row]:
    rows = subject.rows(problems)
    (written,) = complete(
        subject, rows, [steered(subject)], temperature=temperature, seed=seed, label="answers"
    )
    return written


def right_answers(subject: Subject, problems: Records, grader: MathGrader) -> list[Row]:
    """The steered model's greedy answers that are right; SteerError when there is none."""
    rows = write_answers(subject, problems)
    right = graded(subject, rows, problems, grader).tolist()
    answers = [row for row, ok in zip(rows, right, strict=True) if ok]
    if not answers:
        raise SteerError(f"none of the {len(rows)} steered answers is right: there is none to weigh")
    return answers


def chosen_layers(args: argparse.Namespace, subject: Subject) -> list[int] | None:
    if args.layers is None:
        return None
    return SteeringConfig(layers=args.layers).resolve_layers(subject.decoder.num_hidden_layers)

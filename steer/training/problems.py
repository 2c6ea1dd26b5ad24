"""The problems of a run: those to train on, those held out, and those that fit the model's context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.models import check_context, context_length
from steer.prompt import PromptSpec
from steer.tasks.columns import parse_columns
from steer.tasks.data import has_own_columns, heldout_source, load_problems
from steer.tasks.prompts import Question, formatter, question
from steer.tasks.tools import Tool
from steer.training.run import RunConfig
from steer.training.tool_calls import asker, with_tools

log = logging.getLogger("steer")

Problems = Sequence[dict[str, Any]]


def problems(run: RunConfig) -> tuple[Dataset, list[dict[str, Any]] | None]:
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
            columns=parse_columns(run.columns),
        )
        held_out = _held_out(run)
    if held_out is None:
        return train, None
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


def held_out_problems(run: RunConfig) -> list[dict[str, Any]] | None:
    """The held-out problems alone, of a run that is trained on no problems; None when there are none."""
    with PartialState().main_process_first():
        held_out = _held_out(run)
    return None if held_out is None else held_out.to_list()


def _held_out(run: RunConfig) -> Dataset | None:
    source = heldout_source(run.train_data, run.eval_data)
    if source is None:
        return None
    split = "heldout" if source == "arithmetic" else run.eval_split
    columns = run.eval_columns or (run.columns if has_own_columns(source) else None)
    return load_problems(
        source,
        split,
        limit=run.eval_limit,
        arithmetic=run.arithmetic(run.eval_limit),
        columns=parse_columns(columns),
    )


def check_held_out(
    held_out: Problems | None,
    format_problem: Callable[[Question], str],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    answer: int,
    what: str = "held-out problems",
) -> None:
    """
    SteerError where a held-out problem leaves no room for `answer` tokens in the model's context; it says
    `what` the problems are.
    """
    if held_out and context_length(model.config) is not None:
        longest = max(_tokens(tokenizer, [format_problem(question(row)) for row in held_out]))
        check_context(model.config, longest, answer, "--max_completion_length", f"{what}: ")


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def asked(
    train: Dataset,
    held_out: Problems | None,
    prompt: PromptSpec,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    answer: int,
    tools: Sequence[Tool] = (),
) -> Dataset:
    """
    The training problems that fit the model's context, with a column `prompt` of what a trainer is given.

    Args:
        train: the training problems.
        held_out: the held-out problems, which must fit.
        prompt: how a problem is put.
        tokenizer: of the model.
        model: the base model.
        answer: tokens of the longest answer.
        tools: what the model may call.

    Raises:
        SteerError: none fits, or a held-out problem does not; a prompt that cannot be put, or not with tools.
    """
    text = formatter(with_tools(prompt, tools) if tools else prompt, tokenizer)
    data = train.map(lambda row: {"prompt": text(question(row))}, desc="formatting prompts")
    data = fitting(data, held_out, text, tokenizer, model, answer)
    if not tools:
        return data
    chat = asker(prompt, tokenizer, tools)
    return data.map(lambda row: {"prompt": chat(question(row))}, desc="formatting chats")


def fitting(
    train: Dataset,
    held_out: Problems | None,
    format_problem: Callable[[Question], str],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    answer: int,
) -> Dataset:
    """
    The training problems whose `prompt` leaves room for `answer` tokens in the model's context; how many are
    left out is logged. SteerError when none fits, and for a held-out problem that does not fit.
    """

    context = context_length(model.config)
    if context is None:
        return train
    check_held_out(held_out, format_problem, tokenizer, model, answer)
    lengths = _tokens(tokenizer, train["prompt"])
    kept = [i for i, length in enumerate(lengths) if length + answer <= context]
    if not kept:
        check_context(model.config, min(lengths), answer, "--max_completion_length", "training problems: ")
    if len(kept) == len(lengths):
        return train
    log.warning(
        "%d of %d training problems are left out: their prompts, of up to %d tokens, and answers of "
        "max_completion_length=%d do not fit the context of %d tokens",
        len(lengths) - len(kept),
        len(lengths),
        max(lengths),
        answer,
        context,
    )
    return train.select(kept)

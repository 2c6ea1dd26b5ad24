"""
What supervised training and DPO train on: answers to problems, as tokens. They come from problems with
solutions, from a file of chosen and rejected answers, or from the graded answers of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError, shown
from steer.evaluation.answers import Answer, pairs, read_answers, run_model, run_settings
from steer.files import json_lines
from steer.models import context_length
from steer.prompt import PromptSpec
from steer.stop_tokens import end_of_turn
from steer.tasks.elicited import worked_answer
from steer.tasks.prompts import TEMPLATES, formatter, question
from steer.training.arguments import AnswerArguments
from steer.training.problems import Problems, held_out_problems, problems
from steer.training.run import RunConfig
from steer.training.run_settings import RunSettings

log = logging.getLogger("steer")

TRAINING = "training"
_PREFERENCES = ("prompt", "chosen", "rejected")


class Source(NamedTuple):
    """The folder of a run whose answers are trained on, and which of them its path names, if any."""

    folder: Path
    stage: str | None = None


class Example(NamedTuple):
    """A prompt with one answer, and with a worse one in a pair, which its limit may have cut off."""

    prompt: str
    answer: str
    worse: str | None = None
    cut: bool = False


def run_source(train_data: str) -> Source | None:
    """The run that `train_data` names: its folder, or its samples in that; None where it names problems."""
    path = Path(train_data).expanduser()
    if path.suffix == ".json" and path.name.startswith("samples_"):
        return Source(path.parent, path.stem.removeprefix("samples_"))
    if path.name == "completions" and path.is_dir():
        return Source(path.parent, TRAINING)
    return Source(path) if path.is_dir() else None


def is_preferences(train_data: str) -> bool:
    """Whether `train_data` is a .jsonl file whose first line has a chosen and a rejected answer."""
    path = Path(train_data).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    first = next(iter(json_lines(path)), None)
    return isinstance(first, dict) and bool({"chosen", "rejected"} & first.keys())


def load(settings: RunSettings) -> tuple[Dataset | None, Problems | None]:
    """
    The problems of a run that is trained on answers, None where it is given answers of a run or pairs of
    them; and its held-out problems, None when there are none.

    Raises:
        SteerError: problems that cannot be read, and settings that have no effect on such a run.
    """
    run, method = settings.run, settings.training.method
    unset = RunConfig()
    _no_effect(run, unset, ("rewards", "dry_run"), f"method={method} samples no answers")
    source = run_source(run.train_data)
    pairs_given = source is None and is_preferences(run.train_data)
    if source is None:
        names = {name: value for name, value in asdict(settings.answers or AnswerArguments()).items()}
        if given := [name for name, value in names.items() if value is not None]:
            raise SteerError(
                f"{given[0]}={names[given[0]]} has no effect: train_data={run.train_data} is not a folder "
                f"of a run; leave {given[0]} out, or give one"
            )
        if pairs_given and method == "sft":
            raise SteerError(
                f"{run.train_data} has chosen and rejected answers, and method=sft trains on right ones; set "
                "method=dpo, or give problems with solutions"
            )
        if not pairs_given and method == "dpo":
            raise SteerError(
                f"train_data={run.train_data} has no pairs of answers; method=dpo takes the folder of a run "
                "whose answers are kept, or a .jsonl file with prompt, chosen and rejected"
            )
        if not pairs_given:
            return problems(run)
    names_of_problems = ("columns", "train_split", "train_limit", "levels", "max_problem_chars", "exclude")
    why = f"train_data={run.train_data} holds answers and no problems"
    _no_effect(run, unset, (*names_of_problems, "validate_every"), why)
    if run.examples:
        log.info("examples=%d plays no part: there are no training problems to take them from", run.examples)
    return None, held_out_problems(run)


def _no_effect(run: RunConfig, unset: RunConfig, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(run, name) != getattr(unset, name):
            raise SteerError(f"{name}={shown(getattr(run, name))} has no effect: {why}; leave it out")


def examples(
    settings: RunSettings,
    train: Dataset | None,
    held_out: Problems | None,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> tuple[Dataset, dict[str, Any]]:
    """
    What the trainer is given, and where it is from.

    Args:
        settings: of the run.
        train: the problems to train on, where `train_data` names problems; else None.
        held_out: problems that must not be trained on; `train` is without them already.
        tokenizer: of the model.
        model: the base model, whose context limits the length.

    Returns:
        A data set of token ids, in the form that trl's trainers make of text; and what the provenance of the
        vectors says of it: its origin and how many examples were kept.

    Raises:
        SteerError: no example is left, or they are not what the method needs.
    """
    method, data = settings.training.method, settings.run.train_data
    source = run_source(data)
    told: dict[str, Any]
    if source is not None:
        made, told = _of_run(settings, source, tokenizer)
    elif train is None:
        made, told = _preferences(Path(data).expanduser(), settings.prompt, tokenizer), {}
    else:
        made, told = [_solution(row, settings.prompt, tokenizer) for row in train], {}
    if held_out and train is None:
        made = _unseen(made, held_out, settings.prompt, tokenizer)
    distinct = list(dict.fromkeys(made))
    if len(distinct) < len(made):
        log.info("%d examples that are there already are left out", len(made) - len(distinct))
    rows = _tokens(distinct, tokenizer, settings.prompt, method)
    kept = _fitting(rows, settings.training.max_length, context_length(model.config))
    log.info("%d examples to train on", len(kept))
    columns = {name: [row[name] for row in kept] for name in kept[0]}
    return Dataset.from_dict(columns), {"from": data, **told, "examples": len(kept)}


# ---- where they are from


def _solution(row: Mapping[str, Any], prompt: PromptSpec, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A problem with its solution, as a worked example has it."""
    text = worked_answer(row)
    if prompt.prefix:
        if not text.startswith(prompt.prefix):
            raise SteerError(
                f"prefix={prompt.prefix!r} opens every answer, and the solution of {shown(row['problem'])} "
                "does not begin with it; leave prefix out, or write it before the solutions"
            )
        text = text.removeprefix(prompt.prefix)
    elif isinstance(question(row), str):
        text = _gap(prompt) + text
    return Example(formatter(prompt, tokenizer)(question(row)), text)


def _gap(prompt: PromptSpec) -> str:
    """What a template that is not a chat has between its prompt and an answer."""
    template = TEMPLATES[prompt.template]
    return " " if not template.chat and template.example.split("{answer}")[0].endswith(" ") else ""


def _preferences(path: Path, prompt: PromptSpec, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Pairs of answers in a file; a `prompt` is a text, which is used as it is, or a chat."""
    put = formatter(prompt, tokenizer)
    made = []
    for number, row in enumerate(json_lines(path), 1):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or (lacking := [name for name in _PREFERENCES if name not in row]):
            names = lacking if isinstance(row, dict) else _PREFERENCES
            raise SteerError(
                f"{where} has no {' and no '.join(map(repr, names))}; expected an object with 'prompt', "
                "'chosen' and 'rejected'"
            )
        for name in ("chosen", "rejected"):
            if not isinstance(row[name], str):
                raise SteerError(f"{where}: {name!r} is {shown(row[name])}; expected a text")
        asked = row["prompt"]
        chat = isinstance(asked, list) and all(isinstance(turn, dict) and "role" in turn for turn in asked)
        if not isinstance(asked, str) and not (chat and asked):
            raise SteerError(f"{where}: 'prompt' is {shown(asked)}; expected a text or a list of messages")
        if row["chosen"] == row["rejected"]:
            raise SteerError(f"{where}: 'chosen' and 'rejected' are the same text; leave the line out")
        made.append(Example(asked if isinstance(asked, str) else put(asked), row["chosen"], row["rejected"]))
    return made


def _of_run(
    settings: RunSettings, source: Source, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], dict[str, Any]]:
    """The right answers of a run, or pairs of a right and a wrong one to the same problem."""
    asked = settings.answers or AnswerArguments()
    of = run_settings(source.folder)
    evaluated = "variants" in of
    if source.stage and asked.stage not in (None, source.stage):
        raise SteerError(
            f"train_data={settings.run.train_data} has the answers of stage {source.stage!r}, and "
            f"stage={asked.stage}; leave stage out, or give the folder {source.folder}"
        )
    for name, value, wanted in (("stage", asked.stage, evaluated), ("variant", asked.variant, not evaluated)):
        if value is not None and wanted:
            kind, other = ("eval", "variant") if evaluated else ("train", "stage")
            raise SteerError(
                f"{name}={value} has no effect: {source.folder} is a run of `steer {kind}`; choose its "
                f"answers by {other}"
            )
    stage = source.stage or asked.stage or TRAINING
    found = read_answers(source.folder, tokenizer, stage, asked.variant or "base")
    asked_with = next((answer.spec for answer in found.rows if answer.spec != settings.prompt), None)
    if asked_with is not None:
        raise SteerError(
            f"{source.folder}, {found.what}: the model was asked with {asked_with}, and this run asks it "
            f"with {settings.prompt}; give the same template, prefix and chat template variables"
        )
    if (model := run_model(of)["model"]) != settings.run.model:
        log.info("the answers are those of another model, %s", model)
    least = asked.min_reward
    graded = [a._replace(correct=_right(a, least, source, found.what)) for a in found.rows]
    # a right answer that its limit cut off does not show how one ends
    graded = [answer for answer in graded if answer.finished or not answer.correct]
    right = [answer for answer in graded if answer.correct]
    log.info(
        "%s, %s: %d answers, %d of them right; %d more are right, but cut off by their limit and left out",
        source.folder,
        found.what,
        len(found.rows),
        len(right),
        len(found.rows) - len(graded),
    )
    told = {"which": found.what, "answers": len(found.rows), "right": len(right)}
    if not right:
        limit = "" if least is None else f" with a reward from {least:g}"
        raise SteerError(
            f"{source.folder}, {found.what}: none of {len(found.rows)} answers is right{limit} and ended "
            "by the model; choose another run, stage or variant"
        )
    if settings.training.method == "sft":
        return [Example(answer.prompt, answer.text) for answer in right], told
    wrong = [answer for answer in graded if not answer.correct]
    made = [
        Example(right[i].prompt, right[i].text, wrong[j].text, not wrong[j].finished)
        for i, j in pairs(graded)
        if right[i].text != wrong[j].text
    ]
    if not made:
        raise SteerError(
            f"{source.folder}, {found.what}: no problem has both a right and a wrong answer, of "
            f"{len(right)} right and {len(wrong)} wrong ones; choose answers that were sampled several times"
        )
    return made, {**told, "pairs": len(made)}


def _right(answer: Answer, least: float | None, source: Source, what: str) -> bool:
    if least is None:
        return answer.correct
    if answer.reward is None:
        raise SteerError(
            f"min_reward={least:g}: {source.folder}, {what}, has verdicts and no rewards; leave min_reward "
            "out, or choose the answers of stage 'training'"
        )
    return answer.reward >= least


def _unseen(
    made: list[Example], held_out: Problems, prompt: PromptSpec, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    put = formatter(prompt, tokenizer)
    kept_out = {put(question(row)) for row in held_out}
    unseen = [one for one in made if one.prompt not in kept_out]
    if len(unseen) < len(made):
        log.info("%d examples are answers to held-out problems and were dropped", len(made) - len(unseen))
    if not unseen:
        raise SteerError(
            "every answer to train on is one to a held-out problem; choose the answers of stage 'training', "
            "or other problems as eval_data"
        )
    return unseen


# ---- tokens


def _tokens(
    made: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompt: PromptSpec, method: str
) -> list[dict[str, list[int]]]:
    chat = TEMPLATES[prompt.template].chat
    end = (end_of_turn(tokenizer) if chat else None) or tokenizer.eos_token_id
    if end is None:
        raise SteerError("the tokenizer has no token that ends a text (eos_token); set one on it")
    bos = tokenizer.bos_token
    rows: list[dict[str, list[int]]] = []
    for one in made:
        # as `prompt_ids` for one text
        special = not (bos and one.prompt.startswith(bos))
        first = list(tokenizer(one.prompt, add_special_tokens=special)["input_ids"])
        better, worse = (
            list(tokenizer(text or "", add_special_tokens=False)["input_ids"]) for text in one[1:3]
        )
        better.append(end)
        if not one.cut:
            worse.append(end)
        if method == "sft":
            rows.append({"input_ids": first + better, "labels": [-100] * len(first) + better})
        else:
            rows.append({"prompt_ids": first, "chosen_ids": better, "rejected_ids": worse})
    return rows


def _fitting(
    rows: list[dict[str, list[int]]], max_length: int | None, context: int | None
) -> list[dict[str, list[int]]]:
    """The rows that are no longer than `max_length` and the model's context; how many are not is logged."""

    def length(row: dict[str, list[int]]) -> int:
        if "input_ids" in row:
            return len(row["input_ids"])
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    most = min((limit for limit in (max_length, context) if limit is not None), default=None)
    if most is None:
        return rows
    kept = [row for row in rows if length(row) <= most]
    why = f"max_length={max_length} and the model's context of {context} tokens"
    if not kept:
        shortest = min(map(length, rows))
        raise SteerError(f"no example fits {why}: the shortest has {shortest} tokens; raise max_length")
    if len(kept) < len(rows):
        log.warning("%d of %d examples do not fit %s", len(rows) - len(kept), len(rows), why)
    return kept

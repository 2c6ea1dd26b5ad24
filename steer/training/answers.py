"""
What supervised training and DPO train on: answers to problems, as tokens. They come from problems with
solutions, from a file of chosen and rejected answers, or from the graded answers of a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError, shown
from steer.evaluation.answers import Answers, pairs, read_answers, run_model, run_settings
from steer.files import json_lines
from steer.models import context_length
from steer.prompt import PromptSpec
from steer.tasks.elicited import worked_answer
from steer.tasks.prompts import TEMPLATES, Question, formatter, question
from steer.training.answer_tokens import Example, fitting, tokens
from steer.training.arguments import AnswerArguments
from steer.training.problems import Problems, held_out_problems, problems
from steer.training.run import RunConfig
from steer.training.run_settings import RunSettings

log = logging.getLogger("steer")

TRAINING = "training"
# Settings without effect where no answers are sampled, and where answers are given without their problems.
OF_SAMPLES = ("rewards", "tools", "dry_run")
OF_PROBLEMS = (
    *("columns", "train_split", "train_limit", "levels", "max_problem_chars", "exclude", "validate_every"),
)
_PREFERENCES = ("prompt", "chosen", "rejected")


class Source(NamedTuple):
    """The folder of a run whose answers are trained on, and which of them its path names, if any."""

    folder: Path
    stage: str | None = None


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
    _no_effect(run, unset, OF_SAMPLES, f"method={method} samples no answers")
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
        if run.prefix:
            raise SteerError(
                f"prefix={shown(run.prefix)} opens every answer, and the prompts and answers of "
                f"{run.train_data} are used as they are; leave prefix out, or write it into them"
            )
    why = f"train_data={run.train_data} holds answers and no problems"
    _no_effect(run, unset, OF_PROBLEMS, why)
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
        vectors says of it: its origin, how many examples were kept, and a checksum of them.

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
        made = _unseen(made, held_out, settings.prompt, tokenizer, anywhere=source is None)
    distinct = list(dict.fromkeys(made))
    if len(distinct) < len(made):
        log.info("%d examples that are there already are left out", len(made) - len(distinct))
    rows = tokens(distinct, tokenizer, method)
    kept = fitting(rows, settings.training.max_length, context_length(model.config))
    log.info("%d examples to train on", len(kept))
    columns = {name: [row[name] for row in kept] for name in kept[0]}
    checksum = hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()[:16]
    return Dataset.from_dict(columns), {"from": data, **told, "examples": len(kept), "checksum": checksum}


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """SteerError where a run that goes on has other examples than it began with, by what `examples` says."""
    if "checksum" in before and before["checksum"] != now["checksum"]:
        raise SteerError(
            f"{now['from']} has changed since this run began: {before['examples']} examples then, "
            f"{now['examples']} now; give another output_dir, or the answers as they were"
        )


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
    asked = question(row)
    return Example(formatter(prompt, tokenizer)(asked), text, chat=_is_chat(prompt, asked))


def _is_chat(prompt: PromptSpec, asked: Question) -> bool:
    return not isinstance(asked, str) or TEMPLATES[prompt.template].chat


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
        # a text may be of any form: its answers end as those of the run's template do
        chat = _is_chat(prompt, asked)
        text = asked if isinstance(asked, str) else put(asked)
        made.append(Example(text, row["chosen"], row["rejected"], chat=chat))
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
    least = asked.min_reward
    found = read_answers(source.folder, tokenizer, stage, asked.variant or "base", least)
    _check_prompts(found, settings, source, tokenizer, run_model(of)["model"])
    told: dict[str, Any] = {"which": found.what}
    if found.scored:
        told["scored_on"] = list(found.scored)
        _tell_scored(found, settings, source)
    # a right answer that its limit cut off does not show how one ends
    graded = [answer for answer in found.rows if answer.finished or not answer.correct]
    right = [answer for answer in graded if answer.correct]
    log.info(
        "%s, %s: %d answers, %d of them right; %d more are right, but cut off by their limit and left out",
        source.folder,
        found.what,
        len(found.rows),
        len(right),
        len(found.rows) - len(graded),
    )
    told |= {"answers": len(found.rows), "right": len(right)}
    if not right:
        limit = "" if least is None else f" with a reward from {least:g}"
        raise SteerError(
            f"{source.folder}, {found.what}: none of {len(found.rows)} answers is right{limit} and ended "
            "by the model; choose another run, stage or variant"
        )
    chat = TEMPLATES[settings.prompt.template].chat
    if settings.training.method == "sft":
        return [Example(answer.prompt, answer.text, chat=chat) for answer in right], told
    wrong = [answer for answer in graded if not answer.correct]
    made = [
        Example(right[i].prompt, right[i].text, wrong[j].text, not wrong[j].finished, chat)
        for i, j in pairs(graded)
        if right[i].text != wrong[j].text
    ]
    if not made:
        raise SteerError(
            f"{source.folder}, {found.what}: no problem has both a right and a wrong answer, of "
            f"{len(right)} right and {len(wrong)} wrong ones; choose answers that were sampled several times"
        )
    return made, {**told, "pairs": len(made)}


def _check_prompts(
    found: Answers, settings: RunSettings, source: Source, tokenizer: PreTrainedTokenizerBase, model: str
) -> None:
    """SteerError where the answers follow other prompts than this run's."""
    where = f"{source.folder}, {found.what}"
    other = next((answer.spec for answer in found.rows if answer.spec != settings.prompt), None)
    if other is not None:
        fix = "give the same template, prefix and chat_template_kwargs"
        if other.examples or other.system:
            fix = "training knows no worked examples and no system text: choose another stage or variant"
        raise SteerError(
            f"{where}: the model was asked with {other}, and this run asks it with {settings.prompt}; {fix}"
        )
    if model == settings.run.model:
        return
    log.info("the answers are those of another model, %s", model)
    problem = "What is asked?"
    before, _, after = formatter(settings.prompt, tokenizer)(problem).partition(problem)
    for answer in found.rows:  # the prompts of updates are text that the other model's tokenizer laid out
        if not (answer.prompt.startswith(before) and answer.prompt.endswith(after)):
            raise SteerError(
                f"{where}: the prompt {shown(answer.prompt)} is laid out for {model}, and this run asks its "
                f"model with {shown(before + '...' + after)}; choose answers of `steer eval`, whose prompts "
                "are laid out anew"
            )


def _tell_scored(found: Answers, settings: RunSettings, source: Source) -> None:
    """Answers to problems that a run was scored on: which of them stay unseen must be said."""
    names = ", ".join(found.scored)
    if settings.run.eval_data is None:
        raise SteerError(
            f"{source.folder}, {found.what}, answers the problems that it was scored on ({names}), and no "
            "eval_data says which of them must not be trained on; give the problems that are to stay unseen "
            "as eval_data, or 'none' to train on all"
        )
    log.warning(
        "warning: these are answers to problems of %s, and those that eval_data=%s does not hold out are "
        "trained on: a score of the vectors on them does not show what they do on new problems",
        names,
        settings.run.eval_data,
    )


def _unseen(
    made: list[Example],
    held_out: Problems,
    prompt: PromptSpec,
    tokenizer: PreTrainedTokenizerBase,
    anywhere: bool = False,
) -> list[Example]:
    """The examples without held-out problems; `anywhere`: nor with one as a part of their prompt."""

    def fold(text: str) -> str:
        return " ".join(text.split())

    put = formatter(prompt, tokenizer)
    kept_out = {fold(put(question(row))) for row in held_out}
    problems_out = {fold(row["problem"]) for row in held_out} if anywhere else set()

    def seen(asked: str) -> bool:
        parts = (text for text in problems_out if text in asked)
        return asked in kept_out or any(re.search(rf"(?<!\w){re.escape(p)}(?!\w)", asked) for p in parts)

    unseen = [one for one in made if not seen(fold(one.prompt))]
    if len(unseen) < len(made):
        log.info("%d examples are answers to held-out problems and were dropped", len(made) - len(unseen))
    if not unseen:
        raise SteerError(
            "every answer to train on is one to a held-out problem; give answers to other problems, or other "
            "problems as eval_data"
        )
    return unseen

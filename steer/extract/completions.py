"""
The right and wrong answers of a run, as a contrast: those that `steer train` left in `samples_STAGE.json` or
(`log_completions`) in `completions/`, and those of `steer eval`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from steer.errors import SteerError, shown
from steer.evaluation import benchmarks, store
from steer.extract.contrast import Contrast
from steer.extract.rows import Row
from steer.files import read_json
from steer.prompt import PromptSpec
from steer.tasks.columns import parse_columns
from steer.tasks.data import has_own_columns, heldout_source, load_problems
from steer.tasks.prompts import Question, format_prompt, prompt_ids, question

STAGES = ("before", "longer", "elicited", "after", "training")


class Answer(NamedTuple):
    """One answer of a run. `about` tells the problem from others."""

    about: str
    prompt: str
    text: str
    correct: bool


def read_completions(
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    stage: str = "after",
    variant: str = "base",
) -> Contrast:
    """
    The right answers of a run as positive texts, the wrong ones as negative ones, each after its prompt.

    A right and a wrong answer to one problem are a pair: the first right one with the first wrong one, and so
    on.

    Args:
        folder: of a run of `steer train`, of a member of `steer sweep`, or of `steer eval`.
        tokenizer: of the run's model.
        stage: of a run of `steer train`: a key of `STAGES`, whose answers were kept. "training" are those of
            the updates themselves, which `log_completions` keeps.
        variant: of a run of `steer eval`: whose answers.

    Raises:
        SteerError: no such run, stage or variant; answers that are all right or all wrong.
    """
    path = Path(folder)
    settings = run_settings(path)
    if "variants" in settings:
        answers, prompt = list(_evaluated(path, settings, variant, tokenizer)), None
        what = f"variant {variant!r}"
    else:
        prompt = _spec(settings["run"], settings["training"])
        if stage not in STAGES:
            raise SteerError(f"stage={stage!r} is unknown; choose one of {', '.join(STAGES)}")
        find = _trained if stage == "training" else _answered
        answers, what = list(find(path, settings, prompt, stage, tokenizer)), f"stage {stage!r}"
    counts = {kind: sum(a.correct is kind for a in answers) for kind in (True, False)}
    if not all(counts.values()):
        raise SteerError(
            f"{path}, {what}: {counts[True]} answers are right and {counts[False]} wrong; a direction needs "
            "both: choose another --stage or --variant, or a run with both"
        )
    rows = {kind: [_row(a, tokenizer) for a in answers if a.correct is kind] for kind in (True, False)}
    source = {"from": f"right and wrong answers of the run {path}, {what}"}
    return Contrast(rows[True], rows[False], _pairs(answers), source, prompt)


def run_settings(folder: Path) -> dict[str, Any]:
    """`run.json` of a run of `steer train`, `steer sweep` (also from a member's folder) or `steer eval`."""
    home = folder.parent.parent if folder.parent.name == "members" else folder
    path = home / store.RUN_FILE
    if not path.is_file():
        raise SteerError(f"no run in {folder}: there is no {store.RUN_FILE}; give the folder of a run")
    settings = read_json(path)
    parts = set(settings) if isinstance(settings, dict) else set()
    if "variants" in parts:
        return store.read_settings(home)
    if not {"run", "training"} <= parts:
        raise SteerError(f"{path} is of no run of `steer train` or `steer eval`; give the folder of one")
    return settings


def run_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The base model of a run: `model`, `revision` and `base_adapter`."""
    if "variants" in settings:
        return {"model": settings["model"], "revision": settings.get("revision"), "base_adapter": None}
    run = settings["run"]
    names = {"model": "model", "revision": "model_revision", "base_adapter": "base_adapter"}
    return {name: run.get(field) for name, field in names.items()}


def _pairs(answers: list[Answer]) -> list[tuple[int, int]]:
    places: dict[bool, dict[str, list[int]]] = {True: defaultdict(list), False: defaultdict(list)}
    count = {True: 0, False: 0}
    for answer in answers:
        places[answer.correct][answer.about].append(count[answer.correct])
        count[answer.correct] += 1
    return [
        pair
        for about, right in places[True].items()
        for pair in zip(right, places[False][about], strict=False)
    ]


def _row(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> Row:
    first = prompt_ids(tokenizer, [answer.prompt])[0]
    after = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    return Row((*first, *after), len(first))


# ---- runs of `steer train`


def _spec(run: Mapping[str, Any], training: Mapping[str, Any]) -> PromptSpec:
    given = {name: run[name] for name in ("template", "prefix") if run.get(name)}
    return PromptSpec(**given, chat_template_kwargs=training.get("chat_template_kwargs"))


def _answered(
    folder: Path,
    settings: Mapping[str, Any],
    spec: PromptSpec,
    stage: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Answer]:
    path = folder / f"samples_{stage}.json"
    if not path.is_file():
        there = [name for name in STAGES if (folder / f"samples_{name}.json").is_file()]
        there += ["training"] if any((folder / "completions").glob("*.parquet")) else []
        raise SteerError(
            f"{folder} has no answers of stage {stage!r}; it has those of {', '.join(there) or 'no stage'}"
        )
    if stage == "elicited":
        examples = read_json(folder / "examples.json")
        spec = replace(spec, examples=tuple((problem, answer) for problem, answer in examples))
    asked = _questions(settings["run"])
    for row in read_json(path):
        prompt = format_prompt(asked.get(row["problem"], row["problem"]), tokenizer, spec)
        yield Answer(row["problem"], prompt, row["completion"], row["correct"])


def _questions(run: Mapping[str, Any]) -> dict[str, Question]:
    """What held-out problems of the user's own data ask, by their text: some are chats."""
    source = heldout_source(run["train_data"], run.get("eval_data"))
    if source is None or not has_own_columns(source):
        return {}
    own = run.get("eval_columns") or run.get("columns")
    problems = load_problems(source, run.get("eval_split", "test"), columns=parse_columns(own)).to_list()
    return {row["problem"]: question(row) for row in problems}


def _trained(
    folder: Path,
    settings: Mapping[str, Any],
    spec: PromptSpec,
    stage: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Answer]:
    """trl's tables of the samples of updates."""
    import pyarrow.parquet

    paths = sorted((folder / "completions").glob("*.parquet"))
    if not paths:
        raise SteerError(
            f"{folder} has no tables of completions; train with --log_completions true, or choose another "
            "--stage"
        )
    for path in paths:
        for row in pyarrow.parquet.read_table(path).to_pylist():
            if "correctness" not in row:
                names = ", ".join(row)
                raise SteerError(f"{path} does not say which answers are right; its columns are {names}")
            if not isinstance(row["prompt"], str):
                raise SteerError(f"{path} has chats for prompts; choose another --stage")
            yield Answer(row["prompt"], row["prompt"], row["completion"], row["correctness"] > 0)


# ---- runs of `steer eval`


def _evaluated(
    folder: Path, settings: Mapping[str, Any], variant: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Answer]:
    if variant not in settings["variants"]:
        raise SteerError(
            f"{folder} has no variant {shown(variant)}; it has {', '.join(settings['variants'])}"
        )
    way = settings["variants"][variant]
    problems = {(row["benchmark"], row["id"]): row for row in store.read_problems(folder)}
    done = store.read_completions(folder, ("variant", "benchmark", "problem", "text", "correct"))
    for of, name, key, text, correct in zip(*done.values(), strict=True):
        if of != variant:
            continue
        row, asked = problems[name, key], settings["benchmarks"][name]
        if benchmarks.problem_id(row["problem"], store.references(row)) != key:
            raise SteerError(
                f"{folder}: benchmark {name!r} asks chats, which a run does not keep; give pairs"
            )
        spec = PromptSpec.from_dict({k: v for k, v in asked.items() if k in _SPEC})
        examples = way.get("asked", {}).get(name, {}).get("examples")
        spec = replace(
            spec,
            prefix=way.get("prefix") or spec.prefix,
            system=way.get("system") or spec.system,
            examples=tuple((p, a) for p, a in examples) if examples else spec.examples,
        )
        yield Answer(key, format_prompt(row["problem"], tokenizer, spec), text, correct)


_SPEC = ("template", "prefix", "system", "chat_template_kwargs", "examples")

"""
The answers of a run: those that `steer train` left in `samples_STAGE.json` or (`log_completions`) in
`completions/`, and those of `steer eval`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from steer.errors import SteerError, shown
from steer.evaluation import benchmarks, store
from steer.files import read_json
from steer.prompt import PromptSpec
from steer.tasks.columns import parse_columns
from steer.tasks.data import has_own_columns, heldout_source, load_problems
from steer.tasks.prompts import Question, format_prompt, question

STAGES = ("before", "longer", "elicited", "after", "training")
# Column of the tables of completions, which older ones lack: whether its limit cut an answer off.
CUT_OFF = "cut_off"


class Answer(NamedTuple):
    """
    One answer of a run. `about` tells the problem from others, `spec` is how it was asked, `finished` whether
    the model ended it.
    """

    about: str
    prompt: str
    text: str
    correct: bool
    spec: PromptSpec
    finished: bool


class Answers(NamedTuple):
    """
    The answers of a run; which of them these are in words, such as "stage 'after'"; how a run of `steer
    train` puts its problems, None for one of `steer eval`, where each benchmark may be put in another way;
    and the names of the benchmarks or held-out data that they answer, none for those of updates.
    """

    rows: list[Answer]
    what: str
    prompt: PromptSpec | None
    scored: tuple[str, ...] = ()


def read_answers(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    stage: str = "after",
    variant: str = "base",
    min_reward: float | None = None,
) -> Answers:
    """
    The graded answers of a run, each after its prompt.

    Args:
        folder: of a run of `steer train`, of a member of `steer sweep`, or of `steer eval`.
        tokenizer: of the run's model.
        stage: of a run of `steer train`: a key of `STAGES`, whose answers were kept. "training" are those of
            the updates themselves, which `log_completions` keeps.
        variant: of a run of `steer eval`: whose answers.
        min_reward: of stage "training": the rewards together, with the run's weights, from which an answer
            counts as right; None: right is what is correct.

    Raises:
        SteerError: no such run, stage or variant; a reward asked of answers that have verdicts alone.
    """
    settings = run_settings(folder)
    evaluated = "variants" in settings
    what = f"variant {variant!r}" if evaluated else f"stage {stage!r}"
    if min_reward is not None and (evaluated or stage != "training"):
        raise SteerError(
            f"min_reward={min_reward:g}: {folder}, {what}, has verdicts and no rewards; leave min_reward "
            "out, or choose the answers of stage 'training'"
        )
    if evaluated:
        rows = list(_evaluated(folder, settings, variant, tokenizer))
        return Answers(rows, what, None, tuple(settings["benchmarks"]))
    spec = asked_with(settings)
    if tools := settings["run"].get("tools"):
        raise SteerError(
            f"the answers of {folder} hold calls of tools ({', '.join(tools)}) and their results, which are "
            "no text to train on or to extract from; give another run"
        )
    if stage not in STAGES:
        raise SteerError(f"stage={stage!r} is unknown; choose one of {', '.join(STAGES)}")
    if stage == "training":
        return Answers(list(_trained(folder, settings, spec, tokenizer, min_reward)), what, spec)
    rows = list(_answered(folder, settings, spec, stage, tokenizer))
    held_out = heldout_source(settings["run"]["train_data"], settings["run"].get("eval_data"))
    return Answers(rows, what, spec, (held_out,) if held_out else ())


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


def asked_with(settings: Mapping[str, Any]) -> PromptSpec:
    """How a run of `steer train` put its problems."""
    run, training = settings["run"], settings["training"]
    given = {name: run[name] for name in ("template", "prefix") if run.get(name)}
    return PromptSpec(**given, chat_template_kwargs=training.get("chat_template_kwargs"))


def pairs(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """
    Pairs of a right and a wrong answer to one problem: the first right one with the first wrong one, and so
    on. Each is a place among the right answers and one among the wrong ones.
    """
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


# ---- runs of `steer train`


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
        yield Answer(row["problem"], prompt, row["completion"], row["correct"], spec, row["finished"])


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
    tokenizer: PreTrainedTokenizerBase,
    least: float | None,
) -> Iterator[Answer]:
    """trl's tables of the samples of updates."""
    import pyarrow.parquet

    paths = sorted((folder / "completions").glob("*.parquet"))
    if not paths:
        raise SteerError(
            f"{folder} has no tables of completions; train with --log_completions true, or choose another "
            "--stage"
        )
    limit, weights = _limit_and_weights(settings)
    for path in paths:
        for row in pyarrow.parquet.read_table(path).to_pylist():
            if least is None and "correctness" not in row:
                names = ", ".join(row)
                raise SteerError(
                    f"{path} does not say which answers are right; its columns are {names}; choose another "
                    "stage, or in training those with a high reward (min_reward)"
                )
            if not isinstance(row["prompt"], str):
                raise SteerError(f"{path} has chats for prompts; choose another --stage")
            columns = list(row)
            first = columns.index("completion") + 1  # the rewards follow, in the order of their settings
            rewards = [row[name] or 0.0 for name in columns[first : first + len(weights)]]
            total = sum(weight * reward for weight, reward in zip(weights, rewards, strict=True))
            right = (row["correctness"] or 0) > 0 if least is None else total >= least
            cut = row.get(CUT_OFF)
            if cut is None:  # a text may have fewer tokens than were sampled
                length = len(tokenizer(row["completion"], add_special_tokens=False)["input_ids"])
                cut = length >= limit - max(2, 0.02 * limit)
            yield Answer(row["prompt"], row["prompt"], row["completion"], right, spec, not cut)


def _limit_and_weights(settings: Mapping[str, Any]) -> tuple[int, list[float]]:
    """The most tokens of a sample of a run, and the weights of its rewards."""
    run, training = settings["run"], settings["training"]
    weights = training.get("reward_weights") or [1.0] * len(run["rewards"])
    return training["max_completion_length"], [float(weight) for weight in weights]


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
    columns = ("variant", "benchmark", "problem", "text", "correct", "truncated")
    done = store.read_completions(folder, columns)
    for of, name, key, text, correct, cut in zip(*done.values(), strict=True):
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
        yield Answer(key, format_prompt(row["problem"], tokenizer, spec), text, correct, spec, not cut)


_SPEC = ("template", "prefix", "system", "chat_template_kwargs", "examples")

"""
`steer eval --side-effect-tasks`: tasks of lm-evaluation-harness, answered by the base and each variant.

The harness asks, decodes and grades as its task says; the model is the one in memory, with the variant on it.
What is kept is its verdict on each problem, so that variants are paired with the base.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from steer import artifact, extras
from steer.errors import SteerError, one_line, shown
from steer.evaluation import scores
from steer.evaluation.collect import Collection
from steer.evaluation.tables import difference, interval, named
from steer.evaluation.variants import Variant
from steer.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steer.evaluation.engines import HfEngine

log = logging.getLogger("steer")

# Where `run.json` holds the verdicts: by variant and task.
KEY = "side_effect_tasks"
# Metrics that are a verdict on one problem, the first one that a task has.
METRICS = ("acc", "exact_match")
BATCH = 16


def check(tasks: Sequence[str], variants: Sequence[Variant]) -> None:
    """
    Check what can be checked before a model is loaded.

    Args:
        tasks: names of lm-eval's tasks or groups, or paths of YAML files of tasks.
        variants: what is measured.

    Raises:
        SteerError: lm-eval is not installed, it knows no such task, or vectors steer some tokens only.
    """
    extras.require("--side-effect-tasks", "lm-eval")
    for variant in variants:
        if variant.kind == "vectors" and (positions := artifact.read(variant.path).config.positions) != "all":
            raise SteerError(
                f"{variant.path} has positions={positions}, and lm-eval does not say where its prompts end; "
                "leave out --side-effect-tasks"
            )
    known = _manager(tuple(tasks)).all_tasks
    for task in tasks:
        if _name(task) not in known:
            near = get_close_matches(task, known, 1)
            hint = f"; did you mean {near[0]}?" if near else "; `lm_eval ls tasks` lists them"
            raise SteerError(f"--side-effect-tasks: lm-eval has no task {shown(task)}{hint}")


def missing(
    settings: Mapping[str, Any], variants: Iterable[Variant], tasks: Sequence[str], limit: int | None
) -> list[tuple[Variant, list[str]]]:
    """The variants, with the tasks that a run has no verdicts on, on at most `limit` problems each."""
    known = settings.get(KEY, {})
    asked = {task: (limit, _checksum(task)) for task in tasks}
    wanted = []
    for variant in variants:
        have = {name: (one["limit"], one.get("file")) for name, one in known.get(variant.name, {}).items()}
        lacking = [task for task, of in asked.items() if have.get(_name(task)) != of]
        wanted += [(variant, lacking)] if lacking else []
    return wanted


def measure(
    engine: HfEngine,
    tokenizer: PreTrainedTokenizerBase,
    variant: Variant,
    tasks: Sequence[str],
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """
    The verdicts on a variant.

    Returns:
        By task: `values`, one in [0, 1] for each problem, the same problems for every variant; the name of
        the `metric`; the `limit`; and the checksum of the `file` of a task that is one. The problems of a
        group are those of all its tasks.

    Raises:
        SteerError: a task that cannot be read, and one without a verdict on each problem.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, found = _manager(tuple(tasks)), {}
    with engine.variant(variant):
        model = HFLM(pretrained=engine.model, tokenizer=tokenizer, batch_size=BATCH)
        for task in tasks:
            name = _name(task)
            log.info("%s: task %s of lm-eval", variant.name, name)
            try:
                result = simple_evaluate(
                    model, tasks=[name], limit=limit, bootstrap_iters=0, task_manager=manager
                )
            except (OSError, ValueError, RuntimeError, KeyError) as error:  # a data set that is not there
                raise SteerError(
                    f"lm-eval cannot run task {shown(name)} ({type(error).__name__}: {one_line(error)})"
                ) from error
            metric, values = _verdicts(name, result["samples"])
            made_by = versions("lm-eval")["lm-eval"]
            about = {"metric": metric, "limit": limit, "file": _checksum(task), "lm-eval": made_by}
            found[name] = {**about, "values": values}
    return found


@cache
def _manager(tasks: tuple[str, ...]) -> Any:
    """Of lm-eval's own tasks, which take seconds to read, where one is asked for by name; and of files."""
    from lm_eval.tasks import TaskManager

    folders = list(dict.fromkeys(str(Path(task).resolve().parent) for task in tasks if _is_file(task)))
    return TaskManager(include_path=folders or None, include_defaults=not all(map(_is_file, tasks)))


def _is_file(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


def _checksum(task: str) -> str | None:
    """Of the file of a task; None for one of lm-eval's own."""
    return hashlib.sha256(Path(task).read_bytes()).hexdigest()[:16] if _is_file(task) else None


def _name(task: str) -> str:
    """The name of a task; that in its file where it is given as one."""
    if not _is_file(task):
        return task
    try:
        name = yaml.safe_load(Path(task).read_text())["task"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise SteerError(
            f"--side-effect-tasks: {shown(task)} is no task of lm-eval ({type(error).__name__}: "
            f"{one_line(error)}); give a YAML file with 'task', or a name"
        ) from error
    return str(name)


def _verdicts(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, list[float]]:
    """The metric of a task and its value for each problem, by its first filter, in the order of problems."""
    if not samples:
        raise SteerError(f"task {shown(name)} of lm-eval has no problems; raise --side-effect-limit")
    values: list[float] = []
    metrics = []
    for part in sorted(samples):
        rows = [row for row in samples[part] if row.get("filter") == samples[part][0].get("filter")]
        metric = next((metric for metric in METRICS if metric in rows[0]), None)
        if metric is None:
            have = ", ".join(rows[0].get("metrics", [])) or "none"
            raise SteerError(
                f"task {shown(part)} of lm-eval has no accuracy: its metrics are {have}; choose one with "
                f"{' or '.join(METRICS)}"
            )
        metrics.append(metric)
        values += [float(row[metric]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    return " and ".join(dict.fromkeys(metrics)), values


# ---- beside the scores


def rows(collection: Collection, base: str) -> list[dict[str, Any]]:
    """
    One dict for each task and method whose seeds all have verdicts: `accuracy` with its interval, and the
    paired `difference` from the base with p-value and verdict. A task that the base does not have the same
    number of verdicts on is left out, with a note.
    """
    by_name = {method.name: method for method in collection.methods}
    made = []
    against = by_name[base].tasks if base in by_name else {}
    names = dict.fromkeys(t for method in collection.methods for seed in method.tasks.values() for t in seed)
    for task in names:
        reference = [one[task]["values"] for one in against.values() if task in one]
        for method in collection.methods:
            have = [one[task]["values"] for one in method.tasks.values() if task in one]
            if not have or len(have) < len(method.seeds):
                continue
            lengths = {len(values) for values in (*have, *reference)}
            if len(lengths) > 1:
                told = f"{task}: {method.name} and {base} answered different problems; left out"
                collection.notes.append(told)
                continue
            values = np.array(have)
            row = {
                "task": task,
                "method": method.name,
                "metric": next(iter(method.tasks.values()))[task]["metric"],
                "problems": lengths.pop(),
                "accuracy": asdict(scores.estimate(values)),
                "one_seed": method.parameters > 0 and len(have) == 1,
            }
            if reference and method.name != base:
                row |= asdict(scores.compare(values, np.array(reference)))
            made.append(row)
    return made


def table(rows: Sequence[Mapping[str, Any]], base: str) -> str:
    """The rows as Markdown; empty where there are none."""
    if not rows:
        return ""
    lines = [f"**Side effects on tasks of lm-eval**, paired with {base} over the problems", ""]
    lines.append(f"| task | metric | method | accuracy | minus {named(base)} | p | |")
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['task']} ({row['problems']} problems)", row["metric"], row["method"]]
        cells.append(interval(row["accuracy"]))
        if "difference" in row:
            verdict = row["verdict"]
            one = " (one seed)" if row["one_seed"] and verdict != scores.UNDECIDED else ""
            cells += [difference(row["difference"]), f"{row['p']:.2g}", f"{verdict}{one}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

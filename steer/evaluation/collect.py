"""
Runs read into arrays: methods side by side on the problems that all of them answered.

Variants that differ only behind a '#' (`steering#1`, `steering#2`) are training seeds of one method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from steer.errors import SteerError
from steer.evaluation.pack import read_run
from steer.evaluation.store import COLUMNS, FIXED, GREEDY

Row = dict[str, Any]


@dataclass
class Method:
    """One row of the table: its trainable parameters, and its completions by seed, benchmark and problem."""

    name: str
    parameters: int
    conditions: dict[str, Any]  # what it was run with, to tell apart and to warn
    seeds: list[str] = field(default_factory=list)
    # seed -> benchmark -> problem id -> sample -> completion
    rows: dict[str, dict[str, dict[str, dict[int, Row]]]] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # side effects by seed
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # verdicts of lm-eval by seed and task

    @property
    def side_effects(self) -> list[dict[str, float]]:
        """Those of each seed; empty where not all were measured."""
        return [*self.measured.values()] if len(self.measured) == len(self.seeds) else []


@dataclass
class Cell:
    """A method's answers to one benchmark, decoded one way; arrays are (seeds, problems, samples)."""

    method: Method
    problems: list[str]
    rows: list[list[list[Row]]]

    def array(self, column: str) -> np.ndarray:
        return np.array([[[row[column] for row in p] for p in seed] for seed in self.rows])

    @property
    def values(self) -> np.ndarray:
        """Share of right answers, (seeds, problems)."""
        return self.array("correct").mean(2)

    @property
    def read(self) -> int:
        """How many samples of a problem are graded leniently: the first ones, of all that files keep."""
        known = [[[row["lenient"] is not None for row in p] for p in seed] for seed in self.rows]
        of_all = np.array(known).all((0, 1))
        return int(of_all.cumprod().sum())

    @property
    def lenient(self) -> np.ndarray:
        """Share of right answers in whatever form they are given, (seeds, problems), over `read` samples."""
        return self.array("lenient")[:, :, : self.read].astype(float).mean(2)

    @property
    def loop(self) -> np.ndarray | None:
        """Which answers end in a repetition, as `array`; None for runs that did not record it."""
        found = self.array("loop")
        return None if (found == None).any() else found.astype(bool)  # noqa: E711

    @property
    def untrained(self) -> bool:
        return self.method.conditions["kind"] == "base" and not self.method.parameters


@dataclass
class Collection:
    """Everything that `steer.evaluation.compare` and `steer.evaluation.browse` show."""

    methods: list[Method]
    problems: dict[str, dict[str, Row]]  # benchmark -> id -> problem and answer
    forms: dict[str, str]  # benchmark -> form of its answers
    notes: list[str]
    sessions: list[dict[str, Any]]  # command, versions and time of every `steer eval`

    def benchmarks(self) -> list[str]:
        return list(self.problems)

    def base(self, asked: str) -> str:
        """
        The method that the others are compared with: `asked`, and the first one where that is the default,
        "base", and there is none, which is noted. SteerError for any other that is not there.
        """
        names = [method.name for method in self.methods]
        if asked not in names and asked != "base":
            raise SteerError(f"no method {asked!r} in these runs; they have {', '.join(names)}")
        if asked in names:
            return asked
        self._note(f"there is no method 'base' here: the others are compared with {names[0]}")
        return names[0]

    def cells(self, benchmark: str, greedy: bool) -> list[Cell]:
        """
        The methods that answered `benchmark` this way, on the problems that all of them answered, in the
        order of the problems file.
        """
        complete: list[tuple[Method, dict[str, list[list[Row]]]]] = []
        for method in self.methods:
            by_seed = [_complete(method.rows[s].get(benchmark, {}), greedy) for s in method.seeds]
            common = set.intersection(*map(set, by_seed)) if all(by_seed) else set()
            samples = {len(rows) for seed in by_seed for rows in seed.values()}
            if common and len(samples) == 1:
                complete.append((method, {i: [seed[i] for seed in by_seed] for i in common}))
            elif any(by_seed):
                self._note(f"{method.name}, {benchmark}: the seeds answered different problems; left out")
        if not complete:
            return []
        shared = [i for i in self.problems[benchmark] if all(i in answers for _, answers in complete)]
        if not shared:
            raise SteerError(
                f"the runs share no problem of {benchmark}: "
                + ", ".join(f"{m.name} answered {len(a)}" for m, a in complete)
                + "; compare runs of the same problems"
            )
        for method, answers in complete:
            if len(answers) > len(shared):
                self._note(
                    f"{benchmark}: {method.name} answered {len(answers)} problems; compared are the "
                    f"{len(shared)} that all methods answered"
                )
        return [
            Cell(m, shared, [[given[i][s] for i in shared] for s in range(len(m.seeds))])
            for m, given in complete
        ]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def collect(folders: Sequence[str | Path], columns: Iterable[str] = tuple(COLUMNS)) -> Collection:
    """
    The methods of several runs, each a folder or a packed file. A variant that two runs share under the same
    conditions is one; the same name under other conditions gets the run's folder behind it. SteerError for a
    folder that is not a run or an empty one.
    """
    collection = Collection([], {}, {}, [], [])
    methods: dict[str, Method] = {}
    for folder in map(Path, folders):
        settings, problems, completions = read_run(folder, columns)
        collection.sessions += [session for session in settings["sessions"] if session["completions"]]
        for row in problems:
            collection.problems.setdefault(row["benchmark"], {}).setdefault(row["id"], row)
        for name, chosen in settings["benchmarks"].items():
            collection.forms.setdefault(name, chosen["answer"])
        lists = list(completions.values())
        rows = [dict(zip(completions, values, strict=True)) for values in zip(*lists, strict=True)]
        if not rows:
            raise SteerError(
                f"{folder} holds no answers yet; give the same `steer eval` command again to go on with it"
            )
        _note_unfinished(collection, folder, settings, rows)
        names = {}
        for name, variant in settings["variants"].items():
            base, _, seed = name.partition("#")
            conditions = {
                **{key: settings[key] for key in FIXED},
                **{key: variant[key] for key in ("kind", "scale", "prefix", "parameters", "digest")},
                "system": variant.get("system", ""),
                "asked": variant.get("asked", {}),
                "benchmarks": settings["benchmarks"],
            }
            base = _own_name(base, folder, seed, conditions, methods)
            method = methods.setdefault(base, Method(base, variant["parameters"], conditions))
            for part in ("benchmarks", "asked"):
                method.conditions[part] = {**conditions[part], **method.conditions[part]}
            if seed not in method.seeds:
                method.seeds.append(seed)
            if effects := settings.get("side_effects", {}).get(name):
                method.measured[seed] = effects
            if verdicts := settings.get("side_effect_tasks", {}).get(name):
                known = method.tasks.setdefault(seed, {})
                for task, one in verdicts.items():
                    first = known.setdefault(task, one)
                    if any(first.get(part) != one.get(part) for part in ("limit", "file")):
                        collection._note(
                            f"{name}: task {task} of lm-eval was answered in several runs with another limit "
                            "or file; those of the first are shown"
                        )
            names[name] = method.rows.setdefault(seed, {})
        for row in rows:
            place = names[row["variant"]].setdefault(row["benchmark"], {}).setdefault(row["problem"], {})
            place.setdefault(row["sample"], row)
    collection.methods = [method for method in methods.values() if any(method.rows.values())]
    _note_conditions(collection)
    return collection


def _complete(problems: dict[str, dict[int, Row]], greedy: bool) -> dict[str, list[Row]]:
    """The completions of each problem that has all of them."""
    if greedy:
        return {i: [samples[GREEDY]] for i, samples in problems.items() if GREEDY in samples}
    sampled = {i: [samples[k] for k in sorted(samples) if k != GREEDY] for i, samples in problems.items()}
    most = max(map(len, sampled.values()), default=0)
    return {i: rows for i, rows in sampled.items() if rows and len(rows) == most}


def _own_name(
    name: str, folder: Path, seed: str, conditions: dict[str, Any], methods: dict[str, Method]
) -> str:
    """The name, with the run's folder behind it where another method under other conditions has it."""
    numbered = (f"{name} ({folder}, {n})" for n in count(2))
    return next(
        called
        for called in chain([name, f"{name} ({folder.name})", f"{name} ({folder})"], numbered)
        if called not in methods
        or not _differ(methods[called].conditions, conditions, seed not in methods[called].seeds)
    )


def _differ(one: dict[str, Any], other: dict[str, Any], other_seed: bool) -> bool:
    """Whether two variants of one name were made or run differently; training seeds differ in weights."""
    free = {"benchmarks", "asked"} | ({"model", "digest"} if other_seed else set())
    shared = set(one["benchmarks"]) & set(other["benchmarks"])
    return any(one[k] != other[k] for k in one if k not in free) or any(
        one[part].get(name) != other[part].get(name) for part in ("benchmarks", "asked") for name in shared
    )


def _note_unfinished(
    collection: Collection, folder: Path, settings: dict[str, Any], rows: Sequence[Row]
) -> None:
    """Every variant owes each problem what any of them gave it."""
    given: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for row in rows:
        given.setdefault((row["variant"], row["benchmark"]), set()).add((row["problem"], row["sample"]))
    owed = {
        benchmark: set().union(*(keys for (_, b), keys in given.items() if b == benchmark))
        for benchmark in settings["benchmarks"]
    }
    missing = sum(
        len(owed[b] - given.get((v, b), set()))
        for v, variant in settings["variants"].items()
        for b in variant.get("asked") or settings["benchmarks"]  # the elicited base is not asked all of them
        if b in owed
    )
    if missing:
        collection.notes.append(
            f"{folder} is not finished: at least {missing} answers are missing; "
            "the same `steer eval` command goes on with it"
        )


def _note_conditions(collection: Collection) -> None:
    """Say what differs between the methods beside the method."""
    for key in ("model", "engine", "dtype", "temperature", "top_p", "seed"):
        fine_tuned = [m for m in collection.methods if m.conditions["kind"] == "base" and m.parameters]
        told = [m for m in collection.methods if key != "model" or m not in fine_tuned]
        values = {method.name: method.conditions[key] for method in told}
        if len(set(values.values())) > 1:
            collection.notes.append(f"{key} differs: " + ", ".join(f"{n} {v}" for n, v in values.items()))
    for name in collection.problems:
        for key in ("template", "prefix", "system", "chat_template_kwargs", "max_new_tokens", "digest"):
            values = {
                m.name: m.conditions["asked"].get(name, {}).get(key, asked.get(key)) or "none"
                for m in collection.methods
                for asked in [m.conditions["benchmarks"].get(name)]
                if asked is not None
            }
            if len(set(map(str, values.values()))) > 1:
                collection.notes.append(
                    f"{name}: {key} differs: " + ", ".join(f"{n} {v}" for n, v in values.items())
                )

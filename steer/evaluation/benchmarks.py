"""
The benchmarks: where each one's problems lie, how they are asked, how often, and how long an answer may be.

A benchmark is a name below, or any file in the record form (`steer.tasks.data`); settings follow after
colons:

    gsm8k    gsm8k:limit=200:samples=4    my-problems.jsonl:template=plain
    arithmetic:operators=+*:digits=1:heldout=0.4

Samples and lengths are those of arXiv 2509.06608 where it names the benchmark (AIME and AMC 32 samples, the
others one; 4096 tokens in all), unless a command line says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.prompt import PromptSpec
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.data import load_problems, on_hub
from steer.tasks.prompts import DEFAULT_PROMPT, TEMPLATES, Question

FORMS = {
    "integer": re.compile(r"-?[0-9][0-9,]*(\.0+)?"),
    "number": re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?|-?\.[0-9]+"),
    "expression": re.compile(r".*", re.DOTALL),
}


@dataclass(frozen=True)
class Benchmark:
    """One declaration. `answer` is the form of the reference answers, a key of FORMS."""

    name: str
    hub: str = ""
    file: str = ""  # what the set is called in a folder of local files, or the path of the user's own file
    answer: str = "expression"
    samples: int = 1  # sampled completions of each problem, beside the greedy one
    max_new_tokens: int = 3072
    prompt: PromptSpec = DEFAULT_PROMPT  # where neither the user nor the vectors say another
    template: str | None = None  # the one that the user asks for
    limit: int | None = None  # most problems; a seeded choice, and a larger limit holds a smaller one's
    config: str | None = None
    split: str = "test"
    columns: tuple[str, str] = ("problem", "answer")  # on the hub
    arithmetic: Arithmetic | None = None
    train: str = (
        ""  # its training problems, a source of `steer.tasks.data`: TRAIN_train.jsonl in a local folder
    )


@dataclass(frozen=True)
class Problem:
    """One problem; `id` is a hash of its text and answer, the same in every run that asks it."""

    id: str
    problem: str
    answer: str
    golds: tuple[str, ...] = ()  # all right answers, where there are several
    messages: tuple[dict[str, str], ...] = ()  # the chat that asks it, where it is one

    @property
    def asks(self) -> Question:
        return self.messages or self.problem

    @property
    def references(self) -> str | tuple[str, ...]:
        """What an answer is graded against."""
        return self.golds or self.answer


KNOWN = {
    b.name: b
    for b in (
        Benchmark(
            "gsm8k",
            "openai/gsm8k",
            "gsm8k_test.jsonl",
            "integer",
            max_new_tokens=1024,
            config="main",
            columns=("question", "answer"),
            train="gsm8k",
        ),
        Benchmark("math500", "HuggingFaceH4/MATH-500", "math500.jsonl", train="math"),
        Benchmark("aime24", "HuggingFaceH4/aime_2024", "aime24.jsonl", "integer", samples=32, split="train"),
        Benchmark("aime25", "math-ai/aime25", "aime25.jsonl", "integer", samples=32),
        Benchmark(
            "amc23", "math-ai/amc23", "amc23.jsonl", "number", samples=32, columns=("question", "answer")
        ),
        Benchmark("minerva", "math-ai/minervamath", "minerva_math.jsonl", columns=("question", "answer")),
        Benchmark(
            "olympiadbench",
            "math-ai/olympiadbench",
            "olympiadbench_math_en.jsonl",
            columns=("question", "final_answer"),
        ),
        Benchmark(
            "svamp",
            "ChilleD/SVAMP",
            "svamp.jsonl",
            "number",
            max_new_tokens=512,
            columns=("question_concat", "Answer"),
        ),
        Benchmark(
            "arithmetic",
            answer="integer",
            samples=8,
            max_new_tokens=32,
            prompt=PromptSpec("boxed_short"),
            arithmetic=Arithmetic(problems=200),
        ),
    )
}

_SETTINGS = {"samples": int, "max_new_tokens": int, "template": str, "limit": int, "split": str}
_GENERATED = {f.name: {"operators": str, "heldout": float}.get(f.name, int) for f in fields(Arithmetic)}


def parse(text: str, **overrides: Any) -> Benchmark:
    """
    The benchmark that `text` names, with the settings behind its colons. `overrides` hold for every benchmark
    of a run and give way to those; None leaves the declaration's own. SteerError for a name, setting or value
    that does not exist.
    """
    name, *settings = text.split(":")
    if name in KNOWN:
        benchmark = KNOWN[name]
    elif Path(name).suffix in (".jsonl", ".json", ".parquet"):
        benchmark = Benchmark(Path(name).stem, file=name)
    else:
        raise SteerError(
            f"unknown benchmark {name!r}; expected one of {', '.join(KNOWN)}, or a file ending in .jsonl, "
            ".json or .parquet"
        )
    benchmark = replace(benchmark, **{k: v for k, v in overrides.items() if v is not None})
    generated = _GENERATED if benchmark.arithmetic else {}
    for setting in settings:
        key, mark, value = setting.partition("=")
        kind = {**generated, **_SETTINGS}.get(key)
        if kind is None or not mark:
            known = ", ".join([*_SETTINGS, *generated])
            raise SteerError(
                f"benchmark {text!r}: {setting!r} is not a setting; write key=value with one of {known}"
            )
        try:
            number = kind(value)
        except ValueError as error:
            raise SteerError(f"benchmark {text!r}: {key}={value!r} is not {_english(kind)}") from error
        if key in generated:
            assert benchmark.arithmetic
            benchmark = replace(benchmark, arithmetic=replace(benchmark.arithmetic, **{key: number}))
        else:
            benchmark = replace(benchmark, **{key: number})
    for key, least in (("samples", 0), ("max_new_tokens", 1), ("limit", 1)):
        count = getattr(benchmark, key)
        if count is not None and count < least:
            raise SteerError(f"benchmark {name!r}: {key}={count} is below {least}")
    if benchmark.template is not None and benchmark.template not in TEMPLATES:
        raise SteerError(
            f"benchmark {name!r}: unknown template {benchmark.template!r}; expected one of "
            f"{', '.join(TEMPLATES)}"
        )
    return benchmark


def problem_id(text: str, answers: str | Sequence[str], messages: Sequence[Mapping[str, str]] = ()) -> str:
    """The id of a problem: a hash of its words, its right answers and the chat that asks it."""
    golds = [answers] if isinstance(answers, str) else answers
    return _digest("\n".join([" ".join(text.split()), *golds, *map(json.dumps, messages)]))


def load(
    benchmark: Benchmark, data_dir: str | Path | None = None, columns: Mapping[str, str] | None = None
) -> tuple[list[Problem], str]:
    """
    The problems, and a digest of the whole set before `limit` cut it. With `data_dir`, the named benchmarks
    are read from their files there and the hub is not asked. `columns` are those of files without a name
    here (`steer.tasks.columns`).

    Raises SteerError for a file that is missing or broken (with the line), a hub that does not answer, and a
    set whose answers have another form than this benchmark's.
    """
    declared = (
        KNOWN.get(benchmark.name, benchmark) if benchmark.hub or benchmark.arithmetic else Benchmark("")
    )
    if benchmark.split != declared.split and not (benchmark.hub and data_dir is None):
        raise SteerError(
            f"benchmark {benchmark.name!r}: split={benchmark.split} is for sets on the hub, and this one is "
            f"{'generated' if benchmark.arithmetic else 'a file, which has one split'}; leave it out"
        )
    if benchmark.arithmetic:
        records = benchmark.arithmetic.generate("heldout")
        digest = _digest(repr(replace(benchmark.arithmetic, problems=1)))
    elif benchmark.hub and data_dir is None:
        records, digest = _from_hub(benchmark), ""
    else:
        path = _file(benchmark, data_dir)
        if benchmark.hub and not path.is_file():
            raise SteerError(
                f"benchmark {benchmark.name!r}: no file {path}; put the problems there as JSON lines with "
                "'problem' and 'answer', or leave --data-dir and STEER_DATA out to ask the hub"
            )
        records = load_problems(str(path), columns=None if benchmark.hub else columns).to_list()
        digest = ""
    by_id: dict[str, Problem] = {}
    for number, record in enumerate(records, 1):
        text, answer = str(record["problem"]), str(record["answer"])
        golds, messages = tuple(record.get("golds") or ()), tuple(record.get("messages") or ())
        if not FORMS[benchmark.answer].fullmatch(answer.strip()):
            article = "an" if benchmark.answer[0] in "aeiou" else "a"
            raise SteerError(
                f"benchmark {benchmark.name!r}: the answer of problem {number}, {answer[:40]!r}, is not "
                f"{article} {benchmark.answer}: is this another set's file?"
            )
        key = problem_id(text, golds or answer, messages)
        by_id.setdefault(key, Problem(key, text, answer, golds if len(golds) > 1 else (), messages))
    problems = list(by_id.values())
    digest = digest or _digest(" ".join(sorted(p.id for p in problems)))
    if benchmark.limit is not None and benchmark.limit < len(problems):
        random.Random(0).shuffle(problems)
        problems = problems[: benchmark.limit]
    return problems, digest


def has_training_problems(
    benchmark: Benchmark, run: Mapping[str, Any], data_dir: str | Path | None = None
) -> bool:
    """
    Whether a benchmark asks problems that vectors were trained on, by the settings `run` that their
    provenance names: it reads the same file, or the same split of a set on the hub, or generates arithmetic
    of which the training held out a smaller share.
    """
    source, split = run.get("train_data"), run.get("train_split")
    if not isinstance(source, str):
        return False
    if generated := benchmark.arithmetic:
        share = run.get("heldout")
        return (
            source == "arithmetic"
            and isinstance(share, int | float)
            and share < generated.heldout
            and run.get("terms") == generated.terms
            and bool(set(str(run.get("operators"))) & set(generated.operators))
        )
    if benchmark.hub and on_hub(source, str(split)) == (benchmark.hub, benchmark.split):
        return True
    return Path(source).resolve() == _file(benchmark, data_dir).resolve()


def _file(benchmark: Benchmark, data_dir: str | Path | None) -> Path:
    return Path(data_dir or "") / benchmark.file if benchmark.hub else Path(benchmark.file)


def _from_hub(benchmark: Benchmark) -> list[dict[str, Any]]:
    import datasets  # seconds to import

    try:
        rows = list(datasets.load_dataset(benchmark.hub, benchmark.config, split=benchmark.split))
    except Exception as error:  # offline, gated, renamed: all mended the same way
        reason = " ".join(str(error).split())[:200]
        raise SteerError(
            f"benchmark {benchmark.name!r}: the hub did not give {benchmark.hub!r} ({type(error).__name__}: "
            f"{reason}); check the network, or put {benchmark.file} into a folder and give it as --data-dir"
        ) from error
    ask, answer = benchmark.columns
    if not rows or not {ask, answer} <= set(rows[0]):
        seen = ", ".join(rows[0]) if rows else "no rows"
        raise SteerError(
            f"benchmark {benchmark.name!r}: {benchmark.hub!r} has {seen}, expected columns {ask} and "
            f"{answer}; put {benchmark.file} into a folder and give it as --data-dir"
        )
    return [{"problem": row[ask], "answer": _reference(row[answer])} for row in rows]


def _reference(answer: Any) -> str:
    """GSM8K's answers are after '####' at the end of the solution; OlympiadBench's are lists."""
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        answer = ", ".join(map(str, answer))
    _, mark, last = str(answer).rpartition("####")
    return last.strip().replace(",", "") if mark else str(answer)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _english(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text"}[kind]

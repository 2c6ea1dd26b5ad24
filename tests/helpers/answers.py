"""Shared by the tests of training on given answers: runs whose answers are kept, and what is made of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from helpers.launching import run_folder

from steer.cli import train
from steer.evaluation import store
from steer.evaluation.benchmarks import problem_id
from steer.tasks.prompts import format_prompt
from steer.training import answers
from steer.training.recipe import begin
from steer.training.run_settings import RunSettings

PLAIN = ["--template", "plain", "--use_cpu", "true", "--report_to", "none", "--max_completion_length", "8"]
PROMPT = RunSettings.parse("grpo_steer", arguments=["--output_dir", "x", *PLAIN]).prompt


def answers_folder(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    """A model, problems, and `run/`: a run of GRPO that kept samples, of 3 + 4 and of 5 + 5."""
    folder = run_folder(place, build_tiny, tiny_tokenizer, 4)
    run = folder / "run"
    if not run.exists():
        (run / "completions").mkdir(parents=True)
        settings = {
            "run": {"model": str(folder / "model"), "template": "plain", "rewards": ["correct01", "format"]},
            "training": {"max_completion_length": 12, "reward_weights": [1.0, 0.25]},
        }
        (run / "run.json").write_text(json.dumps(settings))
        rows = [
            ("3+4", r"\boxed{7}", 1.0, 1.0),
            ("3+4", r"\boxed{7}", 1.0, 1.0),
            ("3+4", r"\boxed{6}", 0.0, 1.0),
            ("3+4", "no", 0.0, 0.0),
            ("5+5", r"\boxed{10} and so", 1.0, 1.0),  # cut off by its limit
            ("5+5", "7 and no end of it", 0.0, 0.0),  # cut off too
            ("5+5", r"\boxed{0}", 1.0, 0.0),
            ("40+5", r"\boxed{5}", 1.0, 1.0),  # held out
            ("8+1", r"\boxed{9}", 1.0, 1.0),  # never wrong
        ]
        table = {
            "step": [1] * len(rows),
            "prompt": [format_prompt(row[0], tiny_tokenizer, PROMPT) for row in rows],
            "completion": [row[1] for row in rows],
            "correctness": [row[2] for row in rows],
            "format": [row[3] for row in rows],
            "advantage": [0.0] * len(rows),
        }
        pyarrow.parquet.write_table(pyarrow.table(table), run / "completions" / "completions_00001.parquet")
    return folder


def with_tests(base: Path) -> None:
    """`tested/`: a run of `steer eval`; `scored/`, `teacher/`: runs of `steer train` with kept answers."""
    if (base / "tested").exists():
        return
    template = {"template": "plain"}
    asked = {name: 0 for name in store.FIXED} | {"model": str(base / "model"), "revision": None}
    asked |= {
        "benchmarks": {"sums": template},
        "variants": {"base": {}, "shown": {"asked": {"sums": {"examples": [["1+1", "2"]]}}}},
    }
    rows = []
    for name, (problem, answer) in itertools.product(asked["variants"], {"3+4": "7", "8+1": "9"}.items()):
        row = dict.fromkeys(store.COLUMNS) | {"variant": name, "benchmark": "sums", "sample": -1}
        row |= {"problem": problem_id(problem, answer), "text": f"\\boxed{{{answer}}}"}
        rows.append(row | {"correct": True, "truncated": False})
    problems = [
        {"benchmark": "sums", "id": problem_id(p, a), "problem": p, "answer": a}
        for p, a in {"3+4": "7", "8+1": "9"}.items()
    ]
    for name, model in (("tested", ""), ("scored", str(base / "model")), ("teacher", "teacher")):
        (base / name / "completions").mkdir(parents=True)
        run = {
            "model": model,
            **template,
            "train_data": "x.jsonl",
            "eval_data": str(base / "sums.jsonl"),
            "rewards": ["r"],
        }
        settings = {"run": run, "training": {"max_completion_length": 9}} if model else asked
        (base / name / "run.json").write_text(json.dumps(settings))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), base / "tested" / "part-00000.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(problems), base / "tested" / "problems.parquet")
    (base / "sums.jsonl").write_text(json.dumps(problems[0]) + "\n")
    after = [{"problem": "8+1", "completion": "9", "correct": True, "finished": True}]
    after.append({"problem": "8+1", "completion": "1", "correct": False, "finished": True})
    (base / "scored" / "samples_after.json").write_text(json.dumps(after))
    # its reward is one of its own, and its prompts are of another chat template
    kept = {
        "prompt": ["<s>user 8+1"] * 2,
        "completion": ["9", "1"],
        "r": [0.9, 0.1],
        "correctness": [1.0, 0.0],
    }
    path = base / "teacher" / "completions" / "completions_00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table(kept), path)
    del kept["correctness"]
    kept["prompt"] = ["8+1\nAnswer:"] * 2
    pyarrow.parquet.write_table(pyarrow.table(kept), base / "scored" / "completions" / path.name)


def made(base: Path, tokenizer: Any, build_tiny: Callable, *words: str) -> tuple[list[Any], dict[str, Any]]:
    """What the settings make for the trainer, and its origin."""
    where = ["--model", str(base / "model"), "--output_dir", str(base / "out"), *PLAIN]
    settings = train.parse([*where, *words])
    begin(settings)
    problems, held_out = answers.load(settings)
    model = build_tiny("llama", vocab_size=len(tokenizer))
    rows, told = answers.examples(settings, problems, held_out, tokenizer, model)
    return rows.to_list(), told


def texts(rows: list[Any], tokenizer: Any) -> list[tuple[str, ...]]:
    """The prompt and the answers of each row, decoded."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids)

    found: list[tuple[str, ...]] = []
    for row in rows:
        if "labels" in row:
            start = next(i for i, label in enumerate(row["labels"]) if label != -100)
            assert row["labels"][start:] == row["input_ids"][start:]
            found.append((text(row["input_ids"][:start]), text(row["input_ids"][start:])))
        else:
            found.append(tuple(text(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")))
    return found

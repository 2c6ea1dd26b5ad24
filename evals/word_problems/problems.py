"""
Training, validation and test problems of the word-problem study, split by template.

    python -m evals.word_problems.problems --multiarith multiarith.jsonl --addsub addsub.jsonl \\
        --out runs/word-problems

GSM8K's training problems and one half of the templates of MultiArith and AddSub are trained on; the other
halves and GSM8K's test problems are the tests. A part of the training templates is for validation. Templates
are texts without numbers and names (`evals.word_problems.templates`), so that no template is on two sides. A
training problem that is nearly the same as a test or validation problem is dropped as well. Writes
train.jsonl, validation.jsonl, gsm8k.jsonl, multiarith.jsonl, addsub.jsonl, and problems.json: counts,
checksums, and how similar the most similar training problem of each test problem is. With `--most-steps`
GSM8K has its easier problems alone, by the lines of their solutions: small models solve few of the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from evals.word_problems.templates import names, nearest, place, template
from steer.arguments import Help, count
from steer.errors import SteerError
from steer.files import replace_file
from steer.tasks.data import load_problems

KEPT = ("problem", "answer", "source", "solution")
ALIKE = 0.8  # similarity from which two problems count as nearly the same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--gsm8k", default="gsm8k", help="hub id, or a .jsonl file of the training problems")
    parser.add_argument("--gsm8k-test", help="a .jsonl file of the test problems, where --gsm8k is a file")
    parser.add_argument("--multiarith", required=True, help="hub id or .jsonl file")
    parser.add_argument("--addsub", required=True, help="hub id or .jsonl file")
    parser.add_argument("--validation", type=count, default=400, help="validation problems, about")
    parser.add_argument("--most-steps", type=count, help="most lines of a solution (default: any number)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()
    if args.gsm8k.endswith(".jsonl") != bool(args.gsm8k_test):
        parser.error("--gsm8k-test goes with a --gsm8k that is a file, and only with that")
    made = split(
        easy(read(args.gsm8k), args.most_steps),
        easy(read(args.gsm8k_test or args.gsm8k, "test"), args.most_steps),
        {"multiarith": read(args.multiarith), "addsub": read(args.addsub)},
        args.validation,
    )
    report = {name: made.pop(name) for name in ("templates", "dropped", "overlap")}
    args.out.mkdir(parents=True, exist_ok=True)
    report["files"] = {}
    for name, rows in made.items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        replace_file(args.out / f"{name}.jsonl", content)
        report["files"][name] = {"problems": len(rows), "sha256": hashlib.sha256(content).hexdigest()[:16]}
    replace_file(args.out / "problems.json", (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report, indent=1))


def read(source: str, part: str = "train") -> list[dict[str, Any]]:
    """The problems of one source, in the record form, without columns that are empty."""
    rows = load_problems(source, part)
    return [{name: row[name] for name in KEPT if row.get(name) is not None} for row in rows]


def easy(rows: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    """
    The problems whose solution has at most `most` lines; all of them where that is None.

    Raises:
        SteerError: `most` is given and a problem has no solution.
    """
    if most is not None and (lacking := sum("solution" not in row for row in rows)):
        raise SteerError(
            f"--most-steps counts the lines of solutions, and {lacking} of {len(rows)} problems of GSM8K "
            "have none; give a file with the field solution, or leave --most-steps out"
        )
    return [row for row in rows if most is None or row["solution"].count("\n") < most]


def split(
    train: list[dict[str, Any]],
    test: list[dict[str, Any]],
    others: dict[str, list[dict[str, Any]]],
    validation: int,
) -> dict[str, Any]:
    """
    Args:
        train, test: GSM8K's own parts.
        others: sets whose templates are halved between training and test, by name.
        validation: about how many of the training problems are for validation, whole templates.

    Returns:
        The problems by file (train, validation, gsm8k and one for each of `others`), the number of
        `templates` of each set, how many training problems are `dropped` for being nearly the same as a test
        or validation problem, and the `overlap` of those with the training problems that are left.

    Raises:
        SteerError: one of the files would have no problems.
    """
    sets = {"gsm8k": [*train, *test], **others}
    known = names(row["problem"] for rows in sets.values() for row in rows)
    of = {row["problem"]: template(row["problem"], known) for rows in sets.values() for row in rows}
    tests = {"gsm8k": test}
    pool = list(train)
    for name, rows in others.items():
        tests[name] = [row for row in rows if place(of[row["problem"]]) < 0.5]
        pool += [row for row in rows if place(of[row["problem"]]) >= 0.5]
    # another part of the hash than the halves, which would put all of them on one side
    share = validation / max(1, len(pool))
    held = {made for made in set(of.values()) if place(f"validation {made}") < share}
    rest = _unlike(pool, [row for rows in tests.values() for row in rows], of)
    validating = [row for row in rest if of[row["problem"]] in held]
    kept = _unlike([row for row in rest if of[row["problem"]] not in held], validating, of)
    made: dict[str, Any] = {"train": kept, "validation": validating, **tests}
    made["templates"] = {name: len({of[row["problem"]] for row in rows}) for name, rows in sets.items()}
    made["dropped"] = len(pool) - len(kept) - len(validating)
    if lacking := [name for name in ("train", "validation", *tests) if not made[name]]:
        raise SteerError(
            f"{', '.join(lacking)}: no problems are left of {len(pool)} to train on and "
            f"{sum(map(len, tests.values()))} to test; give more problems, or another --validation"
        )
    others_text = [of[row["problem"]] for row in kept]
    made["overlap"] = {}
    for name in ("validation", *tests):
        alike, index = nearest([of[row["problem"]] for row in made[name]], others_text)
        most = int(alike.argmax())
        made["overlap"][name] = {
            "median": round(float(np.median(alike)), 3),
            "largest": round(float(alike[most]), 3),
            "most alike": [made[name][most]["problem"], kept[int(index[most])]["problem"]],
        }
    return made


def _unlike(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], of: dict[str, str]
) -> list[dict[str, Any]]:
    """Those of `rows` that are not nearly the same as one of `others`, by their templates `of` each text."""
    alike, _ = nearest([of[row["problem"]] for row in rows], [of[row["problem"]] for row in others])
    return [row for row, value in zip(rows, alike, strict=True) if value < ALIKE]


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")

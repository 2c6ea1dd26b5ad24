"""
Problems of the study of sums: additions and subtractions of numbers of at most two digits.

    python -m evals.sums --out runs/sums
    python -m evals.sums --terms 5 --out runs/long-sums

One-digit arithmetic, the demo's task, is mostly a matter of form: with worked examples in its prompt the
untrained model answers it as well as any trained one. Of sums of two numbers SmolLM2-135M answers about a
quarter, of sums of five Qwen2.5-Coder-0.5B less than half, so that there is something to learn. Solutions add
one number at a time. Writes train.jsonl, validation.jsonl, which rates and the gate are judged by, and
test.jsonl. Sums in another order (3 + 4, 4 + 3) are on one side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from steer.arguments import Help, count
from steer.files import replace_file
from steer.tasks.arithmetic import Arithmetic

HELD_OUT = 0.2  # share of all problems that is not trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--terms", type=int, choices=range(2, 6), default=2, help="numbers in a problem")
    parser.add_argument("--train", type=count, default=3000, help="training problems")
    parser.add_argument("--validation", type=count, default=400, help="validation problems")
    parser.add_argument("--test", type=count, default=1000, help="test problems")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in split(args.train, args.validation, args.test, args.terms).items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        replace_file(args.out / f"{name}.jsonl", content)
        print(f"{name}.jsonl: {len(rows)} problems, sha256 {hashlib.sha256(content).hexdigest()[:16]}")


def split(train: int, validation: int, test: int, terms: int = 2) -> dict[str, list[dict[str, Any]]]:
    """That many problems to train, validate and test on, the same ones every time."""
    draw = Arithmetic(operators="+-", digits=2, terms=terms, problems=train, heldout=HELD_OUT)
    held_out = Arithmetic(operators="+-", digits=2, terms=terms, problems=3000, heldout=HELD_OUT)
    share = validation / (validation + test)
    sides: dict[str, list[dict[str, Any]]] = {"validation": [], "test": []}
    for row in held_out.generate("heldout"):
        sides["validation" if _place(row["problem"]) < share else "test"].append(row)
    made = {"train": draw.generate("train"), **sides}
    return {
        name: [{**row, "solution": worked(row["problem"])} for row in rows[:most]]
        for (name, rows), most in zip(made.items(), (train, validation, test), strict=True)
    }


def worked(problem: str) -> str:
    """The sums of "What is 3 + 4 - 5?", a line each: "3 + 4 = 7", "7 - 5 = 2"."""
    total, *rest = problem.removeprefix("What is ").rstrip("?").split()
    lines = []
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        result = int(total) + int(number) * (1 if operator == "+" else -1)
        lines.append(f"{total} {operator} {number} = {result}")
        total = str(result)
    return "\n".join(lines)


def _place(problem: str) -> float:
    """Where the sum lies in [0, 1), whatever the order of its terms."""
    first, *rest = problem.removeprefix("What is ").rstrip("?").split()
    signs = rest[::2]
    signed = sorted(zip(["+", *signs], [first, *rest[1::2]], strict=True))  # "+" is before "-"
    return random.Random(" ".join(["".join(sorted(signs)), *(number for _, number in signed)])).random()


if __name__ == "__main__":
    main()

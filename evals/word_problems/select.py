"""
Training problems that a model solves sometimes: neither in none nor in all of its samples.

    steer eval --model qwen2.5-coder-0.5b-instruct --base-adapter WARM_START --temperature 1.0 \\
        --benchmarks runs/word-problems/train.jsonl:samples=8:limit=1000 --out runs/word-problems/pass-rates
    python -m evals.word_problems.select runs/word-problems/pass-rates \\
        --problems runs/word-problems/train.jsonl --out runs/word-problems/selected.jsonl

Problems that are always or never solved give a group of equal rewards, from which nothing is learned. Writes
the problems that are left, and beside them a .json with how many had each pass rate, and how many answers
were cut off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from steer.arguments import Help
from steer.errors import SteerError
from steer.evaluation.store import GREEDY, read_completions, read_problems, read_settings
from steer.files import json_lines, replace_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("run", type=Path, help="folder of a run of `steer eval` with samples")
    parser.add_argument("--problems", type=Path, required=True, help="the file that the run was asked")
    parser.add_argument("--variant", default="base", help="whose answers count")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    args = parser.parse_args()
    rates, told = pass_rates(args.run, args.variant)
    kept = [row for row in json_lines(args.problems) if 0 < rates.get(row["problem"], 0.0) < 1]
    if not kept:
        raise SteerError(
            f"{args.run}: no problem of {args.problems} is solved in some samples and not in all"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, "".join(json.dumps(row) + "\n" for row in kept).encode())
    told |= {"kept": len(kept), "model": read_settings(args.run)["model"]}
    replace_file(args.out.with_suffix(".json"), (json.dumps(told, indent=1) + "\n").encode())
    print(json.dumps(told, indent=1))


def pass_rates(run: Path, variant: str) -> tuple[dict[str, float], dict[str, Any]]:
    """
    The share of right answers among the samples of each problem, by the problem's text; and what is told of
    them: problems by number of right samples, and the share of samples that their limit cut off.

    Raises:
        SteerError: the run has no samples of this variant.
    """
    read = read_completions(run, ("variant", "problem", "sample", "correct", "truncated"))
    rows = [
        (problem, correct, cut)
        for name, problem, sample, correct, cut in zip(*read.values(), strict=True)
        if name == variant and sample != GREEDY
    ]
    if not rows:
        raise SteerError(
            f"{run} has no samples of variant {variant!r}; it has {sorted(set(read['variant']))}: ask "
            "`steer eval` for samples (--benchmarks FILE:samples=8)"
        )
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, correct, _ in rows:
        right[problem].append(bool(correct))
    texts = {row["id"]: row["problem"] for row in read_problems(run)}
    counts = Counter(sum(found) for found in right.values())
    told = {
        "problems": len(right),
        "samples": max(map(len, right.values())),
        "problems by right samples": {str(n): counts[n] for n in sorted(counts)},
        "cut off": round(sum(cut for *_, cut in rows) / len(rows), 4),
    }
    return {texts[problem]: sum(found) / len(found) for problem, found in right.items()}, told


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        sys.exit(f"error: {error}")

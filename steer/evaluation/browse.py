"""
Read completions side by side in a terminal.

    steer browse runs/eval --verdict gained --limit 3
    steer browse runs/eval --verdict truncated --methods steering --benchmark gsm8k

The same answers with a filter and a search are in the page of `steer.evaluation.compare`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from steer.arguments import Help
from steer.errors import SteerError
from steer.evaluation.collect import Collection, Row, collect
from steer.evaluation.store import GREEDY

VERDICTS = ("all", "gained", "lost", "right", "wrong", "truncated", "unanswered")


def select(
    collection: Collection,
    base: str,
    methods: Sequence[str],
    verdict: str,
    benchmark: str | None,
    sample: int,
) -> Iterator[tuple[dict[str, Any], dict[str, Row]]]:
    """Problems with the answers of `methods` to them, where any but the base's has this verdict."""
    by_name = {method.name: method for method in collection.methods}
    for name, problems in collection.problems.items():
        for key, problem in problems.items() if benchmark in (None, name) else ():
            answers = {}
            for method in methods:
                one = by_name[method]
                row = one.rows[one.seeds[0]].get(name, {}).get(key, {}).get(sample)
                if row is not None:
                    answers[method] = row
            others = [row for method, row in answers.items() if method != base] or list(answers.values())
            if any(_passes(verdict, answers.get(base), row) for row in others):
                yield problem, answers


def _passes(verdict: str, before: Row | None, row: Row) -> bool:
    was_right = before is not None and before["correct"]
    return {
        "all": True,
        "gained": before is not None and not was_right and row["correct"],
        "lost": was_right and not row["correct"],
        "right": row["correct"],
        "wrong": not row["correct"],
        "truncated": row["truncated"],
        "unanswered": row["how"] == "no_answer",
    }[verdict]


def side_by_side(problem: dict[str, Any], answers: dict[str, Row], width: int) -> str:
    """The problem, then its answers in columns; control characters of a model are shown, not obeyed."""
    lines = [*textwrap.wrap(plain(problem["problem"]), width), f"reference: {plain(problem['answer'])}", ""]
    column = max(24, (width - 3 * (len(answers) - 1)) // max(1, len(answers)))
    columns = []
    for name, row in answers.items():
        given = "no answer" if row["answer"] is None else f"answer {plain(row['answer'])[:60]}"
        facts = f"{'right' if row['correct'] else 'WRONG'}, {given}, {row['tokens']} tokens"
        block = [name, facts + (", cut off" if row["truncated"] else ""), ""]
        for line in plain(row["text"]).split("\n"):
            block += textwrap.wrap(line, column) or [""]
        columns.append([piece for line in block for piece in (textwrap.wrap(line, column) or [""])])
    for i in range(max(map(len, columns), default=0)):
        cut = [(block[i] if i < len(block) else "").ljust(column) for block in columns]
        lines.append(" | ".join(cut).rstrip())
    return "\n".join(lines)


def plain(text: str) -> str:
    """
    `text` with every control character but the line break written out, so that a terminal cannot be driven.
    """
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text.replace("\t", "    "))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="steer browse",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("runs", nargs="+", help="folders that `steer eval` wrote")
    parser.add_argument("--methods", nargs="+", help="whose answers to show (default: all)")
    parser.add_argument(
        "--base", default="base", help="what gained and lost are measured against (default: base)"
    )
    parser.add_argument("--benchmark", help="of this benchmark alone")
    parser.add_argument("--verdict", choices=VERDICTS, default="all", help="problems to show (default: all)")
    parser.add_argument(
        "--sample", type=int, default=GREEDY, help="which sample (default: the greedy answer)"
    )
    parser.add_argument("--limit", type=int, default=5, help="most problems shown (default: 5)")
    args = parser.parse_args(argv)
    try:
        collection = collect(args.runs)
        names = [method.name for method in collection.methods]
        base = collection.base(args.base)
        chosen = list(dict.fromkeys([base, *args.methods])) if args.methods else names
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise SteerError(f"no method {unknown[0]!r} in these runs; they have {', '.join(names)}")
        if args.benchmark not in (None, *collection.problems):
            raise SteerError(
                f"no benchmark {args.benchmark!r} here; there are {', '.join(collection.problems)}"
            )
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    width = shutil.get_terminal_size((110, 40)).columns
    selected = list(select(collection, base, chosen, args.verdict, args.benchmark, args.sample))
    for problem, answers in selected[: args.limit]:
        print(side_by_side(problem, answers, width) + "\n" + "=" * width)
    print(f"{min(args.limit, len(selected))} of {len(selected)} problems ({args.verdict})")
    return 0

r"""
What the base model can do without training, when its answers are asked for and read as well as can be.

A base that is asked for `\boxed{}` and does not write it scores 0 whatever it knows, and a gain over that is
a gain in form. Three controls tell the two apart: worked examples in the prompt and a longer limit on the
answer, both read leniently (`steer.tasks.lenient`), and the best constant answer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Worked examples in a prompt, unless a run says otherwise.
EXAMPLES = 8
# A longer limit is four times the run's own, up to this many tokens.
_FACTOR, _MOST = 4, 1024

# A worked example: a problem, and its answer as the model should write it.
Example = tuple[str, str]


def longer(limit: int) -> int:
    """The limit on the answers of the elicited base, in tokens, where the run's own is `limit`."""
    return max(limit, min(_FACTOR * limit, _MOST))


def choose(
    records: Iterable[Mapping[str, Any]], count: int = EXAMPLES, exclude: Iterable[str] = ()
) -> tuple[Example, ...]:
    r"""
    Worked examples out of training problems: the same ones whatever the order of the records.

    Args:
        records: training problems in the record form of `steer.tasks.data`.
        count: how many; fewer where there are no more.
        exclude: problems that are held out. They are compared with white space folded.

    Returns:
        Pairs of a problem and its solution, where the record has one, with the boxed answer at its end.
    """
    held_out = {_fold(text) for text in exclude}
    by_text = {_fold(record["problem"]): record for record in records}
    texts = sorted((text for text in by_text if text not in held_out), key=_place)
    return tuple((by_text[text]["problem"], worked_answer(by_text[text])) for text in texts[:count])


def fitting(
    examples: Sequence[Example],
    longest: Callable[[Sequence[Example]], int],
    limit: int,
    context: int | None,
) -> tuple[Example, ...]:
    """
    The first of `examples` that leave room for an answer.

    Args:
        longest: tokens of the longest prompt with given examples.
        limit: tokens of the longest answer.
        context: tokens that the model can read; None for any number.
    """
    kept = tuple(examples)
    while kept and context is not None and longest(kept) + limit > context:
        kept = kept[:-1]
    return kept


def constant_answer(golds: Iterable[str]) -> str:
    """
    The most frequent reference answer of the problems that are scored: no answer that ignores the problem
    does better on them. Of equally frequent ones the first in the order of text.
    """
    counts = Counter(golds)
    return min(counts, key=lambda gold: (-counts[gold], gold))


# ---- results.json of a run

# The stages of a run that score the untrained model.
UNTRAINED = ("before", "longer", "elicited")
# All scores in a run's results, in the order of a table.
STAGES = (*UNTRAINED, "constant", "after")


def stages(
    results: Mapping[str, Any], trained: str, base: str = "untrained"
) -> list[tuple[str, dict[str, Any]]]:
    """
    The scores in a run's results with their names, in the order of a table: the base as prompted, the base
    elicited in each way that was measured, the constant answer, the trained model.
    """

    def title(stage: str, score: Mapping[str, Any]) -> str:
        tokens, examples, answer = (score.get(key) for key in ("max_new_tokens", "examples", "answer"))
        return {
            "before": base,
            "longer": f"{base}, {tokens} tokens",
            "elicited": f"{base}, {examples} examples, {tokens} tokens",
            "constant": f"always {answer}",
            "after": trained,
        }[stage]

    return [(title(stage, results[stage]), results[stage]) for stage in STAGES if stage in results]


def best_base(results: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """
    Of the base's scores the one with the highest lenient accuracy, with its name; None where none was read
    leniently. The best is chosen on the held-out problems, which favours the base.
    """
    known = {stage: results[stage] for stage in UNTRAINED if stage in results}
    scored = [row for row in stages(known, "") if isinstance(row[1].get("lenient"), (int, float))]
    return max(scored, key=lambda row: row[1]["lenient"], default=None)


def worked_answer(record: Mapping[str, Any]) -> str:
    """The answer to a problem as the model should write it: its solution, and the boxed answer at the end."""
    boxed = rf"$\boxed{{{record['answer']}}}$"
    solution = re.sub(r"<<[^<>]*>>", "", str(record.get("solution") or "")).strip()  # GSM8K's calculator
    if not solution:
        return boxed
    return solution if r"\boxed" in solution else f"{solution}\nThe answer is {boxed}."


def _fold(text: str) -> str:
    return " ".join(text.split())


def _place(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

r"""
Is the grading right? The same completions graded again by others, with every difference listed and explained.

    steer grading-check runs/eval --sample 300
    steer grading-check samples_gsm8k_2026-01-01T00-00-00.jsonl
    steer grading-check labelled.jsonl

A run is graded again by math-verify as its own README uses it (`verify(parse(reference),
parse(completion))`), and where the answers are numbers by the extraction of lm-eval's GSM8K task:
"flexible", the last number anywhere, and "strict", the number behind "####". A file that lm-eval wrote with
`--log_samples` holds lm-eval's own verdicts; they are compared with this package's. Exit code 1 when a
difference has no explanation.

A file with `{"gold": ..., "answer": ..., "correct": ...}` on each line holds a person's verdicts on boxed
answers: the agreement is printed with every disagreement. Exit code 1 when it is below 98 %.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from steer.arguments import Help
from steer.errors import SteerError
from steer.evaluation.collect import collect
from steer.files import json_lines
from steer.tasks.grading import MathGrader, Verdict, extract_boxed

T = TypeVar("T")

# lm-eval 0.4.13, tasks/gsm8k/gsm8k.yaml
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_IGNORED = [re.compile(text) for text in (",", r"\$", r"(?s).*#### ", r"\.$")]

UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Graded:
    """One completion with our verdict and another grader's."""

    grader: str
    text: str
    reference: str
    ours: Verdict
    theirs: bool
    extracted: str | None  # what the other grader took for the answer, where it tells

    @property
    def reason(self) -> str:
        """Why the two differ, as far as the completion shows it."""
        return explain(self)


def lm_eval_extract(text: str, strict: bool) -> str:
    """What lm-eval's GSM8K task takes for the answer; "[invalid]" when it finds none."""
    matches = (STRICT if strict else FLEXIBLE).findall(text)
    if not matches:
        return "[invalid]"
    last = matches[0] if strict else next((group for group in matches[-1] if group), "[invalid]")
    return last.strip()


def lm_eval_match(extracted: str, reference: str) -> bool:
    """Whether lm-eval calls the extracted answer an exact match of the reference."""
    one, other = extracted, reference
    for pattern in _IGNORED:
        one, other = pattern.sub("", one), pattern.sub("", other)
    return one.lower() == other.lower()


def math_verify(text: str, reference: str) -> bool:
    """math-verify over the whole completion, as its README has it, with its own time limit of 5 seconds."""
    from math_verify import parse, verify

    gold = parse(f"${reference}$") or parse(reference)
    return bool(verify(gold, parse(text)))


def explain(graded: Graded) -> str:
    """Why our verdict and the other grader's differ; UNEXPLAINED when no known reason fits."""
    text, ours = graded.text, graded.ours
    boxed = extract_boxed(text)
    if graded.theirs and not ours.correct:
        if ours.how == "no_answer" and re.search(r"\\(?:boxed|fbox)\s*\{", text):
            return "the last box is empty or never closed; the other grader takes what is elsewhere"
        if ours.how == "no_answer":
            return "no box: the other grader takes a number or formula from the running text"
        if ours.how == "unevaluated":
            return "the box holds a sum still to do, which counts as no answer here"
        if ours.how in ("timeout", "crash", "too_long"):
            return f"our grader gave up on the answer ({ours.how})"
        if graded.extracted is not None and boxed is not None and not _within(graded.extracted, boxed):
            return "the other grader took a number from outside the box"
        if graded.grader == "math-verify" and len(re.findall(r"\\boxed", text)) > 1:
            return "several boxes: only the last counts here"
        if graded.extracted is not None and _within(graded.extracted, boxed or ""):
            return "the other grader took one number out of a longer boxed answer"
    elif ours.correct and not graded.theirs:
        if graded.grader == "lm-eval strict":
            return "no '#### answer' line, which lm-eval's strict match needs"
        if graded.extracted is not None and not _within(graded.extracted, boxed or ""):
            return "the last number of the text is not the boxed one"
        if graded.extracted is not None:
            return "the boxed number is written in a way that lm-eval's pattern or exact match does not take"
        if graded.grader == "math-verify" and re.search(r"[=:%]|\\text|\\circ|,", boxed or ""):
            return "the box holds units, an equation or separators that math-verify reads otherwise"
    return UNEXPLAINED


def _within(extracted: str, boxed: str) -> bool:
    digits = extracted.strip("$.,")
    return bool(digits) and digits in boxed.replace("{,}", ",")


# ---- what is checked


def check_run(folder: str, sample: int, seed: int) -> list[Graded]:
    """A seeded sample of a run's distinct completions, graded by all graders that apply."""
    collection = collect([folder])
    rows = []
    for method in collection.methods:
        for seed_rows in method.rows.values():
            for benchmark, problems in seed_rows.items():
                for key, samples in problems.items():
                    if collection.problems[benchmark][key].get("golds"):
                        continue  # the other graders know one right answer
                    reference = collection.problems[benchmark][key]["answer"]
                    rows += [(benchmark, row, reference) for row in samples.values()]
    distinct = list({(row["text"], reference): (b, row, reference) for b, row, reference in rows}.values())
    random.Random(seed).shuffle(distinct)
    graded = []
    for benchmark, row, reference in distinct[:sample]:
        verdict = Verdict(row["correct"], row["answer"], row["how"])
        graded += _grade(row["text"], reference, verdict, collection.forms.get(benchmark, "expression"))
    return graded


def _grade(text: str, reference: str, ours: Verdict, form: str) -> list[Graded]:
    others = [Graded("math-verify", text, reference, ours, math_verify(text, reference), None)]
    if form != "expression":
        for name in ("flexible", "strict"):
            extracted = lm_eval_extract(text, name == "strict")
            match = lm_eval_match(extracted, reference)
            others.append(Graded(f"lm-eval {name}", text, reference, ours, match, extracted))
    return others


def check_samples(path: str, sample: int, seed: int) -> list[Graded]:
    """lm-eval's own verdicts on its own completions, from a file of `--log_samples`."""

    def read(row: Any) -> tuple[str, str, str, bool, str]:
        name = {"flexible-extract": "flexible", "strict-match": "strict"}.get(row["filter"], row["filter"])
        text, extracted = str(row["resps"][0][0]), str(row["filtered_resps"][0])
        return f"lm-eval {name}", text, str(row["target"]), bool(row["exact_match"]), extracted

    rows = _read(path, read, "not what lm-eval writes with --log_samples for a task with exact_match")
    random.Random(seed).shuffle(rows)
    rows = rows[:sample]
    references = [target.rpartition("#### ")[2].strip().replace(",", "") for _, _, target, _, _ in rows]
    with MathGrader() as grader:
        verdicts = grader.check([text for _, text, _, _, _ in rows], references)
    return [
        Graded(grader, text, reference, verdict, theirs, extracted)
        for (grader, text, _, theirs, extracted), reference, verdict in zip(
            rows, references, verdicts, strict=True
        )
    ]


def _read(path: str, read: Callable[[Any], T], expected: str) -> list[T]:
    """What `read` makes of each line's JSON value."""
    rows = []
    for number, row in enumerate(json_lines(Path(path)), 1):
        try:
            if row is not None:
                rows.append(read(row))
        except (KeyError, IndexError, TypeError) as error:
            raise SteerError(
                f"{path}, line {number}: {expected} ({type(error).__name__}: {error})"
            ) from error
    return rows


def agreement(path: str) -> tuple[int, list[tuple[str, str, Verdict]]]:
    """The grader against a file of labelled pairs.

    Returns:
        the number of pairs, and gold, answer and verdict of every pair that the label contradicts.
    """

    def read(row: Any) -> tuple[str, str, bool]:
        if not isinstance(row["correct"], bool):
            raise TypeError("'correct' must be true or false")
        return str(row["gold"]), str(row["answer"]), row["correct"]

    rows = _read(path, read, 'expected {"gold": ..., "answer": ..., "correct": true or false}')
    with MathGrader() as grader:
        verdicts = grader.check(
            [f"\\boxed{{{answer}}}" for _, answer, _ in rows], [gold for gold, _, _ in rows]
        )
    pairs = zip(rows, verdicts, strict=True)
    return len(rows), [(gold, answer, v) for (gold, answer, correct), v in pairs if v.correct != correct]


def _is_labelled(path: Path) -> bool:
    first = next(json_lines(path), None) if path.is_file() else None
    return isinstance(first, dict) and first.keys() >= {"gold", "answer", "correct"}


def _print_agreement(path: str) -> int:
    count, disagreements = agreement(path)
    for gold, answer, verdict in disagreements:
        ours = "right" if verdict.correct else "wrong"
        print(f"  {ours} here ({verdict.how}), not by the label: answer {answer!r} for {gold!r}")
    share = 1 - len(disagreements) / count
    print(f"the same verdict on {count - len(disagreements)} of {count} labelled answers ({share:.1%})")
    return int(share < 0.98)


def summary(graded: Sequence[Graded], shown: int) -> tuple[str, int]:
    """The report as text, and how many differences have no explanation."""
    lines, unexplained = [], 0
    for grader in dict.fromkeys(g.grader for g in graded):
        of = [g for g in graded if g.grader == grader]
        differ = [g for g in of if g.theirs != g.ours.correct]
        right = sum(g.ours.correct for g in of), sum(g.theirs for g in of)
        lines.append(
            f"{grader}: {len(of)} completions, the same verdict on {len(of) - len(differ)} "
            f"({1 - len(differ) / len(of):.1%}); right by us {right[0]}, by {grader} {right[1]}"
        )
        reasons = Counter((g.theirs, g.reason) for g in differ)
        for (theirs, reason), count in reasons.most_common():
            unexplained += count * (reason == UNEXPLAINED)
            lines.append(
                f"  {count:5}  {'wrong here, right there' if theirs else 'right here, wrong there'}: {reason}"
            )
            for g in [g for g in differ if (g.theirs, g.reason) == (theirs, reason)][:shown]:
                tail = " ".join(g.text.split())[-100:]
                took = f", took {g.extracted!r}" if g.extracted is not None else ""
                lines.append(
                    f"           reference {g.reference!r}, we took {g.ours.answer!r}{took}: …{tail!r}"
                )
    return "\n".join(lines), unexplained


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="steer grading-check",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument(
        "source",
        help="a folder that `steer eval` wrote, or a .jsonl of lm-eval's samples or of labels",
    )
    parser.add_argument(
        "--sample", type=int, default=300, help="most completions graded again (default: 300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of completions (default: 0)")
    parser.add_argument(
        "--shown", type=int, default=2, help="examples of each kind of difference (default: 2)"
    )
    args = parser.parse_args(argv)
    try:
        if _is_labelled(Path(args.source)):
            return _print_agreement(args.source)
        check: Any = check_samples if Path(args.source).is_file() else check_run
        graded = check(args.source, args.sample, args.seed)
        if not graded:
            raise SteerError(f"{args.source} holds no completions")
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text, unexplained = summary(graded, args.shown)
    print(text)
    print(
        f"{unexplained} differences without an explanation"
        if unexplained
        else "every difference is explained"
    )
    return int(unexplained > 0)

"""How much faster the answer grader grades than plain math-verify calls do, on generated answers.

python -m evals.speed_rewards --answers 1000 --numbers 0.9
"""

from __future__ import annotations

import argparse
import random
import time

from math_verify import parse, verify

from steer.tasks.grading import MathGrader


def make_answers(count: int, numbers: float, seed: int) -> tuple[list[str], list[str]]:
    """Completions and their references, about half of them right; a share `numbers` are plain numbers."""
    rng = random.Random(seed)
    completions, golds = [], []
    for _ in range(count):
        a, b, off = rng.randint(2, 9999), rng.randint(2, 9999), rng.randint(0, 1)
        if rng.random() < numbers:
            gold, answer = str(a), f"{a + off:,}"
        else:
            gold, answer = f"{a}x^2 + \\sqrt{{{b}}}", f"\\sqrt{{{b}}} + {a + off} x^2"
        golds.append(gold)
        completions.append(f"Adding up gives $\\boxed{{{answer}}}$.")
    return completions, golds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=1000, help="answers to grade (default: %(default)s)")
    parser.add_argument(
        "--numbers", type=float, default=0.9, help="share of plain numbers (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="checker processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the answers (default: %(default)s)")
    args = parser.parse_args()
    completions, golds = make_answers(args.answers, args.numbers, args.seed)
    verify(parse("$x+1$"), parse("$1+x$"))  # both sides start warm
    with MathGrader(workers=args.workers) as grader:
        grader.check([r"\boxed{x+1}"], ["1+x"])
        start = time.perf_counter()
        verdicts = [v.correct for v in grader.check(completions, golds)]
        ours = time.perf_counter() - start
    start = time.perf_counter()
    plain = [verify(parse(f"${g}$"), parse(c)) for c, g in zip(completions, golds, strict=True)]
    theirs = time.perf_counter() - start
    agree = sum(a == b for a, b in zip(verdicts, plain, strict=True))
    print(f"checker      {ours:8.3f} s  {sum(verdicts)} of {len(verdicts)} right")
    print(f"math-verify  {theirs:8.3f} s  {sum(plain)} of {len(plain)} right")
    print(f"ratio        {theirs / ours:8.1f}    agreeing on {agree} of {len(plain)}")


if __name__ == "__main__":
    main()

"""
What works on which architecture: `docs/models.md`, from the checks of `evals.model_checks` on a tiny random
model of every decoder-only architecture in the installed transformers.

    python -m evals.models_table --out docs/models.md
    python -m evals.models_table llama mamba gpt2             # some of them, on the terminal
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from multiprocessing import get_context
from pathlib import Path

import transformers
from pebble import ProcessExpired, ProcessPool

from evals.architectures import causal_lm_types
from evals.model_checks import CHECKS, STATES, Outcome, check

# A model takes about five seconds; one that takes a hundred times as long hangs.
SECONDS = 500
# A process serves this many models before a fresh one takes over, so that memory does not grow.
MODELS_PER_PROCESS = 10

Table = dict[str, dict[str, Outcome]]


def _quiet() -> None:
    """In each process of the pool: one thread, and no warnings about models that are tiny on purpose."""
    import torch

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def check_all(names: Sequence[str], processes: int) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """What `check` finds for each model type, in the order given; a process that dies or hangs is a crash."""
    context = get_context("spawn")
    with ProcessPool(processes, MODELS_PER_PROCESS, _quiet, context=context) as pool:
        futures: list[Future] = [pool.schedule(check, args=[name], timeout=SECONDS) for name in names]
        for name, future in zip(names, futures, strict=True):
            try:
                yield name, future.result()
            except TimeoutError:
                yield name, dict.fromkeys(CHECKS, Outcome("crash", f"no answer within {SECONDS} s"))
            except ProcessExpired as error:
                yield name, dict.fromkeys(CHECKS, Outcome("crash", f"its process died: {error}"))


def page(table: Table) -> str:
    """The table as Markdown, with a numbered note for each reason."""
    notes: dict[str, int] = {}

    def cell(outcome: Outcome) -> str:
        if not outcome.why:
            return outcome.state
        return f"{outcome.state} [{notes.setdefault(_reason(outcome), len(notes) + 1)}]"

    rows = [f"| {name} | " + " | ".join(map(cell, found.values())) + " |" for name, found in table.items()]
    counts = Counter(outcome.state for found in table.values() for outcome in found.values())
    total = ", ".join(f"{counts[state]:,} {state}" for state in STATES)
    lines = [
        INTRODUCTION.format(models=len(table), version=transformers.__version__, total=total),
        "| model type | " + " | ".join(CHECKS) + " |",
        "|---" * (1 + len(CHECKS)) + "|",
        *rows,
        "",
        "## Reasons",
        "",
        *[f"{number}. {reason}" for reason, number in notes.items()],
    ]
    return "\n".join(lines) + "\n"


def _reason(outcome: Outcome) -> str:
    if outcome.state == "crash":
        return f"`{outcome.why.strip().splitlines()[-1]}`"
    return outcome.why


INTRODUCTION = """# Models

What `steer` does on every decoder-only architecture of transformers {version}: {models} model types, each as
a tiny random model (`evals/architectures.py`), each capability compared with a slow and independent
computation (`evals/model_checks.py`). `python -m evals.models_table --out docs/models.md` writes this page.

TODO

Cells: {total}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; default: all")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    table: Table = {}
    for name, found in check_all(args.names or causal_lm_types(), args.processes):
        table[name] = found
        bad = {check: o for check, o in found.items() if o.state in ("wrong", "crash")}
        print(f"{name}: {dict(Counter(o.state for o in found.values()))}", file=sys.stderr, flush=True)
        for check_name, outcome in bad.items():
            print(f"  {check_name}: {outcome.state}: {outcome.why}", file=sys.stderr, flush=True)
    if args.out:
        args.out.write_text(page(table))
    else:
        print(page(table))
    return int(any(o.state in ("wrong", "crash") for found in table.values() for o in found.values()))


if __name__ == "__main__":
    sys.exit(main())

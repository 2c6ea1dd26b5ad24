"""
Do a few vectors give what full fine-tuning gives? Train and measure both, other methods and the controls, and
write tables, plots and a page.

    steer compare --config compare-tiny
    steer compare --config compare-tiny --report

Each run of training is a process of its own, started by `accelerate launch`, and is scored on held-out
problems by `steer eval`. Learning rates are chosen once for each method, on problems split off the
training set. Whatever was finished is one small file under OUT/runs or OUT/sweeps and is not done again, on
this machine or another; a run that was stopped goes on where it was; one that fails is told of at the end and
holds up no other. Seeds are outermost: after a part of the time there is one seed of everything; the seeds of
a method with `together: true` are trained in one process. `--report` only makes the tables and the page of
what is there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steer.arguments import Help
from steer.errors import SteerError, one_line, print_any_text, shown
from steer.evaluation.plan import read_plan
from steer.training.comparison import Comparison, Failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="steer compare",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--config", required=True, help="YAML file, or the name of one of steer's")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds alone (default: the config's)")
    parser.add_argument(
        "--methods", nargs="+", help="train these methods alone, so that several processes share the work"
    )
    parser.add_argument("--out", help="folder of results (default: the config's)")
    parser.add_argument("--report", action="store_true", help="only make tables and page of what is there")
    args = parser.parse_args(argv)
    print_any_text()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process that runs is ended too
    try:
        plan = read_plan(args.config)
        # rates are chosen with the seed of the whole plan, whichever seeds are trained now
        sweep = {**plan.sweep, "seed": plan.sweep_seed}
        plan = replace(plan, seeds=tuple(args.seeds or plan.seeds), sweep=sweep, out=args.out or plan.out)
        if unknown := sorted(set(args.methods or []) - set(plan.methods)):
            known = ", ".join(plan.methods)
            raise SteerError(f"no method {', '.join(unknown)} in {args.config}: it has {known}")
        comparison = Comparison(plan)
        _make_folder(plan.out)
        failed = [] if args.report else _carry_out(comparison, args.methods)
        comparison.report()
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    for job, reason in failed:
        print(f"failed: {job}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _make_folder(out: str) -> None:
    """Make the folder of results, before the work of hours; SteerError where it cannot be written."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SteerError(f"cannot write to {shown(out)}: {one_line(error)}; give another --out") from error


def _carry_out(comparison: Comparison, methods: Sequence[str] | None) -> list[tuple[str, str]]:
    """Every job in turn, or those of `methods`; what failed, with the reason."""
    jobs = [job for job in comparison.jobs() if methods is None or job[0].rpartition("-")[0] in methods]
    failed = []
    for number, (name, job) in enumerate(jobs, 1):
        print(f"\n[{number} of {len(jobs)}] {name}, {time.strftime('%H:%M:%S')}", flush=True)
        try:
            job()
        except (Failed, OSError) as error:
            failed.append((name, str(error)))
            print(f"{name} failed ({error}); going on with the others", file=sys.stderr, flush=True)
    return failed

"""How a command of `steer lens` shows its result: a figure where asked, then JSON or lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from steer.lens.results import Result
from steer.outputs import output


def show(args: argparse.Namespace, result: Result, lines: Iterator[str]) -> None:
    """Write the figure to `args.plot` where given; print `result` as JSON with `args.json`, else `lines`."""
    if args.plot:
        with output(args.plot, args.replace, option="--plot"):
            print(f"figure: {result.plot(args.plot)}", file=sys.stderr)
    if args.json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        print("\n".join(lines))

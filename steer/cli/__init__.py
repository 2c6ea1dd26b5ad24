"""The `steer` command: train vectors, measure them, look into them, and carry them elsewhere."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings

from steer.cli import calibrate, convert, extract, generate, info, lens, pack, play, programs, sae, serve
from steer.errors import SteerError, one_line, print_any_text
from steer.threads import prepare_environment

ABOUT = """\
Train, move, serve and understand steering vectors.

    steer train --config demo                                    # minutes on two CPU cores
    steer info runs/demo/vectors
    steer generate smollm2-135m-instruct --vectors runs/demo/vectors --prompt "What is 7 + 5?"
    steer eval --model smollm2-135m-instruct --vectors runs/demo/vectors \\
        --benchmarks arithmetic:operators=+*:digits=1:heldout=0.4:problems=75 --out runs/eval-demo
    steer compare runs/eval-demo --out runs/page
    steer export runs/demo/vectors --to gguf
"""


def main(argv: list[str] | None = None) -> int:
    """
    Run one command; returns its exit code. A user's mistake is one line on standard error and code 1 (2 where
    the command line itself cannot be read).
    """
    print_any_text()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    prepare_environment()
    warnings.showwarning = _one_line
    words = list(sys.argv[1:] if argv is None else argv)
    program = programs.find(words)
    parser = _parser()
    args = argparse.Namespace() if program else _arguments(parser, words)
    try:
        if program:
            run, rest = program
            return run(rest) or 0
        logging.basicConfig(format="%(message)s")  # to standard error
        logging.getLogger("steer").setLevel(logging.INFO)
        args.run(args)
    except SteerError as error:
        print(f"error: {error if program else _with_options(str(error), parser, args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough: `steer info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # what the operating system refuses: too long a name, a full disk, no permission
        if program:  # hours of work may have come before: all that is known of the place helps
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _arguments(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    args, more = parser.parse_known_args(words)
    if more and "more" not in args:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.more = more
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steer",
        description=ABOUT,
        epilog="steer COMMAND --help explains a command, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, text) in programs.PROGRAMS.items():
        if " " not in name:
            commands.add_parser(name, help=text)  # listed here; `programs.find` runs it
    for module in (info, generate, play, extract, calibrate, convert, pack, serve, lens, sae):
        module.add_commands(commands)
    return parser


def _with_options(message: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """`message` with Python arguments, such as block_0='drop', as options of the command: --block-0 drop."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                message = _with_options(message, command, args)
        elif parser.get_default("run") is args.run and action.option_strings:
            option = action.option_strings[0]
            message = re.sub(rf"\b{action.dest}=True\b", option, message)
            message = re.sub(rf"\b{action.dest}='([^']*)'", rf"{option} \1", message)
    return message


def _one_line(message: Warning | str, *args: object, **kwargs: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

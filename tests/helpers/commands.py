"""The commands of `steer`, found in its argument parsers: those of new commands too."""

from __future__ import annotations

import argparse
import importlib
import runpy
from collections.abc import Iterator
from functools import cache
from typing import NoReturn
from unittest.mock import patch

from helpers.paths import ROOT

from steer.cli.programs import PROGRAMS


class Found(BaseException):
    """Carries a program's parser out of its `main`."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def _stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> NoReturn:
    raise Found(self)


@cache
def parser(program: str) -> argparse.ArgumentParser:
    """The parser of `steer`, of a module (`python -m NAME`) or of a script, as the program builds it."""
    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", _stop),
        patch("steer.threads.prepare_environment"),
        patch("steer.cli.prepare_environment"),
        patch("warnings.showwarning"),
        patch("sys.argv", [program]),
    ):
        try:
            if program.split()[0] == "steer":
                importlib.import_module("steer.cli").main(program.split()[1:])
            elif program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        except Found as found:
            return found.parser
    raise AssertionError(f"{program} read no command line")


def every_command() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The words of each command, such as ("lens", "logit"), and its parser; `steer compare` in both forms."""
    for words, found in _leaves(parser("steer"), ()):
        name = " ".join(words)
        if name not in PROGRAMS:
            yield words, found
    for name in PROGRAMS:
        yield tuple(name.split()), parser(f"steer {name}")
    yield ("compare", "--config"), parser("steer compare --config x")


def _leaves(
    found: argparse.ArgumentParser, words: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    groups = [action for action in found._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words, found
    for group in groups:
        for name, command in group.choices.items():
            yield from _leaves(command, (*words, name))

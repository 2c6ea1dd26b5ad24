"""Types of command-line arguments: what cannot work is refused while the command line is read."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any


class Help(argparse.RawDescriptionHelpFormatter):
    """
    Help with the default of every option that takes a value, unless its text names one already. Descriptions
    and examples with line breaks or an indent are kept as they are, others are wrapped. '%' formats nothing.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text or text.startswith(" "):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.help or action.help is argparse.SUPPRESS:
            return action.help
        text = action.help.replace("%%", "%")
        takes_value = action.option_strings and action.nargs != 0 and not action.required
        if takes_value:
            text = with_default(text, action.default)
        return text.replace("%", "%%")


def with_default(text: str, value: Any) -> str:
    """The help text of a setting with its default, unless it names one itself."""
    return text if re.search(r"\bdefault:", text) else f"{text} (default: {shown_default(value)})"


def shown_default(value: Any) -> str:
    """A default as written on the command line; "not set" for None, and for an empty text or list."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == "" or value == []:
        return "not set"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


def whole(text: str, least: int = 0) -> int:
    """A whole number from 0."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1."""
    return whole(text, 1)


def text(given: str) -> str:
    """Text that a tokenizer reads: bytes that are not UTF-8 arrive as half surrogate pairs."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{given!r} is not text in UTF-8") from error
    return given


# A factor on vectors, here and in expressions: without a plus, which stands between the terms there.
SCALE = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]-?[0-9]+)?"
_VECTORS = re.compile(rf"((?P<name>[A-Za-z0-9][\w.-]*)=)?(?P<artifact>.*?)(@(?P<scale>{SCALE}))?", re.DOTALL)


def named_vectors(text: str) -> tuple[str, str, float]:
    """`[NAME=]ARTIFACT[@SCALE]` as name, artifact and scale; the name is that of the artifact's folder."""
    match = _VECTORS.fullmatch(text)
    assert match, text
    source = match["artifact"]
    return match["name"] or Path(source).name, source, float(match["scale"] or 1.0)


def add_base_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of loading a base model to a parser or a group of one."""
    parser.add_argument("--revision", help="revision of a hub model: branch, tag or commit (default: main)")
    add_trust(parser)
    parser.add_argument(
        "--base-adapter",
        type=text,
        metavar="DIR",
        help="folder of a LoRA of peft that is merged into the base model first",
    )


def add_trust(parser: argparse._ActionsContainer) -> None:
    """Add `--trust-remote-code` to a parser or a group of one."""
    parser.add_argument(
        "--trust-remote-code",
        "--trust_remote_code",  # as `steer train` spells it
        action="store_true",
        help="run the Python code that comes with a model (default: refuse such a model)",
    )


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def at_least(least: float) -> Callable[[str], float]:
    """A finite number, not below `least`."""

    def read(text: str) -> float:
        number = finite(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g}")
        return number

    return read


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that change how vectors are asked from how they were trained (`choose_prompt`)."""
    parser.add_argument("--template", help="prompt template; default: the one the vectors were trained with")
    parser.add_argument(
        "--prefix", type=text, help="forced opening of the answer, e.g. To; default: as in training"
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="variables of the chat template, e.g. '{\"enable_thinking\": false}'; default: as in training",
    )


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, such as '{"enable_thinking": false}'."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object; expected '{{\"name\": value}}'")
    return value

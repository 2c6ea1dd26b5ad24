"""
The one exception that a user's mistake raises: a single line that says what was given, what was
expected, and how to fix it.
"""

from __future__ import annotations

import io
import sys
from reprlib import Repr

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 160


class SteerError(ValueError):
    """Bad input to `steer`. The message is one line and names the fix."""


def shown(value: object) -> str:
    """A value of whatever a file held, fit for a message: one line of plain text, cut where it is long."""
    return _REPR.repr(value)


def one_line(error: Exception) -> str:
    """Somebody else's error as part of a message: its words on one line, cut where they are long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def print_any_text() -> None:
    """
    Let `print` show what the terminal's encoding lacks as an escape, instead of failing: a path in other
    letters on an ASCII terminal, a file name that is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

"""A small neutral text in plain English, written for this package: what side effects are measured on."""

from __future__ import annotations

from pathlib import Path

_FILE = Path(__file__).with_name("neutral_text.txt")


def prose() -> list[str]:
    """The paragraphs of the text."""
    return [part.strip() for part in _FILE.read_text(encoding="utf-8").split("\n\n") if part.strip()]

"""Texts for an SAE to read: lines of files and rows of data sets on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from steer.errors import SteerError, one_line
from steer.files import json_lines, text_lines

# The fields of a record that make its text, joined by a blank line: the first group of which all but the last
# field is present.
FIELDS = (("text",), ("problem", "solution"), ("question", "answer"), ("problem", "answer"))


class Texts:
    """
    The texts of `sources`, one of each in turn until all are read, as often as it is iterated over.

    A source is a `.txt` file (a text a line), a `.jsonl` file, or a data set on the hub (`owner/name`, or
    `owner/name:split`, or `owner/name:config:split`; streamed). Records hold `text`, or `problem` and
    `solution`, or `question` and `answer`. Raises SteerError for a file that is not there or cannot be read
    so.
    """

    def __init__(self, sources: Sequence[str]):
        if not sources:
            raise SteerError("no texts were given; name .txt or .jsonl files, or a data set on the hub")
        self.sources = list(sources)
        for source in self.sources:
            if _is_file(source) and not Path(source).is_file():
                raise SteerError(f"no file {source!r}; give an existing .txt or .jsonl file")
            if not _is_file(source) and "/" not in source:
                raise SteerError(
                    f"unknown texts {source!r}; expected a .txt or .jsonl file or a hub data set owner/name"
                )

    @cached_property
    def checksums(self) -> dict[str, str]:
        """By local file: the SHA-256 of its content when it was first asked for, cut to 16 digits."""
        found = {}
        for source in filter(_is_file, self.sources):
            try:
                with Path(source).open("rb") as file:
                    found[source] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            except OSError as error:
                raise SteerError(f"cannot read {source!r}: {one_line(error)}") from error
        return found

    def __iter__(self) -> Iterator[str]:
        left = [_lines(Path(source)) if _is_file(source) else _from_hub(source) for source in self.sources]
        while left:
            for source in list(left):
                text = next(source, None)
                if text is None:
                    left.remove(source)
                else:
                    yield text


def _is_file(source: str) -> bool:
    return Path(source).suffix in (".txt", ".jsonl")


def _lines(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        yield from (line for line in text_lines(path) if line.strip())
        return
    for number, record in enumerate(json_lines(path), 1):
        if record is not None:
            yield text_of(record, f"{path.name}, line {number}")


def _from_hub(source: str) -> Iterator[str]:
    import datasets

    name, *parts = source.split(":")
    config, split = (parts[0], parts[1]) if len(parts) > 1 else (None, parts[0] if parts else "train")
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield text_of(row, f"{source}, row {number}")
    except SteerError:
        raise
    except Exception as error:  # offline, unknown, gated: mended in the same way
        reason = " ".join(str(error).split())[:200]
        raise SteerError(
            f"cannot stream {source!r} from the hub ({type(error).__name__}: {reason}); check the name and "
            "the network, or give a local .jsonl or .txt file"
        ) from error


def text_of(record: object, where: str) -> str:
    """The text of one record; SteerError names `where` it is and what it has."""
    if isinstance(record, dict):
        for fields in FIELDS:
            values = [record.get(name) for name in fields]
            if isinstance(values[0], str) and (len(fields) == 1 or values[-1] is not None):
                return "\n\n".join(str(part) for part in values)
    seen = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    raise SteerError(f"{where}: no text in {seen}; expected 'text', or 'problem' with 'solution' or 'answer'")

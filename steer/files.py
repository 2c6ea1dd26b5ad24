"""
Files that are whole or not there, written beside their target and renamed over it; folders that one process
at a time writes to; and JSON that means one thing.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from steer.errors import SteerError, one_line, shown

# In a folder that a process holds: what the operating system locks, and who the process is.
LOCK_FILE, HOLDER_FILE = ".lock", ".held-by"

# Deeper JSON is nobody's config, and some parsers and printers of it recurse.
MAX_NESTING = 200


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, flush it to the disk, and rename it over `path`."""
    replace_files({path: content})


def replace_files(contents: dict[Path, bytes]) -> None:
    """The same for several: none is renamed before all are on the disk, so a full disk changes none."""
    written: dict[str, Path] = {}
    try:
        for path, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written[temporary] = path
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        for temporary, path in written.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def held(folder: str | os.PathLike[str], option: str) -> Iterator[None]:
    """
    Inside, no other process holds `folder`, which is made where it is not there. The operating system lets go
    of it when the process ends, however it ends.

    Args:
        folder: the folder of a run, for the main process of the run alone: the others share its hold.
        option: the option that names another folder, for the message, such as "--output_dir".

    Raises:
        SteerError: another process holds it (named by its number and its host), or it cannot be written.
    """
    path = Path(folder)
    lock, holder = FileLock(path / LOCK_FILE), path / HOLDER_FILE
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        replace_file(holder, f"process {os.getpid()} on {platform.node()}".encode())
    except Timeout as error:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise SteerError(
            f"{path} is in use: {who} writes to it; wait until that ends or stop it, or give another {option}"
        ) from error
    except OSError as error:
        raise SteerError(f"cannot write to {path}: {error.strerror}; give another {option}") from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


class JsonNumber(str):
    """A number of JSON as it is written there."""

    def number(self) -> int | float | str:
        """Its value; the text itself where Python has no such number."""
        try:
            return float(self) if set(self) & set(".eE") else int(self)
        except ValueError:  # thousands of digits
            return str(self)


def parse_json(text: str | bytes, where: str | os.PathLike[str], literal_numbers: bool = False) -> Any:
    """
    The JSON value in `text`.

    Args:
        text: the whole of one JSON value.
        where: where it came from, for the message: a file, or a file and a line.
        literal_numbers: give numbers as `JsonNumber`, strings as they are in `text`, and refuse NaN and
            Infinity, which are none. As floats 0.10 would become 0.1 and 1e-7 would become 1e-07.

    Raises:
        SteerError: no JSON; a key that is there twice, which could mean two things; half a surrogate pair,
            which can be neither shown nor saved; more than `MAX_NESTING` levels.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"the key {shown(name)} is there twice")
            values[name] = value
        return values

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number in JSON")

    numbers: dict[str, Any] = {}
    if literal_numbers:
        numbers = {"parse_int": JsonNumber, "parse_float": JsonNumber, "parse_constant": refuse}
    try:
        values = json.loads(text, object_pairs_hook=once, **numbers)
        _check_nesting(values)
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair
    except (ValueError, RecursionError) as error:  # no JSON, too long a number, too deep a nesting
        raise SteerError(f"{where} is not JSON ({one_line(error)}); was it cut short or altered?") from error
    return values


def json_object(text: str | bytes, where: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in `text`, from `where`; SteerError as `parse_json`, and for another type of value."""
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise SteerError(f"{where} is a JSON {type(values).__name__}, expected an object")
    return values


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; SteerError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise SteerError(f"cannot read {str(path)!r}: {one_line(error)}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in a file; SteerError as `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file in UTF-8, read one after the other; SteerError when it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SteerError(f"cannot read {str(path)!r}: {one_line(error)}") from error


def json_lines(path: Path, literal_numbers: bool = False) -> Iterator[Any]:
    """
    The JSON value of each line of a file, None for an empty line, so that the n-th value is that of line n.

    Args:
        path: a file of one JSON value a line.
        literal_numbers: give numbers as strings, written as they are: see `parse_json`.

    Raises:
        SteerError: names the file and the line that cannot be read.
    """
    for number, line in enumerate(text_lines(path), 1):
        yield parse_json(line, f"{path.name}, line {number}", literal_numbers) if line.strip() else None


def _check_nesting(values: Any) -> None:
    level = [values]
    for _ in range(MAX_NESTING):
        nested = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))]
        level = [value for inner in nested for value in inner]
    if level:
        raise ValueError(f"it is nested more than {MAX_NESTING} deep")


def safetensors_header(content: bytes, where: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a safetensors file that its library has accepted."""
    return json_object(content[8 : 8 + int.from_bytes(content[:8], "little")], f"{where}: the header")


def with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """
    The safetensors file `content` with `metadata` in its header, always in the same order: its library writes
    more than one entry in random order, so that equal vectors would make unequal files.
    """
    header = {"__metadata__": metadata, **safetensors_header(content, "safetensors")}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]

"""
Files that are whole or not there, written beside their target and renamed over it; and JSON that means one
thing.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from steer.errors import SteerError, shown

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


def json_object(text: str | bytes, where: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The JSON object in `text`, which came from `where`. SteerError when it is not one, and when it names a key
    twice, which could mean two things.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"the key {name!r} is there twice")
            values[name] = value
        return values

    try:
        values = json.loads(text, object_pairs_hook=once)
        _check_nesting(values)
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair cannot be shown or saved
    except (ValueError, RecursionError) as error:  # not JSON, too long a number, too deep a nesting
        reason = shown(str(error))
        raise SteerError(f"{where} is not JSON ({reason}); was it cut short or altered?") from error
    if not isinstance(values, dict):
        raise SteerError(f"{where} is a JSON {type(values).__name__}, expected an object")
    return values


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

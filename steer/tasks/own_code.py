"""
Functions of the user's own that a setting names, as `file.py:function` or `package.module:function`: rewards
and tools.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from steer.errors import SteerError, one_line

FORM = "file.py:function or package.module:function"


def own_function(kind: str, name: str) -> Callable[..., Any]:
    """
    The function, or class, that `name` names.

    Args:
        kind: what it is used as, for errors: reward, tool.
        name: as in `FORM`.

    Raises:
        SteerError: a file, module or function that does not exist, that cannot be imported or called.
    """
    attribute = name.rpartition(":")[2]
    module = _module(kind, name)
    if not hasattr(module, attribute):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, there, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(there[:10]) or 'none'}"
        raise SteerError(f"{kind} {name!r}: no function {attribute!r} there{hint}")
    made = getattr(module, attribute)
    if not callable(made):
        raise SteerError(f"{kind} {name!r} is a {type(made).__name__}, which cannot be called")
    return made


def source_checksums(kind: str, names: Sequence[str]) -> dict[str, str]:
    """Of each name that is the user's own, 16 hex digits of the text of its file: edited, it is another."""
    checksums = {}
    for name in names:
        if ":" in name:
            file = _file(_module(kind, name))
            checksums[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file else "no file"
    return checksums


def _module(kind: str, name: str) -> ModuleType:
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return _from_file(kind, name, Path(place).expanduser())
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", place):
        raise SteerError(f"{kind} {name!r} names no file and no module; write {FORM}")
    _find_in(os.getcwd())
    try:
        return importlib.import_module(place)
    except Exception as error:  # whatever the user's module raises
        raise SteerError(
            f"{kind} {name!r}: cannot import {place} ({type(error).__name__}: {one_line(error)}); install "
            "it, start in the folder that holds it, or write file.py:function"
        ) from error


def _from_file(kind: str, name: str, path: Path) -> ModuleType:
    """
    The module in `path`, under the name of the file: processes that its author starts find it by that name,
    as its folder is on their search path.
    """
    if not path.is_file():
        raise SteerError(f"{kind} {name!r}: no file {str(path)!r} (from {os.getcwd()}); correct the path")
    file = path.resolve()
    if (known := sys.modules.get(file.stem)) is None:
        _find_in(str(file.parent))
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(file.stem) if "." not in file.stem else None
        there = spec.origin if spec else None
    else:
        there = getattr(known, "__file__", None)
    if there is None or Path(there).resolve() != file:
        raise SteerError(
            f"{kind} {name!r}: another module is called {file.stem!r} ({there or 'built in'}); rename the "
            "file"
        )
    try:
        return importlib.import_module(file.stem)
    except Exception as error:
        sys.modules.pop(file.stem, None)
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise SteerError(
            f"{kind} {name!r}: {path}{line} cannot be imported ({type(error).__name__}: {one_line(error)})"
        ) from error


def _find_in(folder: str) -> None:
    # At the end: nothing there takes the place of an installed module.
    if folder not in sys.path:
        sys.path.append(folder)


def _file(module: ModuleType) -> Path | None:
    path = getattr(module, "__file__", None)
    return Path(path) if path and Path(path).is_file() else None

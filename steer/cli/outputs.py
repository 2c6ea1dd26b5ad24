"""Output paths of commands: parents are made, what exists is replaced as a whole, with `--force` only."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer.errors import SteerError

# Folders that steer writes hold one of these; `--force` deletes no others.
_MARKS = ("steering_config.json", "adapter_config.json", "config.json", "cfg.json")


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option `--force` of a command that writes to `--out`."""
    parser.add_argument("--force", dest="replace", action="store_true", help="replace an output that exists")


@contextmanager
def output(
    path: str | os.PathLike[str], replace: bool, source: str | os.PathLike[str], option: str = "--out"
) -> Iterator[Path]:
    """
    Inside, the output `path` may be written: a file, or a folder that is then new. When the block raises,
    what was there before is there again.

    Args:
        path: The file or folder to write.
        replace: Whether it may exist.
        source: What the command reads, which it must not replace.
        option: The option that names it, for the message.

    Raises:
        SteerError: It exists and `replace` is false, or it is the source or a folder of something
            else; its parents cannot be made.
    """
    path = Path(path)
    if path.exists() and path.resolve() == Path(source).resolve():
        raise SteerError(f"{path} is what the command reads; give another {option}")
    used = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if used and not replace:
        raise SteerError(f"{path} exists already: give another {option}, or --force to replace it")
    if path.is_dir() and used and not any((path / mark).is_file() for mark in _MARKS):
        raise SteerError(f"{path} is a folder of other files, which --force keeps; give a new {option}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerError(f"cannot write {path}: {error.strerror}") from error
    if not (used and path.is_dir()):  # files are written beside their target and renamed over it
        yield path
        return
    before = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) / path.name
    os.replace(path, before)
    try:
        yield path
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(before, path)
        raise
    finally:
        shutil.rmtree(before.parent, ignore_errors=True)

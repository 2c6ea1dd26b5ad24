"""Output paths of commands: parents are made, what exists is replaced as a whole, with `--force` only."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer.errors import SteerError

CHECKPOINT_MARK = "steer_export.json"  # what tells a checkpoint that `steer export` wrote from any other
# Folders that steer writes hold one of these and no folders; `--force` deletes no others.
_MARKS = {
    *("steering_config.json", CHECKPOINT_MARK),
    *("sae_config.json", "cfg.json", "ae.pt"),  # SAEs, in the formats of `steer sae convert`
    *("table.md", "findings.json"),  # `steer compare`, `steer lens report --figures`
}
_OWN_WEIGHTS = {CHECKPOINT_MARK, "sae_config.json"}  # beside these, weights of a model's name are steer's
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model).*\.(safetensors|bin)")
_ADAPTER = "adapter_model.safetensors"  # steer's has its config in the header


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option `--force` of a command that writes a file or a folder."""
    parser.add_argument("--force", dest="replace", action="store_true", help="replace an output that exists")


def check_output(
    path: str | os.PathLike[str],
    replace: bool | None,
    *sources: str | os.PathLike[str] | None,
    option: str = "--out",
    folder: bool = False,
) -> None:
    """
    Refuse an output that cannot be written, before the work that makes it.

    Args:
        path: The file or folder to write.
        replace: Whether it may exist; None for a command without `--force`.
        sources: What the command reads, which it must not replace; hub ids and None are no paths.
        option: The option that names it, for the message.
        folder: Whether a folder is written, and not a file.

    Raises:
        SteerError: It exists and `replace` is false; it is a source or holds one, a folder of something else,
            or a folder where a file is written or the reverse; its parents cannot be made.
    """
    try:
        _check(Path(path), replace, sources, option, folder)
    except SteerError:
        raise
    except (OSError, ValueError) as error:  # too long a name, a zero byte, a surrogate, no permission
        reason = getattr(error, "strerror", None) or error
        raise SteerError(f"cannot write {str(path)!r}: {reason}; give another {option}") from error


def _check(
    path: Path,
    replace: bool | None,
    sources: tuple[str | os.PathLike[str] | None, ...],
    option: str,
    folder: bool,
) -> None:
    if not path.name:
        raise SteerError(f"{str(path)!r} names no {'folder' if folder else 'file'} to write; give {option}")
    os.fsencode(path)
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise SteerError(f"cannot write {path}: {place} is a file, not a folder; give another {option}")
    if not os.access(place, os.W_OK):
        raise SteerError(f"cannot write {path}: no permission to write in {place}; give another {option}")
    if not path.exists():
        return
    if any(_reads(path, source) for source in sources):
        raise SteerError(f"{path} is what the command reads; give another {option}")
    if not (path.is_file() or path.is_dir()):
        raise SteerError(f"{path} is neither a file nor a folder; give another {option}")
    if path.is_dir() != folder:
        kinds = ("a file", "a folder") if folder else ("a folder", "a file")
        raise SteerError(f"{path} is {kinds[0]}, and {kinds[1]} is written; give another {option}")
    if folder and not any(path.iterdir()):
        return
    if not replace:
        force = "" if replace is None else ", or --force to replace it"
        raise SteerError(f"{path} exists already: give another {option}{force}")
    if folder and not _written_by_steer(path):
        raise SteerError(f"{path} is a folder of other files, which --force keeps; give a new {option}")


def _reads(path: Path, source: str | os.PathLike[str] | None) -> bool:
    """Whether `source` is `path`, or a file or folder in it."""
    if not source:
        return False
    try:
        place = Path(source).expanduser().resolve(strict=True)
        return any(path.samefile(part) for part in (place, *place.parents))
    except (OSError, ValueError, RuntimeError):  # no path, such as a hub id
        return False


def _written_by_steer(folder: Path) -> bool:
    inside = list(folder.iterdir())
    names = {file.name for file in inside}
    own = bool(names & _OWN_WEIGHTS) or (_ADAPTER in names and _has_config(folder / _ADAPTER))
    if any(file.is_dir() for file in inside) or (not own and any(map(_WEIGHTS.fullmatch, names))):
        return False
    return own or bool(names & _MARKS)


def _has_config(file: Path) -> bool:
    """Whether the header of a safetensors file has the config of steering vectors."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        return b'"steering_config"' in content.read(min(length, file.stat().st_size))


@contextmanager
def output(
    path: str | os.PathLike[str],
    replace: bool,
    *sources: str | os.PathLike[str] | None,
    option: str = "--out",
    folder: bool = False,
) -> Iterator[Path]:
    """
    Inside, the output `path` may be written: a file, or a folder that is then new. When the block raises,
    what was there before is there again. Arguments and errors are those of `check_output`.
    """
    check_output(path, replace, *sources, option=option, folder=folder)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerError(f"cannot write {path}: {error.strerror}; give another {option}") from error
    if not (folder and path.is_dir() and any(path.iterdir())):
        yield path  # files are written beside their target and renamed over it
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

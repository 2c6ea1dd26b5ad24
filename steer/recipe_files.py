"""
The recipes that come with the package: the programs, `configs/` and the launchers of `accelerate/`. An
installed package holds them as `steer/recipes`, a clone as `recipes` at its top.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path

from steer.errors import SteerError, shown

LAUNCHER = "STEER_LAUNCHER"  # the environment variable that tells a process its `--launcher`


def recipes_folder() -> Path:
    """The folder of the recipes that belong to this `steer`."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "configs").is_dir():
            return folder
    raise SteerError(f"{package} has no recipes; install the package again: pip install steer-rl")


def config_file(given: str) -> Path:
    """
    The config file that a user means.

    Args:
        given: Path of a YAML file, or the name of one that comes with the package, such as "demo".

    Returns:
        The path; a file in the current folder comes before a name.

    Raises:
        SteerError: There is neither; the message lists the names, nearest first.
    """
    return _find("config", given, recipes_folder() / "configs")


def launcher_file(given: str) -> Path:
    """The same for a config file of `accelerate launch`, such as "ddp"."""
    return _find("launcher", given, recipes_folder() / "accelerate")


def _find(kind: str, given: str, folder: Path) -> Path:
    try:
        if Path(given).is_file():
            return Path(given)
    except (OSError, ValueError):  # a name that no file can have
        pass
    names = {path.stem: path for path in folder.glob("*.yaml")}
    if given in names:
        return names[given]
    stem = Path(given).stem
    near = sorted(sorted(names), key=lambda name: -SequenceMatcher(None, stem, name).ratio())
    raise SteerError(
        f"no {kind} file {shown(given)}; give a YAML file, or the name of one of steer's: {', '.join(near)}"
    )

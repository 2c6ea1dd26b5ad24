"""Whether a kept result of a comparison was made with the settings that are asked for now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from steer.errors import SteerError
from steer.evaluation.pack import read_packed
from steer.files import HOLDER_FILE, LOCK_FILE
from steer.training.run import RUN_FILE
from steer.training.same_result import CONTINUED, WATCHING, differences


def is_made(file: Path, asked: dict[str, Any]) -> bool:
    """
    Whether a packed run is there.

    Raises:
        SteerError: it was made with other settings.
    """
    if not file.exists():
        return False
    packed = read_packed(file)
    about = packed["about"]
    if "data" not in about.get("asked", {}):  # older: nothing says which training problems were used
        asked = {k: v for k, v in asked.items() if k != "data"}
    rest = {k: v for k, v in asked.items() if k != "base"}
    if "base" in asked and about["hash"] == digest(rest):  # older: the evaluation says which base
        told = {"model": packed["settings"]["model"], "model_revision": packed["settings"]["revision"]}
        known = {**rest, "base": {name: value for name, value in told.items() if value}}
        about = {"hash": digest(known), "asked": known}
    check(file, about, asked)
    return True


def digest(asked: dict[str, Any]) -> str:
    """A hash of what decides the numbers, not of how the run is watched."""
    training = {k: v for k, v in asked.get("training", {}).items() if k not in WATCHING}
    text = json.dumps({**asked, "training": training}, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(file: Path, have: dict[str, Any], asked: dict[str, Any]) -> None:
    """SteerError, with what differs, where a file has other settings; older ones hold a hash alone."""
    if have["hash"] == digest(asked):
        return
    changed = []
    if "asked" in have:
        wanted = json.loads(json.dumps(asked, default=list))
        changed = differences(_parts(have["asked"]), _parts(wanted), {}, frozenset())
    raise SteerError(
        f"{file} was made with other settings than these{': ' if changed else ''}{'; '.join(changed[:3])}; "
        "move it away to have it made again, or give another --out"
    )


def check_begun(folder: Path, config: Path, settings: dict[str, Any]) -> None:
    """
    SteerError where `folder` holds what was begun, by the file `config`, with another length or schedule than
    `settings`: a run would go on with them, and its result be none of either.
    """
    begun = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if not begun - {RUN_FILE, LOCK_FILE, HOLDER_FILE} or not config.exists():
        return
    names = {*CONTINUED, "sweep_steps"}
    have, wanted = (
        {"training": {name: value for name, value in one.items() if name in names}}
        for one in (yaml.safe_load(config.read_text()), settings)
    )
    if changed := differences(have, wanted, {}, frozenset()):
        raise SteerError(
            f"{folder} was begun with other settings than these: {'; '.join(changed)}; remove that folder, "
            "or give another output_dir"
        )


def _parts(asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: part if isinstance(part, dict) else {name: part} for name, part in asked.items()}

"""
A finished run in one small JSON file, fit for version control: settings, problems and every verdict, and the
texts that a page shows. `steer.evaluation.compare` and `steer.evaluation.browse` read it as they read the
folder it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.evaluation.regrade import NEEDED, regrade
from steer.evaluation.store import COLUMNS, GREEDY, LATER, read_completions, read_problems, read_settings
from steer.files import read_json, replace_file

# Texts are most of a run; of the sampled answers these many are kept, as many as a page shows.
TEXTS = 2

Run = tuple[dict[str, Any], list[dict[str, Any]], dict[str, list[Any]]]


def pack(folder: str | Path, target: str | Path, about: dict[str, Any] | None = None) -> None:
    """
    Write the run in `folder` to the file `target`, with `about` for whatever else is known of it. A column
    whose rows are all alike is one value, a problem its number, and the texts of later samples are empty. A
    base with an adapter merged into it is named by these two.
    """
    settings, problems = _settings(folder), read_problems(folder)
    columns = read_completions(folder)
    regrade(columns, problems)
    numbers = {(p["benchmark"], p["id"]): n for n, p in enumerate(problems)}
    keys = zip(columns["benchmark"], columns["problem"], strict=True)
    columns["problem"] = [numbers[key] for key in keys]
    texts = zip(columns["text"], columns["sample"], strict=True)
    columns["text"] = [text if sample < GREEDY + 1 + TEXTS else "" for text, sample in texts]
    columns["seconds"] = [round(seconds, 4) for seconds in columns["seconds"]]
    short = {n: c[0] if c and all(v == c[0] for v in c) else c for n, c in columns.items()}
    parts = {
        "rows": len(columns["problem"]),
        "about": about or {},
        "settings": settings,
        **{"problems": problems, "completions": short},
    }
    replace_file(Path(target), _lines(parts).encode())


def read_run(path: str | Path, columns: Iterable[str] = tuple(COLUMNS)) -> Run:
    """
    Settings, problems and completions (lists by column) of a run: its folder, or its packed file. Runs of old
    are graded leniently here; what cannot be, because the file lacks the text, is None in that column.
    """
    columns = tuple(columns)
    wanted = dict.fromkeys((*columns, *NEEDED) if "lenient" in columns else columns)
    packed = Path(path).is_file()
    if not packed:
        settings, problems, whole = _settings(path), read_problems(path), read_completions(path, wanted)
    else:
        settings, problems, whole = _unpacked(path, wanted)
    if "lenient" in columns:
        regrade(whole, problems, TEXTS if packed else None)
    return settings, problems, {name: whole[name] for name in columns}


def _settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a run in a folder, its model named as on another machine."""
    from steer.base_adapter import public_base  # loads torch

    settings = read_settings(folder)
    return {**settings, "model": public_base(settings["model"])}


def _unpacked(path: str | Path, columns: Iterable[str]) -> Run:
    packed = read_packed(path)
    try:
        problems, rows = packed["problems"], packed["rows"]
        kept = {**dict.fromkeys(LATER), **packed["completions"]}
        whole = {n: c if isinstance(c, list) else [c] * rows for n, c in kept.items()}
        whole["problem"] = [problems[n]["id"] for n in whole["problem"]]
        chosen = {name: whole[name] for name in columns}
        if any(len(column) != rows for column in chosen.values()):
            raise ValueError(f"its columns do not all have {rows} rows")
        return packed["settings"], problems, chosen
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise SteerError(f"{path} is not a packed run ({error!r}); pack it again") from error


def read_packed(path: str | Path) -> dict[str, Any]:
    """The whole content of a packed file; `about` is what `pack` was given."""
    packed = read_json(path)
    if not isinstance(packed, dict) or "completions" not in packed:
        raise SteerError(f"{path} is not a packed run of `steer eval`: it has no completions")
    return packed


def _lines(parts: dict[str, Any]) -> str:
    """JSON with a line for each problem and each column, so that a change shows where it is."""

    def one(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    lines = []
    for name, part in parts.items():
        if name == "problems":
            text = "[\n" + ",\n".join(map(one, part)) + "\n]"
        elif name == "completions":
            text = "{\n" + ",\n".join(f"{one(n)}:{one(column)}" for n, column in part.items()) + "\n}"
        else:
            text = json.dumps(part, indent=1, ensure_ascii=False)
        lines.append(f"{one(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"

"""
A run on disk, which a kill at any moment leaves whole:

    run.json             what was asked: model, engine, seed, benchmarks, variants; versions of each session;
                         the side effects of each variant, and its verdicts on tasks of lm-eval, where they
                         were measured
    problems.parquet     every problem with its benchmark, id and reference answer
    part-00000.parquet   completions, graded; one file a batch, so a stopped run loses one batch at most
    scores.json          the table, once the run is complete (`steer.evaluation.compare`)

Each file is written beside its target and renamed over it. A row of a part is (variant, benchmark, problem,
sample), sample -1 being the greedy answer, with COLUMNS.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from steer.base_adapter import merged_from, public_base
from steer.errors import SteerError
from steer.evaluation.variants import fingerprint
from steer.files import held, read_json, replace_file

RUN_FILE, PROBLEMS_FILE = "run.json", "problems.parquet"
GREEDY = -1
COLUMNS = {
    "variant": str,
    "benchmark": str,
    "problem": str,  # its id
    "sample": int,
    "seed": int,  # of this row's random numbers
    "text": str,
    "answer": str,  # what was extracted; None when there is none
    "correct": bool,
    "how": str,  # which step of the grader decided
    "tokens": int,  # generated, the end-of-text token included
    "truncated": bool,  # stopped by the length limit
    "prompt_tokens": int,
    "seconds": float,  # the batch's time over its rows
    "lenient": bool,  # whether the answer is right in whatever form it is given; older runs lack the column
    "loop": bool,  # whether the answer ends in a repetition (`steer.evaluation.broken`); older runs lack it
}
# Columns that the files of older runs lack: None there.
LATER = ("lenient", "loop")
# What decides which completions a row gets; the rest of a run may grow: variants, benchmarks, samples.
FIXED = ("model", "revision", "engine", "dtype", "seed", "temperature", "top_p")

# What a run keeps of its variants beside their completions, by variant.
MEASURED = ("side_effects", "side_effect_tasks")

Key = tuple[str, str, str, int]


class Store:
    """One run's folder. Opened by one process at a time; read by any."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings: dict[str, Any] = {}
        self._next = 0
        self._hold = ExitStack()

    def open(self, settings: Mapping[str, Any], problems: Sequence[Mapping[str, Any]]) -> set[Key]:
        """
        Begin the run, or go on with it: the keys of the completions that are there. SteerError when the
        folder holds a run of other settings or other files, when another process writes to it, and when it
        cannot be written.
        """
        self._hold.enter_context(held(self.folder, "--out"))
        try:
            others = [f.name for f in self.folder.iterdir() if not f.name.startswith(".")]
            if set(others) - {PROBLEMS_FILE} and RUN_FILE not in others:
                raise SteerError(
                    f"{self.folder} holds {others[0]}, which is not a run of `steer eval`; give another --out"
                )
        except OSError as error:
            raise _disk(self.folder, error) from error
        before = read_settings(self.folder) if RUN_FILE in others else {}
        self.settings = _merge(self.folder, before, settings)
        # benchmarks may share problems
        known = {(r["benchmark"], r["id"]): r for r in (read_problems(self.folder) if before else [])}
        known.update({(row["benchmark"], row["id"]): dict(row) for row in problems})
        self._write(PROBLEMS_FILE, _parquet(list(known.values())))
        self.save_settings()
        self._next = 1 + max((int(part.stem[5:]) for part in _parts(self.folder)), default=-1)
        done = read_completions(self.folder, ("variant", "benchmark", "problem", "sample"))
        return set(zip(*(done[c] for c in ("variant", "benchmark", "problem", "sample")), strict=True))

    def save_settings(self) -> None:
        self._write(RUN_FILE, (json.dumps(self.settings, indent=2) + "\n").encode())

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one batch of completions, all or nothing."""
        self._write(f"part-{self._next:05}.parquet", _parquet(rows))
        self._next += 1

    def close(self) -> None:
        self._hold.close()

    def _write(self, name: str, content: bytes) -> None:
        try:
            replace_file(self.folder / name, content)
        except OSError as error:
            raise _disk(self.folder, error) from error


def read_settings(folder: str | Path) -> dict[str, Any]:
    """`run.json` of a run; SteerError when the folder holds none."""
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise SteerError(f"no run in {folder}: there is no {RUN_FILE}; give a folder that `steer eval` wrote")
    try:
        settings = read_json(path)
        if not isinstance(settings, dict) or not {"variants", "benchmarks", *FIXED} <= set(settings):
            raise ValueError("it is not what `steer eval` writes")
    except (ValueError, OSError) as error:
        raise SteerError(f"{path} cannot be read ({error}); give another folder") from error
    return settings


def read_problems(folder: str | Path) -> list[dict[str, Any]]:
    """Rows with `benchmark`, `id`, `problem`, `answer`, and `golds` where some have several right answers."""
    return _read(Path(folder) / PROBLEMS_FILE, None).to_pylist()


def references(problem: Mapping[str, Any]) -> str | list[str]:
    """What answers to a problem of `read_problems` are graded against: its answer, or all that are right."""
    return json.loads(problem["golds"]) if problem.get("golds") else str(problem["answer"])


def read_completions(folder: str | Path, columns: Iterable[str] = tuple(COLUMNS)) -> dict[str, list[Any]]:
    """All completions of a run so far, as lists by column."""
    by_column: dict[str, list[Any]] = {name: [] for name in columns}
    for path in _parts(Path(folder)):
        table = _read(path, None)
        for name, values in by_column.items():
            missing = name in LATER and name not in table.column_names
            values.extend([None] * len(table) if missing else table[name].to_pylist())
    return by_column


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-[0-9][0-9][0-9][0-9][0-9].parquet"))


def _read(path: Path, columns: list[str] | None) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path, columns=columns)
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SteerError(
            f"{path} cannot be read ({reason}); if it was damaged, remove it and run the same command again: "
            "only what it held is sampled anew"
        ) from error


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), bool: pyarrow.bool_(), float: pyarrow.float64()}
    names = dict.fromkeys(name for row in rows for name in row)
    schema = pyarrow.schema([(name, types[COLUMNS.get(name, str)]) for name in names])
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema)
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _merge(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run with what this session adds; SteerError where the two contradict each other."""
    if not before:
        return dict(now)
    changed = [
        f"{name} was {before[name]!r}, now {now[name]!r}"
        for name in FIXED
        if before[name] != now[name] and not (name == "model" and _same_model(before[name], now[name]))
    ]
    for part in ("variants", "benchmarks"):
        for name, asked in now[part].items():
            changed += _changed(name, before[part].get(name, asked), asked)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise SteerError(f"{folder} holds another run: {'; '.join(changed[:3])}{more}; give another --out")
    measured = {key: before[key] for key in MEASURED if before.get(key)}
    variants = {
        name: {**variant, "asked": {**before["variants"].get(name, {}).get("asked", {}), **variant["asked"]}}
        if "asked" in variant
        else variant
        for name, variant in now["variants"].items()
    }
    return {
        **now,
        **measured,
        "variants": {**before["variants"], **variants},
        "benchmarks": {**before["benchmarks"], **now["benchmarks"]},
        "sessions": [*(s for s in before["sessions"] if s["completions"]), *now["sessions"]],
    }


def _same_model(one: str, other: str) -> bool:
    """Whether both are one model, or folders with the same adapter merged into the same base and revision."""
    return (
        public_base(one) == public_base(other)
        and merged_from(one).get("revision") == merged_from(other).get("revision")
        and fingerprint(Path(one)) == fingerprint(Path(other))
    )


def _changed(name: str, had: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """How a variant or a benchmark is asked otherwise than before; a field that is empty may be missing."""
    changed = []
    for key in {**had, **asked}:
        one, other = had.get(key), asked.get(key)
        if key == "asked":  # by benchmark: others may come
            changed += [
                f"{name}: {benchmark} was asked otherwise"
                for benchmark, way in (other or {}).items()
                if (one or {}).get(benchmark, way) != way
            ]
        elif key != "path" and one != other and (one or other):
            changed.append(f"{name}: {key} was {one!r}, now {other!r}")
    return changed


def _disk(folder: Path, error: OSError) -> SteerError:
    return SteerError(
        f"cannot write to {folder}: {error.strerror}; what is there is whole: fix that and run the same "
        "command again to go on"
    )

"""Math problems in one record form: `problem`, `answer`, optional `solution`, `level`, `type`, `source`.

They come from a generator of arithmetic, known data sets on the hub, or a local file in the record form.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steer.errors import SteerError, one_line
from steer.files import json_lines, parse_json, read_text, replace_file
from steer.tasks.arithmetic import Arithmetic
from steer.tasks.columns import conversation, extras, renamed

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

Record = dict[str, Any]

_OPTIONAL = ("solution", "type")
_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_RECORD_FORM = "'problem' and 'answer' (optional: solution, level, type, source)"


def _gsm8k(row: Record) -> Record:
    solution, mark, answer = str(row.get("answer", "")).rpartition("####")
    return {
        "problem": row.get("question"),
        "answer": answer.strip().replace(",", "") if mark else None,
        "solution": solution.strip(),
    }


def _math(row: Record) -> Record:
    return {**row, "answer": _last_boxed(str(row.get("solution", "")))}


def _math500(row: Record) -> Record:
    return {**row, "type": row.get("subject")}


class _Known(NamedTuple):
    hub: str
    config: str | None = None
    only_split: str | None = None  # the one split there is, whichever was asked for
    convert: Callable[[Record], Record] = dict


# MATH-500 was drawn from the test half of MATH, so the train split of "math" does not overlap it
_KNOWN = {
    "gsm8k": _Known("openai/gsm8k", "main", convert=_gsm8k),
    "math": _Known("DigitalLearningGmbH/MATH-lighteval", convert=_math),
    "deepscaler": _Known("agentica-org/DeepScaleR-Preview-Dataset", only_split="train"),
    "math500": _Known("HuggingFaceH4/MATH-500", only_split="test", convert=_math500),
}


def on_hub(source: str, split: str) -> tuple[str, str]:
    """The hub id (a file as it is named) and split that `load_problems` reads for a source."""
    known = _KNOWN.get(source)
    return (known.hub, known.only_split or split) if known else (source, split)


def has_own_columns(source: str) -> bool:
    """Whether `source` is a file or hub id, whose columns may have any names, and none that is known here."""
    return source != "arithmetic" and source not in _KNOWN


def has_splits(source: str) -> bool:
    """Whether `source` has problems beside those of training: not a file, a folder or a set of one split."""
    if source in _KNOWN:
        return _KNOWN[source].only_split is None
    path = Path(source)
    on_hub = _HUB_ID.fullmatch(source) and path.suffix not in _SUFFIXES and not path.exists()
    return source == "arithmetic" or bool(on_hub)


def heldout_source(train_data: str | None, eval_data: str | None) -> str | None:
    """
    The source of a run's held-out problems by its settings: `eval_data`, or where that is not set those that
    generated arithmetic keeps out of training. None when there are none.
    """
    source = eval_data or ("arithmetic" if train_data == "arithmetic" else "none")
    return None if source == "none" else source


def load_problems(
    source: str,
    split: str = "train",
    *,
    limit: int | None = None,
    levels: list[int] | None = None,
    max_chars: int | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    arithmetic: Arithmetic | None = None,
    columns: Mapping[str, str] | None = None,
    of_another: bool = False,
) -> datasets.Dataset:
    """Problems of one source as a data set with at least the string columns `problem`, `answer` and `source`.

    A row whose `prompt` is a list of messages is a chat: it is in column `messages`, and its `problem` is the
    user's last turn where it has none of its own. Where answers are lists, `golds` has all those of a
    problem, of which any is right, and `answer` the first. Columns that are not in the record form follow
    under their own names.

    source: "arithmetic" (made by `arithmetic`), "gsm8k", "math", "deepscaler", "math500", another hub id
        whose columns are in the record form, or a path ending in .jsonl, .json or .parquet (no splits).
    limit: most problems returned; only when it cuts are they shuffled, by `seed`.
    levels: keep these difficulty levels alone (a problem without a level is dropped).
    max_chars: longest problem text kept, in characters.
    exclude: sources whose problems must not occur, compared with whitespace folded. Their "test" split is
        read; write "gsm8k:train" for another.
    columns: the column of each field of the record form that a file or hub id has under another name.
    of_another: whether `columns` were given for another source, and hold here only where this one has them.
    Raises SteerError for a source that cannot be read, a record without problem or answer, an empty result.
    """
    import datasets  # seconds to import, and only loading needs it

    if limit is not None and limit < 1:
        raise SteerError(f"limit is {limit}; expected at least 1, or none for all problems")
    records = _read(source, split, arithmetic, columns, of_another)
    counts = [f"{len(records)} read"]

    def keep(rule: str, kept: list[Record]) -> None:
        nonlocal records
        if len(kept) < len(records):
            log.info(
                "%s: dropped %d of %d problems: %s", source, len(records) - len(kept), len(records), rule
            )
        records = kept
        counts.append(f"{len(kept)} after {rule}")

    first: dict[str, Record] = {}
    for record in records:
        key = json.dumps(record["messages"]) if record["messages"] else record["problem"]
        first.setdefault(_fold(key), record)
    keep("removing duplicates", list(first.values()))
    for other in exclude:
        name, mark, part = other.rpartition(":")
        if not mark or part not in ("train", "test", "validation", "heldout"):
            name, part = other, "test"
        banned = {_fold(r["problem"]) for r in _read(name, part, arithmetic, columns, of_another=True)}
        keep(f"excluding {other}", [r for r in records if _fold(r["problem"]) not in banned])
    if levels is not None:
        keep(f"keeping levels {sorted(levels)}", [r for r in records if r["level"] in levels])
    if max_chars is not None:
        keep(
            f"keeping at most {max_chars} characters", [r for r in records if len(r["problem"]) <= max_chars]
        )
    if not records:
        raise SteerError(
            f"no problems left from {source!r} ({', '.join(counts)}); loosen the filter that emptied it"
        )
    if limit is not None and limit < len(records):
        records = random.Random(seed).sample(records, limit)
    log.info("%s: %d problems", source, len(records))
    names = ["problem", "answer", "source"]
    names += [c for c in ("level", *_OPTIONAL, "messages") if any(r[c] is not None for r in records)]
    if any(len(r["golds"]) > 1 for r in records):
        names.append("golds")
    made = {c: [r[c] for r in records] for c in names}
    extra = {name: [r["extra"][name] for r in records] for name in records[0]["extra"]}
    return datasets.Dataset.from_dict({**made, **extra})


def save_problems(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write problems, as `load_problems` returns them, so that it reads the same ones back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, "".join(json.dumps(_record(row)) + "\n" for row in rows).encode())


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """A problem in the record form, in which a chat is its prompt and its answer may be a list."""
    record = {name: value for name, value in row.items() if name not in ("messages", "golds")}
    if row.get("messages"):
        record["prompt"] = row["messages"]
    if row.get("golds"):
        record["answer"] = row["golds"]
    return record


def _read(
    source: str,
    split: str,
    arithmetic: Arithmetic | None,
    columns: Mapping[str, str] | None = None,
    of_another: bool = False,
) -> list[Record]:
    columns = columns or {}
    if columns and not has_own_columns(source) and not of_another:
        raise SteerError(f"columns are for files and hub ids, and {source!r} has its own; leave them out")
    if source == "arithmetic":
        return _records(
            (arithmetic or Arithmetic()).generate("train" if split == "train" else "heldout"), source
        )
    if source in _KNOWN:
        known = _KNOWN[source]
        rows = _from_hub(known.hub, known.config, known.only_split or split)
        return _records(map(known.convert, rows), source)
    path = Path(source)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise SteerError(
                f"no file {source!r}; give a path ending in {', '.join(_SUFFIXES)} to an existing file"
            )
        rows = _from_file(path)
        return _records(rows, path.name, _held(rows, columns) if of_another else columns)
    if _HUB_ID.fullmatch(source) and not path.is_file():
        rows = _from_hub(source, None, split)
        return _records(rows, source, _held(rows, columns) if of_another else columns)
    raise SteerError(
        f"unknown source {source!r}; expected arithmetic, {', '.join(_KNOWN)}, a hub id owner/name, or a "
        f"path ending in {', '.join(_SUFFIXES)}"
    )


def _held(rows: Sequence[Any], columns: Mapping[str, str]) -> Mapping[str, str]:
    """`columns` where the rows have all of them, else none."""
    first = next((row for row in rows if row is not None), None)
    return columns if isinstance(first, dict) and set(columns.values()) <= set(first) else {}


def _from_hub(hub: str, config: str | None, split: str) -> list[Record]:
    import datasets

    try:
        return list(datasets.load_dataset(hub, config, split=split))
    except Exception as error:  # offline, unknown id, gated, unknown split: all mended the same way
        reason = " ".join(str(error).split())[:200]
        raise SteerError(
            f"cannot load split {split!r} of {hub!r} from the hub ({type(error).__name__}: {reason}); check "
            f"the name and the network, or give a local .jsonl file with the fields {_RECORD_FORM}"
        ) from error


def _from_file(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_table(path).to_pylist())
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise SteerError(f"cannot read {str(path)!r}: {one_line(error)}") from error
    if path.suffix == ".jsonl":
        # an empty line is None, so that record numbers are line numbers
        return list(json_lines(path, literal_numbers=True))
    rows = parse_json(read_text(path), f"{path.name} (one record per line is .jsonl)", literal_numbers=True)
    if not isinstance(rows, list):
        raise SteerError(
            f"{path.name} holds a {type(rows).__name__}; expected a list of records with {_RECORD_FORM}"
        )
    return rows


def _records(rows: Iterable[Any], source: str, columns: Mapping[str, str] | None = None) -> list[Record]:
    """
    Rows checked and brought to the record form, every field present (None where the row has none). With
    `columns`, `extra` holds the columns that are not in the record form.
    """
    records, kept = [], []
    for number, row in enumerate(rows, 1):
        if row is None:
            continue
        where = f"{source}, record {number}"
        if not isinstance(row, dict):
            raise SteerError(f"{where}: a {type(row).__name__}; expected fields {_RECORD_FORM}")
        fields = renamed(row, columns or {}, where)
        record: Record = {"source": str(fields.get("source") or source), "level": _level(fields.get("level"))}
        record["messages"] = messages = conversation(fields.get("prompt"), where)
        if messages and "problem" not in fields:
            fields["problem"] = messages[-1]["content"]
        answers = fields.get("answer")
        golds = answers if isinstance(answers, list) and answers else [answers]
        record["problem"] = _required("problem", fields.get("problem"), row, where)
        record["golds"] = [_required("answer", gold, row, where) for gold in golds]
        record["answer"] = record["golds"][0]
        for name in _OPTIONAL:
            record[name] = _text(fields.get(name))
        records.append(record)
        kept.append(row)
    extra = {} if columns is None else extras(kept, columns, source)
    for i, record in enumerate(records):
        record["extra"] = {name: values[i] for name, values in extra.items()}
    return records


def _required(name: str, given: Any, row: Record, where: str) -> str:
    if isinstance(given, float) and not math.isfinite(given):
        raise SteerError(
            f"{where}: {name!r} is {given}, which is not a number; correct the record or leave it out"
        )
    value = _text(given)
    if value is None:
        raise SteerError(
            f"{where}: no {name!r} (a non-empty string or number) among columns {', '.join(map(str, row))}; "
            f"expected {_RECORD_FORM}, or say which column it is: --columns problem=COLUMN,answer=COLUMN"
        )
    return value


def _text(value: Any) -> str | None:
    if isinstance(value, float) and math.isfinite(value):
        # of a typed column, where its text is not known: written out, as 1e-07 is nobody's answer
        digits = Decimal(repr(value))
        value = format(digits.to_integral_value() if value.is_integer() else digits, "f")
    if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    return None


def _level(value: Any) -> int | None:
    """Levels are written 5, 5.0, "5" and "Level 5"; "Level ?" is not a level."""
    match = re.fullmatch(r"(?:level)?\s*([0-9]{1,4})(?:\.0)?", str(value).strip(), re.IGNORECASE)
    return int(match[1]) if match else None


def _fold(text: str) -> str:
    return " ".join(text.split())


def _last_boxed(solution: str) -> str | None:
    r"""Content of the last \boxed in a reference solution, where "\boxed 7" without braces also occurs."""
    # not the grader's extraction: this one reads trusted text, and data is below rewards
    _, mark, rest = solution.rpartition("\\boxed")
    rest = rest.lstrip()
    if not mark or not rest:
        return None
    if rest[0] != "{":
        return re.split(r"[$\s]", rest, maxsplit=1)[0] or None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[1 : brace.start()].strip() or None
    return None

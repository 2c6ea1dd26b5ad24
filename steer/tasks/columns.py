"""
Which column of the user's data set holds what: the names of the record form for their columns, chats, several
reference answers, and the columns that only rewards read.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from steer.errors import SteerError, shown
from steer.files import JsonNumber

log = logging.getLogger("steer")

Message = dict[str, str]

# What a record may hold, each under the name of another column where `columns` says so.
FIELDS = ("problem", "answer", "prompt", "solution", "level", "type", "source")
# Names of ours in a data set, and of what the trainer gives to every reward.
_TAKEN = {"messages", "golds", "prompt", "prompts", "completion", "completions", "completion_ids"}
_TAKEN |= {"trainer_state", "log_extra", "log_metric", "environments"}


def parse_columns(given: object) -> dict[str, str]:
    """
    The columns that hold the fields of a record, by field.

    Args:
        given: `"problem=question,answer=solution"`, a mapping, or None for none.

    Raises:
        SteerError: another form, a field that does not exist, a field that is there twice.
    """
    form = "write problem=COLUMN,answer=COLUMN"
    if not given:
        return {}
    pairs: list[tuple[Any, Any]] = []
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        for part in str(given).split(","):
            field, mark, column = part.partition("=")
            if not mark:
                raise SteerError(f"columns {shown(given)}: {shown(part)} has no '='; {form}")
            pairs.append((field.strip(), column.strip()))
    columns: dict[str, str] = {}
    for field, column in pairs:
        if field not in FIELDS:
            near = difflib.get_close_matches(str(field), FIELDS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SteerError(
                f"columns {shown(given)}: a record has no {shown(field)}{hint}; it has {', '.join(FIELDS)}"
            )
        if field in columns or not isinstance(column, str) or not column:
            raise SteerError(f"columns {shown(given)}: {field!r} has not exactly one column; {form}")
        columns[field] = column
    return {field: columns[field] for field in FIELDS if field in columns}


def columns_text(columns: Mapping[str, str]) -> str | None:
    """The mapping as `parse_columns` reads it from a command line; None for an empty one."""
    return ",".join(f"{field}={column}" for field, column in columns.items()) or None


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """
    The fields that `row` has, under their names in the record form.

    Args:
        row: a row of a data set.
        columns: the column of each field that has another name.
        where: the source and number of the row, for the message.

    Raises:
        SteerError: a column that is named and not there; lists those that are, and the nearest one.
    """
    for field, column in columns.items():
        if column not in row:
            raise SteerError(f"{where}: no column {column!r} for {field!r}{known(row, column)}")
    fields = {field: row[column] for field, column in _sources(columns).items() if column in row}
    if "prompt" in columns and not isinstance(fields["prompt"], list):
        raise SteerError(
            f"{where}: column {columns['prompt']!r} holds {shown(fields['prompt'])}; a prompt is a list of "
            "messages with role and content, and plain text is a problem: --columns problem=COLUMN"
        )
    return fields


def _sources(columns: Mapping[str, str]) -> dict[str, str]:
    """The column of each field; a column that stands for another field is not also its own."""
    taken = set(columns.values())
    return {f: columns.get(f, f) for f in FIELDS if f in columns or f not in taken}


def known(row: Collection[str], wanted: str) -> str:
    """The columns of a row as the end of a message, with the one whose name is nearest to `wanted`."""
    names = [str(name) for name in row]
    near = difflib.get_close_matches(wanted, names, 1)
    return f"; the columns are {', '.join(names)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def conversation(value: object, where: str) -> list[Message] | None:
    """
    The messages of a conversational prompt; None where `value` is not a list.

    Raises:
        SteerError: no list of `{"role": ..., "content": ...}` whose last turn is the user's.
    """
    if not isinstance(value, list):
        return None
    messages = []
    for turn in value:
        # a typed data set fills keys that other turns have with None
        held = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
        if set(held) != {"role", "content"} or not all(isinstance(text, str) for text in held.values()):
            raise SteerError(
                f"{where}: 'prompt' has the message {shown(turn)}; expected "
                '{"role": "user", "content": "text"} alone'
            )
        messages.append({"role": str(held["role"]), "content": str(held["content"])})
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise SteerError(f"{where}: 'prompt' does not end with a turn of the user; correct the record")
    return messages


def extras(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], source: str) -> dict[str, list]:
    """
    The columns that are no fields of a record, for the rewards: their values in the order of `rows`, numbers
    as numbers. A column whose values have several types becomes text, and one that a data set cannot hold, or
    whose name means something else, is left out; both are logged.
    """
    used = set(_sources(columns).values())
    if not any(isinstance(row.get("prompt"), list) for row in rows):
        used -= {"prompt"} - set(columns.values())
    names = dict.fromkeys(str(name) for row in rows for name in row if name not in used)
    kept = {}
    for name in names:
        given = [row.get(name) for row in rows]
        values = [_plain(value) for value in given]
        if name in _TAKEN or name in FIELDS:
            log.info("%s: column %r is not passed to rewards: the name means something else", source, name)
        elif (kind := _unfit(values)) is not None:
            log.info("%s: column %r is not passed to rewards: it holds %s", source, name, kind)
        elif _kept(values):
            kept[name] = values
        else:
            nested = any(isinstance(value, list | dict) for value in values)
            kept[name] = [_written(value, nested) for value in given]
            form = "JSON text" if nested else "text"
            log.info(
                "%s: column %r holds values of several types: rewards get them as %s", source, name, form
            )
    return kept


def _kept(values: list[Any]) -> bool:
    """Whether a data set gives `values` back as they are: its columns have one type."""
    import pyarrow

    try:
        back = pyarrow.array(values).to_pylist()
    except (pyarrow.ArrowException, OverflowError):
        return False
    return json.dumps(back) == json.dumps(values)


def _written(value: Any, nested: bool) -> str | None:
    if value is None:
        return None
    if nested:
        return json.dumps(_plain(value), ensure_ascii=False)
    return str(value) if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    """`value` with its numbers, which are kept as text while reference answers are read, as numbers."""
    if isinstance(value, JsonNumber):
        return value.number()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _unfit(values: Sequence[Any]) -> str | None:
    """What of `values` JSON cannot hold: the name of its type."""
    for value in values:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return f"{type(value).__name__} that JSON has no form for"
    return None

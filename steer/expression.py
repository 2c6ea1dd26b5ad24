"""
Which sets of vectors act, as a request names them: `math@0.7+brief@-0.3`, or JSON with positions and layers.

    expression = "base" | term ("+" term)*
    term       = name ["@" scale]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steer.arguments import SCALE
from steer.config import SteeringArguments
from steer.errors import SteerError, shown

# The expression of the base model, without vectors.
BASE = "base"
_SCALE = re.compile(SCALE)
_FORM = "write names with scales, such as math@0.7+brief@-0.3, or base for no vectors"


@dataclass(frozen=True)
class Term:
    """
    One set in a sum.

    Args:
        name: of the set.
        scale: factor on its vectors as saved.
        layers: the layers that it steers, as in `SteeringConfig`; None for all that it has.
        positions: the tokens that it steers; None for those of its config.
    """

    name: str
    scale: float = 1.0
    layers: str | None = None
    positions: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def check_name(name: str) -> None:
    """SteerError for the name of a set that no expression could name."""
    if not name or name == BASE or name != name.strip() or set("@+") & set(name):
        raise SteerError(
            f"{shown(name)} cannot name vectors: names are not empty, not {BASE!r} and hold no @ or +, which "
            "expressions use; write NAME=ARTIFACT"
        )


def check_names(names: Sequence[str]) -> None:
    """SteerError for the names of sets that expressions cannot tell apart."""
    for name in names:
        check_name(name)
    if len(set(names)) < len(names):
        raise SteerError(f"two sets have one name ({', '.join(names)}); write NAME=ARTIFACT")


def parse(text: str) -> tuple[Term, ...]:
    """
    The terms of an expression, in its order; none for the base model. The inverse of `show`.

    Args:
        text: such as `math@0.7+brief@-0.3`, `math` or `base`.

    Raises:
        SteerError: it is empty, a name is missing or given twice, or a scale is not a finite number.
    """
    if text.strip() == BASE:
        return ()
    terms = []
    for part in text.split("+"):
        name, at, scale = (piece.strip() for piece in part.partition("@"))
        if not name:
            what = "a set without a name" if text.strip() else "no sets"
            raise SteerError(f"steering {shown(text)} names {what}; {_FORM}")
        if name == BASE:
            raise SteerError(f"steering {shown(text)}: {BASE!r} stands alone, for no vectors; {_FORM}")
        number = float(scale) if _SCALE.fullmatch(scale) else None
        if at and (number is None or not abs(number) <= sys.float_info.max):
            raise SteerError(
                f"steering {shown(text)}: the scale {shown(scale)} of {shown(name)} is not a finite number; "
                "write one such as 0.7, 1e-3 or -2"
            )
        terms.append(Term(name, 1.0 if number is None else number))
    _check_different(terms)
    return tuple(terms)


def show(terms: Sequence[Term]) -> str:
    """The expression of terms without layers and positions: the inverse of `parse`."""
    return (
        "+".join(
            term.name if term.scale == 1 else f"{term.name}@{term.scale!r}".replace("e+", "e")
            for term in terms
        )
        or BASE
    )


def from_json(value: object) -> tuple[tuple[Term, ...], str | None]:
    """
    The `steering` field of a request.

    Args:
        value: {"sets": [{"name": "math", "scale": 0.7, "layers": "4-12", "positions": "completion"}],
            "prompt": "math"}; of a set all but the name are optional, and `prompt` is.

    Returns:
        The terms, and the set whose prompt is used ("none": the request as sent), None where it is not told.

    Raises:
        SteerError: names the field that is missing, unknown or of a wrong value.
    """
    body = _object(value, "steering", ("sets", "prompt"))
    sets = body.get("sets")
    if not isinstance(sets, list) or not sets:
        raise SteerError(
            f"steering.sets={shown(sets)} is not a list of sets: expected at least one "
            '{"name": "math", "scale": 0.7, "layers": "4-12", "positions": "completion"}'
        )
    terms = [_term(given, f"steering.sets[{number}]") for number, given in enumerate(sets)]
    _check_different(terms)
    prompt = body.get("prompt")
    if prompt is not None and prompt not in [*(term.name for term in terms), "none"]:
        raise SteerError(
            f"steering.prompt={shown(prompt)} is none of the sets: give one of "
            f"{', '.join(term.name for term in terms)}, or none for the request as it is sent"
        )
    return tuple(terms), prompt


def _term(value: object, where: str) -> Term:
    given = _object(value, where, ("name", "scale", "layers", "positions"))
    name, layers = given.get("name"), given.get("layers")
    if not isinstance(name, str) or not name:
        raise SteerError(f"{where}.name={shown(name)} is not the name of a set")
    if layers is not None and not isinstance(layers, str):
        raise SteerError(f"{where}.layers={shown(layers)} is not text such as '4-12' or '0,3,last'")
    given = {key: value for key, value in given.items() if value is not None}
    try:  # the same values as in the config of an artifact
        checked = SteeringArguments(**{key: value for key, value in given.items() if key != "name"})
    except SteerError as error:
        raise SteerError(f"{where}.{error}") from error
    return Term(name, checked.scale, layers and checked.layers, given.get("positions"))


def _object(value: object, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SteerError(f"{where}={shown(value)} is not an object with the fields {', '.join(known)}")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise SteerError(f"{where}.{unknown[0]} is not a field; {where} has {', '.join(known)}")
    return value


def _check_different(terms: Iterable[Term]) -> None:
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SteerError(f"steering names {shown(twice)} twice; give each set once, with one scale")

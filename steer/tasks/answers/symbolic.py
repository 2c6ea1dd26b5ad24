"""Whether two mathematical expressions are equal, by sympy, which can hang or use up memory.

Runs in a worker process that can be killed. Expressions are read by latex2sympy2_extended, which math-verify
reads with; lists, sets, equations and units are taken apart before (`steer.tasks.answers.equality`).
"""

from __future__ import annotations

import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sympy import Basic

_DIGITS = 30  # of the numeric comparison
_TOLERANCE = 1e-18  # relative; rounding of the evaluation at _DIGITS digits stays far below
_POINTS = 6  # where expressions with variables are compared; half of them positive
_CONSTANTS = ("i", "e")
# Letters that latex2sympy takes for numbers (\gamma+1 for 1, I^2 for I), or cannot read with an index (E_1)
_MISREAD = re.compile(
    r"(\\(?![gG]amma(?![a-zA-Z]))[a-zA-Z]+)|(?:\\([gG])amma(?![a-zA-Z])|([EI]))(?:_\{(\w+)\})?(?!\()"
)


def _renamed(match: re.Match[str]) -> str:
    """The letter as an index of Z, which is read as a variable."""
    return match[1] or f" Z_{{{match[2] or match[3]}{match[4] or ''}}} "


@lru_cache(maxsize=64)
def parse(text: str) -> Basic | None:
    """The sympy expression of a normalised text; None when it is not one expression.

    Letters keep their case. i and e are numbers: what is equal with both as variables stays equal.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy.core.function import AppliedUndef

    text = re.sub(r'"([A-Za-z])"', r" \1 ", text)
    text = re.sub(r"_(\w)", r"_{\1}", re.sub(r'_\{?"(\w+)"\}?', r"_{\1}", text))  # E_1 is read as E times 1
    text = _MISREAD.sub(_renamed, text)
    text = re.sub(r"([0-9.]+) ?\\?%", r"\\frac{\1}{100}", text)
    if '"' in text or not text or re.search(r"[0-9]_", text):  # 5_7 would be 5
        return None
    try:
        parsed: Any = latex2sympy(
            text,
            is_real=False,
            convert_degrees=True,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # latex2sympy raises bare Exception for text that it cannot read
        return None
    if not isinstance(parsed, sympy.Expr):
        return None
    parsed = parsed.subs({s: sympy.I if s.name == "i" else sympy.E for s in _named(parsed, _CONSTANTS)})

    def is_symbol(part: Any) -> bool:  # f(2), and dx/dt, which sympy takes for 0
        derivative = isinstance(part, sympy.Derivative) and not part.expr.has(*part.variables)
        return derivative or isinstance(part, AppliedUndef)

    return parsed.replace(is_symbol, lambda part: sympy.Symbol(str(part)))


def _named(expression: Any, names: tuple[str, ...]) -> list[Any]:
    return [symbol for symbol in expression.free_symbols if symbol.name in names]


def _exact(expression: Any) -> Any:
    import sympy

    return expression.replace(
        lambda part: isinstance(part, sympy.Float), lambda part: sympy.Rational(str(part))
    )


def _value(expression: Any, point: dict[Any, Any]) -> Any | None:
    """The expression's value at a point as a sympy number; None where it has none or is not finite."""
    from sympy.core.evalf import PrecisionExhausted

    try:
        value = expression.evalf(_DIGITS, subs=point) if point else expression.evalf(_DIGITS)
        if not value.is_number or not value.is_finite:
            value = expression.subs(point).doit().evalf(_DIGITS)
        real, imaginary = value.as_real_imag()
    except PrecisionExhausted:  # a floor of what may be an integer
        return None
    return value if real.is_Number and imaginary.is_Number and value.is_finite else None


def _close(one: Any, other: Any, tolerance: float = _TOLERANCE) -> bool:
    size = max(abs(one), abs(other))
    return bool(abs(one - other) <= tolerance * size)


def _points(symbols: list[Any]) -> list[dict[Any, Any]]:
    import sympy

    rng = random.Random(0)
    points = []
    for number in range(_POINTS):
        signs = [1 if number < _POINTS // 2 else rng.choice((-1, 1)) for _ in symbols]
        if number == _POINTS - 1:
            signs = [-1] * len(symbols)
        points.append(
            {
                s: sign * sympy.Rational(rng.randint(10**6, 4 * 10**6), 10**6 + 3)
                for s, sign in zip(symbols, signs, strict=True)
            }
        )
    return points


def _symbols(*expressions: Any) -> list[Any]:
    return sorted(set().union(*(e.free_symbols for e in expressions)), key=str)


def equal(gold: str, answer: str) -> bool:
    """Whether two normalised expressions have the same value, whatever the values of their variables.

    Compared to 18 digits relative to their size, at real points when there are variables; expressions that
    only agree where the variables are positive are left to math-verify's simplification. A decimal stands for
    what rounds to it at six places.
    """
    import sympy
    from math_verify import verify

    one, other = parse(gold), parse(answer)
    if one is None or other is None:
        return False
    decimal = one.has(sympy.Float) or other.has(sympy.Float)
    one, other = _exact(one), _exact(other)
    if one == other:
        return True
    symbols = _symbols(one, other)
    if not symbols:
        values: list[Any] = [_value(one, {}), _value(other, {})]
        if None in values:
            return False
        if decimal and one.is_real is not False and other.is_real is not False:
            rounded = [sympy.Rational(str(value.round(6))) for value in values if value.is_real]
            if len(rounded) == 2 and rounded[0] == rounded[1] != 0:
                return True
        return _close(*values) or bool(values[0] == values[1])
    agree: list[bool | None] = []
    for point in _points(symbols):
        values = [_value(one, point), _value(other, point)]
        agree.append(None if None in values else _close(*values))
    positive = agree[: _POINTS // 2]
    if False in positive:
        return False
    if True in positive and False not in agree:
        return True
    return bool(verify([one], [other], timeout_seconds=None))  # gold first: not symmetric


def ratio_sign(gold: tuple[str, str], answer: tuple[str, str]) -> int:
    """Sign of the constant by which one relation's difference of sides is a multiple of the other's.

    Returns:
        1 or -1 when (left - right) of both are proportional, so that the equations are the same; 0 otherwise.
    """
    sides = [parse(side) for side in (*gold, *answer)]
    if any(side is None for side in sides):
        return 0
    a, b, c, d = (_exact(side) for side in sides)
    one, other = a - b, c - d
    symbols = _symbols(one, other)
    if not symbols:
        return 0
    first = None
    for point in _points(symbols):
        above, below = _value(one, point), _value(other, point)
        if above is None or below is None:
            continue
        if above == 0 or below == 0:
            return 0
        ratio = above / below
        if first is not None and not _close(first, ratio):
            return 0
        first = ratio
    return 0 if first is None or not first.is_real else (1 if first > 0 else -1)


def solves(label: str, value: str, equation: tuple[str, str]) -> bool:
    """Whether an equation says label = value: it holds there, and is linear in the label, so nowhere else.

    xy = 1 says y = 1/x.
    """
    name, target, left, right = (parse(text) for text in (label, value, *equation))
    if name is None or not name.is_Symbol or target is None or left is None or right is None:
        return False
    difference, target = _exact(left - right), _exact(target)
    if name not in difference.free_symbols or name in target.free_symbols:
        return False
    held = 0
    for point in _points([s for s in _symbols(difference, target) if s != name]):
        at = _value(target, point)
        zero, one, two = (
            _value(difference, {**point, name: at + step}) if at is not None else None for step in range(3)
        )
        if zero is None or one is None or two is None:
            continue
        if one == 0 or abs(zero) > _TOLERANCE * abs(one) or not _close(two, 2 * one):
            return False
        held += 1
    return held > 0


def rounds_to(text: str, rounded: Fraction, digits: int) -> bool:
    """Whether an expression without variables is `rounded` at that many decimal places."""
    import sympy

    parsed = parse(text)
    if parsed is None or parsed.free_symbols:
        return False
    value = _value(_exact(parsed), {})
    shift = sympy.Integer(10) ** digits
    target = sympy.Rational(rounded.numerator, rounded.denominator) * shift
    return value is not None and target == int(target) and abs(value * shift - target) <= 1

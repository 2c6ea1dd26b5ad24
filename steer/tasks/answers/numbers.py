"""Plain numbers as people write them, and when two of them are the same.

Works on text from `steer.tasks.answers.latex.normalise`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, NamedTuple

from steer.tasks.answers.units import (
    CURRENCY,
    NUMBER_WORDS,
    Around,
    Unit,
    conflict,
    harmless_lead,
    read_units,
)

Form = Literal["integer", "decimal", "fraction", "mixed", "scientific", "repeating"]


class Number(NamedTuple):
    """A number as written: exact value, how it is written, and its unit and the words around it."""

    value: Fraction
    form: Form
    unit: Unit  # units of measure, "percent" and "degree" among them
    nouns: frozenset[str]  # other words behind the number

    @property
    def around(self) -> Around:
        """What `units.conflict` compares."""
        return self.unit, self.nouns


# --- the number itself --------------------------------------------------------------------------------------

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]{1,1000})"  # ASCII digits only
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]{{0,1000}})?|\.[0-9]{{1,1000}})"
_TIMES_TEN = r"(?: ?(?:\\times|\\cdot|\*|×|x) ?10\^)"
_EXPONENT = r"(?:\{ ?(?P<braced>[+-]?[0-9]{1,3}) ?\}|(?P<bare>-?[0-9](?![0-9])|[0-9]{1,3}))"
_SIGN = r"(?P<sign>[+-]?) ?"
_REPEATING = re.compile(
    _SIGN + r"(?P<whole>[0-9]{0,30})\.(?P<once>[0-9]{0,30})\\(?:overline|bar|dot)\{(?P<period>[0-9]{1,30})\}"
)
_POWER_OF_TEN = re.compile(_SIGN + r"(?P<mantissa>)10\^" + _EXPONENT)
_SCIENTIFIC = re.compile(
    _SIGN + rf"(?P<mantissa>{_DECIMAL})(?:{_TIMES_TEN}{_EXPONENT}|[eE](?P<e>[+-]?[0-9]{{1,3}})(?![0-9]))"
)
_MIXED = re.compile(
    _SIGN + rf"(?P<whole>{_DIGITS}) ?(?:\\frac\{{(?P<above>[0-9]{{1,9}})\}}\{{(?P<below>[0-9]{{1,9}})\}}"
    r"|(?<= )(?P<over>[0-9]{1,9})/(?P<under>[0-9]{1,9}))(?![0-9./])"
)
_FRACTION = re.compile(
    _SIGN + rf"\\frac\{{(?P<above_sign>[+-]?)(?P<above>{_DIGITS}\.?)\}}"
    rf"\{{(?P<below_sign>[+-]?)(?P<below>{_DIGITS})\}}(?![0-9./])"
)
_QUOTIENT = re.compile(_SIGN + rf"(?P<above>{_DIGITS}\.?) ?/ ?(?P<below>{_DIGITS})(?![0-9./])")
_SIMPLE = re.compile(_SIGN + rf"(?P<digits>{_DECIMAL})(?![0-9])")


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").removesuffix(".") or "0")


def _leading_number(text: str) -> tuple[Fraction, Form, int] | None:
    """Value, form and length of the number that the text starts with."""
    value: Fraction
    form: Form
    if match := _REPEATING.match(text):
        once, period = match["once"], match["period"]
        value = Fraction(int(match["whole"] + once or "0"), 10 ** len(once))
        value, form = value + Fraction(int(period), 10 ** len(once) * (10 ** len(period) - 1)), "repeating"
    elif match := _POWER_OF_TEN.match(text) or _SCIENTIFIC.match(text):
        power = int(match["braced"] or match["bare"] or match.groupdict().get("e") or 0)
        value, form = _plain(match["mantissa"] or "1") * Fraction(10) ** power, "scientific"
    elif match := _MIXED.match(text):
        above, below = int(match["above"] or match["over"]), int(match["below"] or match["under"])
        if not below:
            return None
        value, form = _plain(match["whole"]) + Fraction(above, below), "mixed"
    elif match := _FRACTION.match(text) or _QUOTIENT.match(text):
        parts = match.groupdict()
        inner = (parts.get("above_sign") or "") + (parts.get("below_sign") or "")
        if not _plain(parts["below"]) or (match["sign"] + inner).count("-") > 1:
            return None
        value, form = int(inner[-1:] + "1") * _plain(parts["above"]) / _plain(parts["below"]), "fraction"
        if "-" in inner:
            value = -abs(value)
    elif match := _SIMPLE.match(text):
        value = _plain(match["digits"])
        form = "decimal" if match["digits"].partition(".")[2].strip("0") else "integer"
    else:
        return None
    return int(match["sign"] + "1") * value, form, match.end()


# --- with what is around it ------------------------------------------------------------------------------


_LEAD = re.compile(r'\\(?:approx|therefore|sim)(?![a-zA-Z]) ?|"([^"]*)" ?|([A-Za-z][a-z]+) (?=[0-9+\-.\\])')
_LEAD_IN_WORDS = re.compile(r"()([A-Za-z][a-z']*(?: [a-z']+)*[:=]?) ?(?=[0-9+\-.\\$])")


def _leads(text: str, in_words: bool) -> Iterator[str]:
    """The text, then without what introduces the number. in_words: all of it was in \\text."""
    yield text
    for _ in range(4):
        match = (_LEAD_IN_WORDS if in_words else _LEAD).match(text)
        if not match or ((match[1] or match[2]) and not harmless_lead(match[1] or match[2])):
            return
        text = text[match.end() :]
        yield text


def read_number(text: str) -> Number | None:
    """The plain number, with its unit, that a normalised text is; None when it is anything else.

    Integers, decimals, fractions, mixed numbers, repeating decimals, powers of ten and number words count;
    whatever still has to be worked out does not.
    """
    text = text.strip()
    in_words = text.startswith('"') and text.endswith('"') and text.count('"') == 2
    if in_words:
        text = text[1:-1].strip(" .")
        if text.lower() in NUMBER_WORDS:
            return Number(Fraction(NUMBER_WORDS[text.lower()]), "integer", (), frozenset())
    elif text in NUMBER_WORDS:
        return Number(Fraction(NUMBER_WORDS[text]), "integer", (), frozenset())
    for rest in _leads(text, in_words):
        sign, money = "", ""
        if match := re.match(r"([+-]?) ?(\\\$|€|£) ?", rest):
            sign, money, rest = match[1], CURRENCY[match[2]], rest[match.end() :]
            if sign and rest[:1] in ("+", "-"):
                return None
        started = _leading_number(rest)
        if started is None:
            continue
        value, form, length = started
        behind = read_units(rest[length:], value, in_words)
        if behind is None:
            return None
        scale, (unit, nouns) = behind
        if money and not any(name in CURRENCY.values() for name, _ in unit):
            unit = tuple(sorted((*unit, (money, 1))))
        value = int(sign + "1") * value * scale
        if scale > 1 and form == "decimal" and value.denominator == 1:
            form = "integer"
        return Number(value, form, unit, nouns)
    return None


def same_number(gold: Number, answer: Number) -> bool:
    """Whether the answer is the gold, worked out as far, and in its unit where both name one.

    50% is 50, 0.5 and 1/2; 25 is 25%, but not 0.25, and 0.5 is 50%, but not 0.5%.
    """
    if conflict(gold.around, answer.around):
        return False
    percents = ("percent", 1) in gold.unit, ("percent", 1) in answer.unit
    if _equal(gold, answer):
        return percents != (False, True) or abs(gold.value) >= 1 or not gold.value
    if percents == (True, False):
        return _equal(gold._replace(value=gold.value / 100, form="decimal"), answer)
    if percents == (False, True):
        return _equal(gold, answer._replace(value=answer.value / 100))
    return False


def _equal(gold: Number, answer: Number) -> bool:
    if gold.value == answer.value:
        # 25/5 for 5 still has to be worked out
        return gold.form != "integer" or answer.form not in ("fraction", "mixed")
    # a decimal stands for the fractions that round to it at six places, as in math-verify
    forms = {gold.form, answer.form}
    if "decimal" not in forms or not forms & {"fraction", "mixed", "repeating"}:
        return False
    rounded = round(gold.value, 6)
    return rounded != 0 and rounded == round(answer.value, 6)

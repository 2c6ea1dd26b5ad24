r"""Answers that still have to be worked out, and what a plain number as the reference accepts.

A reference that is a plain number takes plain numbers only, alone or as a side of a true equation, so that no
\boxed{97+27} earns a reward for handing the question back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from steer.tasks.answers import structure
from steer.tasks.answers.latex import Unreadable, normalise
from steer.tasks.answers.numbers import Number, read_number, same_number
from steer.tasks.answers.structure import Answer, content
from steer.tasks.answers.units import conflict, harmless_lead

# --- right, wrong, or None where only sympy can tell -------------------------------------------------------


def every(verdicts: Sequence[bool | None]) -> bool | None:
    """Whether all are right: False with one wrong, else None with one undecided."""
    if False in verdicts:
        return False
    return None if None in verdicts else True


def some(verdicts: Sequence[bool | None]) -> bool | None:
    """Whether any is right: True with one right, else None with one undecided."""
    if True in verdicts:
        return True
    return None if None in verdicts else False


def equal(gold: str, answer: str, decide: bool) -> bool | None:
    """`symbolic.equal`, or None where sympy must not be asked."""
    if not decide:
        return None
    from steer.tasks.answers import symbolic

    return symbolic.equal(gold, answer)


# --- what still has to be worked out ------------------------------------------------------------------------

_WORK = {
    "floor": r"\\[lr](?:floor|ceil)",
    "choice": r"\\(?:max|min|gcd|sup|inf|[bp]?mod|div)(?![a-zA-Z])|\\operatorname|lcm",
    "absolute": r"\||\\[lr]?Vert",
    "factorial": r"!|\\binom",
    "series": r"\\(?:sum|prod|i?int|lim|oint|partial|det)(?![a-zA-Z])|\\frac\{d[^{}]*\}\{d",
    "trigonometry": r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-zA-Z])",
    "degrees": r"\\circ",
    "logarithm": r"\\(?:log|ln|lg)(?![a-zA-Z])",
}
_WORK_PATTERNS = {name: re.compile(pattern) for name, pattern in _WORK.items()}
_PRODUCT = re.compile(r"(?<![\^_\w.}])[0-9.]+(?:[*]\(?[0-9.]+(?![0-9.^])|\^(?:[0-9]|\{[0-9]+\}))")
_SUM = re.compile(r"(?:^|(?<=[(=+{\-,]))[0-9.]+[+\-]-?[0-9.]+(?=$|[)=+}\-,])")

_REAL = r"(?:[0-9]*\\frac\{-?[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+|[0-9,]*\.?[0-9]+)"
_IMAGINARY = rf"(?:{_REAL}\*?i|i\*{_REAL}|\\frac\{{-?[0-9]*i\}}\{{[0-9]+\}}|[0-9]*i/[0-9]+|i)"
_PARTS = rf"[+-]?(?:{_REAL}[+-]{_IMAGINARY}|{_IMAGINARY}[+-]{_REAL}|{_IMAGINARY})"
_COMPLEX = re.compile(rf"{_PARTS}|-?\\frac\{{{_PARTS}\}}\{{[0-9]+\}}|-?\({_PARTS}\)/[0-9]+")


def _arithmetic(text: str) -> str:
    return re.sub(r"\\(?:cdot|times|ast)(?![a-zA-Z])", "*", text).replace(" ", "")


def work_left(gold: str, answer: str) -> bool:
    """Whether the answer asks for more work than the gold does: other functions, or arithmetic on numbers.

    Where the gold is a complex number a+bi, anything that is none is work.
    """
    for pattern in _WORK_PATTERNS.values():
        if pattern.search(answer) and not pattern.search(gold):
            return True
    one, other = _arithmetic(gold), _arithmetic(answer)
    if _COMPLEX.fullmatch(one):
        return _COMPLEX.fullmatch(other) is None
    return any(pattern.search(other) and not pattern.search(one) for pattern in (_PRODUCT, _SUM))


# --- numbers ------------------------------------------------------------------------------------------------

_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\\?\w+)|\^(?:\{[^{}]*\}|\\?\w)|(?<=[a-zA-Z])\([^()]*\)")
_COMMANDS = re.compile(r"\\[a-zA-Z]+")


_NO_NAMES = {
    r"\frac", r"\sqrt", r"\cdot", r"\times", r"\pi", r"\binom", r"\sum", r"\dots", r"\div", r"\circ",
    r"\infty", r"\log", r"\ln", r"\sin", r"\cos", r"\tan", r"\max", r"\min", r"\gcd", r"\lfloor", r"\rfloor",
}  # fmt: skip


def is_name(side: str) -> bool:
    r"""Whether a side of an equation names what is asked for: x, 2m+n, f(3), \angle ABC, "Area".

    A side with one variable and numbers, such as x+1, says something else about it and is not a name.
    """
    if side.startswith('"') and not any(c.isdigit() for c in side):
        return harmless_lead(side.replace('"', "") + ":")
    bare = _SUBSCRIPT.sub("", side.replace('"', ""))
    letters = set(re.findall("[a-zA-Z]", _COMMANDS.sub("", bare)))
    letters |= set(_COMMANDS.findall(bare)) - _NO_NAMES
    if len(letters) > 1:
        bare = re.sub(r"[0-9]+(?=[a-zA-Z(\\])", "", bare)  # coefficients
    return bool(letters) and not any(c.isdigit() for c in bare)


def number_in(text: str) -> Number | None:
    """The plain number that a text is, in brackets or quotes or not."""
    return read_number(text) or read_number(content(text))


def is_number(gold: Number, answer: str, decide: bool) -> bool | None:
    """Whether an answer is the plain number `gold`, or a true equation with it as a side."""
    number = number_in(answer)
    answer = content(answer)
    if number is not None:
        return same_number(gold, number)
    if (in_base := structure.based(answer)) is not None:
        return in_base[1] == 10 and is_number(gold, in_base[0], decide)
    given = structure.read(answer)
    if given.kind == "relation":
        return _number_in_relation(gold, given, decide)
    if given.kind != "single" and len(given.items) == 1:
        return is_number(gold, given.items[0], decide)
    if (chosen := structure.choice(answer)) is not None and chosen[1]:
        return is_number(gold, chosen[1], decide)
    return False


def _number_in_relation(gold: Number, relation: Answer, decide: bool) -> bool | None:
    sides, marks = relation.items, relation.marks
    if marks == ("in",):  # x \in \{5\}
        single = is_name(sides[0]) and structure.read(sides[1]).kind == "set"
        return single and is_number(gold, sides[1], decide)
    if not set(marks) <= {"=", "approx"}:
        return False
    if not sides[0] and marks[0] == "approx":  # \approx 5
        sides, marks = sides[1:], marks[1:]
    if not all(sides):
        return False
    numbers = [number_in(side) for side in sides]
    this = next((n for n in numbers[::-1] if n is not None and same_number(gold, n)), None)
    if this is None:
        return False
    verdicts: list[bool | None] = []
    for place, (side, number) in enumerate(zip(sides, numbers, strict=True)):
        if number is not None:
            rounded = "approx" in marks[max(place - 1, 0) : place + 1] and _rounds(number, this)
            equal_value = number.value == this.value and not conflict(this.around, number.around)
            verdicts.append(equal_value or rounded or same_number(gold, number))
        elif not is_name(side):
            value = f"\\frac{{{this.value.numerator}}}{{{this.value.denominator}}}"
            verdicts.append(equal(_unit_free(side), value, decide))
    return every(verdicts)


def _rounds(one: Number, other: Number) -> bool:
    r"""Whether one number is the other one rounded, as in 12.57 \approx 12.566."""
    return any(
        round(one.value, digits) == other.value or round(other.value, digits) == one.value
        for digits in range(7)
    )


def _unit_free(text: str) -> str:
    return re.sub(r'"[^"]*"(?:\^\{?-?[0-9]\}?)?|\\\$', " ", text).strip()


_OPERATOR = re.compile(
    r"[+*^!/|]|\\(?:times|cdot|div|frac|sqrt|binom|sum|prod|int|log|ln|exp|max|min|gcd|sin|cos|tan|pm)\b"
    r"|\\[lr](?:floor|ceil)|\\operatorname|(?<=[\w)}\]])-|(?<=[\d)}])[({]|--"
)


def unevaluated(gold: str, answer: str) -> bool:
    r"""Whether a wrong answer to a plain number is a calculation still to do, such as \boxed{97 + 27}."""
    try:
        last = normalise(answer.rpartition("=")[2])
        if number_in(normalise(gold)) is None:
            return False
        if (given := number_in(last)) is not None:
            return given.form in ("fraction", "mixed")
        letters = re.search("[a-zA-Z]", _COMMANDS.sub("", _unit_free(last)))
        return letters is None and _OPERATOR.search(last) is not None
    except Unreadable:
        return False

r"""Whether an answer is the reference answer, by its structure: lists, sets, intervals, equations, words.

`same` takes both apart until numbers and words decide, or single expressions are left, which only sympy can
compare (`steer.tasks.answers.symbolic`). It runs twice at most: in the calling process, where it says None
when it needs sympy, and then in a worker.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from steer.tasks.answers import structure
from steer.tasks.answers.latex import Unreadable, normalise
from steer.tasks.answers.numbers import Number, read_number
from steer.tasks.answers.structure import Answer, content, unquoted
from steer.tasks.answers.units import Around, conflict, harmless_lead, read_units
from steer.tasks.answers.worked_out import equal, every, is_name, is_number, number_in, some, work_left

_MOST_ELEMENTS = 64  # of a list that is compared element by element


def _ratio_sign(gold: tuple[str, str], answer: tuple[str, str], decide: bool) -> int | None:
    if not decide:
        return None
    from steer.tasks.answers import symbolic

    return symbolic.ratio_sign(gold, answer)


# --- expressions with units ---------------------------------------------------------------------------------

_UNITS_BEHIND = re.compile(
    r'(?P<units>(?:(?:\\cdot|/|\^\{?\\circ\}?(?="?[CF])|,|\.| )*(?:"[^"]*"|\("[^"]*"\))(?:\^\{?-?[0-9]\}?)?)+'
    r"| (?:sq\.? |square |cubic )?(?:mm|cm|km|inches|feet|ft|meters|miles|units|degrees|radians|dollars|"
    r"seconds|minutes|hours)(?:\^[23])?)$"
)


def _without_units(text: str) -> tuple[str, Around]:
    """An expression without the units and words around it, and those."""
    for _ in range(3):
        match = re.match(r'\\(?:approx|therefore)(?![a-zA-Z]) ?|"([^"]*)" ?(?=.)', text)
        if not match or (match[1] and not harmless_lead(match[1])):
            break
        text = text[match.end() :]
    text = text.removesuffix(r"\checkmark").strip()
    match = _UNITS_BEHIND.search(text)
    if match and match.start() > 0:
        read = read_units(match["units"], Fraction(0))
        if read is not None and read[0] == 1:
            return text[: match.start()].strip(), read[1]
    return text, ((), frozenset())


# --- collections --------------------------------------------------------------------------------------------


def _match(golds: tuple[str, ...], given: tuple[str, ...], decide: bool) -> bool | None:
    """Whether the elements are the same in some order."""
    if len(golds) != len(given):
        return False
    left = Counter(golds) - Counter(given)
    other = Counter(given) - Counter(golds)
    rest, candidates = list(left.elements()), list(other.elements())
    if len(rest) > _MOST_ELEMENTS:
        return False
    undecided = False
    for gold in rest:
        for place, candidate in enumerate(candidates):
            verdict = same(gold, candidate, decide)
            if verdict:
                del candidates[place]
                break
            undecided |= verdict is None
        else:
            if not undecided:
                return False
    return None if undecided and candidates else True


def _elements(answer: Answer) -> tuple[str, ...]:
    r"""Elements of a list or set, an element with \pm counted as two."""
    elements: list[str] = []
    for item in answer.items:
        inner = structure.read(item)
        elements += inner.items if inner.kind == "list" and inner.marks == ("and",) else (item,)
    return tuple(elements)


def _same_collection(gold: Answer, answer: Answer, text: str, decide: bool) -> bool | None:
    if gold.kind in ("list", "set"):
        if answer.kind in ("list", "set"):
            return _match(_elements(gold), _elements(answer), decide)
        if answer.kind == "single" and "," in text and gold.kind == "list":  # "100,200" for "100, 200"
            return _match(_elements(gold), tuple(part.strip() for part in text.split(",")), decide)
        if answer.kind == "relation" and answer.marks == ("in",) and is_name(answer.items[0]):
            return _same_collection(gold, structure.read(answer.items[1]), answer.items[1], decide)
        if len(_elements(gold)) == 1:
            return same(_elements(gold)[0], text, decide)
        return False
    if gold.kind != answer.kind or len(gold.items) != len(answer.items):
        return False
    if gold.kind in ("matrix", "interval", "tuple") and gold.marks != answer.marks:
        return False
    return every([same(g, a, decide) for g, a in zip(gold.items, answer.items, strict=True)])


# --- relations and intervals --------------------------------------------------------------------------------

_INEQUALITIES = {"<": "<", "le": "le", ">": "<", "ge": "le"}


def _upwards(relation: Answer) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Sides and marks of inequalities, turned so that every mark is < or le."""
    marks = set(relation.marks)
    if marks <= {"<", "le"}:
        return relation.items, relation.marks
    if marks <= {">", "ge"}:
        return relation.items[::-1], tuple(_INEQUALITIES[m] for m in relation.marks[::-1])
    return None


def _ranges(text: str) -> tuple[str | None, tuple[Answer, ...]] | None:
    """Variable and intervals that an interval, a union or inequalities say; None for anything else."""
    answer = structure.read(text)
    if text in (r"\mathbb{R}", '"all real numbers"', '"all reals"'):
        return None, (Answer("interval", (r"-\infty", r"\infty"), ("(", ")")),)
    if answer.kind == "interval" or (answer.kind == "tuple" and len(answer.items) == 2):
        return None, (Answer("interval", tuple(_endpoint(i) for i in answer.items), answer.marks),)
    if answer.kind == "set":
        return None, tuple(Answer("set", (item,)) for item in answer.items)
    if answer.kind == "union" or (answer.kind == "list" and set(answer.marks) == {"or"}):
        parts = [_ranges(item) for item in answer.items]
        if any(part is None for part in parts):
            return None
        names = {part[0] for part in parts if part}
        if len(names) > 1:
            return None
        return next(iter(names)), tuple(r for part in parts if part for r in part[1])
    if answer.kind != "relation":
        return None
    if answer.marks == ("in",) and is_name(answer.items[0]):
        inner = _ranges(answer.items[1])
        return None if inner is None or inner[0] is not None else (answer.items[0], inner[1])
    turned = _upwards(answer)
    if turned is None:
        return None
    sides, marks = turned
    if len(sides) == 2 and is_name(sides[0]) != is_name(sides[1]):
        strict = marks[0] == "<"
        if is_name(sides[0]):
            return sides[0], (Answer("interval", (r"-\infty", sides[1]), ("(", ")" if strict else "]")),)
        return sides[1], (Answer("interval", (sides[0], r"\infty"), ("(" if strict else "[", ")")),)
    if len(sides) == 3 and is_name(sides[1]):
        brackets = ("(" if marks[0] == "<" else "[", ")" if marks[1] == "<" else "]")
        return sides[1], (Answer("interval", (sides[0], sides[2]), brackets),)
    return None


def _endpoint(text: str) -> str:
    return text.removeprefix("+") if text.endswith(r"\infty") else text


def _same_ranges(gold: str, answer: str, decide: bool) -> bool | None:
    one, other = _ranges(gold), _ranges(answer)
    if one is None or other is None:
        return False
    if one[0] is not None and other[0] is not None and one[0] != other[0]:
        return False
    if len(one[1]) != len(other[1]):
        return False
    rest, undecided = list(other[1]), False
    for part in one[1]:
        verdicts = [_same_range(part, candidate, decide) for candidate in rest]
        if True in verdicts:
            del rest[verdicts.index(True)]
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _same_range(gold: Answer, answer: Answer, decide: bool) -> bool | None:
    if gold.kind != answer.kind or gold.marks != answer.marks:
        return False
    return every([same(g, a, decide) for g, a in zip(gold.items, answer.items, strict=True)])


def _same_relation(gold: Answer, text: str, decide: bool) -> bool | None:
    """Whether an answer is a reference such as y=2x+3, x<3 or AB=9."""
    answer = structure.read(text)
    if set(gold.marks) <= {"=", "approx"}:
        if answer.kind == "relation" and set(answer.marks) <= {"=", "approx"}:
            return _same_equation(gold, answer, decide)
        if "approx" in gold.marks:
            return some([same(side, text, decide) for side in gold.items if side])
        if len(gold.items) != 2:
            return False
        if _is_label(gold.items[0]):
            return same(gold.items[1], text, decide)
        return _is_label(gold.items[1]) and same(gold.items[0], text, decide)
    if answer.kind != "relation":
        return gold.marks == ("in",) and is_name(gold.items[0]) and same(gold.items[1], text, decide)
    one, two = _upwards(gold) or gold[1:], _upwards(answer) or answer[1:]
    if one[1] != two[1]:
        return False
    direct = every([same(g, a, decide) for g, a in zip(one[0], two[0], strict=True)])
    if direct is not False or one[1] not in (("<",), ("le",)) or _still_to_solve(gold, answer):
        return direct
    sign = _ratio_sign((one[0][0], one[0][1]), (two[0][0], two[0][1]), decide)
    return None if sign is None else sign == 1


def _same_equation(gold: Answer, answer: Answer, decide: bool) -> bool | None:
    if len(gold.items) != 2:
        pairs = zip(gold.items, answer.items, strict=False)
        return len(gold.items) == len(answer.items) and every([same(g, a, decide) for g, a in pairs])
    if not all(answer.items):
        return False
    if len(answer.items) > 2:  # y = 2x + 3 = 3 + 2x
        first, *others = answer.items
        return every([_same_equation(gold, Answer("relation", (first, s), ("=",)), decide) for s in others])
    for sides in (answer.items, answer.items[::-1]):
        if _is_label(gold.items[0]) and _same_label(gold.items[0], sides[0]):
            return same(gold.items[1], sides[1], decide)
        if _is_label(gold.items[1]) and gold.items[1] == sides[1]:
            return same(gold.items[0], sides[0], decide)
    if _still_to_solve(gold, answer):
        return False
    left, right = gold.items
    sign = _ratio_sign((left, right), (answer.items[0], answer.items[1]), decide)
    if sign or (decide and _one_solves_the_other(gold, answer)):
        return True
    words = [structure.words(side) for side in (*gold.items, *answer.items)]
    if all(words):
        return sorted(words[:2]) == sorted(words[2:])  # type: ignore[type-var]
    return None if sign is None else False


def _still_to_solve(gold: Answer, answer: Answer) -> bool:
    """Whether the gold says what number a name is, and the answer does not: 2x=4 for x=2, but not x-2=0."""

    def solved(sides: tuple[str, ...]) -> bool:
        pairs = (sides, sides[::-1])
        return any(_is_label(label) and number_in(value) is not None for label, value in pairs)

    moved = [re.fullmatch(r'([^"+-]+)[+-](.+)', side) for side in answer.items if "0" in answer.items]
    said = [answer.items, *(parts.groups() for parts in moved if parts)]
    return solved(gold.items) and not any(solved(sides) for sides in said)


def _same_label(one: str, other: str) -> bool:
    """y = x^2 and f(x) = x^2 say the same."""
    return one.replace(", ", ",") == other.replace(", ", ",") or (
        "y" in (one, other) and any(re.fullmatch(r"[a-zA-Z]\(x\)", s) for s in (one, other))
    )


def _one_solves_the_other(gold: Answer, answer: Answer) -> bool:
    from steer.tasks.answers import symbolic

    for one, other in ((gold, answer), (answer, gold)):
        for label, value in (one.items, one.items[::-1]):
            if _is_label(label) and symbolic.solves(label, value, (other.items[0], other.items[1])):
                return True
    return False


_LABEL = re.compile(
    r"(?:\\(?!sqrt|frac)[a-zA-Z]+ ?)?[a-zA-Z ]*(?:_(?:\w|\{[^{}]*\}))?'*"
    r"(?:\((?:[\w()]|, ?|\\(?:theta|(?:var)?phi|rho|alpha|beta|gamma|lambda|mu)(?![a-zA-Z]))*\))?"
)


def _is_label(side: str) -> bool:
    r"""Whether a side of an equation is only a name: x, AB, X_d, f(x), (x, y), a:b, \angle ABC, "Area"."""
    if side.startswith('"'):
        return is_name(side)
    if re.match(r"\((?:[^()]*,)? ?[0-9]", side):  # (x, 1) says something of x
        return False
    return all(re.search("[a-zA-Z]", part) and _LABEL.fullmatch(part) for part in side.split(":"))


def _in_equation(gold: str, answer: Answer, decide: bool) -> bool | None:
    """Whether an equation is the answer to an expression: x = gold, or a true one with the gold as a side."""
    sides = [side for side in answer.items if side]
    if len(sides) != len(answer.items) - (answer.marks[0] == "approx" and not answer.items[0]):
        return False
    named = [side for side in (sides[0], sides[-1]) if _is_label(side)]
    rest = [side for side in sides if side not in named] or sides[-1:]
    direct = [same(gold, side, decide) for side in rest]
    checked: list[bool | None] = []
    for side, verdict in zip(rest, direct, strict=True):
        rounded = read_number(side) if "approx" in answer.marks and side == sides[-1] else None
        if verdict is False and rounded is not None:
            verdict = _approximates(gold, rounded) if decide else None
        elif verdict is False and len(rest) > 1:
            verdict = equal(gold, _without_units(side)[0], decide)
        checked.append(verdict)
    return every([some(direct), *checked])


def _approximates(gold: str, rounded: Number) -> bool:
    from steer.tasks.answers import symbolic

    return any(symbolic.rounds_to(_without_units(gold)[0], rounded.value, digits) for digits in range(1, 10))


# --- everything ---------------------------------------------------------------------------------------------


def same(gold: str, answer: str, decide: bool) -> bool | None:
    """Whether a normalised answer is the normalised reference.

    Args:
        gold: the reference, as `steer.tasks.answers.latex.normalise` returns it.
        answer: the answer, the same.
        decide: whether single expressions may be compared by sympy, which can hang; only in a worker.

    Returns:
        True or False; None when sympy is needed and `decide` is False.

    Raises:
        Unreadable: brackets or quotes that do not match.
    """
    if gold == answer:
        return bool(gold)
    if not gold or not answer:
        return False
    gold_letter = structure.letter(gold)
    if gold_letter is not None:
        chosen = structure.choice(answer)
        given = structure.letter(answer) or (chosen[0] if chosen else None)
        if given is not None:
            return given == gold_letter
    number = number_in(gold)
    if number is not None:
        return is_number(number, answer, decide)
    gold_words = structure.words(gold)
    if gold_words is not None:
        verdict = gold_words in (structure.words(answer), structure.words(content(answer)))
        if verdict or structure.read(gold).kind != "list":
            return verdict
    if (in_base := structure.based(gold)) is not None:
        given_base = structure.based(answer)
        return in_base == given_base if given_base else answer.strip('"') == in_base[0]
    return _same_structure(gold, answer, decide)


_RANGES = ("interval", "tuple", "union")


def _same_structure(gold: str, answer: str, decide: bool) -> bool | None:
    one, other = structure.read(gold), structure.read(answer)
    if one.kind == "relation":
        return some([_same_relation(one, answer, decide), _same_ranges(gold, answer, decide)])
    if one.kind != "single" and other.kind == "relation" and other.marks == ("=",):  # (x, y) = (1, 2)
        return _is_label(other.items[0]) and same(gold, other.items[1], decide)
    ranges = _same_ranges(gold, answer, decide) if one.kind != "set" else False
    if ranges is not False or one.kind == "union" or (one.kind in _RANGES and other.kind == "relation"):
        return ranges
    if one.kind != "single" or other.kind in ("tuple", "interval", "union", "matrix", "ratio"):
        return _same_collection(one, other, answer, decide)
    if other.kind == "relation":
        return _in_equation(gold, other, decide) if set(other.marks) <= {"=", "approx"} else False
    if other.kind in ("list", "set"):
        return same(gold, other.items[0], decide) if len(other.items) == 1 else False
    return _same_expression(gold, answer, decide)


def _same_expression(gold: str, answer: str, decide: bool) -> bool | None:
    gold, gold_unit = _without_units(unquoted(gold))
    answer, answer_unit = _without_units(unquoted(answer))
    if conflict(gold_unit, answer_unit):
        return False
    gold, answer = content(gold), content(answer)
    if gold == answer:
        return True
    if (chosen := structure.choice(answer)) is not None and chosen[1]:
        return same(gold, chosen[1], decide)
    if structure.words(answer) is not None or work_left(gold, answer):
        return False
    return equal(gold, answer, decide)


def compare(gold: str, answer: str, decide: bool = False) -> bool | None:
    """`same` for texts as they were written. One that cannot be read is right only for an identical one."""
    if gold.strip() == answer.strip():
        return bool(gold.strip())
    if _suspicious(gold + answer):
        return False
    try:
        return same(normalise(gold), normalise(answer), decide)
    except Unreadable:
        return False


def _suspicious(text: str) -> bool:
    """Characters that parsers read as a person would not: NUL and the like, and other scripts' digits."""
    return any((c < " " and c not in "\t\n\r") or (c > "~" and c.isdecimal()) for c in text)

"""What kind of answer a text is: a list, a set, an interval, an equation, words, or one expression.

Works on text from `steer.tasks.answers.latex.normalise`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

from steer.tasks.answers.latex import ROW_END, Unreadable, normalise
from steer.tasks.answers.units import NUMBER_WORDS

Kind = Literal["list", "set", "tuple", "interval", "union", "matrix", "relation", "ratio", "single"]


class Answer(NamedTuple):
    """What an answer is made of.

    items: elements, sides of a relation, parts of a union, cells of a matrix, or the one text.
    marks: brackets of an interval, relations between sides, the shape of a matrix, "and"/"or" of a list.
    """

    kind: Kind
    items: tuple[str, ...]
    marks: tuple[str, ...] = ()


_OPENING, _CLOSING = "([{", ")]}"
_JOINT = re.compile(r'[,;]? ?"[,;]? ?(and|or)[,;]?"|[,;]? (and|or)(?= )|\\(lor|vee|land|wedge)(?![a-zA-Z])')
_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|ne|approx|in|equiv|notin|sim)(?![a-zA-Z])|\\not=")
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array|cases)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)


def _levels(text: str) -> list[int]:
    """Bracket depth at each character; quoted words count as one deep."""
    depths, depth, quoted = [], 0, False
    begins = {match.start(): 1 for match in re.finditer(r"\\begin\{", text)}
    begins |= {match.end(): -1 for match in re.finditer(r"\\end\{\w+\}", text)}
    for place, c in enumerate(text):
        depth += begins.get(place, 0)
        if c == '"':
            quoted = not quoted
            depths.append(depth + 1)
            continue
        if not quoted and c in _CLOSING:
            depth -= 1
            if depth < 0:
                raise Unreadable
        depths.append(depth + quoted)
        if not quoted and c in _OPENING:
            depth += 1
    if depth + begins.get(len(text), 0) or quoted:
        raise Unreadable
    return depths


def _cut(text: str, places: list[tuple[int, int]]) -> tuple[str, ...]:
    parts, start = [], 0
    for begin, end in places:
        parts.append(text[start:begin].strip())
        start = end
    return (*parts, text[start:].strip())


def _commas(text: str, depths: list[int], keep_thousands: bool) -> list[tuple[int, int]]:
    places = [i for i, c in enumerate(text) if c in ",;" and depths[i] == 0]
    if keep_thousands:
        kept = {i for match in _THOUSANDS.finditer(text) for i in range(match.start(), match.end())}
        others = [i for i in places if i not in kept]
        # "1,234, 5" is a list of two, "54,108,135" a number, and "7,54,108,135,1" no two of these
        if all(text[i] == ";" or text[i + 1 : i + 2] == " " for i in others):
            places = others
    return [(i, i + 1) for i in places]


def _elements(text: str, keep_thousands: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The elements of an unbracketed list, and the words "and" and "or" between them."""
    joints = []

    def joint(match: re.Match[str]) -> str:
        word = match[1] or match[2] or {"lor": "or", "vee": "or"}.get(match[3], "and")
        joints.append(word)
        return " ; "

    text = _JOINT.sub(joint, text)
    parts = _cut(text, _commas(text, _levels(text), keep_thousands))
    return parts, tuple(joints)


def whole_bracket(text: str) -> bool:
    """Whether the first character opens a bracket that the last one closes."""
    if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return False
    depths = _levels(text)
    return all(depth > 0 for depth in depths[1:-1])


def unquoted(text: str) -> str:
    """A text that is one quotation, without its quotes; any other text as it is."""
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        return normalise(text[1:-1])
    return text


@lru_cache(maxsize=4096)
def read(text: str) -> Answer:
    """The structure of a normalised text.

    Raises:
        Unreadable: brackets or quotes that do not match.
    """
    match = _MATRIX.fullmatch(text)
    if match and r"\begin{" not in match[2]:
        rows = [row.strip() for row in match[2].strip().removesuffix(ROW_END).split(ROW_END)]
        cells = [[cell.strip() for cell in row.split("&")] for row in rows]
        name = {"vmatrix": "determinant", "Vmatrix": "norm", "cases": "cases"}.get(match[1], "matrix")
        shape = (name, *(str(len(row)) for row in cells))
        return Answer("matrix", tuple(cell for row in cells for cell in row), shape)
    depths = _levels(text)
    if (bare := unquoted(text)) != text:
        parts, joints = _elements(bare, keep_thousands=True)
        return Answer("list" if len(parts) > 1 else "single", tuple(f'"{part}"' for part in parts), joints)
    parts, joints = _elements(text, keep_thousands=True)
    if len(parts) > 1:
        if joints and not parts[0]:
            raise Unreadable
        return Answer("list", tuple(part for part in parts if part), joints)
    cups = [m.span() for m in re.finditer(r"\\cup(?![a-zA-Z])", text) if depths[m.start()] == 0]
    relations = [m for m in _RELATION.finditer(text) if depths[m.start()] == 0]
    if relations:
        sides = _cut(text, [m.span() for m in relations])
        return Answer("relation", sides, tuple(m[0].lstrip("\\") for m in relations))
    if cups:
        return Answer("union", _cut(text, cups))
    if text.startswith(r"\{") and text.endswith(r"\}") and whole_bracket(text[1:-2] + "}"):
        inside = text[2:-2].strip()
        return Answer("set", _elements(inside, False)[0] if inside else ())
    if text == r"\emptyset":
        return Answer("set", ())
    if any(depths[match.start()] == 0 for match in re.finditer(r"\\(?:pm|mp)(?![a-zA-Z])", text)):
        return _signs(text)
    if whole_bracket(text):
        inside = text[1:-1].strip()
        parts = _cut(inside, _commas(inside, _levels(inside), keep_thousands=False))
        if len(parts) == 1:
            return read(inside) if inside else Answer("single", (text,))
        if text[0] == "{" or text[-1] == "}":
            return read(inside)
        if len(parts) == 2 and (text[0], text[-1]) != ("(", ")"):
            return Answer("interval", parts, (text[0], text[-1]))
        return Answer("tuple" if text[0] == "(" else "list", parts, (text[0], text[-1]))
    colons = [(i, i + 1) for i, c in enumerate(text) if c == ":" and depths[i] == 0]
    if colons and all(part[:1].isdigit() or part.isalnum() for part in _cut(text, colons)):
        return Answer("ratio", _cut(text, colons))
    return _signs(text) if re.search(r"\\pm(?![a-zA-Z])", text) else Answer("single", (text,))


def _signs(text: str) -> Answer:
    r"""Two expressions, with the upper and with the lower signs of every \pm and \mp."""
    upper = re.sub(r"\\pm(?![a-zA-Z]) ?", "+", re.sub(r"\\mp(?![a-zA-Z]) ?", "-", text))
    lower = re.sub(r"\\mp(?![a-zA-Z]) ?", "+", re.sub(r"\\pm(?![a-zA-Z]) ?", "-", text))
    return Answer("list", (upper, lower), ("and",))


# --- words, letters, bases ----------------------------------------------------------------------------------

_SHORT_WORDS = ("yes", "no", "odd", "red", "one", "two", "six", "ten", "on", "up", "may", "all", "any", "not")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'\-]*(?: [A-Za-z0-9'\-]+)*")
_ARTICLES = re.compile(r"^(?:the|an|a) (?=\w{2})")


def words(text: str) -> str | None:
    """The words that a text is, in one spelling; None when it is maths.

    Several letters without \\text are a product unless they look like a word: "xyz" is one, "CBA", "No" and
    "east" are not.
    """
    quoted = '"' in text
    if quoted:
        bare = unquoted(text)
        if bare == text:  # "A5"_{11}, or maths beside words
            return None
    else:
        bare = text
    bare = bare.strip(" .!").strip()
    if len(bare) < 2 or not _WORDS.fullmatch(bare):
        return None
    first = bare.split()[0]
    looks = first[0].isupper() or len(first) > 3 or first.lower() in _SHORT_WORDS
    if not (quoted or looks):
        return None
    return _ARTICLES.sub("", " ".join(bare.lower().split()))


_LETTER = re.compile(r'"?(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\b[ :]*)?"? ?\(?"?([A-Z])"?\)?"?')
_CHOICE = re.compile(
    r'"\(([A-Z])\)"|"([A-Z])[.):]"|\("?([A-Z])"?\)(?!\w)|\(?([A-Z])[.):](?!\w)|"\(?([A-Z])[.):]+(?= )'
)


def letter(text: str) -> str | None:
    """The capital that a text is, such as the letter of a choice."""
    match = _LETTER.fullmatch(text)
    return match[1] if match else None


def choice(text: str) -> tuple[str, str] | None:
    """Letter and text of a choice written out, such as "(C) 12"; None when there is no letter in front."""
    match = _CHOICE.match(text)
    if not match:
        return None
    rest = text[match.end() :].strip()
    if match[5]:
        rest = '"' + rest
        rest = rest if rest.count('"') == 2 and not rest.startswith('"" ') else rest.replace('"', "", 1)
    if _CHOICE.search(rest) or re.search(r"\b(?:or|and|not)\b", rest):
        return None
    return next(group for group in match.groups() if group), unquoted(rest)


_BASED = re.compile(
    r'(-?)\(?"?([0-9A-Z]*[0-9][0-9A-Z]*)"?\)?'
    r'(?:_\{?\(?"?([0-9]{1,3}|[a-z]+)"?\)?\}?| ?"?\(?(?:in )?base[ -]?"? ?([0-9]{1,3}|[a-z]+)\)?"?)'
)


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of an integer with a base below it, such as 432_7."""
    match = _BASED.fullmatch(text)
    if not match:
        return None
    written = match[3] or match[4]
    base = int(written) if written.isdigit() else NUMBER_WORDS.get(written, 0)
    return (match[1] + match[2], base) if base > 1 else None


def content(text: str) -> str:
    """The inside of brackets, \\{ \\} included, around a single value, and of quotes."""
    while True:
        previous = text
        if text.startswith(r"\{") and text.endswith(r"\}") and whole_bracket(text[1:-2] + "}"):
            inside = text[2:-2].strip()
        elif text[:1] in ("(", "{", "[") and whole_bracket(text) and text[0] + text[-1] in ("()", "{}", "[]"):
            inside = text[1:-1].strip()
        else:
            inside = unquoted(text)
        if inside and "," not in inside and read(inside).kind in ("single", "relation"):
            text = inside
        if text == previous:
            return text

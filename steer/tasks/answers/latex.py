r"""LaTeX brought to one spelling: the text that all of grading works on."""

from __future__ import annotations

import re
from functools import lru_cache

MAX_LAYERS = 40  # nested brackets; deeper is nonsense, and recursion would be too deep


class Unreadable(Exception):
    """The text is not an answer: unbalanced, or nested too deeply. Never leaves the grading code."""


_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
    "∈": r"\in ", "°": r"^\circ ", "±": r"\pm ", "≈": r"\approx ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "→": r"\to ", "√": r"\sqrt ", "“": "", "”": "", '"': "", "’": "'", "，": ",", "∠": r"\angle ",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_COMMANDS = {
    "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "varnothing": "emptyset",
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "lbrace": "{", "rbrace": "}",
    "dbinom": "binom", "tbinom": "binom", "bigcup": "cup", "ldots": "dots", "cdots": "dots", "dotsc": "dots",
    "thickapprox": "approx", "approxeq": "approx", "simeq": "approx",
}  # fmt: skip
_COMMANDS = {name: f"\\{command}" for name, command in _COMMANDS.items()} | {
    "lbrack": "[", "rbrack": "]", "lt": "<", "gt": ">", "colon": ":",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "degree": "^\\circ",
}  # fmt: skip
_COMMAND = re.compile(r"\\(" + "|".join(_COMMANDS) + r")(?![a-zA-Z])")
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z])\s*\.?"
    r"|\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|boldmath|normalfont)(?![a-zA-Z])"
    r"|\\(?:hspace|vspace|color)\*?\{[^{}]*\}|\\!\s*|(?<!\\)\\[()\[\]]|\\phantom\s*(?:\{[^{}]*\}|-)?"
)
_WIDE = re.compile(r"\\q?quad(?![a-zA-Z])")
_SPACE = re.compile(r"(?:\s|~|\\[,;: ]|\\(?:space|thinspace|enspace)(?![a-zA-Z]))+")
_GROUP = re.compile(
    r"\\(text|textbf|textit|textrm|textnormal|textsf|texttt|textup|emph|mbox|hbox|mathrm|operatorname\*?|"
    r"mathbf|boldsymbol|bm|mathit|mathsf|mathtt|boxed|fbox|textcolor\{[^{}]*\}|underline|mathord|mathbin|mathrel)"
    r"\s*\{([^{}]*)\}"
)
_MATHS_FONTS = (
    "mathbf",
    "boldsymbol",
    "bm",
    "mathit",
    "mathsf",
    "mathtt",
    "boxed",
    "fbox",
    "underline",
    "math",
)
_FUNCTIONS = (
    "gcd",
    "lcm",
    "max",
    "min",
    "sin",
    "cos",
    "tan",
    "log",
    "ln",
    "exp",
    "arcsin",
    "arccos",
    "arctan",
)
ROW_END = "\ue001"  # stands for \\\\, so that "\\\\ " is not read as a space
_ELLIPSIS = re.compile(r"(\.[0-9]{0,20}?)(?:([0-9])\2\2+|([0-9]{2,6}?)\3+) ?(?:\\dots|\.\.\.)(?![0-9.])")
_BRACED = re.compile(r"([\^_])\{(\w|\\[a-zA-Z]+)\}")


def _font(match: re.Match[str]) -> str:
    command, content = match[1], match[2]
    bare = content.replace('"', "").strip()
    if command.startswith("operatorname") or (command == "mathrm" and bare in _FUNCTIONS):
        return f"\\operatorname{{{bare}}} " if bare not in _FUNCTIONS or bare in ("lcm",) else f"\\{bare} "
    if command.startswith(("mathbf", *_MATHS_FONTS, "textcolor")) and command != "mathrm":
        return f" {content} "
    if command == "mathrm" and bare in ("d", "e", "i", "R", "Z", "N", "Q"):
        return f" {bare} "
    if not any(c.isalpha() for c in bare):
        return f" {bare} "
    return f'"{_SPACE.sub(" ", content.replace(chr(34), " ")).strip()}"'


def _argument(text: str, place: int) -> tuple[str, int]:
    """The argument of a command at `place`: a group's content, a command, or one character."""
    while place < len(text) and text[place] == " ":
        place += 1
    if text[place : place + 1] == "{":
        depth = 0
        for end in range(place, len(text)):
            if text[end - 1] != "\\":
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                if depth == 0:
                    return text[place + 1 : end], end + 1
        raise Unreadable
    if match := re.compile(r"\\[a-zA-Z]+").match(text, place):
        return match[0], match.end()
    return text[place : place + 1], place + 1


def _arguments(text: str, name: str, count: int) -> str:
    r"""Every argument of a command in braces: \frac12 becomes \frac{1}{2}."""
    out, place = [], 0
    for match in re.finditer(rf"\\{name}(?![a-zA-Z])", text):
        if match.start() < place:
            continue  # inside an argument that was copied; its own arguments are handled below
        out.append(text[place : match.end()])
        place = match.end()
        for _ in range(count):
            inner, place = _argument(text, place)
            out.append(
                "{" + (_arguments(inner, name, count) if f"\\{name}" in inner else inner).strip() + "}"
            )
    return "".join(out) + text[place:]


def _nesting(text: str) -> int:
    depth = deepest = 0
    for c in text:
        if c in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in ")]}":
            depth -= 1
    return deepest


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    r"""The text in one spelling: \text{cm} as "cm", no sizes, fonts or spacing that carry no meaning.

    Raises:
        Unreadable: braces that never close, or nesting beyond MAX_LAYERS.
    """
    if _nesting(text) > MAX_LAYERS:
        raise Unreadable
    for symbol, command in _SYMBOLS.items():
        text = text.replace(symbol, command)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = (
        re.sub(r"\\\\(?:\s*\[-?[0-9.]+ ?[a-z]{2}\])?", ROW_END, text)
        .replace("{,}", ",")
        .replace(r"\left{", r"\left\{")
        .replace(r"\$", "\ue000")
    )
    text = re.sub(r"\$\s*,?\s*\$", ", ", text).replace("$", "").replace("\ue000", r"\$")
    text = _DROPPED.sub("", text)
    text = _COMMAND.sub(lambda m: _COMMANDS[m[1]], text)
    text = _WIDE.sub(" ;", _SPACE.sub(" ", text))
    for _ in range(6):
        text, changed = _GROUP.subn(_font, text)
        if not changed:
            break
    text = _SPACE.sub(" ", text).strip()
    for name, count in (("frac", 2), ("sqrt", 1), ("binom", 2), ("overline", 1), ("bar", 1), ("dot", 1)):
        if f"\\{name}" in text and not (name == "sqrt" and re.search(r"\\sqrt ?\[", text)):
            text = _arguments(text, name, count)
    text = _BRACED.sub(r"\1\2", re.sub(r"([\^_]) ?\{ ?([^{} ]*) ?\}", r"\1{\2}", text))
    text = re.sub(r"\{([+\-])\}", r"\1", text)
    text = re.sub(r"(times|cdot|[ *])\{([0-9.]+)\}(?=\^)", r"\1 \2", text).replace("  ", " ")
    text = _ELLIPSIS.sub(r"\1\\overline{\2\3}", text)
    # a space says nothing beside a bracket or an operator, but "1 2" is not 12 and "\pi r" is not "\pir"
    text = re.sub(r" ?([=+*/<>^_(\[{|]) ?|(?<=[-]) | (?=[-)\]}|:])", lambda m: m[1] or "", text)
    text = re.sub(r"(?<=:) ", "", text)
    previous = None
    while text != previous:
        previous = text
        text = text.strip(" ;,").removesuffix(ROW_END)
        if text.endswith(".") and not text.endswith(r"\dots."):
            text = text[:-1]
    return text

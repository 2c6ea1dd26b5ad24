r"""
What a completion answers when no form is asked of it: the box where there is one, else the phrase "the answer
is ...", else the last number. It separates knowing an answer from writing it in `\boxed{}`: a model that was
trained to write boxes gains nothing here from the box alone.
"""

from __future__ import annotations

import re

from steer.tasks.answers.units import changes_number
from steer.tasks.grading import extract_boxed

_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
# Not inside a word or another number: "x3", "v1.2". A minus sign counts where nothing is subtracted from.
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![)}}\]])[-\u2212])?(?:\\[dt]?frac\{{[0-9]+\}}\{{[0-9]+\}}|{_DECIMAL}(?:/[0-9]+(?![0-9.]))?)"
)
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*(?:\\\[\s*)?", re.IGNORECASE)
# The end of a line, or a full stop that ends a sentence.
_END = re.compile(r"\n|\.(?=\s|$)")
_WORDS = re.compile(r"[A-Za-z ,'\u20ac$%*]*")
_MINUS = re.compile(r"(?<![0-9] )\b(?:negative|minus) +(?=[0-9.])", re.IGNORECASE)


def extract_lenient(text: str) -> str | None:
    r"""
    The answer of a completion in whatever form it is given.

    The first of these that the text has:

    1. the content of the last closed `\boxed{}` (`extract_boxed`) that is not empty;
    2. what follows the last "answer is" or "answer:", to the end of the sentence: its number where it holds a
       single one among words, with those words that may change it ("2 million", "50%"), else all of it;
       "negative 5" and "minus 5" are -5. It must hold a digit, a LaTeX command or a single letter;
    3. the last number.

    Returns:
        The answer, or None where the text has none of these. Linear in the length of `text`.
    """
    boxed = extract_boxed(text)
    if boxed is not None and boxed.strip():
        return boxed
    return _phrase(text) or _last_number(text)


def _phrase(text: str) -> str | None:
    start = -1
    for match in _PHRASE.finditer(text):
        start = match.end()
    if start < 0:
        return None
    end = _END.search(text, start)
    said = _MINUS.sub("-", text[start : end.start() if end else len(text)].strip(" \t*"))
    numbers = list(_NUMBER.finditer(said))
    if len(numbers) == 1:
        before, after = said[: numbers[0].start()], said[numbers[0].end() :]
        if _WORDS.fullmatch(before + after):
            return _changing(before) + numbers[0][0] + _changing(after)
    letter = re.fullmatch(r"\(?[A-Za-z]\)?", said)
    return said if letter or re.search(r"[0-9]|\\[A-Za-z]", said) else None


def _changing(words: str) -> str:
    r"""The words beside a number as in a box, `\text{ million}`, where they may change it; else nothing."""
    if not changes_number(words):
        return ""
    words = words.replace("*", "").replace("$", "")
    return rf"\text{{{words}}}" if re.search("[A-Za-z]", words) else words.strip()


def _last_number(text: str) -> str | None:
    last = None
    for match in _NUMBER.finditer(text):
        last = match[0]
    return last

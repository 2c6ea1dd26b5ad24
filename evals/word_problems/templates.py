"""
What is left of a word problem without its numbers and names. AddSub and MultiArith fill few templates with
many numbers, so a split by text puts the same problem on both sides; a split by template does not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import csr_matrix

_WORDS = re.compile(r"\$?\d+(?:[.,:/]\d+)*%?|[A-Za-z]+(?:'[a-z]+)?|[.?!]")
_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
"""
_SPELLED = frozenset(_NUMBERS.split())
_PRONOUNS = {"she": "he", "her": "his", "hers": "his", "him": "his", "herself": "himself"}


def names(texts: Iterable[str]) -> frozenset[str]:
    """
    The words that are written with a capital inside a sentence and never without one, in lower case: names
    of people, places and days.
    """
    capital, small = set(), set()
    for text in texts:
        start = True
        for word in _WORDS.findall(text):
            if word in ".?!":
                start = True
                continue
            if word[0].islower():
                small.add(word)
            elif word[0].isupper() and not start:
                capital.add(word.lower())
            start = False
    return frozenset(capital - small)


def template(text: str, known: frozenset[str]) -> str:
    """
    `text` in lower case, with "0" for a number in digits or words, "name" for one of the `known` names or of
    the text's own (Rose, who is a word elsewhere), and one pronoun for both sexes.
    """
    known |= names([text])
    made: list[str] = []
    for word in _WORDS.findall(text):
        lower = word.lower()
        if lower in ".?!":
            continue
        stem = lower.removesuffix("'s")
        if lower[0].isdigit() or lower[0] == "$" or lower in _SPELLED:
            made += ["0"] if made[-1:] != ["0"] else []  # "twenty-five" is one number
        elif stem in known:
            made.append("name")
        else:
            made.append(_PRONOUNS.get(lower, lower))
    return " ".join(made)


def place(made: str) -> float:
    """Where a template lies between 0 and 1, by its hash: the same on every machine."""
    return int.from_bytes(hashlib.sha256(made.encode()).digest()[:6]) / 2**48


def nearest(these: Sequence[str], others: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """
    The most similar of `others` for each of `these`: cosine of the sets of word trigrams.

    Returns:
        Similarities (n,) from 0 to 1, and the indices (n,) into `others`.
    """
    columns: dict[tuple[str, ...], int] = {}

    def matrix(texts: Sequence[str]) -> csr_matrix:
        rows, cells, values = [], [], []
        for row, text in enumerate(texts):
            words = ["", "", *text.split(), "", ""]
            grams = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
            for gram in grams:
                rows.append(row)
                cells.append(columns.setdefault(gram, len(columns)))
                values.append(len(grams) ** -0.5)
        return csr_matrix((values, (rows, cells)), shape=(len(texts), 10**7))

    first, second = matrix(these), matrix(others)
    products = (first @ second.T).tocsr()
    best, index = np.zeros(len(these)), np.zeros(len(these), dtype=int)
    for row in range(len(these)):
        start, end = products.indptr[row : row + 2]
        if end > start:
            at = start + int(products.data[start:end].argmax())
            best[row], index[row] = products.data[at], products.indices[at]
    return best, index

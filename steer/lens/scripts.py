"""
Which writing systems a vector promotes and suppresses, against the make-up of the vocabulary: the test of the
claim that middle layers push down non-English tokens (arXiv 2509.06608, v2 and v3).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from steer.lens.logit_lens import LogitLens
from steer.lens.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steer.lens.languages import Languages

SCRIPTS = (
    "latin",  # ASCII letters: English, and much else
    "accented",  # Latin letters with marks: a European language other than English
    "cjk",
    "cyrillic",
    "other script",
    "digits",
    "code",  # punctuation and symbols
    "space",
    "special",  # control tokens, pieces of a multi-byte character
)
FOREIGN = ("accented", "cjk", "cyrillic", "other script")
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")


@dataclass
class ScriptCounts(Result):
    """
    `promoted` and `suppressed` (layers, scripts): counts among each layer's top and bottom tokens; `base`
    (scripts,) the share of each script in the whole vocabulary. `languages` is what a classifier says of
    them, where one is installed.
    """

    layers: list[int]
    scripts: list[str]
    promoted: torch.Tensor
    suppressed: torch.Tensor
    base: torch.Tensor
    languages: Languages | None = None

    def foreign(self, side: str = "suppressed") -> torch.Tensor:
        """Share of tokens in a script other than plain Latin, of all that were counted: (layers,)."""
        counts: torch.Tensor = getattr(self, side)
        chosen = [self.scripts.index(name) for name in FOREIGN]
        return counts[:, chosen].sum(1) / counts.sum(1).clamp(min=1)

    @property
    def foreign_base(self) -> float:
        """The same share in the vocabulary."""
        return self.base[[self.scripts.index(name) for name in FOREIGN]].sum().item()

    def figure(self) -> Figure:
        """Two lines over the layers, against the vocabulary's share."""
        from steer.lens import plots

        lines = {side: self.foreign(side) for side in ("promoted", "suppressed")}
        return plots.lines(
            lines,
            x=self.layers,
            level=("whole vocabulary", self.foreign_base),
            xlabel="layer",
            ylabel="share of non-English scripts",
            title="Scripts of the top and bottom tokens",
        )


def script(text: str) -> str:
    """The writing system of one token's text, by its letters; digits, then symbols, where it has none."""
    stripped = text.strip()
    if not stripped:
        return "space" if text else "special"
    if stripped.startswith("<") and stripped.endswith(">") and len(stripped) > 3:
        return "special"  # <|im_end|>, <0x0A>, <unused 7>
    letters = [char for char in stripped if char.isalpha()]
    if not letters:
        return "digits" if any(char.isdigit() for char in stripped) else "code"
    kinds = {_letter(char) for char in letters}
    for kind in ("special", "cjk", "cyrillic", "other script", "accented"):
        if kind in kinds:
            return kind
    return "latin"


@lru_cache(maxsize=1 << 16)
def _letter(char: str) -> str:
    if char.isascii():
        return "latin"
    name = unicodedata.name(char, "")
    if name.startswith(_CJK):
        return "cjk"
    if name.startswith("CYRILLIC"):
        return "cyrillic"
    if name.startswith("LATIN"):
        return "accented"
    return "other script"


def vocabulary_scripts(tokenizer: PreTrainedTokenizerBase, size: int) -> torch.Tensor:
    """The index in `SCRIPTS` of each of the first `size` tokens: (size,)."""
    specials = set(tokenizer.all_special_ids)
    numbers = []
    for index in range(size):
        text = str(tokenizer.decode([index], clean_up_tokenization_spaces=False))
        special = index in specials or "\ufffd" in text
        numbers.append(SCRIPTS.index("special" if special else script(text)))
    return torch.tensor(numbers)


def count_scripts(lens: LogitLens, tokenizer: PreTrainedTokenizerBase) -> ScriptCounts:
    """Count the scripts of the lens's top and bottom tokens and of the whole vocabulary."""
    size = min(len(tokenizer), lens.scores.shape[1])
    kinds = vocabulary_scripts(tokenizer, size)

    def counts(ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.bincount(kinds[row], minlength=len(SCRIPTS)) for row in ids])

    base = torch.bincount(kinds, minlength=len(SCRIPTS)).double() / size
    return ScriptCounts(lens.layers, list(SCRIPTS), counts(lens.top), counts(lens.bottom), base)

"""
The languages of promoted and suppressed tokens by a classifier (py3langid), beside their scripts: how far the
script table is the language table that the paper's claim is about (arXiv 2509.06608, v2 and v3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from steer.extras import require
from steer.lens.logit_lens import LogitLens
from steer.lens.results import Result
from steer.lens.scripts import FOREIGN, script
from steer.lens.subject import token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Classify = Callable[[str], tuple[str, float]]
BYTES = 4  # of letters, in UTF-8: shorter tokens say too little
CONFIDENCE = 0.1  # of the classifier's answer; what is below is undecided
SAMPLE = 4000  # tokens of the vocabulary
KINDS = ("English", "other language", "undecided")


@dataclass
class Languages(Result):
    """
    Counts of tokens whose letters have `BYTES` bytes or more. `promoted` and `suppressed` (layers, kinds), in
    the order of `KINDS`; `vocabulary` (kinds,), of a random sample of the vocabulary. `tables` by
    "vocabulary" and "suppressed" (all layers): decided tokens by script (plain Latin, another) and language
    (English, another), (2, 2).
    """

    layers: list[int]
    promoted: torch.Tensor
    suppressed: torch.Tensor
    vocabulary: torch.Tensor
    tables: dict[str, torch.Tensor]

    def foreign(self, side: str = "suppressed") -> torch.Tensor:
        """Share of other languages among the decided tokens: (layers,), NaN where none is decided."""
        return _foreign(getattr(self, side))

    @property
    def foreign_base(self) -> float:
        """The same share in the vocabulary."""
        return _foreign(self.vocabulary).item()

    def rows(self) -> list[tuple[str, int, float, float, float]]:
        """
        By set of tokens: its name, how many are decided, the share in which script and classifier agree,
        Cohen's kappa, and the share of other languages by the classifier.
        """
        found = []
        for name, table in self.tables.items():
            shares = agreement(table)
            other = (table[:, 1].sum() / table.sum().clamp(min=1)).item()
            found.append((name, int(table.sum()), *shares, other))
        return found

    def to_dict(self) -> dict[str, Any]:
        names = ("tokens", "decided", "agreement", "kappa", "other_language")
        told = [dict(zip(names, row, strict=True)) for row in self.rows()]
        told = [{k: None if v != v else v for k, v in row.items()} for row in told]
        return {**super().to_dict(), "kinds": KINDS, "agreement": told}

    def figure(self) -> Figure:
        """Two lines over the layers, against the vocabulary's share."""
        from steer.lens import plots

        return plots.lines(
            {side: self.foreign(side) for side in ("promoted", "suppressed")},
            x=self.layers,
            level=("whole vocabulary", self.foreign_base),
            xlabel="layer",
            ylabel="share of other languages",
            title="Languages of the top and bottom tokens, by the classifier",
        )


def classifier() -> Classify:
    """
    The language (ISO 639 code) of a text and the confidence in it, from 0 to 1, by py3langid.

    Raises:
        SteerError: It is not installed.
    """
    require("the language classifier", "langid")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    classify: Classify = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
    return classify


def languages(
    lens: LogitLens,
    tokenizer: PreTrainedTokenizerBase,
    classify: Classify,
    *,
    sample: int = SAMPLE,
    seed: int = 0,
) -> Languages:
    """
    Classify the lens's top and bottom tokens and a random sample of the vocabulary.

    Args:
        sample: Tokens of the vocabulary that are drawn; those with too few letters are left out.
    """
    known: dict[int, tuple[int, int] | None] = {}

    def kinds(ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts (kinds,) of these tokens, and the decided ones by script and language, (2, 2)."""
        counts, table = torch.zeros(len(KINDS)), torch.zeros(2, 2)
        for index in ids:
            if index not in known:
                known[index] = _kind(token_text(tokenizer, index), classify)
            kind = known[index]
            if kind is not None:
                counts[kind[1]] += 1
                if kind[1] < 2:
                    table[kind] += 1
        return counts, table

    size = min(len(tokenizer), lens.scores.shape[1])
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:sample]
    vocabulary, table = kinds(drawn.tolist())
    top, bottom = ([kinds(row) for row in ids.tolist()] for ids in (lens.top, lens.bottom))
    return Languages(
        lens.layers,
        torch.stack([counts for counts, _ in top]),
        torch.stack([counts for counts, _ in bottom]),
        vocabulary,
        {"vocabulary": table, "suppressed": torch.stack([one for _, one in bottom]).sum(0)},
    )


def agreement(table: torch.Tensor) -> tuple[float, float]:
    """Share on the diagonal of a (2, 2) table of counts, and Cohen's kappa; NaN where undefined."""
    total = table.double().sum().item()
    if not total:
        return float("nan"), float("nan")
    share = table.double().trace().item() / total
    chance = (table.sum(0).double() @ table.sum(1).double()).item() / total**2
    return share, (share - chance) / (1 - chance) if chance < 1 else float("nan")


def _kind(text: str, classify: Classify) -> tuple[int, int] | None:
    """Whether its script is another one, and its kind; None for a special token and one of few letters."""
    written = script(text)
    letters = "".join(char for char in text if char.isalpha())
    if len(letters.encode()) < BYTES or written in ("special", "code", "digits", "space"):
        return None
    language, confidence = classify(text.strip())
    kind = 2 if confidence < CONFIDENCE else int(language != "en")
    return int(written in FOREIGN), kind


def _foreign(counts: torch.Tensor) -> torch.Tensor:
    return counts[..., 1] / counts[..., :2].sum(-1)

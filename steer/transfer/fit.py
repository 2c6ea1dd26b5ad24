"""Fit the map of every matched pair of layers on a text sample, and judge it on texts that were kept out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from steer.errors import SteerError
from steer.transfer import maps
from steer.transfer.activations import Side, paired
from steer.transfer.layers import Match, by_likeness
from steer.transfer.maps import Moments, Similarity

# Fewer held-out tokens than this judge nothing.
MIN_HELD_OUT = 50
# Layers are matched by CKA on this many texts at most: every layer is compared with every other.
CKA_TEXTS = 64


@dataclass(frozen=True)
class Fitted:
    """
    `matrices` are the maps, (hidden_size, other hidden_size), by match; None is a copy. What else was
    measured is by match too, and empty where no model was run: `r2`, `cka`, mean `norms` of the stream in
    (donor, recipient), ridge `penalties`. `pairs` and `held_out` count tokens.
    """

    method: str
    matrices: dict[Match, torch.Tensor | None]
    r2: dict[Match, float] = field(default_factory=dict)
    cka: dict[Match, float] = field(default_factory=dict)
    norms: dict[Match, tuple[float, float]] = field(default_factory=dict)
    penalties: dict[Match, float] = field(default_factory=dict)
    rescale: bool = False
    pairs: int = 0
    held_out: int = 0

    @property
    def mean_r2(self) -> float | None:
        return sum(self.r2.values()) / len(self.r2) if self.r2 else None

    def factor(self, match: Match) -> float:
        """What lengths are multiplied with: with `rescale`, the recipient's mean norm over the donor's."""
        donor, recipient = self.norms[match] if self.rescale else (1.0, 1.0)
        return recipient / donor if donor > 0 else 1.0


def match_by_cka(
    donor: Side, recipient: Side, texts: Sequence[str], layers: Sequence[int], site: str
) -> list[Match]:
    """Match the donor's `layers` to those of the recipient whose streams are most like theirs."""
    others = range(recipient.decoder.num_hidden_layers)
    pairs = [(i, j) for i in layers for j in others]
    similarity = Similarity()
    for batch in paired(donor, recipient, texts[:CKA_TEXTS], layers, others, site, "comparing layers"):
        similarity.add(batch.donor, batch.recipient, pairs)
    likeness = (
        {(i, j): similarity.cka(i, j) for i, j in pairs} if similarity.cross else dict.fromkeys(pairs, 0.0)
    )
    return by_likeness(layers, len(others), likeness)


def fit(
    donor: Side,
    recipient: Side,
    texts: Sequence[str],
    matches: Sequence[Match],
    *,
    site: str,
    method: str,
    penalty: float | None,
    rescale: bool,
    min_r2: float,
) -> Fitted:
    """
    Fit `method` on eight texts of ten; of the other two, one chooses the ridge penalty, one judges the maps.

    A copy is judged as the map it is: the identity, times the ratio of the streams' mean norms if `rescale`.
    Raises SteerError for a sample that pairs too few tokens: a ridge regression has `hidden_size` unknowns
    for each output, an orthogonal map needs covariances of full rank.
    """
    similarity = Similarity()
    shape = (donor.decoder.hidden_size, recipient.decoder.hidden_size)
    # One text of ten judges, the first of them, so that a small sample has one too; the second chooses.
    held_out = _moments(donor, recipient, texts[0::10], matches, site, similarity, "held-out texts")
    choosing = _moments(donor, recipient, texts[1::10], matches, site, similarity, "texts to choose on")
    rest = [text for index, text in enumerate(texts) if index % 10 > 1]
    fitting = _moments(donor, recipient, rest, matches, site, similarity, "texts to fit on")

    direct = method == "direct" or (method == "auto" and shape[0] == shape[1])
    needed = {"direct": MIN_HELD_OUT, "procrustes": min(shape) + 1}.get(method, shape[0] + 1)
    have, judged = fitting[matches[0]].count, held_out[matches[0]].count
    if have < needed or judged < MIN_HELD_OUT:
        raise SteerError(
            f"the text sample gives {have} paired tokens to fit on and {judged} to judge on; {method} from "
            f"hidden size {shape[0]} to {shape[1]} needs at least {needed} and {MIN_HELD_OUT}: give more "
            "texts, or none for the built-in sample"
        )
    norms = {m: (fitting[m].x_norm, fitting[m].y_norm) for m in matches}

    def judge(name: str, matrices: dict[Match, torch.Tensor | None], penalties: dict[Match, float]) -> Fitted:
        cka = {m: similarity.cka(m.donor, m.recipient) for m in matches}
        fitted = Fitted(name, matrices, {}, cka, norms, penalties, rescale, have, judged)
        for match, matrix in matrices.items():
            if matrix is None:
                matrix = fitted.factor(match) * torch.eye(shape[0], dtype=torch.float64)
            fitted.r2[match] = maps.r2(matrix, fitting[match], held_out[match])
        return fitted

    if direct:
        copied = judge("direct", dict.fromkeys(matches), {})
        if method == "direct" or (copied.mean_r2 or 0.0) >= min_r2:
            return copied
    if method == "procrustes":
        for match in matches:
            fitting[match].merge(choosing[match])
        return judge("procrustes", {m: maps.procrustes(fitting[m]) for m in matches}, {})
    matrices: dict[Match, torch.Tensor | None] = {}
    penalties: dict[Match, float] = {}
    for match in matches:
        chosen = penalty
        if chosen is None:
            tried = maps.ridge(fitting[match], maps.PENALTIES)
            scores = [maps.r2(matrix, fitting[match], choosing[match]) for matrix in tried]
            chosen = maps.PENALTIES[scores.index(max(scores))]
        fitting[match].merge(choosing[match])
        penalties[match] = chosen
        matrices[match] = maps.ridge(fitting[match], [chosen])[0]
    return judge("ridge", matrices, penalties)


def _moments(
    donor: Side,
    recipient: Side,
    texts: Sequence[str],
    matches: Sequence[Match],
    site: str,
    similarity: Similarity,
    label: str,
) -> dict[Match, Moments]:
    by_match = {match: Moments(donor.decoder.hidden_size, recipient.decoder.hidden_size) for match in matches}
    layers = sorted({m.donor for m in matches}), sorted({m.recipient for m in matches})
    for batch in paired(donor, recipient, texts, *layers, site, label):
        for match, moments in by_match.items():
            moments.add(batch.donor[match.donor], batch.recipient[match.recipient])
        similarity.add(batch.donor, batch.recipient, [(m.donor, m.recipient) for m in matches])
    return by_match

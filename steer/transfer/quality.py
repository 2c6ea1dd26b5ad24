"""What a transfer did, layer by layer, and how well it should work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isnan
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """
    One donor layer and the recipient layer that got its vector. None stands for what was not measured.

    share: part of the donor's vector that went there (below 1 when the recipient is deeper).
    r2: held-out share of the recipient's stream that the map explains, mean over dimensions (`maps.r2`).
    cka: linear CKA of the two streams on the text sample, unbiased.
    norm_before, norm_after: length of the donor's vector (times share) and of what it became.
    relative_before, relative_after: the same in units of the mean norm of the stream in each model.
    cosine: between the vector before and after, where both models have one width.
    penalty: of the ridge regression, in units of each dimension's variance.
    """

    donor: int
    recipient: int
    share: float
    r2: float | None
    cka: float | None
    norm_before: float
    norm_after: float
    relative_before: float | None
    relative_after: float | None
    cosine: float | None
    penalty: float | None = None


@dataclass(frozen=True)
class TransferReport:
    """
    `method` is "direct", "procrustes" or "ridge", `layers_by` "depth" or "cka"; `pairs` and `held_out` count
    the tokens that the maps were fitted and judged on (0 when neither model was run); `notes` are for people.
    """

    donor: str
    recipient: str
    method: str
    layers_by: str
    rescale: bool
    mean_r2: float | None
    pairs: int
    held_out: int
    layers: list[LayerReport]
    notes: list[str]

    def verdict(self) -> str:
        """One line: what may be hoped for."""
        if self.mean_r2 is None:
            return "direct copy, nothing was measured: the report knows no more than that the shapes agree"
        value = f"held-out R2 {self.mean_r2:.2f}"
        # The thresholds are those of evals/results/transfer.json: a fine-tune at 0.99 kept the effect, one at
        # 0.89 that had been taught the opposite kept none, nor did a map into another family at 0.64.
        if self.method == "direct" and self.mean_r2 >= 0.95:
            return (
                f"{value}: the same coordinates; expect the effect, unless the recipient was taught otherwise"
            )
        if self.mean_r2 >= 0.5:
            return (
                f"{value}: the streams are alike, which is not yet that the effect survives; measure accuracy"
            )
        return f"{value}: most of the recipient's stream is unexplained; expect little, measure accuracy"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "verdict": self.verdict()}

    def text(self) -> str:
        """The report as a table for a terminal."""
        how = f"{self.method}, layers by {self.layers_by}"
        how += ", each vector as long relative to the stream as it was" if self.rescale else ""
        lines = [f"{self.donor} -> {self.recipient}", f"method   {how}"]
        if self.pairs:
            lines.append(f"sample   {self.pairs} paired tokens to fit, {self.held_out} held out")
        lines += [f"note     {note}" for note in self.notes]
        columns = (
            "layer        share     R2    CKA   norm before   after   % of stream before   after   cosine"
        )
        lines += ["", columns]
        for row in self.layers:
            cells = [
                f"{row.donor:3} -> {row.recipient:<3}",
                f"{row.share:7.2f}",
                _cell(row.r2, 7),
                _cell(row.cka, 7),
                f"{row.norm_before:14.3f}",
                f"{row.norm_after:8.3f}",
                _cell(row.relative_before, 21, 100),
                _cell(row.relative_after, 8, 100),
                _cell(row.cosine, 9),
            ]
            lines.append("".join(cells))
        return "\n".join([*lines, "", self.verdict()])


def _cell(value: float | None, width: int, factor: float = 1.0) -> str:
    return "-".rjust(width) if value is None or isnan(value) else f"{factor * value:{width}.2f}"

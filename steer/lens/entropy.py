"""
Whether vectors act where the base model is uncertain or where it is sure: the entropy of its next-token
distribution against the shift of the distribution, token by token (arXiv 2509.06608, the last layer).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from steer.lens.conditions import BASE, Condition
from steer.lens.passes import passes
from steer.lens.random_sets import TWO_SIDED_DRAWS, two_sided_p, with_random_sets
from steer.lens.results import Result
from steer.lens.subject import Row, Subject, chunks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHIFTS = {"variation": "total variation", "gain": "largest gain of probability"}
QUARTERS = 4
TEXTS = 4  # whose base distributions are held at once


@dataclass
class EntropyShift(Result):
    """
    One value a generated token, in the order of the texts: `entropy` of the base model's distribution in
    nats; `variation`, the total variation distance between it and the steered one; `gain`, the largest gain
    of probability of any token; `change`, the steered entropy minus the base one. `random_variation` and
    `random_gain` (draws, tokens) are those of random vectors of equal length, on the same texts.
    """

    layers: list[int]
    texts: int
    entropy: torch.Tensor
    variation: torch.Tensor
    gain: torch.Tensor
    change: torch.Tensor
    random_variation: torch.Tensor
    random_gain: torch.Tensor

    def correlations(self) -> list[tuple[str, float, float, float, float, float]]:
        """
        By measure of the shift: its name, Spearman's correlation with the entropy over tokens, that of the
        random sets (mean, least, largest), and the two-sided p-value among them.
        """
        found = []
        for name in SHIFTS:
            own = _spearman(self.entropy, getattr(self, name))
            null = [_spearman(self.entropy, line) for line in getattr(self, f"random_{name}")]
            ends = float(np.mean(null)), min(null), max(null)
            found.append((name, own, *ends, two_sided_p(own, null)))
        return found

    def quarters(self) -> list[tuple[float, float, float, float]]:
        """
        By quarter of the tokens, the surest first: mean entropy, mean total variation, that of the random
        sets, and mean change of entropy.
        """
        found = []
        for part in self.entropy.argsort(stable=True).tensor_split(QUARTERS):
            if len(part):
                means = [v[..., part].double().mean().item() for v in (self.entropy, self.variation)]
                random = self.random_variation[:, part].double().mean().item()
                found.append((*means, random, self.change[part].double().mean().item()))
        return found  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Without the random sets' values at each token: their correlations and means."""
        kept = {k: v for k, v in super().to_dict().items() if not k.startswith("random_")}
        names = ("shift", "spearman", "random_mean", "random_min", "random_max", "p")
        parts = ("entropy", "variation", "random_variation", "entropy_change")
        rows = [(name, *(_known(x) for x in rest)) for name, *rest in self.correlations()]
        return {
            **kept,
            "correlations": [dict(zip(names, row, strict=True)) for row in rows],
            "quarters": [dict(zip(parts, row, strict=True)) for row in self.quarters()],
        }

    def figure(self) -> Figure:
        """Total variation over entropy, a dot a token, and the means of the quarters."""
        from steer.lens import plots

        figure, axes = plots.panels(6.4, 3.4)
        axes.scatter(plots.as_array(self.entropy), plots.as_array(self.variation), s=6, alpha=0.3)
        at, own, random, _ = zip(*self.quarters(), strict=True)
        axes.plot(at, own, color=plots.COLOURS[1], marker="o", label="mean of a quarter of the tokens")
        axes.plot(at, random, color=plots.COLOURS[5], marker="o", label="random vectors")
        axes.legend(frameon=False, fontsize=8)
        plots.finish(
            axes, "Where the vectors act", "entropy of the base model, nats", "total variation distance"
        )
        figure.tight_layout()
        return figure


def entropy_shift(
    subject: Subject,
    rows: Sequence[Row],
    *,
    layers: Collection[int] | None = None,
    draws: int = TWO_SIDED_DRAWS,
    seed: int = 0,
    label: str | None = None,
) -> EntropyShift:
    """
    Measure both at every token of the completions of `rows`, with the vectors of `layers` (all by default).

    Args:
        rows: Prompts with completions; of a prompt alone, the one token that comes next.
        draws: Random sets of the null distribution.
    """
    on = Condition(frozenset(subject.layers if layers is None else layers))

    parts = []
    for _, some in chunks(rows, TEXTS):
        base = _probabilities(subject, some, BASE, label)
        entropy = _entropy(base)

        def shifts(some: Sequence[Row] = some, base: torch.Tensor = base) -> torch.Tensor:
            """Total variation, largest gain, and entropy: (3, tokens)."""
            steered = _probabilities(subject, some, on)
            moved = steered - base
            return torch.stack([moved.abs().sum(-1) / 2, moved.amax(-1), _entropy(steered)])

        own, null = shifts(), torch.stack(with_random_sets(subject.vectors, shifts, draws, seed))
        parts.append((entropy, own[0], own[1], own[2] - entropy, null[:, 0], null[:, 1]))
    found = [torch.cat(part, -1) for part in zip(*parts, strict=True)]
    return EntropyShift(sorted(on.layers), len(rows), *found)


def _probabilities(
    subject: Subject, rows: Sequence[Row], condition: Condition, label: str | None = None
) -> torch.Tensor:
    """Of the next token at each token that predicts a completion, row by row: (tokens, vocabulary)."""
    return torch.cat(
        [
            done.next_token(index)[0].softmax(-1).cpu()
            for done in passes(subject, rows, [condition], label=label)
            for index in range(len(done.rows))
        ]
    )


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Of distributions (tokens, vocabulary): (tokens,) in nats."""
    return torch.special.entr(probabilities).sum(-1)


def _spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """NaN for fewer than three tokens or equal values."""
    if len(one) < 3 or (one == one[0]).all() or (other == other[0]).all():
        return float("nan")
    return float(stats.spearmanr(one.numpy(), other.numpy()).statistic)


def _known(value: float) -> float | None:
    return None if value != value else value

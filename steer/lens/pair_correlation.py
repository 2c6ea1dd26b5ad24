"""
What goes with a good pair of layers: Spearman correlation of the pairs' scores with the cosine of the two
vectors and with the distance of the two layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch.nn.functional import normalize

from steer.lens.composition import Composition
from steer.lens.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 4  # pairs that a correlation needs
PERMUTATIONS = 5000  # all orders of up to 7 layers, otherwise that many drawn at random
MEASURES = {"score": "pair score", "gain": "gain over the better of the two"}
AGAINST = {"cosine": "cosine of the two vectors", "distance": "distance of the two layers"}


@dataclass
class Correlation:
    """
    Spearman's `rho` over `n` pairs. `p`: two-sided, as if the pairs were independent. `p_layers`: two-sided
    by permuting the layers (Mantel's test), as pairs that share a layer are not. NaN where fewer than
    `FEWEST` pairs have a value or all have the same.
    """

    measure: str
    against: str
    rho: float
    n: int
    p: float
    p_layers: float

    def told(self) -> str:
        if math.isnan(self.rho):
            return f"undefined: n = {self.n}, and {FEWEST} pairs of different values are needed"
        return f"{self.rho:+.2f} (n = {self.n}, p = {self.p:.3g}, p by layers = {self.p_layers:.3g})"


@dataclass
class PairCorrelations(Result):
    """
    `pairs` of layers with their `score` (NaN where undefined), `gain`, `cosine` and `distance`, (pairs,)
    each; `correlations` of each measure with the cosine and the distance.
    """

    pairs: list[tuple[int, int]]
    score: torch.Tensor
    gain: torch.Tensor
    cosine: torch.Tensor
    distance: torch.Tensor
    correlations: list[Correlation]

    def figure(self) -> Figure:
        """Gains of the pairs over the cosine and over the distance."""
        from steer.lens import plots

        figure, axes = plots.panels(8.6, 3.0, 1, 2, sharey=True)
        for axis, name in zip(axes, AGAINST, strict=True):
            axis.scatter(plots.as_array(getattr(self, name)), plots.as_array(self.gain), s=18)
            rho = next(c.rho for c in self.correlations if (c.measure, c.against) == ("gain", name))
            plots.finish(axis, f"Spearman {rho:+.2f}" if rho == rho else "", AGAINST[name], MEASURES["gain"])
        figure.tight_layout()
        return figure

    def rows(self) -> list[tuple[str, str, str]]:
        """Of each correlation what is correlated, with what, and its value in words."""
        return [(MEASURES[c.measure], AGAINST[c.against], c.told()) for c in self.correlations]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "permutations": PERMUTATIONS}


def pair_correlations(composed: Composition, vectors: Mapping[int, torch.Tensor]) -> PairCorrelations:
    """
    Correlate what pairs of layers reach with how alike and how far apart they are.

    Args:
        composed: Single layers and pairs, as `composition.compose` measures them.
        vectors: (hidden_size,) by layer: the vectors that were on.
    """
    layers = composed.layers
    best = torch.maximum(composed.alone[:, None], composed.alone[None, :])
    unit = normalize(torch.stack([vectors[layer].double().cpu() for layer in layers]), dim=1)
    at = torch.tensor(layers, dtype=torch.float64)
    made = {
        "score": composed.score,
        "gain": composed.pairs - best,
        "cosine": unit @ unit.T,
        "distance": (at[:, None] - at[None, :]).abs(),
    }
    matrices = {name: matrix.double().numpy() for name, matrix in made.items()}
    found = [correlate(matrices[m], matrices[a], m, a) for m in MEASURES for a in AGAINST]
    i, j = np.triu_indices(len(layers), 1)
    upper = {name: torch.from_numpy(matrix[i, j]) for name, matrix in matrices.items()}
    return PairCorrelations(list(combinations(layers, 2)), **upper, correlations=found)


def correlate(measured: np.ndarray, known: np.ndarray, measure: str, against: str) -> Correlation:
    """Of two symmetric (layers, layers) matrices, over the pairs where `measured` is a number."""
    size = len(measured)
    i, j = np.triu_indices(size, 1)
    defined = ~np.isnan(measured[i, j])
    i, j = i[defined], j[defined]
    values, n = measured[i, j], int(defined.sum())
    if n < FEWEST or np.ptp(values) == 0 or np.ptp(known[i, j]) == 0:
        return Correlation(measure, against, math.nan, n, math.nan, math.nan)
    result = stats.spearmanr(values, known[i, j])
    orders = _orders(size)
    others = known[orders[:, i], orders[:, j]]  # (orders, pairs)
    null = _rank_correlation(values, others)
    reached = np.abs(null) >= abs(float(result.statistic)) - 1e-9
    return Correlation(
        measure, against, float(result.statistic), n, float(result.pvalue), float(reached.mean())
    )


def _orders(size: int) -> np.ndarray:
    """Orders of `size` layers, the given one first."""
    if math.factorial(size) <= PERMUTATIONS + 40:  # 7! = 5040
        return np.array(list(permutations(range(size))))
    rng = np.random.default_rng(0)
    drawn = [np.arange(size), *(rng.permutation(size) for _ in range(PERMUTATIONS - 1))]
    return np.stack(drawn)


def _rank_correlation(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's correlation of `values` (n,) with each row of `others`; 0 for a row of equal values."""
    one = stats.rankdata(values) - (len(values) + 1) / 2
    many = stats.rankdata(others, axis=1) - (len(values) + 1) / 2
    lengths = np.sqrt((one**2).sum() * (many**2).sum(1))
    return np.asarray((many @ one) / np.where(lengths > 0, lengths, 1))

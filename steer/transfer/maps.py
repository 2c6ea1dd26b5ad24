"""
Linear maps between two residual streams, from their second moments alone: what is kept of a text sample does
not grow with its length.

Streams are rows, x (width) of the donor and y (other width) of the recipient, and a map B (width, other
width) means y - mean(y) ~ (x - mean(x)) B. A vector that is added to x is a difference of two streams, so it
is mapped by B alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Penalties of ridge regression that are tried, in units of each dimension's own variance.
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Tokens of one batch, at most, whose Gram matrix is taken: its cost is their square.
TOKENS = 512


class Moments:
    """
    Count, means, and centred sums of products of paired streams: `xx` (width, width), `xy` (width, other
    width), `yy` (other width,) the diagonal alone. `x_norm` and `y_norm` are mean Euclidean norms. A batch is
    centred and multiplied in its own precision, batches are added up in float64.
    """

    def __init__(self, width: int, other: int):
        self.count = 0
        self.x_norm = self.y_norm = 0.0
        self.x_mean = torch.zeros(width, dtype=torch.float64)
        self.y_mean = torch.zeros(other, dtype=torch.float64)
        self.xx = torch.zeros(width, width, dtype=torch.float64)
        self.xy = torch.zeros(width, other, dtype=torch.float64)
        self.yy = torch.zeros(other, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in more tokens: x (tokens, width) and y (tokens, other width)."""
        if not len(x):
            return
        new = Moments(0, 0)
        new.count = len(x)
        new.x_norm, new.y_norm = x.norm(dim=1).mean().item(), y.norm(dim=1).mean().item()
        new.x_mean, new.y_mean = x.double().mean(0), y.double().mean(0)
        x, y = (x - new.x_mean).to(x.dtype), (y - new.y_mean).to(y.dtype)
        new.xx, new.xy, new.yy = x.T @ x, x.T @ y, y.double().square().sum(0)
        self.merge(new)

    def merge(self, other: Moments) -> None:
        """Take in the tokens of `other` (Chan, Golub, LeVeque 1979): exact whatever the order."""
        total = self.count + other.count
        if not other.count:
            return
        share = other.count / total
        dx, dy = other.x_mean - self.x_mean, other.y_mean - self.y_mean
        between = self.count * share
        self.xx += other.xx + between * torch.outer(dx, dx)
        self.xy += other.xy + between * torch.outer(dx, dy)
        self.yy += other.yy + between * dy.square()
        self.x_mean = self.x_mean + share * dx
        self.y_mean = self.y_mean + share * dy
        self.x_norm += share * (other.x_norm - self.x_norm)
        self.y_norm += share * (other.y_norm - self.y_norm)
        self.count = total


def procrustes(moments: Moments) -> torch.Tensor:
    """
    s Q: the orthogonal Q that maximises <X Q, Y> (Schoenemann 1966) and its least-squares factor s. Between
    different widths Q has orthonormal rows or columns, whichever are fewer.
    """
    u, values, v = torch.linalg.svd(moments.xy, full_matrices=False)
    q = u @ v
    explained = ((moments.xx @ q) * q).sum()
    return q * (values.sum() / explained if explained > 0 else 0.0)


def ridge(moments: Moments, penalties: Sequence[float]) -> list[torch.Tensor]:
    """
    The ridge regression of y on x for each penalty, given in units of each dimension's own variance, so that
    neither scale nor massive dimensions decide what is penalised.
    """
    variance = moments.xx.diagonal() / moments.count
    scale = torch.where(variance > 0, variance, 1.0).sqrt()
    values, basis = torch.linalg.eigh(moments.xx / moments.count / torch.outer(scale, scale))
    projected = basis.T @ (moments.xy / moments.count / scale[:, None])
    values = values.clamp(min=0)[:, None]
    tiny = torch.finfo(torch.float64).eps  # a penalty of 0 still ignores directions that never occur
    return [(basis @ (projected / (values + p).clamp(min=tiny))) / scale[:, None] for p in penalties]


def r2(matrix: torch.Tensor, fitted: Moments, held_out: Moments) -> float:
    """
    Share of the recipient's variance that the map explains on held-out tokens: 1 - SSE / SST for each
    dimension, at least -1, and the mean over the dimensions that vary. Each counts the same, so a few massive
    ones decide nothing. The intercept is that of the fitted tokens.
    """
    predicted = held_out.xx @ matrix
    off = (held_out.y_mean - fitted.y_mean) - (held_out.x_mean - fitted.x_mean) @ matrix
    error = held_out.yy - 2 * (matrix * held_out.xy).sum(0) + (matrix * predicted).sum(0)
    error = error + held_out.count * off.square()
    varies = held_out.yy > 0
    if not varies.any():
        return 0.0
    return (1 - error[varies] / held_out.yy[varies]).clamp(min=-1).mean().item()


class Similarity:
    """
    Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) between layers of two models, from batches of paired
    tokens with the unbiased estimator (Nguyen et al. 2021, arXiv 2010.15327): 1 for streams that differ by a
    rotation and a factor, about 0 for unrelated ones, however few tokens a batch has.
    """

    def __init__(self) -> None:
        self.own: list[dict[int, float]] = [{}, {}]
        self.cross: dict[tuple[int, int], float] = {}

    def add(
        self,
        donor: dict[int, torch.Tensor],
        recipient: dict[int, torch.Tensor],
        pairs: Sequence[tuple[int, int]],
    ) -> None:
        """One batch: streams (tokens, width) by layer. `pairs` are the (donor, recipient) layers compared."""
        count = len(next(iter(donor.values())))
        if count < 4:  # the estimator needs four tokens
            return
        step = -(-count // TOKENS)
        grams = [{layer: _gram(x[::step]) for layer, x in side.items()} for side in (donor, recipient)]
        for side, added in zip(self.own, grams, strict=True):
            for layer, gram in added.items():
                side[layer] = side.get(layer, 0.0) + _hsic(gram, gram)
        for i, j in pairs:
            self.cross[i, j] = self.cross.get((i, j), 0.0) + _hsic(grams[0][i], grams[1][j])

    def cka(self, donor: int, recipient: int) -> float:
        product = self.own[0].get(donor, 0.0) * self.own[1].get(recipient, 0.0)
        return self.cross[donor, recipient] / product**0.5 if product > 0 else 0.0


def _gram(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(0)
    return (x @ x.T).fill_diagonal_(0)


def _hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased HSIC of two Gram matrices with zero diagonals (Song et al. 2012, equation 5)."""
    n = len(a)
    rows_a, rows_b = a.sum(0), b.sum(0)
    total = (a * b).sum() + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 * rows_a @ rows_b / (n - 2)
    return (total / (n * (n - 3))).item()

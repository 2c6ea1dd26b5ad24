"""
The heads of KronSAE (arXiv 2505.22255): feature (i, j) of a head is made of its rows P_i and Q_j.

Features are in the paper's order, head by head and row-major. The encoder's rows are P_1 of all heads, P_2 of
all heads, ..., Q_n of all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer.sae.sparse import top_k


class Heads(NamedTuple):
    """`heads` heads of m rows P and n rows Q: heads * m * n features, heads * (m + n) rows."""

    heads: int
    m: int
    n: int

    def strongest_pairs(self, factors: Tensor, k: int, signed: bool = False) -> tuple[Tensor, Tensor]:
        """
        The encoder's rows P_i and Q_j, (tokens, k) each, of the k largest products p_i q_j of one head.

        Products compare as their roots do. Only the k rows P_i with the largest max_j p_i q_j can be in one
        of them, so of all products only k n are computed: exact, and nothing of size d_sae is held.

        factors: (tokens, rows), none negative unless `signed`.
        """
        heads, m, n = self
        places = factors.view(len(factors), m + n, heads)
        p, q = places[:, :m], places[:, m:]
        largest = p * q.amax(1, keepdim=True)
        if signed:
            largest = torch.maximum(largest, p * q.amin(1, keepdim=True))
        p_rows = top_k(largest.flatten(1), min(k, m * heads))[1]
        q_rows = p_rows[:, :, None] % heads + heads * torch.arange(m, m + n, device=factors.device)
        q_rows = q_rows.flatten(1)
        products = factors.gather(1, q_rows).unflatten(1, (-1, n)) * factors.gather(1, p_rows)[:, :, None]
        best = products.flatten(1).topk(k).indices
        return p_rows.gather(1, best // n), q_rows.gather(1, best)

    def rows(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's rows that hold P_i and Q_j of each feature (i, j), in the shape of `features`."""
        heads, m, n = self
        head, i, j = features // (m * n), features % (m * n) // n, features % n
        return i * heads + head, (m + j) * heads + head

    def features(self, p_rows: Tensor, q_rows: Tensor) -> Tensor:
        """The inverse of `rows`: the feature (i, j) whose P_i and Q_j are in these rows."""
        heads, m, n = self
        return p_rows % heads * (m * n) + p_rows // heads * n + q_rows // heads - m

    def factors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What each row of the encoder has, (rows, ...), by head: that of P (h, m, ...), of Q (h, n, ...)."""
        heads = rows.unflatten(0, (self.m + self.n, -1)).transpose(0, 1)
        return heads[:, : self.m], heads[:, self.m :]

"""Correlations within heads against numpy's matrix of all pairs, and a KronSAE whose heads go together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steer.errors import SteerError
from steer.sae import SAE, SAEConfig
from steer.sae.heads import LEAST, head_correlation

X = torch.randn(600, 12, generator=torch.Generator().manual_seed(0))


def make(**settings: object) -> SAE:
    return SAE(SAEConfig(**{"d_in": 12, "d_sae": 64, "k": 16, "encoder": "kron", **settings}), seed=1).eval()


@pytest.mark.parametrize("settings", [{}, {"m": 4, "n": 4}, {"activation": "jumprelu"}], ids=str)
def test_the_matrix_of_all_pairs(settings: dict[str, object]) -> None:
    sae = make(**settings)
    found = head_correlation(sae, lambda: X.split(256))
    z = sae.encode(X).detach().double().numpy()
    fires = (z > 0).sum(0)
    kept = np.flatnonzero((fires >= LEAST) & (len(z) - fires >= LEAST))
    matrix = np.corrcoef(z[:, kept].T)
    head = kept // (sae.cfg.m * sae.cfg.n)
    same, apart = head[:, None] == head[None], ~np.eye(len(kept), dtype=bool)
    assert found.within == pytest.approx(matrix[same & apart].mean(), abs=1e-6)
    assert found.between == pytest.approx(matrix[~same].mean(), abs=1e-6)
    assert (found.features, found.tokens) == (len(kept), 600)
    assert found.random_low <= found.random <= found.random_high


def test_heads_that_go_together() -> None:
    """All factors of a head near one direction: its features fire at the same tokens, random heads do not."""
    sae = make()
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(8, 12, generator=generator).repeat(6, 1)  # P_1 of all heads, P_2 of all, ...
    with torch.no_grad():
        sae.encoder.weight.copy_(directions + 0.1 * torch.randn(48, 12, generator=generator))
    found = head_correlation(sae, lambda: [X])
    assert found.within > 0.9
    assert abs(found.between) < 0.1  # features compete for k places
    assert found.random_high < 0.1


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SteerError, match="need a KronSAE"):
        head_correlation(SAE(SAEConfig(12, 64, 16)), lambda: [X])
    with pytest.raises(SteerError, match="no head has two features that fire at 10 of the 5 tokens"):
        head_correlation(make(), lambda: [X[:5]])

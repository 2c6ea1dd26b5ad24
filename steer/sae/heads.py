"""
Do the features of one head of a KronSAE go together? The correlation of their activations over tokens, within
heads and between them, beside random heads of the same features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.sae.model import SAE

# A feature needs this many tokens at which it is above 0, and as many at which it is not.
LEAST = 10
DRAWS = 20  # of random heads, the null distribution of `within`
BAND = (0.05, 0.95)


@dataclass(frozen=True)
class HeadCorrelation:
    """
    Mean Pearson correlations of the activations of two features.

    Args:
        within: of pairs in one head.
        between: of pairs in two heads.
        random: median of `within` when the same features are dealt out to heads of the same sizes at random.
        random_low: 5 % quantile of that.
        random_high: 95 % quantile.
        features: that take part; those that fire at fewer than 10 tokens do not.
        tokens: read.
    """

    within: float
    between: float
    random: float
    random_low: float
    random_high: float
    features: int
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def head_correlation(sae: SAE, batches: Callable[[], Iterable[Tensor]]) -> HeadCorrelation:
    """
    Correlations of features within the heads of a KronSAE and between them. No matrix of all pairs is held:
    the correlations of all pairs in a group sum to the variance of the sum of its standardised features.

    Args:
        sae: a KronSAE.
        batches: gives the activations (tokens, d_in), batch by batch; called twice.

    Raises:
        SteerError: an SAE without heads, and activations at which no head has two features that fire.
    """
    if sae.cfg.encoder != "kron":
        raise SteerError("correlations within heads need a KronSAE; this SAE's encoder is dense")
    total, squares, fires = (torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for _ in range(3))
    tokens = 0
    for batch in batches():
        z = sae.dense_features(batch.to(sae.device, sae.dtype)).double().cpu()
        total += z.sum(0)
        squares += z.square().sum(0)
        fires += (z > 0).sum(0)
        tokens += len(z)
    mean = total / max(tokens, 1)
    deviation = (squares / max(tokens, 1) - mean.square()).clamp(min=0).sqrt()
    kept = ((fires >= LEAST) & (tokens - fires >= LEAST) & (deviation > 0)).nonzero().squeeze(1)
    own = kept // (sae.cfg.m * sae.cfg.n)
    generator = torch.Generator().manual_seed(0)
    groups = [own, *(own[torch.randperm(len(own), generator=generator)] for _ in range(DRAWS))]
    heads = sae.cfg.heads or 0
    pairs = torch.bincount(own, minlength=heads).double()
    pairs = (pairs * (pairs - 1)).sum()
    if not pairs:
        raise SteerError(
            f"no head has two features that fire at {LEAST} of the {tokens} tokens or more; read more of them"
        )
    sums = torch.zeros(len(groups), dtype=torch.float64)
    whole = 0.0
    for batch in batches():
        z = sae.dense_features(batch.to(sae.device, sae.dtype))[:, kept.to(sae.device)].double().cpu()
        z = (z - mean[kept]) / deviation[kept]
        whole += z.sum(1).square().sum().item()
        for n, group in enumerate(groups):
            by_head = torch.zeros(len(z), heads, dtype=torch.float64).index_add_(1, group, z)
            sums[n] += by_head.square().sum()
    within = (sums / tokens - len(kept)) / pairs
    all_pairs = len(kept) * (len(kept) - 1)
    others = (whole / tokens - len(kept) - (within[0] * pairs).item()) / max(all_pairs - pairs.item(), 1)
    random = within[1:]
    low, high = (random.quantile(q).item() for q in BAND)
    return HeadCorrelation(within[0].item(), others, random.median().item(), low, high, len(kept), tokens)

"""
How good an SAE is: explained variance at any l0, the language model's loss with the reconstruction in its
stream, and how alike its features are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from steer.errors import SteerError
from steer.sae.activations import Window, check_base
from steer.sae.intervene import changed
from steer.sae.model import SAE, Active
from steer.sae.sparse import Selection
from steer.sites import find_decoder


@torch.no_grad()
def prefix_errors(sae: SAE, x: Tensor, active: Active, prefixes: Sequence[int]) -> dict[int, Tensor]:
    """||x - x_hat_j||^2 of each token (tokens,) by prefix length j: from the j strongest features."""
    residual = x - sae.b_dec
    errors, done = {}, 0
    for length in sorted(set(prefixes)):
        part = slice(done, length)
        where = Selection(active.indices[:, part].contiguous(), sae.cfg.d_sae)
        residual = residual - where.gather(active.values[:, part].contiguous(), sae.W_dec)
        errors[length], done = residual.square().sum(1), length
    return errors


def explained_by_prefix(sae: SAE, x: Tensor, active: Active, prefixes: Sequence[int]) -> dict[int, float]:
    """Explained variance of one batch by prefix length, 1 - sum ||x - x_hat||^2 / sum ||x - mean x||^2."""
    total = (x - x.mean(0)).square().sum()
    return {n: (1 - e.sum() / total).item() for n, e in prefix_errors(sae, x, active, prefixes).items()}


@dataclass(frozen=True)
class Quality:
    """Of an SAE over many activations. `explained` by l0, the last one with all active features."""

    tokens: int
    explained: dict[int, float]
    l0: float
    dead: float
    dense: float  # share of features that fire on more than a tenth of the tokens
    firing: list[float]  # share of the tokens on which each feature fires

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "firing"}


@torch.no_grad()
def quality(sae: SAE, batches: Iterable[Tensor], l0: Sequence[int] = ()) -> Quality:
    """
    Explained variance over all `batches` of activations (tokens, d_in), about their common mean, at each `l0`
    from the prefixes of one SAE, and how often features fire.

    With TopK the prefix of n features is what the same SAE gives when k is lowered to n. SteerError when
    there are no activations.
    """
    if sae.cfg.activation != "topk" and l0:
        raise SteerError(f"a sweep over l0 needs activation='topk', this SAE has {sae.cfg.activation!r}")
    above = [n for n in l0 if n > sae.cfg.k]
    if above:
        raise SteerError(
            f"l0={above[0]} is more than the SAE's k={sae.cfg.k}; it has no more active features"
        )
    sums, squares, count = torch.zeros(sae.cfg.d_in, dtype=torch.float64), 0.0, 0
    fired, errors = torch.zeros(sae.cfg.d_sae, dtype=torch.float64), dict.fromkeys(sorted(set(l0)), 0.0)
    whole, active_total = 0.0, 0.0
    for batch in batches:
        x = batch.to(sae.device, sae.dtype)
        active = sae.active(x)
        most = active.values.shape[1]
        squared = prefix_errors(sae, x, active, [*(n for n in errors if n < most), most])
        for n in errors:
            errors[n] += squared[min(n, most)].double().sum().item()
        whole += squared[most].double().sum().item()
        fires = active.values > 0
        fired += torch.bincount(active.indices[fires].cpu(), minlength=sae.cfg.d_sae).double()
        active_total += fires.sum().item()
        sums += x.double().sum(0).cpu()
        squares += x.double().square().sum().item()
        count += len(x)
    if not count:
        raise SteerError("there are no activations to evaluate on")
    variance = squares - (sums.square().sum() / count).item()
    firing = fired / count
    l0_mean = active_total / count
    explained = {n: 1 - e / variance for n, e in errors.items()}
    explained.setdefault(sae.cfg.k, 1 - whole / variance)
    return Quality(
        count,
        explained,
        l0_mean,
        (fired == 0).double().mean().item(),
        (firing > 0.1).double().mean().item(),
        firing.tolist(),
    )


@dataclass(frozen=True)
class LossRecovered:
    """
    Cross-entropy (nats) of the model as it is, with the reconstruction, and with the site's output at zero.
    """

    clean: float
    spliced: float
    zeroed: float

    @property
    def recovered(self) -> float:
        """1 when the reconstruction costs nothing, 0 when it is no better than zeros."""
        return (self.zeroed - self.spliced) / (self.zeroed - self.clean)


@torch.no_grad()
def loss_recovered(
    sae: SAE,
    model: PreTrainedModel,
    windows: Sequence[Window],
    layer: int,
    site: str = "resid_post",
    k: int | None = None,
    known: LossRecovered | None = None,
) -> LossRecovered:
    """
    Cross-entropy of the next token over the kept tokens of `windows`, with the SAE's reconstruction in place
    of the activations at the kept tokens. `k` keeps the k strongest features of a TopK SAE. `known`, measured
    before on the same windows, spares the two passes that do not depend on the SAE.
    """
    decoder = find_decoder(model)
    if decoder.hidden_size != sae.cfg.d_in:
        raise SteerError(f"the SAE has d_in={sae.cfg.d_in}, the model hidden_size={decoder.hidden_size}")
    check_base(sae.cfg.source, model)
    state: dict[str, Any] = {}

    def change(hidden: Tensor) -> Tensor:
        if state["mode"] == "clean":
            return hidden
        keep = state["keep"].to(hidden.device)
        out = hidden.clone()
        if state["mode"] == "zeroed":
            out[keep] = 0
        else:
            out[keep] = reconstruct(sae, hidden[keep].to(sae.dtype), k).to(hidden.dtype)
        return out

    sums, count = dict.fromkeys(("spliced",) if known else ("clean", "spliced", "zeroed"), 0.0), 0
    with changed(model, layer, site, change):
        for window in windows:
            ids = torch.tensor([window.ids], device=model.device)
            state["keep"] = torch.tensor([window.keep])
            scored = torch.tensor(window.keep)[:-1].to(model.device)
            if not scored.any():
                continue
            count += int(scored.sum())
            for mode in sums:
                state["mode"] = mode
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                sums[mode] += cross_entropy(logits[scored], ids[0, 1:][scored], reduction="sum").item()
    if not count:
        raise SteerError("the windows hold no token whose successor could be predicted")
    means = {mode: value / count for mode, value in sums.items()}
    return replace(known, **means) if known else LossRecovered(**means)


def reconstruct(sae: SAE, x: Tensor, k: int | None = None) -> Tensor:
    """Reconstructions (tokens, d_in), from the k strongest features where k is given."""
    if k is None or k >= sae.cfg.k:
        return sae(x)
    return sae.decode_active(sae.strongest(x, k))


@torch.no_grad()
def nearest_cosines(table: Tensor, chunk: int = 1024) -> Tensor:
    """(features,): the cosine of each row of `table` with the row most like it; near 1 means a duplicate."""
    rows = torch.nn.functional.normalize(table.float(), dim=1)
    nearest = []
    for start in range(0, len(rows), chunk):
        cosines = rows[start : start + chunk] @ rows.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -2
        nearest.append(cosines.amax(1))
    return torch.cat(nearest)

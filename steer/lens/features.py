"""
Vectors in the features of a sparse autoencoder: which they write (rows of the decoder), which they read (rows
of the encoder), and whose activation changes on texts while they are on. Beside each number is that of random
vectors of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steer.errors import SteerError
from steer.hooks import hooked
from steer.lens.conditions import BASE, Condition, open_lanes
from steer.lens.passes import prompt_columns
from steer.lens.random_sets import ONE_SIDED_DRAWS, with_random_sets
from steer.lens.results import Result
from steer.lens.subject import Row, Subject, chunks
from steer.places import Place, find_places
from steer.sae import SAE
from steer.sae.features import logit_effects

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAND = (0.05, 0.95)  # quantiles of the random vectors that are shown
RANKS = 50  # of the figure
WORDS = 3  # that a feature promotes, beside its number
PART = 1 << 24  # features times tokens that are held at once
# Within a layer, what is computed before what; the stream before a layer is that after the one below.
ORDER = {"attn_out": 1, "resid_mid": 2, "mlp_out": 3, "resid_post": 4}
# Below this share of the activations' length a change is rounding.
ROUNDING = 1e-6


@dataclass
class Reading(Result):
    """
    The strongest features by one measure, the strongest first. Strength is the measure's absolute value.

    Args:
        measure: what is measured.
        features: indices, (top,).
        value: (top,).
        low: 5 % quantile of the same feature's value with random vectors, (top,).
        high: 95 % quantile, (top,).
        p: how often the strongest feature of random vectors is at least as strong as this one, counted with
            these vectors themselves: (1 + such draws) / (1 + draws), (top,).
        ranked: strengths by rank, (ranks,).
        random_ranked: those of random vectors, (draws, ranks).
        extra: further numbers of the features, by name, (top,) each.
        promotes: the tokens that each feature's row of the decoder promotes.
    """

    measure: str
    features: list[int]
    value: Tensor
    low: Tensor
    high: Tensor
    p: Tensor
    ranked: Tensor
    random_ranked: Tensor
    extra: dict[str, Tensor]
    promotes: list[list[str]]

    @property
    def strongest(self) -> tuple[float, float, float, float]:
        """Strength of the strongest feature; of random vectors the median and both quantiles of it."""
        random = self.random_ranked[:, 0].double()
        low, high = (random.quantile(q).item() for q in BAND)
        return self.ranked[0].item(), random.median().item(), low, high


@dataclass
class Features(Result):
    """
    What vectors do in the features of an SAE.

    Args:
        sae: its name.
        layer: that it reads.
        site: that it reads.
        direct: whether a vector is at the SAE's own place and is read as it is; otherwise the direction is
            the mean change that the vectors make there.
        layers: whose vectors are on.
        length: of the direction.
        draws: random vectors.
        texts: read, and how many tokens of them counted.
        tokens: of the texts, at which features were measured.
        writes: by the cosine with decoder rows; extra `projection`, the direction's length along the row.
        reads: by the cosine with encoder rows; extra `change`, of the feature's pre-activation. None for a
            KronSAE, whose features have no single encoder row.
        activation: by the change of a feature's mean activation on the texts; extra `off` and `on`, the mean
            activations, and `fires_off` and `fires_on`, the shares of tokens where it is above 0.
    """

    sae: str
    layer: int
    site: str
    direct: bool
    layers: list[int]
    length: float
    draws: int
    texts: int
    tokens: int
    writes: Reading
    reads: Reading | None
    activation: Reading

    def figure(self) -> Figure:
        """Strength by rank of each measure: the vectors, and the band of random ones."""
        from steer.lens import plots

        shown = [reading for reading in (self.writes, self.reads, self.activation) if reading is not None]
        figure, axes = plots.panels(3.6 * len(shown), 3.0, 1, len(shown), squeeze=False)
        for axis, reading in zip(axes[0], shown, strict=True):
            ranks = range(1, len(reading.ranked) + 1)
            random = reading.random_ranked.double()
            low, high = (random.quantile(q, dim=0).tolist() for q in BAND)
            axis.fill_between(ranks, low, high, color="#777777", alpha=0.35, linewidth=0, label="random")
            axis.plot(ranks, reading.ranked.tolist(), color=plots.COLOURS[1], label="vectors")
            plots.finish(axis, reading.measure, "rank of the feature", "strength")
        axes[0][0].legend(frameon=False, fontsize=8)
        figure.tight_layout()
        return figure


@dataclass
class _Means:
    """Over the texts' tokens: activations (d_in,), features (d_sae,), and the share where each fires."""

    stream: Tensor
    features: Tensor
    fires: Tensor
    tokens: int


def check_upstream(subject: Subject, layers: Sequence[int], layer: int, site: str, name: str) -> bool:
    """
    Whether one of the vectors is at the SAE's place itself and adds the same at every token: an adaptive one
    does not.

    Raises:
        SteerError: all of them act after that place, so that nothing changes there.
    """
    place = _order(layer, site)
    own = subject.site
    steered = [_order(one, own) for one in layers]
    if not any(one <= place for one in steered):
        raise SteerError(
            f"{name} reads {site} of layer {layer}, and the vectors act after that ({own} of layers "
            f"{', '.join(map(str, layers))}): nothing changes there; give an SAE of layer {min(layers)} or "
            "later"
        )
    return place in steered and subject.vectors.config.kind != "adaptive"


def _order(layer: int, site: str) -> tuple[int, int]:
    return (layer - 1, ORDER["resid_post"]) if site == "resid_pre" else (layer, ORDER[site])


def _place(subject: Subject, layer: int, site: str) -> Place:
    """
    Where the SAE's activations are. Vectors before a layer are added to what the layer below returned, so the
    stream after that one is read where they leave it.
    """
    if (subject.site, site) == ("resid_pre", "resid_post") and layer + 1 < subject.decoder.num_hidden_layers:
        layer, site = layer + 1, "resid_pre"
    (place,) = find_places(subject.model, [layer], site)
    return place


@torch.no_grad()
def read_features(
    subject: Subject,
    sae: SAE,
    name: str,
    layer: int,
    site: str,
    rows: Sequence[Row],
    *,
    layers: Sequence[int] | None = None,
    draws: int = ONE_SIDED_DRAWS,
    top: int = 10,
    seed: int = 0,
    label: str | None = None,
) -> Features:
    """
    Read a subject's vectors in the features of an SAE.

    Args:
        subject: the model with the vectors.
        sae: of this model (`steer.sae.place.sae_place`).
        name: of the SAE.
        layer: that the SAE reads.
        site: that the SAE reads.
        rows: the texts; features are measured at the tokens that predict their completions, special tokens
            left out.
        layers: whose vectors are on; default: all.
        draws: random vectors of equal length, the null distribution.
        top: features in each reading.
        seed: of the random vectors.
        label: of the progress bar.

    Raises:
        SteerError: vectors that act after the SAE's place or change nothing there, no draws, and texts
            without tokens to measure at.
    """
    on = sorted(subject.layers if layers is None else layers)
    direct = check_upstream(subject, on, layer, site, name)
    place = _place(subject, layer, site)
    differences = (sae.cfg.source or {}).get("what") == "difference"
    steered = Condition(frozenset(on))

    def measure(condition: Condition) -> _Means:
        return _measure(subject, place, sae, rows, condition, differences and condition is not BASE)

    off = measure(BASE)
    if differences:  # without vectors there is no difference
        nothing = sae.dense_features(torch.zeros(1, sae.cfg.d_in, device=sae.device, dtype=sae.dtype))[0]
        off = _Means(torch.zeros_like(off.stream), nothing.double(), (nothing > 0).double(), off.tokens)
    with_vectors = measure(steered)
    here = next(one for one in on if _order(one, subject.site) == _order(layer, site)) if direct else None

    def direction(means: _Means) -> Tensor:
        if here is None:
            return means.stream - off.stream
        return subject.vectors.added()[here].double()

    own = direction(with_vectors)
    changed = (with_vectors.stream - off.stream).norm()
    if not changed > ROUNDING * max(off.stream.norm().item(), 1e-30) or not own.norm() > 0:
        raise SteerError(
            f"the vectors do not change {site} of layer {layer} on these texts: {name} has nothing to read"
        )
    with tqdm(total=draws, desc=label, unit="draw", leave=False, disable=label is None) as bar:

        def measure_random() -> tuple[Tensor, Tensor]:
            means = measure(steered)
            bar.update()
            return direction(means), means.features - off.features

        random = with_random_sets(subject.vectors, measure_random, draws, seed)
    directions = torch.stack([own, *(one for one, _ in random)])
    products, lengths = _products(directions, sae.W_dec)
    cosines = products / lengths / directions.norm(dim=1, keepdim=True)
    along = {"projection": products[0] / lengths}
    writes = _reading("cosine with decoder rows", cosines[0], cosines[1:], along, top)
    reads = None
    if sae.cfg.encoder == "dense":
        products, lengths = _products(directions, sae.encoder.weight)
        cosines = products / lengths / directions.norm(dim=1, keepdim=True)
        reads = _reading("cosine with encoder rows", cosines[0], cosines[1:], {"change": products[0]}, top)
    activation = _reading(
        "change of the mean activation",
        with_vectors.features - off.features,
        torch.stack([one for _, one in random]),
        {
            "off": off.features,
            "on": with_vectors.features,
            "fires_off": off.fires,
            "fires_on": with_vectors.fires,
        },
        top,
    )
    _name(subject, sae, [reading for reading in (writes, reads, activation) if reading is not None])
    return Features(
        name,
        layer,
        site,
        direct,
        on,
        own.norm().item(),
        draws,
        len(rows),
        with_vectors.tokens,
        writes,
        reads,
        activation,
    )


def _products(directions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products (directions, rows) with the rows of a table, and the lengths of these."""
    products, lengths = [], []
    for part in table.detach().split(1 << 14):
        rows = part.double().cpu()
        products.append(directions @ rows.T)
        lengths.append(rows.norm(dim=1).clamp(min=1e-30))
    return torch.cat(products, 1), torch.cat(lengths)


def _reading(measure: str, value: Tensor, random: Tensor, extra: dict[str, Tensor], top: int) -> Reading:
    """value: (features,); random: (draws, features)."""
    strength, ranks = value.abs(), min(RANKS, len(value))
    best = strength.topk(min(top, len(value))).indices
    strongest = random.abs().topk(ranks, dim=1).values
    beaten = (strongest[:, :1] >= strength[best]).sum(0)
    low, high = (random[:, best].quantile(q, dim=0) for q in BAND)
    return Reading(
        measure,
        best.tolist(),
        value[best],
        low,
        high,
        (1 + beaten) / (1 + len(random)),
        strength.topk(ranks).values,
        strongest,
        {name: one[best] for name, one in extra.items()},
        [],
    )


def _name(subject: Subject, sae: SAE, readings: Sequence[Reading]) -> None:
    """The tokens that the features of the readings promote."""
    features = sorted({feature for reading in readings for feature in reading.features})
    words, _ = logit_effects(sae, subject.model, subject.tokenizer, features, WORDS)
    by_feature = dict(zip(features, words, strict=True))
    for reading in readings:
        reading.promotes = [by_feature[feature] for feature in reading.features]


class _Stop(Exception):
    """Ends a forward pass where the activations were taken."""


def _measure(
    subject: Subject, place: Place, sae: SAE, rows: Sequence[Row], condition: Condition, differences: bool
) -> _Means:
    """Means over the texts in one condition; of differences between it and the base model where asked."""
    conditions = [BASE, condition] if differences else [condition]
    special = torch.tensor(subject.tokenizer.all_special_ids, dtype=torch.long)
    size = sae.cfg.d_sae
    stream = torch.zeros(sae.cfg.d_in, dtype=torch.float64)
    total, fires = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
    tokens = 0
    for _, batch in chunks(rows, subject.batch_size // len(conditions)):
        padded = subject.padded(batch)
        keep = torch.zeros(padded.ids.shape, dtype=torch.bool)
        for index, row in enumerate(batch):
            at = row.predicting
            keep[index, int(padded.start[index]) + at.start : int(padded.start[index]) + at.stop] = True
        keep &= ~torch.isin(padded.ids.cpu(), special)
        hidden = _activations(subject, place, padded, batch, conditions)
        hidden = hidden[-1] - hidden[0] if differences else hidden[0]
        kept = hidden[keep.to(hidden.device)]
        tokens += len(kept)
        stream += kept.double().sum(0).cpu()
        for part in kept.to(sae.device, sae.dtype).split(max(1, PART // size)):
            features = sae.dense_features(part)
            total += features.double().sum(0).cpu()
            fires += (features > 0).double().sum(0).cpu()
    if not tokens:
        raise SteerError("the texts have no tokens to measure features at; give longer ones")
    return _Means(stream / tokens, total / tokens, fires / tokens, tokens)


def _activations(
    subject: Subject, place: Place, padded: Any, batch: Sequence[Row], conditions: Sequence[Condition]
) -> Tensor:
    """(conditions, rows, columns, hidden_size) in float32, from a pass that ends at the place."""
    taken: list[Tensor] = []

    def take(hidden: Tensor) -> None:
        taken.append(hidden.float())
        raise _Stop

    repeated = padded.repeat(len(conditions))
    prompt = prompt_columns(padded, batch).repeat(len(conditions)).to(subject.device)
    with ExitStack() as stack:
        stack.enter_context(open_lanes(subject, conditions))
        stack.enter_context(subject.vectors.prompt_length(prompt))
        stack.enter_context(hooked(*place.watch(take)))
        stack.enter_context(suppress(_Stop))
        subject.decoder.backbone(
            input_ids=repeated.ids,
            attention_mask=repeated.mask,
            position_ids=repeated.positions,
            use_cache=False,
        )
    return taken[0].unflatten(0, (len(conditions), len(batch)))

"""Artifacts out of contrasts and directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.artifact import Artifact, from_vectors
from steer.config import SITES, SteeringConfig
from steer.errors import SteerError
from steer.evaluation.neutral_text import prose
from steer.extract.activations import TOKENS, read_activations
from steer.extract.contrast import Contrast
from steer.extract.directions import (
    METHODS,
    SHARE,
    mean_difference,
    principal_component,
    scaled,
    support_vector,
)
from steer.extract.rows import Row
from steer.identity import tokenizer_checksum
from steer.models import context_length
from steer.sites import find_decoder
from steer.versions import versions

# Below this share of the stream's length a difference is rounding.
ROUNDING = 1e-6


def from_contrast(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrast,
    *,
    method: str = "mean",
    layers: str = "all",
    site: str = "resid_post",
    tokens: str = "last",
    share: float = SHARE,
    positions: str = "all",
    batch_size: int = 16,
    label: str | None = None,
) -> Artifact:
    """
    Vectors that lead from the negative to the positive texts of a contrast.

    Args:
        model: the base model; vectors that are attached to it are off meanwhile.
        tokenizer: of the model.
        contrast: the texts.
        method: a key of `METHODS`.
        layers: as in `SteeringConfig.layers`.
        site: where the activations are read, and the vectors are added.
        tokens: which tokens are read, a key of `TOKENS`.
        share: length of all vectors together, as a share of the mean length of the residual stream; each of n
            has share / n of it at its layer.
        positions: which tokens the vectors steer, a key of `steer.config.POSITIONS`.
        batch_size: texts in a forward pass.
        label: of the progress bar; None for none.

    Returns:
        The artifact; its provenance has `extract`, which says all of this.

    Raises:
        SteerError: an unknown method, layer or site; a share that is not a number above 0; texts that do not
            differ; PCA without pairs.
    """
    if method not in METHODS:
        raise SteerError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    chosen = _layers(model, layers, site, positions, share)
    pca = method == "pca"
    if pca and not contrast.pairs:
        raise SteerError(
            "method='pca' needs pairs, and there are none: give lines with both 'positive' and 'negative', a "
            "run with right and wrong answers to one problem, or method='mean'"
        )
    positive, negative = (
        read_activations(
            model, rows, chosen, site, tokens, batch_size, method != "mean", label and f"{label}, {name}"
        )
        for name, rows in (("positive", contrast.positive), ("negative", contrast.negative))
    )
    if pca:
        directions = principal_component(positive, negative, contrast.pairs)
    elif method == "svm":
        directions = support_vector(positive, negative)
    else:
        directions = mean_difference(positive, negative)
    norms = dict(zip(chosen, ((positive.norm + negative.norm) / 2).tolist(), strict=True))
    for layer, direction in directions.items():
        if direction.norm() < ROUNDING * norms[layer]:
            raise SteerError(
                f"layer {layer}: positive and negative texts are the same there (at {TOKENS[tokens]}); give "
                "texts that differ, other tokens, or other layers"
            )
    told = {
        **contrast.source,
        "method": METHODS[method],
        "read at": TOKENS[tokens],
        "positive texts": len(contrast.positive),
        "negative texts": len(contrast.negative),
        **({"pairs": len(contrast.pairs)} if pca else {}),
    }
    return _artifact(
        model, tokenizer, scaled(directions, norms, share), told, share, site, positions, contrast.prompt
    )


def from_direction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    direction: Tensor,
    source: Mapping[str, Any],
    *,
    layers: str = "last",
    site: str = "resid_post",
    share: float = SHARE,
    positions: str = "all",
    batch_size: int = 16,
) -> Artifact:
    """
    The same direction in each of `layers`; the length of the residual stream is measured on the neutral text
    that comes with the package (`steer.evaluation.neutral_text`).

    Args:
        direction: (hidden_size,), of `token_direction` or `sae_direction`.
        source: what the card says of it.
        model: the base model.
        tokenizer: of the model.
        layers: as in `SteeringConfig.layers`.
        site: where the length of the residual stream is measured, and the vectors are added.
        share: length of all vectors together, as in `from_contrast`.
        positions: which tokens the vectors steer, a key of `steer.config.POSITIONS`.
        batch_size: texts in a forward pass.

    Raises:
        SteerError: an unknown layer or site, a share that is not a number above 0, and a direction without
            length.
    """
    chosen = _layers(model, layers, site, positions, share)
    context = context_length(model.config)
    cut = [ids[:context] for ids in tokenizer(prose(), verbose=False)["input_ids"]]
    rows = [Row(tuple(ids), len(ids)) for ids in cut]
    read = read_activations(model, rows, chosen, site, "all", batch_size)
    norms = dict(zip(chosen, read.norm.tolist(), strict=True))
    vectors = scaled(dict.fromkeys(chosen, direction.double()), norms, share)
    return _artifact(model, tokenizer, vectors, source, share, site, positions, None)


def _layers(model: PreTrainedModel, layers: str, site: str, positions: str, share: float) -> list[int]:
    """The layers that are asked for; SteerError for settings that cannot work, before any forward pass."""
    if not 0 < share < float("inf"):
        raise SteerError(f"share={share!r} is not a number above 0; 0.1 is a tenth of the stream's length")
    config = SteeringConfig(layers=layers, site=site, positions=positions)  # refuses what is unknown
    return config.resolve_layers(find_decoder(model).num_hidden_layers)


def _artifact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[int, Tensor],
    told: Mapping[str, Any],
    share: float,
    site: str,
    positions: str,
    prompt: Any,
) -> Artifact:
    each = share / len(vectors)
    length = f"{each:.3g} of the mean length of the residual stream at the layer, in all layers {share:g}"
    provenance = {
        "extract": {**told, "site": f"{site}, {SITES[site]}", "length": length},
        "versions": versions("steer", "torch", "transformers"),
    }
    made = from_vectors(vectors, model, site=site, positions=positions, prompt=prompt, provenance=provenance)
    return replace(made, config=replace(made.config, tokenizer_checksum=tokenizer_checksum(tokenizer)))

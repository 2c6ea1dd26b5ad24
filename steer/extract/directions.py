"""
Directions in the residual stream, and the length that vectors along them are given.

A direction has no natural strength, and vectors in several layers add up. The vectors that are made here have
together a stated share of the mean length of the residual stream: in n layers each has share / n of that at
its layer, measured over the tokens that the direction was read from (at a site that is
no stream, such as attn_out: of the stream after the layer).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError, shown
from steer.extract.activations import Activations
from steer.final_norm import onto_stream

if TYPE_CHECKING:
    from steer.sae import SAE

METHODS = {
    "mean": "the mean of the positive texts minus that of the negative ones",
    "pca": "the direction along which paired texts differ most: the first principal component of their "
    "differences, taken about zero, with the sign of the mean difference",
    "svm": "the normal of the plane between positive and negative texts, of a linear support vector machine",
}
# Weight of the hinge losses against the margin, as in scikit-learn's LinearSVC, whose default it is too.
PENALTY = 1.0
# Of the mean length of the residual stream.
SHARE = 0.1


def mean_difference(positive: Activations, negative: Activations) -> dict[int, Tensor]:
    """
    The mean of the positive texts minus that of the negative ones (arXiv 2312.06681), by layer:
    (hidden_size,) in float64. Every token counts the same, whichever text it is of.
    """
    difference = positive.mean - negative.mean
    return dict(zip(positive.layers, difference, strict=True))


def principal_component(
    positive: Activations, negative: Activations, pairs: Sequence[tuple[int, int]]
) -> dict[int, Tensor]:
    """
    The first principal component of the differences of paired texts (arXiv 2310.01405), by layer:
    (hidden_size,) in float64, as long as the root mean square of the differences along it.

    The differences are not centred: their mean is part of what is sought. The sign is such that the pairs'
    mean difference is along the component.

    Args:
        positive: with `texts`.
        negative: with `texts`.
        pairs: indices of the texts that belong together, one pair or more.
    """
    assert positive.texts is not None and negative.texts is not None and pairs
    one, other = torch.tensor(pairs).T
    components = {}
    for place, layer in enumerate(positive.layers):
        rows = positive.texts[one, place].double() - negative.texts[other, place].double()
        if len(rows) < rows.shape[1]:  # the smaller of the two products
            component = rows.T @ torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -1]
        else:
            component = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
        component = normalize(component, dim=0)
        along = rows @ component
        components[layer] = component * along.square().mean().sqrt() * (-1.0 if along.mean() < 0 else 1.0)
    return components


def support_vector(positive: Activations, negative: Activations) -> dict[int, Tensor]:
    """
    The normal of the plane that a linear support vector machine puts between positive and negative texts, by
    layer: (hidden_size,) in float64, towards the positive ones, as long as their mean difference along it.

    With each text's mean activation x, less the mean of all and divided by the root mean square length of
    that, and y = 1 or -1, it minimises |w|^2 / 2 + `PENALTY` * sum of max(0, 1 - y (w x + b))^2.

    Args:
        positive: with `texts`.
        negative: with `texts`.
    """
    assert positive.texts is not None and negative.texts is not None
    normals = {}
    for place, layer in enumerate(positive.layers):
        one, other = positive.texts[:, place].double(), negative.texts[:, place].double()
        points = torch.cat([one, other])
        points = points - points.mean(0)
        length = points.norm(dim=1).square().mean().sqrt()
        labels = torch.cat([torch.ones(len(one)), -torch.ones(len(other))]).double()
        normal = _squared_hinge(points / length.clamp(min=1e-30), labels)
        normal = normalize(normal, dim=0)
        normals[layer] = normal * ((one.mean(0) - other.mean(0)) @ normal).abs()
    return normals


def _squared_hinge(points: Tensor, labels: Tensor) -> Tensor:
    """The weights (width,) of a linear SVM with squared hinge loss and a free bias; points (texts, width)."""
    basis = torch.eye(points.shape[1], dtype=points.dtype)
    if len(points) < points.shape[1]:  # the weights are in the span of the points
        basis, triangle = torch.linalg.qr(points.T)
        points = triangle.T
    weights = torch.zeros(points.shape[1] + 1, dtype=points.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        slack = (1 - labels * (points @ weights[:-1] + weights[-1])).clamp(min=0)
        value = weights[:-1].square().sum() / 2 + PENALTY * slack.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return basis @ weights[:-1].detach()


def token_direction(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """
    The direction that raises the logit of one token most: its row of the unembedding, through the final norm.

    Args:
        model: the base model.
        tokenizer: of the model.
        text: the text of the token, leading space included: " Paris".

    Returns:
        (hidden_size,) in float64.

    Raises:
        SteerError: a text that is not one token, and a model without an unembedding.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        names = [tokenizer.decode([index]) for index in ids]
        raise SteerError(
            f"{shown(text)} is {len(ids)} tokens ({shown(names)}), expected one; many words are one token "
            f"with a space before them, such as {' paris'!r}"
        )
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise SteerError(f"{type(model).__name__} has no unembedding matrix to take a token's direction from")
    row = head.weight[ids[0]].detach().double().cpu()
    return onto_stream(model, row[None])[0]


def sae_direction(
    folder: str | os.PathLike[str],
    feature: int,
    model: PreTrainedModel,
    layers: Sequence[int] | None = None,
    site: str | None = None,
    sae: SAE | None = None,
) -> tuple[Tensor, int, str, dict[str, Any]]:
    """
    What a feature of a sparse autoencoder writes: its row of the decoder.

    Args:
        folder: of the SAE, or its name: whatever `steer.sae.load_sae` takes.
        feature: its index.
        model: the base model.
        layers: the layer, for an SAE that does not say which it was trained on.
        site: likewise; default resid_post.
        sae: the SAE, if it is loaded already.

    Returns:
        The direction (hidden_size,) in float64, the layer, the site, and what the card says of the source.

    Raises:
        SteerError: an SAE of another model, layer, site or width; a feature that it does not have; no layer.
    """
    from steer.sae import load_sae
    from steer.sae.place import sae_place

    sae = sae or load_sae(folder)
    known = (sae.cfg.source or {}).get("layer")
    if layers is not None and (len(layers) != 1 or known not in (None, layers[0])):
        was = "one layer" if known is None else f"layer {known}"
        raise SteerError(
            f"{folder} is an SAE of {was}, --layers asks for {list(layers)}; leave it out or correct it"
        )
    layer, place = sae_place(sae, model, str(folder), layers[0] if layers else None, site)
    if not 0 <= feature < sae.cfg.d_sae:
        raise SteerError(f"{folder} has features 0 to {sae.cfg.d_sae - 1}, not {feature}")
    told = {"from": f"feature {feature} of the SAE {folder}", "sae": dict(sae.cfg.source or {})}
    return sae.W_dec[feature].detach().double().cpu(), layer, place, told


def scaled(
    directions: Mapping[int, Tensor], norms: Mapping[int, float], share: float = SHARE
) -> dict[int, Tensor]:
    """
    Each of n directions at `share` / n times the mean length of its layer's residual stream.

    Args:
        directions: (hidden_size,) by layer.
        norms: mean length of the residual stream, by layer.
        share: of all vectors together, such as 0.1 for a tenth.

    Returns:
        (hidden_size,) in float32 by layer.

    Raises:
        SteerError: a direction without length.
    """
    made = {}
    for layer, direction in directions.items():
        length = direction.norm().item()
        if not length:
            raise SteerError(f"layer {layer}: the direction is zero; give another, or other layers")
        made[layer] = (direction * (share / len(directions) * norms[layer] / length)).float()
    return made

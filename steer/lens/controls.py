"""
Controls for whatever is claimed of trained vectors: values of the same size that were not trained for it.

Each function gives tensors by parameter name; `values` puts them in the subject's vectors for a while.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.nn.functional import normalize

from steer.errors import SteerError
from steer.extract import directions as extract
from steer.extract.activations import read_activations
from steer.lens.subject import Row, Subject
from steer.vectors import SteeringVectors


@contextmanager
def values(vectors: SteeringVectors, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the vectors have the values `tensors`; outside, their own again."""
    own = vectors.tensors()
    vectors.set_tensors(tensors)
    try:
        yield
    finally:
        vectors.set_tensors(own)


def random_vectors(vectors: SteeringVectors, seed: int = 0) -> dict[str, torch.Tensor]:
    """Directions drawn uniformly at random, each layer as long as its own vector."""
    generator = torch.Generator().manual_seed(seed)
    own = vectors.effective()
    if vectors.config.kind == "shared":
        return _shared(vectors, torch.randn(_directions(vectors).shape, generator=generator))
    drawn = {layer: torch.randn(vector.shape, generator=generator) for layer, vector in own.items()}
    return _with_directions(vectors, drawn)


def directions(vectors: SteeringVectors, tensors: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """What `Condition.directions` takes for the vectors to act as with the values `tensors`."""
    if vectors.config.kind == "adaptive":  # the read-outs stay
        names = [name for name in tensors if name.endswith(".vector")]
        return {layer: tensors[name] for layer, name in zip(vectors.layers, names, strict=True)}
    with values(vectors, tensors):
        return vectors.effective()


def random_readouts(vectors: SteeringVectors, seed: int = 0) -> dict[str, torch.Tensor]:
    """
    `random_vectors` of adaptive vectors with random read-outs, each as long as its own: what it shows, tokens
    and lengths alone show. SteerError for vectors without read-outs.
    """
    if vectors.config.kind != "adaptive":
        raise SteerError(f"{vectors.config.kind} vectors have no read-outs; use the random control")
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = random_vectors(vectors, seed)
    for name, own in tensors.items():
        if name.endswith(".readout"):
            drawn = torch.randn(own.shape, generator=generator, dtype=torch.float64)
            tensors[name] = (normalize(drawn, dim=0) * own.double().norm()).to(own.dtype)
    return tensors


def shuffled_layers(vectors: SteeringVectors, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every layer gets the direction of another one, at its own length. SteerError for a single layer."""
    layers = vectors.layers
    if len(layers) < 2:
        raise SteerError("one layer cannot be shuffled: this control needs vectors in two layers or more")
    rng = random.Random(seed)
    order = layers.copy()
    rng.shuffle(order)
    after = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: no layer keeps its own
    own = vectors.effective()
    if vectors.config.kind == "shared":
        raise SteerError("shared vectors cannot be shuffled in place; use the random control")
    return _with_directions(vectors, {layer: own[after[layer]] for layer in layers})


def mean_difference(
    subject: Subject, wanted: Sequence[Row], unwanted: Sequence[Row], label: str | None = None
) -> dict[str, torch.Tensor]:
    """
    Each layer's direction is the base model's mean activation, at the vectors' site and the completion tokens
    of `wanted`, minus that of `unwanted` (such as the steered and the base model's answers), at the trained
    vector's length: what could be had from activations alone, the paper's baseline.
    """
    if subject.vectors.config.kind == "shared":
        raise SteerError("shared vectors hold no free direction a layer; use the random control")
    positive, negative = (
        read_activations(
            subject.model,
            rows,
            subject.layers,
            site=subject.site,
            tokens="completion",
            batch_size=subject.batch_size,
            label=label,
        )
        for rows in (wanted, unwanted)
    )
    sign = math.copysign(1.0, subject.vectors.scale)  # the scale is applied to them again
    found = extract.mean_difference(positive, negative)
    return _with_directions(subject.vectors, {layer: sign * one for layer, one in found.items()})


def _with_directions(vectors: SteeringVectors, chosen: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`vectors` with each layer's direction replaced and its length kept."""
    tensors = vectors.tensors()
    names = [name for name in tensors if name.endswith(".vector")]
    for layer, name in zip(vectors.layers, names, strict=True):
        own = tensors[name]
        tensors[name] = (normalize(chosen[layer].double(), dim=0) * own.double().norm()).to(own.dtype)
    return tensors


def _directions(vectors: SteeringVectors) -> torch.Tensor:
    return list(vectors.tensors().values())[-1]


def _shared(vectors: SteeringVectors, drawn: torch.Tensor) -> dict[str, torch.Tensor]:
    """Shared vectors with other directions, and mixes rescaled so that every layer keeps its length."""
    tensors, own = vectors.tensors(), vectors.effective()
    *mixes, last = tensors
    tensors[last] = drawn.to(tensors[last].dtype)
    for layer, name in zip(vectors.layers, mixes, strict=True):
        made = (tensors[name].double() @ tensors[last].double()).norm()
        tensors[name] = (tensors[name].double() * own[layer].double().norm() / made).to(tensors[name].dtype)
    return tensors

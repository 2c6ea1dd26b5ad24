"""The tensors of an artifact: their names and shapes for a config, and the check that they are so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from steer.config import SteeringConfig
from steer.errors import SteerError, shown

if TYPE_CHECKING:
    import numpy as np
    import torch

_NAME = re.compile(r"(?P<decoder>[\w.]+)\.(?P<layer>\d{1,5})\.steering\.(?:vector|readout|mix)", re.ASCII)


def decoder_name(tensors: Iterable[str]) -> str | None:
    """Name of the list of decoder layers, such as `model.layers`, from the names of the tensors."""
    match = next(filter(None, map(_NAME.fullmatch, tensors)), None)
    return match["decoder"] if match else None


def expected_names(config: SteeringConfig, decoder: str) -> dict[str, tuple[int | None, ...]]:
    """Names and shapes of the tensors of `config`; None is a length that the config does not tell."""
    assert config.num_hidden_layers is not None
    shapes: dict[str, dict[str, tuple[int | None, ...]]] = {
        "constant": {"vector": (config.hidden_size,)},
        "adaptive": {"vector": (config.hidden_size,), "readout": (None,)},
        "shared": {"mix": (config.rank,)},
    }
    names = {
        f"{decoder}.{layer}.steering.{part}": shape
        for layer in config.resolve_layers(config.num_hidden_layers)
        for part, shape in shapes[config.kind].items()
    }
    if config.kind == "shared":
        names[directions_name(decoder)] = (config.rank, config.hidden_size)
    if config.condition is not None:
        names[probe_name(decoder)] = (config.hidden_size,)
    return names


def same_tensors(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both have the same names, and equal numbers under each."""
    return one.keys() == other.keys() and all(
        values.shape == other[name].shape and bool((values == other[name]).all())
        for name, values in one.items()
    )


def directions_name(decoder: str) -> str:
    """Where the shared directions live: beside the list of layers, in the module that runs them."""
    return f"{decoder.rpartition('.')[0]}.steering.directions".removeprefix(".")


def probe_name(decoder: str) -> str:
    """Where the probe of a condition lives, likewise."""
    return f"{decoder.rpartition('.')[0]}.steering.probe".removeprefix(".")


def renamed(tensors: Mapping[str, torch.Tensor], decoder: str) -> dict[str, torch.Tensor]:
    """
    The same tensors for a model whose list of decoder layers is called `decoder`: a text model is inside of a
    vision-language model under another name.
    """
    own = decoder_name(tensors)
    if own is None or own == decoder:
        return dict(tensors)
    beside = {directions_name(own): directions_name(decoder), probe_name(own): probe_name(decoder)}
    return {
        beside[name] if name in beside else decoder + name.removeprefix(own): tensor
        for name, tensor in tensors.items()
    }


def check_tensors(config: SteeringConfig, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise SteerError unless the tensors are exactly those that the config speaks of, and finite."""
    import torch

    for name, tensor in tensors.items():
        if tensor.dtype != getattr(torch, config.dtype):
            raise SteerError(
                f"{where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected "
                f"{config.dtype} as the config says"
            )
    arrays = {name: tensor.detach().cpu().double().numpy() for name, tensor in tensors.items()}
    check_arrays(config, arrays, where)


def check_arrays(config: SteeringConfig, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """The same for float64 arrays: needs no torch."""
    import numpy as np

    if not arrays:
        raise SteerError(f"{where}: the artifact holds no vectors")
    if config.hidden_size is None or config.num_hidden_layers is None:
        raise SteerError(f"{where}: the steering config does not say hidden_size and num_hidden_layers")
    decoder = decoder_name(arrays)
    if decoder is None:
        raise SteerError(
            f"{where}: unexpected tensor {next(iter(arrays))!r}; names are like "
            "'model.layers.12.steering.vector'"
        )
    expected = expected_names(config, decoder)
    if set(arrays) != set(expected):
        wrong = sorted(set(arrays) ^ set(expected))
        raise SteerError(
            f"{where}: the tensors are not the {config.kind} vectors of layers {shown(config.layers)}: "
            f"{', '.join(wrong[:4])} {'is' if len(wrong) == 1 else 'are'} missing or unexpected"
        )
    for name, shape in expected.items():
        array = arrays[name]
        if array.shape != shape and not (shape == (None,) and array.ndim == 1 and array.size):
            raise SteerError(f"{where}: {name} has shape {array.shape}, expected floats {shape}")
        if name == probe_name(decoder) and not array.any():
            raise SteerError(f"{where}: {name} is zero: no state has a cosine with it")
        if not np.isfinite(array).all():
            raise SteerError(
                f"{where}: {name} holds NaN or Inf; lower the learning rate or load an earlier checkpoint"
            )

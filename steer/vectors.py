"""
Steering vectors inside a model: attach, switch off, scale, save, load, detach.

A vector is a parameter of its decoder layer, `model.layers.12.steering.vector`, so optimizers, DDP and FSDP
meet it like any other parameter. A forward hook adds it to the residual stream: h <- h + scale * s_l (arXiv
2509.06608, section 2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer import artifact
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.sites import find_decoder, find_sites


class Gate:
    """
    What all vectors of one model share: on or off, the scale, and which tokens of the running pass are
    steered.
    """

    def __init__(self, positions: str, scale: float):
        self.positions = positions
        self.scale = scale
        self.enabled = True
        self.prompt_length: int | torch.Tensor | None = None  # columns of the prompt, where told
        self.mask: torch.Tensor | None = None  # (batch or 1, tokens, 1) bool; None steers every token

    def place(self, tokens: int, past: Any, device: torch.device) -> None:
        """
        Set `mask` for a pass over `tokens` new columns after those in the KV cache `past` (None without a
        cache).
        """
        seen = past.get_seq_length() if past is not None else 0
        length = self.prompt_length
        if length is None:
            if past is not None and seen == 0:  # kept on the cache: several generations may take turns
                past.steering_prompt_length = tokens
            length = getattr(past, "steering_prompt_length", None)
            if length is None:
                raise SteerError(
                    f"positions={self.positions!r} must know where the prompt ends: wrap this call in "
                    "`with vectors.prompt_length(n):` (generate() needs nothing)"
                )
        column = torch.arange(tokens, device=device) + seen  # (tokens,)
        if isinstance(length, torch.Tensor) and length.dim():
            column, length = column[None, :], length.to(device)[:, None]
        rule: dict[str, torch.Tensor] = {
            "prompt": column < length,
            "last_prompt": column == length - 1,
            "completion": column >= length,
            "first_completion": column == length,
        }
        self.mask = rule[self.positions].unsqueeze(-1)


class SteeringVector(nn.Module):
    """
    One vector of shape (width,), zero at the start, added to hidden states of shape (batch, tokens, width).
    """

    def __init__(self, width: int, gate: Gate, dtype: torch.dtype = torch.float32, device: Any = None):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
        self.gate = gate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.gate.enabled:
            return hidden
        # Added in the precision of the stream, as a bias would be; the vector itself keeps its own.
        steered = hidden + (self.gate.scale * self.vector).to(hidden.device, hidden.dtype)
        mask = self.gate.mask
        return steered if mask is None else torch.where(mask.to(hidden.device), steered, hidden)


class SteeringVectors:
    """
    The handle that `attach` and `load` return: all vectors of one model.

    `config` is what they are, `scale` what they are multiplied with, `named_parameters()` the trainable
    numbers.
    """

    def __init__(
        self, model: nn.Module, config: SteeringConfig, modules: dict[str, SteeringVector], gate: Gate
    ):
        self.model = model
        self.config = config
        self._modules = modules
        self._gate = gate
        self._handles: list[Any] = []
        self._was_trainable: list[str] = []

    @property
    def scale(self) -> float:
        return self._gate.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self.config = replace(self.config, scale=value)
        self._gate.scale = self.config.scale

    @property
    def depth(self) -> int:
        """Number of decoder layers of the model, steered or not."""
        assert self.config.depth is not None
        return self.config.depth

    @property
    def layers(self) -> list[int]:
        """Indices of the steered layers, ascending."""
        return self.config.resolve_layers(self.depth)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of shape (width,) by their name in the model, first layer first."""
        return {f"{name}.vector": module.vector for name, module in self._modules.items()}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Detached copies on the CPU, each (width,), by parameter name; sharded parameters are gathered."""
        whole = {
            n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in self.named_parameters().items()
        }
        return {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}

    def set_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy values in, by parameter name. Missing or additional names and other shapes are refused."""
        parameters = self.named_parameters()
        if set(tensors) != set(parameters):
            wrong = ", ".join(sorted(set(tensors) ^ set(parameters)))
            raise SteerError(
                f"the vectors given are not those of this model's layers {self.config.layers}: {wrong}"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                if tensors[name].shape != parameter.shape:
                    raise SteerError(
                        f"{name} has width {tuple(tensors[name].shape)}, the model {tuple(parameter.shape)}; "
                        "vectors only fit a model of their own width"
                    )
                parameter.copy_(tensors[name])

    def norms(self) -> dict[int, float]:
        """Euclidean norm of each vector by layer index."""
        return {layer: t.norm().item() for layer, t in zip(self.layers, self.tensors().values(), strict=True)}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model again, exactly."""
        before, self._gate.enabled = self._gate.enabled, False
        try:
            yield
        finally:
            self._gate.enabled = before

    @contextmanager
    def prompt_length(self, columns: int | torch.Tensor) -> Iterator[None]:
        """
        Inside, the first `columns` columns (padding included; an int, or (batch,) for each row) are the
        prompt.

        Needed only when `positions` is not 'all' and the model is called without `generate()`, or when it
        prefills the prompt in chunks. Run the backward pass inside too when activations are checkpointed:
        the recomputation asks again where the prompt ends.
        """
        before, self._gate.prompt_length = self._gate.prompt_length, columns
        try:
            yield
        finally:
            self._gate.prompt_length = before

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """
        Write `steering_config.json` and `steering.safetensors`; the format is described in `steer.artifact`.
        """
        return artifact.write(folder, artifact.Artifact(self.config, self.tensors()))

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        shape = f"{len(self._modules)} x {self.config.width} = {count:,} numbers"
        return f"SteeringVectors({shape}, {self.config.site})"


def attach(model: nn.Module, config: SteeringConfig | None = None) -> SteeringVectors:
    """
    Put zero vectors into `model` and freeze everything else. Zero vectors change no output, bit for bit.

    `model` is any decoder-only causal LM of transformers. Raises SteerError for a layer or site it does not
    have, and for a model that already has vectors.
    """
    config = config or SteeringConfig()
    if "steering_vectors" in model.__dict__:
        raise SteerError("the model already has steering vectors; call steer.detach(model) first")
    decoder = find_decoder(model)
    layers = config.resolve_layers(decoder.depth)
    sites = find_sites(decoder, layers, config.site)
    base: Any = model.config
    config = replace(
        config,
        base_model=config.base_model or base._name_or_path or None,
        base_revision=config.base_revision or getattr(base, "_commit_hash", None),
        model_type=base.get_text_config().model_type,
        width=decoder.width,
        depth=decoder.depth,
    )
    gate = Gate(config.positions, config.scale)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    modules, handles = {}, []
    for index, site in zip(layers, sites, strict=True):
        block = decoder.layers[index]
        vector = SteeringVector(decoder.width, gate, getattr(torch, config.dtype), _device(block))
        block.steering = vector
        modules[f"{decoder.name}.{index}.steering"] = vector
        # `partial` rather than a closure, so that a deep copy of the model steers with its own vectors.
        # `prepend`, because transformers captures hidden states with hooks of its own, installed at their
        # first use.
        if site.on_input:
            hook = partial(_steer_input, vector)
            handles.append(site.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        else:
            handles.append(site.module.register_forward_hook(partial(_steer_output, vector), prepend=True))
    if config.positions != "all":
        handles.append(
            decoder.trunk.register_forward_pre_hook(partial(_place, gate), prepend=True, with_kwargs=True)
        )
    vectors = SteeringVectors(model, config, modules, gate)
    vectors._handles, vectors._was_trainable = handles, trainable
    model.__dict__["steering_vectors"] = vectors
    return vectors


def attached(model: nn.Module) -> SteeringVectors:
    """The vectors inside `model`; SteerError when there are none."""
    if "steering_vectors" not in model.__dict__:
        raise SteerError(
            f"this {type(model).__name__} has no steering vectors; call steer.attach or steer.load first"
        )
    return model.__dict__["steering_vectors"]


def detach(model: nn.Module) -> None:
    """
    Take the vectors out: the base model again, bit for bit, with the parameters trainable that were before.
    """
    vectors = attached(model)
    for handle in vectors._handles:
        handle.remove()
    for name in vectors._modules:
        del model.get_submodule(name.rpartition(".")[0]).steering
    for name in vectors._was_trainable:
        model.get_parameter(name).requires_grad_(True)
    del model.__dict__["steering_vectors"]


def load(source: str | os.PathLike[str], model: nn.Module, revision: str | None = None) -> SteeringVectors:
    """
    Attach the vectors saved in `source` (a folder, a `.safetensors` file or a hub id) to `model`.

    Raises SteerError when the file is damaged, or when the model differs in width, depth or architecture.
    """
    saved = artifact.read(source, revision)
    decoder = find_decoder(model)
    config = saved.config
    kind = model.config.get_text_config().model_type  # type: ignore[union-attr, operator]
    have = {"width": decoder.width, "depth": decoder.depth, "model_type": kind}
    for name, value in have.items():
        if getattr(config, name) != value:
            raise SteerError(
                f"{source} was made for {config.base_model} with {name}={getattr(config, name)}, this "
                "model has "
                f"{name}={value}; vectors only fit a model of the same shape"
            )
    vectors = attach(model, config)
    try:
        vectors.set_tensors(saved.tensors)
    except SteerError:
        detach(model)
        raise
    return vectors


def _device(block: nn.Module) -> torch.device:
    """
    Where the layer computes: its parameters' device, or the execution device when accelerate offloads them.
    """
    for module in block.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(block.parameters()).device


def _steer_output(vector: SteeringVector, module: nn.Module, args: tuple, output: Any) -> Any:
    # transformers 5 returns a bare tensor from decoder layers, earlier releases and attention modules a tuple
    return (vector(output[0]), *output[1:]) if isinstance(output, tuple) else vector(output)


def _steer_input(vector: SteeringVector, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (vector(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": vector(kwargs["hidden_states"])}


def _place(gate: Gate, trunk: nn.Module, args: tuple, kwargs: dict) -> None:
    if not gate.enabled:  # the base model needs no prompt length
        return
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    gate.place(tokens.shape[1], kwargs.get("past_key_values"), tokens.device)

"""
Steering vectors inside a model: attach, switch off, scale, save, load, detach.

A vector (`steer.kinds`) is a parameter of its decoder layer, `model.layers.12.steering.vector`, so
optimizers, DDP and FSDP meet it like any other parameter. A forward hook adds it to the residual stream:
h <- h + scale * s_l (arXiv 2509.06608, section 2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steer import artifact
from steer.artifact_tensors import directions_name, probe_name, renamed
from steer.batching import BatchGuard
from steer.compat import forget_compiled
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.hooks import hook
from steer.identity import check_fits, describe
from steer.kinds import AdaptiveVector, SharedDirections, SharedVector, SteeringState, SteeringVector
from steer.probe import verify
from steer.prompt_watch import PromptWatch
from steer.quantization import check_quantization, keep_gradients
from steer.saving import warn_when_saved
from steer.sharded import fill, gathered, shape, whole
from steer.sites import Decoder, Site, find_decoder, find_down_projections, find_steered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyVector = SteeringVector | AdaptiveVector | SharedVector


class SteeringVectors:
    """
    The handle that `attach` and `load` return: all vectors of one model.

    `config` is what they are, `scale` what they are multiplied with, `named_parameters()` the trainable
    numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SteeringConfig,
        modules: dict[str, AnyVector],
        state: SteeringState,
        shared: tuple[str, SharedDirections] | None = None,
    ):
        self.model = model
        self.config = config
        self._modules = modules  # by name, first layer first
        self._state = state
        self._shared = shared  # the directions that all layers mix, and their name
        self._asked: Site | None = None  # where the condition is read
        self._handles: list[Any] = []
        self._was_trainable: list[str] = []

    @property
    def scale(self) -> float:
        return self._state.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self.config = replace(self.config, scale=value)
        self._state.scale = self.config.scale

    @property
    def reads_prompt(self) -> bool:
        """Whether what they steer depends on where the prompt ends."""
        return self.config.positions != "all" or self.config.condition is not None

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers of the model, steered or not."""
        assert self.config.num_hidden_layers is not None
        return self.config.num_hidden_layers

    @property
    def layers(self) -> list[int]:
        """Indices of the steered layers, ascending."""
        return self.config.resolve_layers(self.num_hidden_layers)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable numbers by their name in the model, first layer first, shared directions last."""
        modules = {**self._modules, **dict([self._shared] if self._shared else [])}
        return {f"{name}.{part}": p for name, m in modules.items() for part, p in m.named_parameters()}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def parameter_layers(self) -> list[int | None]:
        """The layer that each of `parameters()` belongs to; None for what all layers share."""
        layers: list[int | None] = []
        for layer, module in zip(self.layers, self._modules.values(), strict=True):
            layers += [layer] * len(list(module.parameters()))
        return layers + [None] * bool(self._shared)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Detached copies on the CPU by parameter name; sharded parameters are gathered."""
        named = self.named_parameters()
        with gathered(named.values()):
            made = {name: whole(p).detach().to("cpu", copy=True) for name, p in named.items()}
        if self._state.probe is not None:
            made[self._probe_name] = self._state.probe.to("cpu", copy=True)
        return made

    def effective(self) -> dict[int, torch.Tensor]:
        """
        The direction that each layer adds, (hidden_size,) on the CPU by layer index, without the scale. An
        adaptive vector's is as long as the vector times its read-out.
        """
        if self.config.kind == "constant":
            tensors = self.tensors()  # with the probe of a condition
            return {i: tensors[name] for i, name in zip(self.layers, self.named_parameters(), strict=True)}
        with torch.no_grad(), gathered(self.parameters()):
            directions = [whole(module.effective()).cpu() for module in self._modules.values()]
        return dict(zip(self.layers, directions, strict=True))

    def added(self) -> dict[int, torch.Tensor]:
        """What each layer adds: `effective()` times the scale."""
        return {layer: self.scale * vector for layer, vector in self.effective().items()}

    def set_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy values in, by parameter name. Missing or additional names and other shapes are refused."""
        parameters = self.named_parameters()
        if self.config.condition is not None:
            probe = tensors.get(self._probe_name)
            if probe is None:
                raise SteerError(f"the vectors given have no {self._probe_name} for their condition")
            self._state.probe = probe.detach().clone()
            tensors = {name: tensor for name, tensor in tensors.items() if name != self._probe_name}
        if set(tensors) != set(parameters):
            wrong = ", ".join(sorted(set(tensors) ^ set(parameters)))
            raise SteerError(
                f"the vectors given are not those of this model's layers {self.config.layers}: {wrong}"
            )
        with gathered(parameters.values(), write=True):
            for name, parameter in parameters.items():
                if tensors[name].shape != parameter.shape:
                    raise SteerError(
                        f"{name} has shape {tuple(tensors[name].shape)}, the model's "
                        f"{tuple(parameter.shape)}; vectors only fit a model of their own hidden size"
                    )
            for name, parameter in parameters.items():
                fill(parameter, tensors[name])

    @property
    def _probe_name(self) -> str:
        return probe_name(find_decoder(self.model).name)

    def norms(self) -> dict[int, float]:
        """Euclidean norm of `effective()`, by layer index."""
        return {layer: vector.norm().item() for layer, vector in self.effective().items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """
        Inside, the model is the base model again, exactly: in the thread that calls this, not in others. A
        compiled model (`torch.compile`) has one state for all threads. `model.generate_batch`, which runs the
        model in another thread, raises SteerError inside.
        """
        before, self._state.enabled = self._state.enabled, False
        try:
            yield
        finally:
            self._state.enabled = before

    def _off(self) -> str | None:
        """How this thread has the vectors off; None where they are on."""
        return None if self._state.enabled else "vectors.disabled()"

    @contextmanager
    def prompt_length(self, columns: int | torch.Tensor) -> Iterator[None]:
        """
        Inside, the first `columns` columns (padding included; an int, or (batch,) for each row) are the
        prompt, in the thread that calls this.

        Needed only when `positions` is not 'all' and the model is called without `generate()`. Run the
        backward pass inside too when activations are checkpointed, each pass with a backward pass of its own:
        the recomputation asks again which tokens are steered, and is told those of the last pass.
        """
        before, self._state.prompt_length = self._state.prompt_length, columns
        try:
            yield
        finally:
            self._state.prompt_length = before

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """
        Write the vectors as an artifact (docs/format.md), which `steer.load` reads. `save` is the same.

        Args:
            save_directory: the folder, made if missing; an artifact in it is replaced.

        Returns:
            The folder.

        Raises:
            SteerError: when the folder cannot be written, or a vector holds NaN or Inf.
        """
        return artifact.write(save_directory, artifact.Artifact(self.config, self.tensors()))

    save = save_pretrained

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload steering vectors",
    ) -> str:
        """
        Upload the vectors to a model repository on the hub: `Artifact.push_to_hub`.

        Args:
            repo_id: such as "user/name"; `steer.load(repo_id, model)` loads them from there.
            private: whether a repository that is created is private, by default as the account says.
            token: with write access, by default that of `hf auth login`.
            commit_message: the title of the commit.

        Returns:
            The address of the commit.

        Raises:
            SteerError: when the vectors cannot be saved, the hub refuses or cannot be reached.
        """
        saved = artifact.Artifact(self.config, self.tensors())
        return saved.push_to_hub(repo_id, private=private, token=token, commit_message=commit_message)

    def __repr__(self) -> str:
        count = sum(shape(p).numel() for p in self.parameters())
        what = f"{len(self._modules)} layers, {count:,} numbers"
        return f"SteeringVectors({self.config.kind}, {what}, {self.config.site})"


def attach(model: nn.Module, config: SteeringConfig | None = None) -> SteeringVectors:
    """
    Put fresh vectors into `model` and freeze everything else. They change no output, bit for bit.

    `model` is any decoder-only causal LM of transformers, or a vision-language model, whose text model is
    steered: at the tokens of images as at those of text. Raises SteerError for a layer or site it does not
    have, and for a model that already has vectors.
    """
    config = config or SteeringConfig()
    config.refuse_condition("steer.attach makes fresh vectors, and a condition needs a probe: use steer.load")
    return _attach(model, config)


def _attach(model: nn.Module, config: SteeringConfig) -> SteeringVectors:
    decoder = find_decoder(model)
    check_bare(model)
    vectors, places = build(model, config)
    verify(decoder, vectors.layers, config.kind, config.site, places)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for layer, module, place in zip(vectors.layers, vectors._modules.values(), places, strict=True):
        decoder.layers[layer].steering = module
        vectors._handles.append(hook(module, place))
    if vectors._shared is not None:
        decoder.holder.steering = vectors._shared[1]
    if vectors.reads_prompt:
        vectors._handles.append(PromptWatch(model, vectors._state, vectors._asked))
    check = vectors._state.check_thread
    vectors._handles.append(decoder.backbone.register_forward_pre_hook(check, prepend=True))
    vectors._handles.append(BatchGuard(model, vectors._off))
    vectors._was_trainable = trainable
    model.__dict__["steering_vectors"] = vectors
    warn_when_saved(model)
    forget_compiled()
    return vectors


def build(
    model: nn.Module, config: SteeringConfig, state: SteeringState | None = None
) -> tuple[SteeringVectors, list[Site]]:
    """
    Fresh vectors for `model` that are not in it, and where each belongs, first layer first. SteerError for a
    layer or site it does not have. `state` is what they share, by default that of `config`.
    """
    decoder = find_decoder(model)
    base: Any = model.config
    check_quantization(base, base.name_or_path or type(model).__name__)
    keep_gradients(model)
    layers = config.resolve_layers(decoder.num_hidden_layers)
    made_for = describe(model)
    if config.base_model_name_or_path is not None:  # they may be of another one than this
        names = ("base_model_name_or_path", "base_revision", "base_adapter", "base_checksum")
        made_for |= {name: getattr(config, name) for name in names}
    config = replace(config, **made_for)
    state = state or SteeringState(config.positions, config.scale, config.condition)
    shared, modules, places = _make(decoder, layers, config, state)
    named = {f"{decoder.name}.{i}.steering": module for i, module in zip(layers, modules, strict=True)}
    root = directions_name(decoder.name).rpartition(".")[0]
    made = SteeringVectors(model, config, named, state, (root, shared) if shared is not None else None)
    if config.condition is not None:
        (made._asked,) = find_steered(decoder, [config.condition.layer], "resid_post")
    return made, places


def check_bare(model: nn.Module) -> None:
    """SteerError when there are vectors inside `model`, whatever wraps the one that they were attached to."""
    if _steered(model):
        raise SteerError("the model already has steering vectors; call steer.detach(model) first")


def _steered(model: nn.Module) -> bool:
    return any(hasattr(module, "steering") for module in model.modules())


def attached(model: nn.Module) -> SteeringVectors:
    """The vectors inside `model`, which may wrap the one that has them; SteerError when there are none."""
    for module in model.modules():
        if "steering_vectors" in module.__dict__:
            return module.__dict__["steering_vectors"]
    kind = type(model).__name__
    if _steered(model):
        raise SteerError(
            f"the vectors in this {kind} were attached to another object that holds the same layers, such as "
            "what torch.compile or PEFT returned; pass that one"
        )
    raise SteerError(f"this {kind} has no steering vectors; call steer.attach or steer.load first")


def detach(model: nn.Module) -> None:
    """
    Take the vectors out: the base model again, bit for bit, with the parameters trainable that were before.
    """
    vectors = attached(model)
    model = vectors.model  # which the one given may wrap
    for handle in vectors._handles:
        handle.remove()
    decoder = find_decoder(model)
    for layer in vectors.layers:
        del decoder.layers[layer].steering
    if vectors._shared is not None:
        del decoder.holder.steering
    for name in vectors._was_trainable:
        model.get_parameter(name).requires_grad_(True)
    del model.__dict__["steering_vectors"]
    model.__dict__.pop("save_pretrained", None)  # `warn_when_saved`
    forget_compiled()


def load(
    source: str | os.PathLike[str] | artifact.Artifact,
    model: nn.Module,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> SteeringVectors:
    """
    Attach the vectors in `source` (a folder, a `.safetensors` file, a hub id or an Artifact) to `model`.
    Vectors of a text model fit the same text model inside of a vision-language model, and the other way
    round.

    Raises SteerError when the file is damaged, or when the model differs in hidden size, number of layers or
    architecture.
    Warns when the model has other weights than the one they were made for, and, where `tokenizer` is given,
    another vocabulary.
    """
    saved = source if isinstance(source, artifact.Artifact) else artifact.read(source, revision)
    name = "these vectors" if saved is source else str(source)
    check_fits(saved.config, model, name, tokenizer)
    vectors = _attach(model, saved.config)
    try:
        vectors.set_tensors(renamed(saved.tensors, find_decoder(model).name))
    except SteerError:
        detach(model)
        raise
    return vectors


def _make(
    decoder: Decoder, layers: list[int], config: SteeringConfig, state: SteeringState
) -> tuple[SharedDirections | None, list[AnyVector], list[Site]]:
    """The modules of `config.kind`, one a layer, and where each is; the directions that they share."""
    dtype = getattr(torch, config.dtype)
    devices = [_device(decoder.layers[index]) for index in layers]
    if config.kind == "adaptive":
        downs = find_down_projections(decoder, layers)
        adaptive: list[AnyVector] = [
            AdaptiveVector(decoder.hidden_size, inner, layer, state, dtype, device)
            for layer, device, (_, inner) in zip(layers, devices, downs, strict=True)
        ]
        return None, adaptive, [Site(module, with_input=True) for module, _ in downs]
    sites = find_steered(decoder, layers, config.site)
    if config.kind == "shared":
        if config.rank > min(len(layers), decoder.hidden_size):
            raise SteerError(
                f"rank={config.rank} shared directions for {len(layers)} layers and hidden size "
                f"{decoder.hidden_size}: give no more than the smaller of the two"
            )
        shared = SharedDirections(config.rank, decoder.hidden_size, dtype, devices[0])
        mixed: list[AnyVector] = [
            SharedVector(shared, i, state, dtype, d) for i, d in zip(layers, devices, strict=True)
        ]
        return shared, mixed, sites
    return None, [SteeringVector(decoder.hidden_size, state, dtype, device) for device in devices], sites


def _device(block: nn.Module) -> torch.device:
    """
    Where the layer computes: its parameters' device, or the execution device when accelerate offloads them.
    """
    for module in block.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(block.parameters()).device

"""
Several sets of vectors in one model, added up. Each call chooses their strengths and the layers; calls in
other threads choose their own.

    mixer = Mixer(model)
    mixer.add("math", steer.read("runs/math/vectors"))
    mixer.add("brief", steer.read("runs/brief/vectors"))
    with mixer.active(Mix({"math": 1.0, "brief": -0.5})):
        model(...)                                          # outside, the model is the base model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from steer.artifact import Artifact
from steer.artifact_tensors import renamed
from steer.errors import SteerError
from steer.hooks import hook
from steer.kinds import SteeringState
from steer.probe import verify
from steer.prompt_watch import PromptWatch
from steer.sites import find_decoder
from steer.vectors import AnyVector, SteeringVectors, build, check_fits


@dataclass(frozen=True)
class Mix:
    """
    Args:
        strengths: factor on the saved scale of each set, by its name; a set that is left out is off.
        layers: the layers that are steered; None for all.
    """

    strengths: Mapping[str, float] = field(default_factory=dict)
    layers: frozenset[int] | None = None

    def strength(self, name: str, layer: int) -> float:
        """The factor on the vector of set `name` at `layer`; 0 where it is off."""
        return self.strengths.get(name, 0.0) if self.layers is None or layer in self.layers else 0.0


BASE = Mix()


class Mixer:
    """The sets of vectors in `model`, by name, all off outside of `active`."""

    def __init__(self, model: nn.Module):
        if "steering_vectors" in model.__dict__:
            raise SteerError("the model already has steering vectors; call steer.detach(model) first")
        self.model = model
        self.sets: dict[str, SteeringVectors] = {}
        # of the thread, and in asyncio of the task: what one user chooses does not reach another
        self._mix: ContextVar[Mix] = ContextVar("mix", default=BASE)

    def add(self, name: str, artifact: Artifact, tokenizer: Any = None) -> None:
        """
        Add a set.

        Args:
            name: what `Mix` calls it.
            artifact: the vectors.
            tokenizer: of the model, to warn where the vectors are for another vocabulary.

        Raises:
            SteerError: a name that is taken, vectors for a model of another shape or with a condition.
        """
        if name in self.sets:
            raise SteerError(f"two sets of vectors have one name, {name!r}; write NAME=ARTIFACT")
        config = artifact.config
        config.refuse_condition("steer play")
        check_fits(artifact, self.model, name, tokenizer)
        state = _Strength(config.positions, config.scale, lambda: self.current.strengths.get(name, 0.0))
        decoder = find_decoder(self.model)
        with self.prompt_length(1):  # of the other sets, which are off
            vectors, places = build(self.model, config, state)
            verify(decoder, vectors.layers, config.kind, config.site, places)
        vectors.set_tensors(renamed(artifact.tensors, decoder.name))
        for layer, vector, place in zip(vectors.layers, vectors._modules.values(), places, strict=True):
            hook(_Switched(self, name, layer, vector), place)
        if config.positions != "all":
            PromptWatch(self.model, state)
        self.sets[name] = vectors

    @property
    def current(self) -> Mix:
        """The mix of this thread."""
        return self._mix.get()

    @property
    def layers(self) -> list[int]:
        """The layers that any of the sets steers, ascending."""
        return sorted({layer for vectors in self.sets.values() for layer in vectors.layers})

    @contextmanager
    def active(self, mix: Mix) -> Iterator[None]:
        """
        Inside, the model is steered by `mix`: in the thread that calls this, not in others.

        Raises:
            SteerError: a set that there is none of, or a layer that no set steers.
        """
        unknown = [name for name in mix.strengths if name not in self.sets]
        if unknown:
            raise SteerError(f"no set {unknown[0]!r}; there are {', '.join(self.sets) or 'none'}")
        other = sorted((mix.layers or frozenset()) - {*self.layers})
        if other:
            raise SteerError(f"layer {other[0]} is not steered; steered are {self.layers}")
        token = self._mix.set(mix)
        try:
            yield
        finally:
            self._mix.reset(token)

    @contextmanager
    def prompt_length(self, columns: int | torch.Tensor) -> Iterator[None]:
        """`SteeringVectors.prompt_length` of all sets."""
        with ExitStack() as stack:
            for vectors in self.sets.values():
                stack.enter_context(vectors.prompt_length(columns))
            yield


class _Strength(SteeringState):
    """The state of one set, whose scale is the saved one times what the calling thread's mix says."""

    def __init__(self, positions: str, saved: float, factor: Callable[[], float]):
        self._saved, self._factor = saved, factor
        super().__init__(positions, saved)

    @property
    def scale(self) -> float:
        return self._saved * self._factor()

    @scale.setter
    def scale(self, value: float) -> None:
        self._saved = value


class _Switched:
    """The vector of one set at one layer; hidden states stay as they are where the mix has it off."""

    def __init__(self, mixer: Mixer, name: str, layer: int, vector: AnyVector):
        self.mixer, self.name, self.layer, self.vector = mixer, name, layer, vector

    def __call__(self, hidden: torch.Tensor, *read: torch.Tensor) -> torch.Tensor:
        on = self.mixer.current.strength(self.name, self.layer)
        return self.vector(hidden, *read) if on else hidden

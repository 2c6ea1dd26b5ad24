"""
Several sets of vectors at once, their sum: what `steer.expression` names, from artifacts, and in a model.

    artifacts = {"math": steer.read("runs/math"), "brief": steer.read("runs/brief")}
    with mixed(model, chosen(parse("math@0.7+brief@-0.3"), artifacts)):
        model.generate(...)

Where several threads share the model, each call chooses its own sum:

    mixer = Mixer(model)
    mixer.add("math", artifacts["math"])
    mixer.add("brief", artifacts["brief"])
    with mixer.active(Mix({"math": 1.0, "brief": -0.5})):
        model(...)                                          # outside, the model is the base model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from steer.artifact import Artifact
from steer.artifact_tensors import renamed
from steer.batching import BatchGuard
from steer.compat import forget_compiled
from steer.errors import SteerError
from steer.expression import Term
from steer.hooks import Site, hook
from steer.identity import check_fits
from steer.kinds import SteeringState
from steer.probe import verify
from steer.prompt_watch import PromptWatch
from steer.sites import find_decoder
from steer.vector_sets import prompt_lengths
from steer.vectors import AnyVector, SteeringVectors, build, check_bare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LARGEST = torch.finfo(torch.float32).max


def chosen(terms: Sequence[Term], artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """
    What each term adds, by the name of its set, in the order of the names. Sets of scale 0 are left out.

    Args:
        terms: of an expression.
        artifacts: the sets that it can name.

    Raises:
        SteerError: a name that is none of them; a layer that the model does not have; layers of which the set
            steers none.
    """
    found = {}
    for term in terms:
        if term.name not in artifacts:
            raise SteerError(f"no vectors named {term.name!r}; there are {', '.join(artifacts) or 'none'}")
        artifact = artifacts[term.name]
        try:
            if term.layers is not None:
                artifact = artifact.select(term.layers)
            scaled = replace(artifact.config, scale=term.scale * artifact.config.scale)
            if max(abs(term.scale), abs(scaled.scale)) > LARGEST:
                raise SteerError(
                    f"scale={term.scale:g} is too large for float32; give less than {LARGEST:.2g}"
                )
        except SteerError as error:
            raise SteerError(f"steering of {term.name!r}: {error}") from error
        if term.positions is not None:
            scaled = replace(scaled, positions=term.positions)
        if scaled.scale:
            found[term.name] = replace(artifact, config=scaled)
    return dict(sorted(found.items()))


@contextmanager
def mixed(
    model: nn.Module, artifacts: Mapping[str, Artifact], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[dict[str, SteeringVectors]]:
    """
    Inside, the sum of the artifacts steers `model`, every artifact at its own site, layers and positions.
    Outside it is the base model, as it is inside without artifacts. Gives the vectors of each by its name,
    for the `prompt_length` of passes that are not those of `generate()`.

    Args:
        model: a decoder-only causal LM without vectors.
        artifacts: by the names that messages call them.
        tokenizer: to compare its vocabulary with that of the artifacts.

    Raises:
        SteerError: an artifact is for a model of another shape, or the model has vectors already.
    """
    check_bare(model)
    made = {name: _built(model, name, saved, tokenizer) for name, saved in artifacts.items()}
    with ExitStack() as stack:
        stack.callback(forget_compiled)  # when the hooks are gone
        for vectors, places in made.values():
            for module, place in zip(vectors._modules.values(), places, strict=True):
                stack.callback(hook(module, place).remove)
            if vectors.reads_prompt:
                stack.callback(PromptWatch(model, vectors._state, vectors._asked).remove)
            stack.callback(BatchGuard(model, vectors._off).remove)
        forget_compiled()
        yield {name: vectors for name, (vectors, _) in made.items()}


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
        check_bare(model)
        self.model = model
        self.sets: dict[str, SteeringVectors] = {}
        # of the thread, and in asyncio of the task: what one user chooses does not reach another
        self._mix: ContextVar[Mix] = ContextVar("mix", default=BASE)
        BatchGuard(model, self._chosen)

    def add(self, name: str, artifact: Artifact, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
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
        state = _Strength(config.positions, config.scale, lambda: self.current.strengths.get(name, 0.0))
        with self.prompt_length(1):  # of the other sets, which are off
            vectors, places = _built(self.model, name, artifact, tokenizer, state)
        for layer, vector, place in zip(vectors.layers, vectors._modules.values(), places, strict=True):
            hook(_Switched(self, name, layer, vector), place)
        if vectors.reads_prompt:
            PromptWatch(self.model, state)
        forget_compiled()
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
        `model.generate_batch`, which runs the model in another thread, raises SteerError inside.

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

    def _chosen(self) -> str | None:
        """How this thread has chosen a mix; None where it has not."""
        return None if self.current == BASE else "mixer.active(mix)"

    def prompt_length(self, columns: int | torch.Tensor) -> AbstractContextManager[None]:
        """`SteeringVectors.prompt_length` of all sets."""
        return prompt_lengths(self.sets.values(), columns)


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


def _built(
    model: nn.Module,
    name: str,
    artifact: Artifact,
    tokenizer: PreTrainedTokenizerBase | None,
    state: SteeringState | None = None,
) -> tuple[SteeringVectors, list[Site]]:
    """The vectors of an artifact, not in the model yet, and where each belongs, first layer first."""
    decoder = find_decoder(model)
    check_fits(artifact.config, model, name, tokenizer)
    vectors, places = build(model, artifact.config, state)
    verify(decoder, vectors.layers, artifact.config.kind, artifact.config.site, places)
    vectors.set_tensors(renamed(artifact.tensors, decoder.name))
    for parameter in vectors.parameters():
        parameter.requires_grad_(False)
    return vectors, places

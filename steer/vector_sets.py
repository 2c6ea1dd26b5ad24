"""
Several independent sets of vectors in one model: each row of a batch is steered by the set it belongs to.

    population = Population(model)
    population.add("early", SteeringConfig(layers="3"))
    population.add("late", SteeringConfig(layers="27", kind="adaptive"))
    with population.rows(torch.tensor([0, 0, 1])):      # two rows of the first set, one of the second
        model(...)

Rows of a set are together in a batch, in the order of the sets. A hook splits the batch, and every set's
own vector changes its own rows, so each set computes, row by row, what it computes alone in the model. Rows
of -1 come first and are the base model's. The sets are not submodules of the model: nothing of it is renamed,
and no graph reaches below the lowest layer that a row of the batch is steered at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from steer.compat import forget_compiled
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.hooks import hook
from steer.probe import verify
from steer.prompt_watch import PromptWatch
from steer.sites import Site, find_decoder
from steer.vectors import AnyVector, SteeringVectors, build, check_bare

BASE = -1


@contextmanager
def prompt_lengths(sets: Iterable[SteeringVectors], columns: int | torch.Tensor) -> Iterator[None]:
    """`SteeringVectors.prompt_length` of several sets of vectors."""
    with ExitStack() as stack:
        for vectors in sets:
            stack.enter_context(vectors.prompt_length(columns))
        yield


class Owners(NamedTuple):
    """
    Which set steers each row, (rows,) ascending, how the model is told before a forward pass, and
    `Population.prompt_length`.
    """

    of: torch.Tensor
    tell: Callable[[torch.Tensor], None]
    prompt_length: Callable[[int | torch.Tensor], AbstractContextManager]

    def choose(self, rows: torch.Tensor) -> None:
        """The coming forward passes have those of the rows, ascending."""
        self.tell(self.of[rows.to(self.of.device)])


class Population:
    """The sets of vectors of one frozen `model`, by name; `sets` keeps the order in which they were added."""

    def __init__(self, model: nn.Module):
        check_bare(model)
        self.model = model
        self.num_hidden_layers = find_decoder(model).num_hidden_layers
        self.sets: dict[str, SteeringVectors] = {}
        self._places: dict[tuple[int, bool], _Place] = {}
        self._handles: list[Any] = []
        self._blocks: dict[str, slice] = {}  # the rows of each set in the running batch, in order
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        model.__dict__["steering_population"] = self  # for who must tell where prompts end

    @property
    def reads_prompt(self) -> bool:
        """`SteeringVectors.reads_prompt` of any set."""
        return any(vectors.reads_prompt for vectors in self.sets.values())

    def add(self, name: str, config: SteeringConfig) -> SteeringVectors:
        """A fresh set. SteerError for a name that is taken and for a layer the model does not have."""
        config.refuse_condition("a population of sets")
        if name in self.sets:
            raise SteerError(f"the population already has a set {name!r}; give each a name of its own")
        with self.prompt_length(1):  # of the other sets, which change no row meanwhile
            vectors, places = build(self.model, config)
            new = {i: p for i, p in zip(vectors.layers, places, strict=True) if _key(p) not in self._places}
            verify(find_decoder(self.model), list(new), config.kind, config.site, list(new.values()))
        for module, site in zip(vectors._modules.values(), places, strict=True):
            key = _key(site)
            if key not in self._places:
                self._places[key] = _Place(self._blocks)
                self._handles.append(hook(self._places[key], site))
            self._places[key].vectors[name] = module
        if config.positions != "all":
            self._handles.append(PromptWatch(self.model, vectors._state))
        forget_compiled()
        self.sets[name] = vectors
        return vectors

    def tell(self, owner: torch.Tensor) -> None:
        """The coming forward passes have these rows: numbers of sets in `sets`, ascending, BASE for none."""
        names = list(self.sets)
        numbers, counts = torch.unique_consecutive(owner, return_counts=True)
        self._blocks.clear()
        end = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number != BASE:
                self._blocks[names[number]] = slice(end, end + count)
            end += count

    @contextmanager
    def rows(self, owner: torch.Tensor) -> Iterator[Owners]:
        """Inside, batches are made of these rows (see `tell`); outside, the model is the base model."""
        if len(owner) > 1 and bool((owner[1:] < owner[:-1]).any()):
            raise SteerError("rows of one set must be together, in the order of the sets")
        self.tell(owner)
        try:
            yield Owners(owner, self.tell, self.prompt_length)
        finally:
            self._blocks.clear()

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Inside, every row of every batch belongs to the set `name`."""
        self._blocks.clear()
        self._blocks[name] = slice(0, None)
        try:
            yield
        finally:
            self._blocks.clear()

    def prompt_length(self, columns: int | torch.Tensor) -> AbstractContextManager[None]:
        """`SteeringVectors.prompt_length` of all sets."""
        return prompt_lengths(self.sets.values(), columns)

    def remove_all(self) -> None:
        """The base model again, bit for bit, with the parameters trainable that were before."""
        for handle in reversed(self._handles):
            handle.remove()
        forget_compiled()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self.model.__dict__.pop("steering_population", None)
        self.sets, self._places, self._handles = {}, {}, []


def _key(site: Site) -> tuple[int, bool]:
    return id(site.module), site.on_input


class _Place:
    """What is at one site: the vector of each set that has one there."""

    def __init__(self, blocks: dict[str, slice]):
        self.blocks = blocks
        self.vectors: dict[str, AnyVector] = {}

    def __call__(self, hidden: torch.Tensor, *read: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        done = 0
        for name, rows in self.blocks.items():
            if name in self.vectors:
                vector = self.vectors[name]
                with vector.state.narrowed(rows):
                    steered = vector(hidden[rows], *(x[rows] for x in read))
                parts += [hidden[done : rows.start], steered]
                done = len(hidden) if rows.stop is None else rows.stop
        return torch.cat([*parts, hidden[done:]]) if parts else hidden

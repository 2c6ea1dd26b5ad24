"""
Which members a population has: one for each layer, learning rate and seed that is asked for, and those of a
list. A member is the command line of the whole population plus its own changes, so that it has the settings
of that run alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any

import yaml

from steer.config import SteeringArguments, SteeringConfig
from steer.errors import SteerError, shown
from steer.training.config import SteeringGRPOConfig
from steer.training.run_settings import RunSettings
from steer.training.sweep.member import OWN

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_FIELDS = {*(f.name for f in fields(SteeringArguments)), *OWN, "rewards"}
_NULLABLE = {f.name for f in fields(SteeringGRPOConfig) if f.name in OWN and f.default is None}
SCORES = ("reward", "validation")
RIVALS = ("all", "layers")


@dataclass
class PopulationArguments:
    """The members of the population, and which of them go on."""

    _argument_group_name = "population"

    each_layer: str | None = field(
        default=None,
        metadata={
            "help": "One member for each of these layers alone: 'all', or a set such as '0-5,27'. Rates of "
            "single layers come from lr_by_layer."
        },
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "A member for each of these rates (with each_layer: and each layer)."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "A member for each of these seeds (and each layer and rate)."}
    )
    population: list[str] | None = field(
        default=None,
        metadata={
            "help": "More members, each a mapping of what it changes: '{name: control, rewards: [random]}'. "
            "In a config file a list of mappings. A member may change " + ", ".join(sorted(_FIELDS)) + "."
        },
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Train these members alone, by name; the others stay as they are."}
    )
    halve_at: list[int] | None = field(
        default=None,
        metadata={
            "help": "Successive halving (arXiv 1502.07943): after each of these updates keep the best "
            "members and stop the others. Only members with the same rewards are compared; ties stay."
        },
    )
    keep: float = field(default=0.5, metadata={"help": "Share of the members that halve_at keeps."})
    halve_on: str = field(
        default="reward",
        metadata={
            "help": "What halve_at compares: reward = mean training reward of the last 5 updates; validation "
            "= greedy accuracy on the problems of validate_every, or on validation_problems of those that "
            "are trained on. Held-out problems play no part."
        },
    )
    halve_among: str = field(
        default="all",
        metadata={
            "help": "Whom halve_at compares: all = all members with the same rewards; layers = those that "
            "also steer the same layers, so that each layer keeps its best learning rates."
        },
    )
    validation_problems: int = field(
        default=64, metadata={"help": "Training problems on which halve_on=validation measures accuracy."}
    )
    winners: int = field(
        default=4,
        metadata={
            "help": "Single layers, best training reward first, whose vectors are tried in pairs; 0 is none."
        },
    )

    @property
    def asked(self) -> bool:
        """Whether any members are asked for, or chosen among."""
        members = (self.each_layer, self.learning_rates, self.seeds, self.population)
        return any((*members, self.only, self.halve_at))

    def __post_init__(self) -> None:
        if self.halve_on not in SCORES:
            raise SteerError(f"halve_on={self.halve_on!r} is unknown; choose one of {', '.join(SCORES)}")
        if self.halve_among not in RIVALS:
            raise SteerError(
                f"halve_among={self.halve_among!r} is unknown; choose one of {', '.join(RIVALS)}"
            )
        if not 0 < self.keep < 1:
            raise SteerError(f"keep={self.keep} is not a share between 0 and 1")
        if self.winners == 1 or self.winners < 0:
            raise SteerError(f"winners={self.winners}: pairs need 2 layers or more; 0 tries none")
        if sorted(set(self.halve_at or [])) != (self.halve_at or []) or min(self.halve_at or [1]) < 1:
            raise SteerError(f"halve_at={self.halve_at} is not a list of updates, the earliest first")


def own(settings: RunSettings) -> dict[str, Any]:
    """What tells a member from others, as JSON types; how long it is trained is not part of it."""
    training = {k: v for k, v in settings.training.to_dict().items() if k in OWN - {"max_steps"}}
    found = {"steering": asdict(settings.steering), "training": training, "rewards": settings.run.rewards}
    source = settings.identity().get("source")
    return {**found, "source": source} if source else found


def members(settings: RunSettings, num_hidden_layers: int, arguments: Sequence[str]) -> list[RunSettings]:
    """
    The members of a population.

    Args:
        settings: what the command line says, the population that it asks for among it.
        num_hidden_layers: of the model.
        arguments: that command line, which all members share.

    Raises:
        SteerError: a change that no member may make, or two members of one name.
    """
    asked, training = settings.population, settings.training
    assert asked is not None
    changes = [*_grid(asked, training, num_hidden_layers), *map(_mapping, asked.population or [])]
    if not changes:
        changes = [{}]
    found: dict[str, RunSettings] = {}
    for change in changes:
        name = str(change.pop("name", None) or _name(change))
        if not _NAME.fullmatch(name):
            raise SteerError(
                f"{shown(name)} cannot name a member: it becomes a folder; use letters, digits and . _ -"
            )
        if name in found:
            raise SteerError(f"two members are called {name!r}; give one of them a `name` of its own")
        found[name] = _settings(name, change, arguments, num_hidden_layers)
    return list(found.values())


def chosen(found: Sequence[RunSettings], only: Sequence[str] | None) -> list[RunSettings]:
    """The members that are trained now."""
    if only is None:
        return list(found)
    names = [settings.member for settings in found]
    if unknown := sorted(set(only) - set(names)):
        raise SteerError(f"no member is called {', '.join(unknown)}; there are {', '.join(names)}")
    return [settings for settings in found if settings.member in only]


def _grid(
    asked: PopulationArguments, training: SteeringGRPOConfig, num_hidden_layers: int
) -> list[dict[str, Any]]:
    layers: list[int | None] = [None]
    rates: dict[int | None, float] = {}
    if asked.each_layer is not None:
        found = SteeringConfig(layers=asked.each_layer).resolve_layers(num_hidden_layers)
        rates, layers = training.layer_rates(found, num_hidden_layers), [*found]
    elif not asked.learning_rates and not asked.seeds:
        return []
    changes = []
    all_rates: list[float | None] = [*asked.learning_rates] if asked.learning_rates else [None]
    seeds: list[int | None] = [*asked.seeds] if asked.seeds else [None]
    for layer, rate, seed in product(layers, all_rates, seeds):
        change: dict[str, Any] = {"layers": layer, "learning_rate": rate, "seed": seed}
        change = {key: value for key, value in change.items() if value is not None}
        change["name"] = _name(change)
        if rate is not None or layer is not None:
            # a rate of its own: a table by layer would overrule it
            change |= {"learning_rate": rate if rate is not None else rates[layer], "lr_by_layer": None}
        changes.append(change)
    return changes


def _mapping(entry: Any) -> dict[str, Any]:
    try:
        found = yaml.safe_load(entry) if isinstance(entry, str) else entry
    except yaml.YAMLError as error:
        raise SteerError(f"population entry {shown(entry)} is not YAML; write '{{layers: 3}}'") from error
    if not isinstance(found, dict) or not found:
        raise SteerError(f"population entry {shown(entry)} changes nothing; write it as '{{layers: 3}}'")
    if unknown := sorted(set(map(str, found)) - _FIELDS - {"name"}):
        raise SteerError(
            f"a member cannot change {', '.join(unknown)}: members share model, data and batches; it may "
            f"change {', '.join(sorted(_FIELDS))}"
        )
    return dict(found)


def _name(change: dict[str, Any]) -> str:
    short = {"layers": "layer", "learning_rate": "lr"}
    parts = []
    for key, value in change.items():
        values = value if isinstance(value, list) else [value]
        text = "+".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        parts.append(f"{short.get(key, key)}-{text}")
    return re.sub(r"[^\w.-]+", "+", "-".join(parts), flags=re.ASCII).replace("+", "_") or "base"


def _settings(
    name: str, change: dict[str, Any], arguments: Sequence[str], num_hidden_layers: int
) -> RunSettings:
    given = {key: value for key, value in change.items() if value is not None}
    if wrong := sorted(change.keys() - given.keys() - _NULLABLE):
        raise SteerError(f"member {name}: {', '.join(wrong)} cannot be null; leave it out")
    extra: list[str] = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        extra += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    try:
        given_all = [*arguments, *extra]
        found = RunSettings.parse("layer_sweep", arguments=given_all, population=PopulationArguments)
        run, training = found.run, found.training
        for key in change.keys() - given.keys():  # what the command line says of it is taken back
            setattr(training, key, None)
        layers = found.steering_config().resolve_layers(num_hidden_layers)
        training.layer_rates(layers, num_hidden_layers)  # names no layer that is not there
    except SteerError as error:
        raise SteerError(f"member {name}: {error}") from error
    if training.reward_weights is not None and len(training.reward_weights) != len(run.rewards):
        raise SteerError(
            f"member {name}: {len(training.reward_weights)} reward_weights for {len(run.rewards)} rewards; "
            "change both together"
        )
    return replace(found, member=name)

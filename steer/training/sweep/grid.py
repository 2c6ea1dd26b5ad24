"""
Which members a population has: one for each layer, learning rate and seed that is asked for, and those of a
list. A member is the command line of the whole population plus its own changes, so that it has the settings
of that run alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from typing import Any

import yaml

from steer.config import SteeringConfig
from steer.errors import SteerError, shown
from steer.training.arguments import MEMBER_FIELDS, PopulationArguments
from steer.training.config import SteeringGRPOConfig
from steer.training.run_settings import RunSettings
from steer.training.sweep.member import OWN

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_NULLABLE = {f.name for f in fields(SteeringGRPOConfig) if f.name in OWN and f.default is None}


def own(settings: RunSettings) -> dict[str, Any]:
    """What tells a member from others, as JSON types; how long it is trained is not part of it."""
    training = {k: v for k, v in settings.training.to_dict().items() if k in OWN - {"max_steps"}}
    values = {"steering": asdict(settings.steering), "training": training, "rewards": settings.run.rewards}
    source = settings.identity().get("source")
    return {**values, "source": source} if source else values


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
    by_name: dict[str, RunSettings] = {}
    for change in changes:
        name = str(change.pop("name", None) or _name(change))
        if not _NAME.fullmatch(name):
            raise SteerError(
                f"{shown(name)} cannot name a member: it becomes a folder; use letters, digits and . _ -"
            )
        if name in by_name:
            raise SteerError(f"two members are called {name!r}; give one of them a `name` of its own")
        by_name[name] = _settings(settings, name, change, arguments, num_hidden_layers)
    return list(by_name.values())


def chosen(members: Sequence[RunSettings], only: Sequence[str] | None) -> list[RunSettings]:
    """The members that are trained now."""
    if only is None:
        return list(members)
    names = [settings.member for settings in members]
    if unknown := sorted(set(only) - set(names)):
        raise SteerError(f"no member is called {', '.join(unknown)}; there are {', '.join(names)}")
    return [settings for settings in members if settings.member in only]


def _grid(
    asked: PopulationArguments, training: SteeringGRPOConfig, num_hidden_layers: int
) -> list[dict[str, Any]]:
    layers: list[int | None] = [None]
    rates: dict[int | None, float] = {}
    if asked.each_layer is not None:
        single = SteeringConfig(layers=asked.each_layer).resolve_layers(num_hidden_layers)
        rates, layers = training.layer_rates(single, num_hidden_layers), [*single]
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
        mapping = yaml.safe_load(entry) if isinstance(entry, str) else entry
    except yaml.YAMLError as error:
        raise SteerError(f"population entry {shown(entry)} is not YAML; write '{{layers: 3}}'") from error
    if not isinstance(mapping, dict) or not mapping:
        raise SteerError(f"population entry {shown(entry)} changes nothing; write it as '{{layers: 3}}'")
    if unknown := sorted(set(map(str, mapping)) - MEMBER_FIELDS - {"name"}):
        raise SteerError(
            f"a member cannot change {', '.join(unknown)}: members share model, data and batches; it may "
            f"change {', '.join(sorted(MEMBER_FIELDS))}"
        )
    return dict(mapping)


def _name(change: dict[str, Any]) -> str:
    short = {"layers": "layer", "learning_rate": "lr"}
    parts = []
    for key, value in change.items():
        values = value if isinstance(value, list) else [value]
        text = "+".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        parts.append(f"{short.get(key, key)}-{text}")
    return re.sub(r"[^\w.-]+", "+", "-".join(parts), flags=re.ASCII).replace("+", "_") or "base"


def _settings(
    whole: RunSettings, name: str, change: dict[str, Any], arguments: Sequence[str], num_hidden_layers: int
) -> RunSettings:
    given = {key: value for key, value in change.items() if value is not None}
    if wrong := sorted(change.keys() - given.keys() - _NULLABLE):
        raise SteerError(f"member {name}: {', '.join(wrong)} cannot be null; leave it out")
    extra: list[str] = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        extra += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    try:
        # a command line of `steer train` has words that `steer sweep` does not know
        parts = {part: getattr(whole, part) for part in ("rates", "finder", "population")}
        kinds = {part: type(value) for part, value in parts.items() if value is not None}
        settings = RunSettings.parse(whole.recipe, None, [*arguments, *extra], **kinds)
        run, training = settings.run, settings.training
        for key in change.keys() - given.keys():  # what the command line says of it is taken back
            setattr(training, key, None)
        layers = settings.steering_config().resolve_layers(num_hidden_layers)
        training.layer_rates(layers, num_hidden_layers)  # names no layer that is not there
    except SteerError as error:
        raise SteerError(f"member {name}: {error}") from error
    if training.reward_weights is not None and len(training.reward_weights) != len(run.rewards):
        raise SteerError(
            f"member {name}: {len(training.reward_weights)} reward_weights for {len(run.rewards)} rewards; "
            "change both together"
        )
    return replace(settings, recipe="layer_sweep", rates=None, finder=None, member=name)

"""What a command line asks beside the settings of a run: a choice of the learning rate, and a population."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from steer.config import SteeringArguments
from steer.errors import SteerError
from steer.training.sweep.member import OWN

# What a member of a population may change.
MEMBER_FIELDS = {*(f.name for f in fields(SteeringArguments)), *OWN, "rewards"}
SCORES = ("reward", "validation")
RIVALS = ("all", "layers")


@dataclass
class AnswerArguments:
    """Which answers of a run are trained on (`--method sft` and `--method dpo`)."""

    _argument_group_name = "answers of a run, where train_data names one"

    stage: str | None = field(
        default=None,
        metadata={
            "help": "Of a run of `steer train`: whose answers. training (default) = those of its updates, "
            "which it keeps with log_completions; before, longer, after = those to the problems it was "
            "scored on, where eval_data says which of them to leave out."
        },
    )
    variant: str | None = field(
        default=None, metadata={"help": "Of a run of `steer eval`: whose answers; default: base."}
    )
    min_reward: float | None = field(
        default=None,
        metadata={
            "help": "Count an answer of stage training as right when its rewards together, with the run's "
            "weights, are at least this. Default: when it is correct."
        },
    )


@dataclass
class SweepArguments:
    """A choice of the learning rate before the run."""

    _argument_group_name = "learning rate sweep"

    lr_sweep: list[float] | None = field(
        default=None,
        metadata={
            "help": "Learning rates to try first, each in a run of its own under OUTPUT_DIR-sweep; the best "
            "one by sampled accuracy on validation problems is then used. Held-out problems play no part."
        },
    )
    sweep_steps: int | None = field(
        default=None,
        metadata={
            "help": "Updates of each of these runs; default: as many as of the run. Few favour larger rates."
        },
    )
    sweep_only: bool = field(default=False, metadata={"help": "Stop once the rate is chosen."})
    validation_samples: int = field(
        default=8, metadata={"help": "Answers to each validation problem, at temperature 1."}
    )

    def __post_init__(self) -> None:
        if not self.lr_sweep:
            _refuse(self, ("sweep_steps", "sweep_only", "validation_samples"), "without lr_sweep")
        for name in ("sweep_steps", "validation_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SteerError(f"{name}={value} is out of range; give a number from 1, or leave it out")


@dataclass
class FinderArguments:
    """A learning rate that short runs recommend."""

    _argument_group_name = "learning rate finder"

    find_lr: bool = field(
        default=False,
        metadata={
            "help": "Recommend a learning rate, and exit: short runs at several rates, trained at once in "
            "OUTPUT_DIR-find-lr, which gets find_lr.json and find_lr.png."
        },
    )
    find_lr_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Rates that find_lr tries; default: 0.1, 0.3, 1, 3 and 10 times learning_rate (or all "
            "rates of lr_by_layer)."
        },
    )
    find_lr_steps: int | None = field(
        default=None,
        metadata={
            "help": "Updates of find_lr, 8 or more; after half of them the worse rates are stopped; "
            "default: 20."
        },
    )

    def __post_init__(self) -> None:
        rates, steps = self.find_lr_rates, self.find_lr_steps
        positive = all(0 < rate < math.inf for rate in rates or ())
        if rates is not None and (not positive or len(set(rates)) < max(2, len(rates))):
            raise SteerError(f"find_lr_rates={rates} are not two or more different rates above zero")
        if steps is not None and steps < 8:
            raise SteerError(f"find_lr_steps={steps} is too few to see a trend; give 8 or more")

    def check(self, words: Sequence[str]) -> None:
        """
        SteerError for settings of a finder that is not asked for. `words`: the command line, which may switch
        off the finder of a config file with `--find_lr false`.
        """
        own = self.find_lr_rates is not None or self.find_lr_steps is not None
        if own and not self.find_lr and "find_lr" not in map(setting_of, words):
            raise SteerError("find_lr_rates and find_lr_steps are for the finder; set find_lr=true as well")


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
            "In a config file a list of mappings. A member may change "
            + ", ".join(sorted(MEMBER_FIELDS))
            + "."
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
        if self.validation_problems < 1:
            raise SteerError(
                f"validation_problems={self.validation_problems} is out of range; give a number from 1"
            )
        if not self.halve_at:
            _refuse(self, ("keep", "halve_on", "halve_among"), "without halve_at")
        if self.halve_on != "validation":
            _refuse(self, ("validation_problems",), "without halve_on=validation")

    def check(self, validates: bool, single: bool) -> None:
        """
        SteerError for what has no effect beside the other settings of a run.

        Args:
            validates: whether the run validates, on problems of its own.
            single: whether the run is no population where no members are asked for.
        """
        if validates:
            _refuse(
                self, ("validation_problems",), "with validate_every, whose problems halve_at compares on"
            )
        if single and not self.asked:
            _refuse(self, ("winners",), "without a population")


def setting_of(word: str) -> str | None:
    """The setting that a word of a command line names; None where it names none."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None


def _refuse(part: Any, names: Sequence[str], where: str) -> None:
    """SteerError for the settings of `names` that are not at their defaults: they have no effect `where`."""
    default = {f.name: f.default for f in fields(part)}
    changed = [f"{name}={getattr(part, name)}" for name in names if getattr(part, name) != default[name]]
    if changed:
        raise SteerError(f"{', '.join(changed)} would have no effect {where}; leave out what has none")

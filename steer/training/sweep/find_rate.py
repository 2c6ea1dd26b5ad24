"""
The learning rate that short runs recommend: which rates are tried, by which rule one is chosen, and the plot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev

from scipy.stats import linregress

from steer.errors import SteerError
from steer.stats import LEVEL
from steer.training.config import SteeringGRPOConfig

STEPS = 20
# The grid, as factors on the rate in its middle.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
# What the last layer alone needs, as a multiple of what the first alone does: from 0.003 to 0.1 for
# Qwen2.5-Math-7B (recipes/configs/deepscaler-qwen2.5-math-7b-single-layer.yaml).
LATE = 30
# Vectors that are further from the base than this on neutral text, in nats a token, are too strong.
MAX_KL = 1.0
# The most that the KL is taken to grow from the end of the short runs to the end of the run.
MAX_GROWTH = 10.0
RULE = (
    "Reward is the mean of the last quarter of the updates. A rate is usable if it was not stopped, its "
    f"reward rose (one-sided t-test of the slope, {LEVEL:g} over the number of rates), did not fall back by "
    f"more than half of its gain, and its KL to the base on neutral text would stay below {MAX_KL:g} nats a "
    f"token if it grew in proportion to the updates of the whole run, at most {MAX_GROWTH:g} times (beyond "
    "the KL of the vectors that it started from). Of the usable rates whose reward is within one standard "
    "error of the best one's, paired over the updates, the smallest is recommended: short runs favour large "
    "rates."
)
_NUMBER = re.compile(r"(?<=:)[^:,]+(?=,|:|$)")


@dataclass
class Trial:
    """
    One rate and how its run went: the mean `rewards` of its updates, why it was `stopped`, the `kl` of its
    vectors to the base on neutral text (None where that is not measured), that of the vectors it started from
    (`kl_at_start`) and the `growth` of the difference that is expected in the whole run. `factor` is on the
    run's own rates.
    """

    learning_rate: float
    factor: float
    rewards: list[float]
    stopped: str | None = None
    kl: float | None = None
    growth: float = 1.0
    kl_at_start: float = 0.0

    def reward(self, updates: int) -> float:
        """Mean reward of the last `updates`."""
        return fmean(self.rewards[-updates:])

    def learned(self, level: float) -> bool:
        """Whether the reward rose over the updates."""
        if len(set(self.rewards)) < 2:
            return False
        fit = linregress(range(len(self.rewards)), self.rewards, alternative="greater")
        return bool(fit.pvalue < level)

    def collapsed(self, updates: int) -> str | None:
        """Why its vectors are of no use, if so."""
        if self.stopped and self.stopped.startswith("diverged"):
            return self.stopped
        if self.kl is not None:
            added = (self.kl - self.kl_at_start) * self.growth
            if not added <= MAX_KL:
                whole = self.kl_at_start + added
                return f"too strong: a KL of {self.kl:.3g} to the base, {whole:.3g} in the whole run"
        start, last = self.rewards[0], self.reward(updates)
        windows = [self.rewards[i : i + updates] for i in range(len(self.rewards) - updates + 1)]
        peak = max([start, *map(fmean, windows)])
        steps = [abs(b - a) for a, b in pairwise(self.rewards)]
        noise = 1.48 * median(steps or [0.0]) / sqrt(2)  # of one update, whatever a single jump
        if peak - last > max((peak - start) / 2, 3 * noise * sqrt(1 + 1 / updates)):
            return f"its reward fell from {peak:.3f} to {last:.3f}"
        return None


@dataclass(frozen=True)
class Choice:
    """The recommended trial, or None; why each of the others was not, by learning rate; what else to know."""

    trial: Trial | None
    why_not: dict[float, str]
    note: str


def choose(trials: Sequence[Trial], steps: int) -> Choice:
    """
    Apply `RULE`.

    Args:
        trials: one for each rate, each with one reward or more.
        steps: updates of a run that was not stopped.
    """
    trials = sorted(trials, key=lambda trial: trial.factor)
    last = smoothed(steps)
    why_not: dict[float, str] = {}
    usable = []
    for trial in trials:
        why = trial.collapsed(last) or trial.stopped
        if why is None and not trial.learned(LEVEL / len(trials)):
            why = "its reward did not rise"
        if why is None:
            usable.append(trial)
        else:
            why_not[trial.learning_rate] = why
    if not usable:
        return Choice(None, why_not, _nothing(trials, last))
    best = max(usable, key=lambda trial: trial.reward(last))
    chosen = next(trial for trial in usable if _close(trial, best, last))
    for trial in usable:
        if trial is not chosen and trial is not best:
            larger = trial.factor > chosen.factor
            why_not[trial.learning_rate] = "no better than a smaller rate" if larger else "learned less"
    if best is not chosen:
        why_not[best.learning_rate] = "no better than a smaller rate, within one standard error"
    ends = {trials[0].factor: "smallest", trials[-1].factor: "largest"}
    end = ends.get(chosen.factor)
    other = {"smallest": "smaller", "largest": "larger"}
    note = f"It is the {end} of the rates that were tried: a {other[end]} one may be better." if end else ""
    return Choice(chosen, why_not, note)


def smoothed(steps: int) -> int:
    """The number of last updates whose mean reward is compared."""
    return max(3, steps // 4)


def _close(trial: Trial, best: Trial, updates: int) -> bool:
    """Whether a trial is within one standard error of the best, paired over the last updates."""
    apart = [b - t for b, t in zip(best.rewards[-updates:], trial.rewards[-updates:], strict=True)]
    return fmean(apart) <= stdev(apart) / sqrt(updates)


def _nothing(trials: Sequence[Trial], updates: int) -> str:
    """What to do when no rate is usable."""
    rates = [trial.learning_rate for trial in trials]
    lost = [trial for trial in trials if trial.collapsed(updates)]
    if lost and lost[0] is trials[0]:
        return (
            f"every rate collapsed, {rates[0]:g} and larger; give smaller ones with find_lr_rates"
            if len(lost) == len(trials)
            else f"no rate is usable, and {rates[0]:g}, the smallest, collapsed; give smaller ones with "
            "find_lr_rates"
        )
    if lost:
        return (
            f"no rate is usable: rates from {lost[0].learning_rate:g} collapsed, and smaller ones were "
            "stopped half-way or their reward did not rise; give rates in between with find_lr_rates, or "
            "more updates with find_lr_steps"
        )
    return (
        f"no rate learned: the reward did not rise at any from {rates[0]:g} to {rates[-1]:g}; give more "
        "updates with find_lr_steps, larger rates with find_lr_rates, or easier problems"
    )


# ---- which rates


def trials(
    training: SteeringGRPOConfig, asked: Sequence[float] | None, layers: Sequence[int], num_hidden_layers: int
) -> list[Trial]:
    """
    The rates to try, ascending, as trials that have not begun.

    Args:
        training: the settings of the run.
        asked: the rates, where they are given.
        layers: that are trained.
        num_hidden_layers: of the model.

    Raises:
        SteerError: rates beside a table by layer.
    """
    if asked and training.lr_by_layer is not None:
        raise SteerError(
            "find_lr_rates and lr_by_layer both set the learning rates; drop one of them (without "
            "find_lr_rates all rates of the table are tried times 0.1 to 10)"
        )
    if asked:
        return [Trial(rate, rate / training.learning_rate, []) for rate in sorted(asked)]
    middle = middle_rate(training, layers, num_hidden_layers)
    rates = [float(f"{factor * middle:.2g}") for factor in FACTORS]
    return [Trial(rate, rate / training.learning_rate, []) for rate in rates]


def middle_rate(training: SteeringGRPOConfig, layers: Sequence[int], num_hidden_layers: int) -> float:
    """
    The rate in the middle of the grid: that of the run. The default is for vectors that begin in the first
    layer; for others it is multiplied by `LATE` to the power of the first layer's relative depth.
    """
    default = next(f.default for f in fields(SteeringGRPOConfig) if f.name == "learning_rate")
    if training.learning_rate != default or training.lr_by_layer is not None:
        return training.learning_rate
    return float(training.learning_rate * LATE ** (layers[0] / max(num_hidden_layers - 1, 1)))


def scaled(table: str, factor: float) -> str:
    """`lr_by_layer` with all rates times `factor`."""
    return _NUMBER.sub(lambda match: f"{float(match[0]) * factor:.4g}", table)


# ---- the plot


def plot(trials: Sequence[Trial], choice: Choice, steps: int, path: Path, title: str) -> None:
    """A PNG: reward by update for each rate, and the last reward by rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    colours = pyplot.get_cmap("viridis")
    last = smoothed(steps)
    for number, trial in enumerate(trials):
        colour = colours(0.95 * number / max(len(trials) - 1, 1))
        ran = range(1, 1 + len(trial.rewards))
        left.plot(ran, trial.rewards, color=colour, label=f"{trial.learning_rate:g}")
        mark = "x" if trial.collapsed(last) else "s" if trial.stopped else "o"
        right.plot(trial.learning_rate, trial.reward(last), mark, color=colour, markersize=8)
    right.plot(
        [trial.learning_rate for trial in trials], [trial.reward(last) for trial in trials], "k-", alpha=0.2
    )
    if choice.trial:
        chosen = choice.trial.learning_rate
        right.axvline(chosen, color="tab:green", alpha=0.6, label=f"recommended: {chosen:g}")
    for mark, label in (("o", "ran to the end"), ("s", "stopped half-way"), ("x", "collapsed or too strong")):
        right.plot([], [], mark, color="tab:gray", label=label)
    left.set_xlabel("update")
    left.set_ylabel("mean reward")
    left.legend(title="learning rate", fontsize=8)
    right.set_xscale("log")
    right.set_xlabel("learning rate")
    right.set_ylabel(f"mean reward of the last {last} updates")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

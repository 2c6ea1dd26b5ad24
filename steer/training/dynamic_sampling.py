"""
Which problems an update samples: groups whose rewards are all equal are replaced by groups of other problems
(dynamic sampling, DAPO, arXiv 2503.14476, section 3.2), and problems that are always or never solved come up
less often.

`SteeringGRPOTrainer` and `PopulationTrainer` both use `UpdateSamples`. They draw and score the samples that
it asks for. All draws are a function of the seed, the update and the pass rates, so a run that resumes with
the same pass rates goes on with the same problems, and all processes choose the same ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import nanstd

from steer.training.config import SteeringGRPOConfig
from steer.training.loss import total_rewards

log = logging.getLogger("steer")


class PassRates:
    """
    A running pass rate of each problem, from the groups that a run sampled of it.

    The rate `p` of a problem is the pass rate of its first group, and then the mean of `p` and the pass rate
    of each new group. The pass rate of a group is the mean of the first reward function over its samples,
    each value limited to 0 to 1. The weight of a problem is

        w = max(floor, 1 - p^n - (1 - p)^n),

    where 1 - p^n - (1 - p)^n is the probability that `n` samples with pass rate `p` are neither all right nor
    all wrong. A problem without a group has weight 1.

    Args:
        problems: number of problems.
        args: read for `num_generations` (n) and `pass_rate_floor`; at a floor of 1 all weights are 1.
    """

    def __init__(self, problems: int, args: SteeringGRPOConfig):
        self.group, self.floor = args.num_generations, args.pass_rate_floor
        self.rates = torch.full((problems,), torch.nan)
        self._limited = False  # whether it was said that rewards were limited

    def weights(self) -> np.ndarray:
        """(problems,): the weight of each problem."""
        p = self.rates.double()
        mixed = 1 - p**self.group - (1 - p) ** self.group
        return torch.nan_to_num(mixed, nan=1.0).clamp(min=self.floor).numpy()

    def add(self, problems: Sequence[int], scores: torch.Tensor) -> None:
        """Take account of new groups. `scores`: (rows, functions), a group of rows for each of `problems`."""
        first = scores[:, 0].float().cpu()
        passed = first.clamp(0, 1).view(-1, self.group).nanmean(1)
        if not self._limited and bool(((first < 0) | (first > 1)).any()):
            self._limited = True
            log.warning(
                "pass_rate_floor reads the first reward function as a pass rate, and its values go from %g "
                "to %g: they are limited to 0 to 1; name the one that says whether an answer is right first",
                first.nan_to_num(nan=torch.inf).min(),
                first.nan_to_num(nan=-torch.inf).max(),
            )
        for problem, rate in zip(problems, passed, strict=True):
            if not rate.isnan():
                old = self.rates[problem]
                self.rates[problem] = rate if old.isnan() else (old + rate) / 2


class UpdateSamples:
    """
    The groups of one generation, `num_generations` samples of each problem, until they are complete:

        while problems := samples.wanted():
            samples.add(*draw(problems, samples.drawn))

    Args:
        args: read for `dynamic_sampling_rounds`, `num_generations`, `seed` and `multi_objective_aggregation`.
        rates: the pass rates of the run, which `add` updates.
        problems: the problem of each group, in the order of the data.
        step: number of the generation, which selects the random numbers.
        reward_weights: (functions,).
        multiple: groups are drawn in multiples of this many, as several processes need it.
    """

    def __init__(
        self,
        args: SteeringGRPOConfig,
        rates: PassRates,
        problems: Sequence[int],
        step: int,
        reward_weights: torch.Tensor,
        multiple: int = 1,
    ):
        self.args, self.rates, self.step, self.multiple = args, rates, step, multiple
        self.group, self.weights = args.num_generations, reward_weights
        self.problems: list[int] = list(problems)  # of each group
        self.rows: list[Any] = []  # what was drawn, `group` rows of each problem
        self.scores = torch.empty(0)  # (rows, functions)
        self.drawn = 0  # rows drawn so far
        self.rounds = -1  # rounds beyond the first
        self.tried = set(self.problems)
        self.replaced = self._replace()
        self.refilled = 0
        self.reward = 0.0  # mean of the first round
        self._asked: list[int] = []

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.args.seed, self.step, *key])

    def _others(self, random: np.random.Generator, count: int) -> list[int]:
        """Up to `count` problems that this generation has not tried, by their weights."""
        weights = self.rates.weights()
        weights[list(self.tried)] = 0.0
        count = min(count, int((weights > 0).sum()))
        if not count:
            return []
        chosen = random.choice(len(weights), count, replace=False, p=weights / weights.sum()).tolist()
        self.tried.update(chosen)
        return chosen

    def _replace(self) -> int:
        """Keep each problem with the probability that is its weight; returns how many were replaced."""
        if self.args.pass_rate_floor == 1:
            return 0
        random = self._random()
        weights = self.rates.weights()[self.problems]
        places = (random.random(len(weights)) >= weights).nonzero()[0].tolist()
        others = self._others(random, len(places))
        for place, problem in zip(places, others, strict=False):
            self.problems[place] = problem
        return len(others)

    def wanted(self) -> list[int]:
        """The problems to draw a group of each of next; empty when the generation is complete."""
        if self.rounds < 0:
            self._asked = list(self.problems)
            return self._asked
        flat = len(self._flat(self.scores))
        if not flat or self.rounds >= self.args.dynamic_sampling_rounds:
            return []
        count = -(-flat // self.multiple) * self.multiple
        self._asked = self._others(self._random(self.rounds + 1), count)
        del self._asked[len(self._asked) // self.multiple * self.multiple :]
        return self._asked

    def add(self, rows: Sequence[Any], scores: torch.Tensor) -> None:
        """
        The samples of the problems that `wanted` returned last.

        Args:
            rows: `num_generations` consecutive samples of each problem, of any type.
            scores: (rows, functions), the rewards of each sample; NaN where a function returned None.
        """
        if self.args.pass_rate_floor < 1:
            self.rates.add(self._asked, scores)
        self.rounds += 1
        self.drawn += len(rows)
        if not self.rounds:
            self.rows, self.scores = list(rows), scores.clone()
            self.reward = total_rewards(scores, self.weights.to(scores.device)).nanmean().item()
            return
        flat, useless = self._flat(self.scores), set(self._flat(scores))
        useful = [i for i in range(len(self._asked)) if i not in useless]
        for place, i in zip(flat, useful, strict=False):
            here, there = self._rows(place), self._rows(i)
            self.problems[place] = self._asked[i]
            self.rows[here] = rows[there]
            self.scores[here] = scores[there]
            self.refilled += 1

    def _rows(self, group: int) -> slice:
        return slice(group * self.group, (group + 1) * self.group)

    def _flat(self, scores: torch.Tensor) -> list[int]:
        """The groups whose scored samples all have the same reward, so that none has an advantage."""
        weights = self.weights.to(scores.device)
        if self.args.multi_objective_aggregation == "sum_then_normalize":
            spread = _spread(total_rewards(scores, weights).view(-1, self.group))
        else:
            grouped = scores.view(-1, self.group, scores.shape[-1])
            centred = grouped - grouped.nanmean(1, keepdim=True)
            normal = centred / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
            # rounding errors of equal rewards are not a spread
            normal = normal.masked_fill(~_spread(grouped)[:, None], 0.0)
            spread = (normal * weights).nansum(2).abs().amax(1) > 1e-5
        return (~spread).nonzero().flatten().tolist()

    def metrics(self) -> dict[str, float]:
        """What is logged of a generation: see docs/training.md."""
        named: dict[str, float] = {}
        if self.args.dynamic_sampling_rounds:
            groups = len(self.problems)
            used = (groups - len(self._flat(self.scores))) * self.group
            named = {
                "dynamic_sampling/refilled": self.refilled / groups,
                "dynamic_sampling/rounds": self.rounds,
                "dynamic_sampling/samples": self.drawn,
                "dynamic_sampling/wasted": 1 - used / self.drawn,
                "dynamic_sampling/reward": self.reward,
            }
        if self.args.pass_rate_floor < 1:
            rates = self.rates.rates
            known = ~rates.isnan()
            extreme = (rates[known] == 0) | (rates[known] == 1)
            named |= {
                "pass_rate/known": known.float().mean().item(),
                "pass_rate/extreme": extreme.float().mean().item() if len(extreme) else 0.0,
                "pass_rate/replaced": self.replaced / len(self.problems),
            }
        return named


def _spread(grouped: torch.Tensor) -> torch.Tensor:
    """Whether the values along dimension 1, without NaN, differ."""
    low, high = (grouped.nan_to_num(nan=fill) for fill in (torch.inf, -torch.inf))
    return high.amax(1) > low.amin(1)

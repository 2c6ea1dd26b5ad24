"""
`SamplingGRPOTrainer`: trl's trainer with dynamic sampling and pass rates of problems
(`steer.training.dynamic_sampling`), whatever samples: steer's sampler, `generate()` or vLLM.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import gcd
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel

from steer.errors import SteerError
from steer.evaluation.answers import CUT_OFF
from steer.training.config import SteeringGRPOConfig
from steer.training.dynamic_sampling import PassRates, UpdateSamples
from steer.training.resuming import ResumableGRPOTrainer

_INDEX = "__problem__"  # column with the index of a problem; reward functions are not given it


@dataclass
class _Row:
    """One sample, as it travels between processes."""

    ids: list[int]
    logps: list[float] | None  # of an engine
    extra: dict[str, Any]  # what reward functions logged of it, by column


class SamplingGRPOTrainer(ResumableGRPOTrainer):
    """
    trl's trainer, which samples again where a group has no advantage (`dynamic_sampling_rounds`) and replaces
    problems of known pass rate (`pass_rate_floor`).

    Raises:
        SteerError: one of the two is set with data that has no index, or with tools or environments.
    """

    model: PreTrainedModel
    num_generations: int
    train_dataset: Dataset
    pass_rates: PassRates | None = None
    first_row = 0  # rows of the generation that were drawn before those that are drawn now
    rollout_seconds = 0.0  # of wall time in which completions were drawn so far
    _known_rewards: torch.Tensor | None = None

    def __init__(self, *, args: SteeringGRPOConfig, **kwargs: Any):
        chooses = args.dynamic_sampling_rounds > 0 or args.pass_rate_floor < 1
        if chooses:
            data = kwargs.get("train_dataset")
            if not isinstance(data, Dataset):
                raise SteerError(
                    "dynamic_sampling_rounds and pass_rate_floor choose problems by their index, and "
                    f"train_dataset is a {type(data).__name__}; give a datasets.Dataset, or leave them out"
                )
            for name in ("tools", "environment_factory", "rollout_func"):
                if kwargs.get(name):
                    raise SteerError(
                        f"{name} cannot be used with dynamic_sampling_rounds or pass_rate_floor; leave "
                        "them out"
                    )
            self.pass_rates = PassRates(len(data), args)
            kwargs["train_dataset"] = data.add_column(_INDEX, list(range(len(data))))
        super().__init__(args=args, **kwargs)

    def _generate(self, prompts: list) -> tuple:
        began = time.perf_counter()
        try:
            return super()._generate(prompts)
        finally:
            self.rollout_seconds += time.perf_counter() - began

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.pass_rates is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        group, processes = self.num_generations, self.accelerator.num_processes
        chosen = gather_object([row[_INDEX] for row in inputs])[::group]
        whole = any(getattr(f, "whole_groups", False) for f in self.reward_funcs)
        samples = UpdateSamples(
            self.args,
            self.pass_rates,
            chosen,
            self._step,
            self.reward_weights,
            multiple=processes if whole else processes // gcd(processes, group),
        )
        while problems := samples.wanted():
            samples.add(*self._draw(problems, samples.drawn))
        inputs = self._own_inputs(samples.problems)
        first = self.accelerator.process_index * len(inputs)
        rows: list[_Row] = samples.rows[first : first + len(inputs)]
        logps = None if rows[0].logps is None else [row.logps for row in rows]
        for column in dict.fromkeys(name for row in rows for name in row.extra):
            self._pending_extra_logs[column] = [row.extra.get(column) for row in rows]
        seen = self.state.num_input_tokens_seen
        drawn = patch.object(self, "_generate_single_turn", lambda *_, **__: ([r.ids for r in rows], logps))
        self._known_rewards = samples.scores
        try:
            with drawn:
                output = super()._generate_and_score_completions(inputs)
        finally:
            self._known_rewards = None
        # The rows were counted when they were drawn.
        self.state.num_input_tokens_seen = seen
        self._metrics["train"]["num_tokens"] = [seen]
        for name, value in samples.metrics().items():
            self._metrics["train"][name].append(value)
        return output

    def _own_inputs(self, problems: list[int]) -> list[dict[str, Any]]:
        """This process's share of the rows of these problems."""
        rows = [problem for problem in problems for _ in range(self.num_generations)]
        size = len(rows) // self.accelerator.num_processes
        first = self.accelerator.process_index * size
        own = rows[first : first + size]
        known = {i: self.train_dataset[i] for i in set(own)}
        return [{k: v for k, v in known[i].items() if k != _INDEX} for i in own]

    def _draw(self, problems: list[int], first_row: int) -> tuple[list[_Row], torch.Tensor]:
        """Sample and score a group of each problem. Returns the rows and scores of all processes."""
        inputs = self._own_inputs(problems)
        prompts = [row["prompt"] for row in inputs]
        self.first_row = first_row
        try:
            # The log describes the samples of the update, not those that were drawn on the way.
            with patch.object(self, "_metrics", defaultdict(lambda: defaultdict(list))):
                _, ids, _, completions, logps, *_ = self._generate(prompts)
        finally:
            self.first_row = 0
        # What rewards measure is of the first round: of all rounds it would count samples that are discarded.
        kept: AbstractContextManager = nullcontext()
        if first_row:
            kept = patch.object(self, "_pending_metrics", defaultdict(list))
        with kept:
            scores = self._calculate_rewards(inputs, prompts, completions, ids)
        extra = {name: list(values) for name, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        rows = [
            _Row(
                list(ids[i]),
                None if logps is None else list(logps[i]),
                {name: values[i] for name, values in extra.items() if i < len(values)},
            )
            for i in range(len(inputs))
        ]
        return gather_object(rows), scores

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        if self._known_rewards is not None:
            return self._known_rewards
        scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        limit, ends = self.args.max_completion_length, self.eos_token_ids
        # its text does not tell: it may be tokenised in another way
        self._pending_extra_logs[CUT_OFF] = [
            len(ids) >= limit and ids[-1] not in ends for ids in completion_ids_list
        ]
        return scores

    # ---- checkpoints

    def _rollout_state(self) -> dict[str, Any]:
        rates = None if self.pass_rates is None else self.pass_rates.rates
        return {**super()._rollout_state(), "pass_rates": rates}

    def _set_rollout_state(self, state: dict[str, Any]) -> None:
        super()._set_rollout_state(state)
        if self.pass_rates is not None and state.get("pass_rates") is not None:
            self.pass_rates.rates = state["pass_rates"].cpu()

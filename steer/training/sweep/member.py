"""
One member of a population: an independent run, with what it needs to go on after any update.
"""

from __future__ import annotations

import inspect
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, get_scheduler

from steer import compat
from steer.artifact import Artifact
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.tasks.rewards import RewardFunction, guard
from steer.training.callbacks import VectorLog
from steer.training.config import SteeringGRPOConfig
from steer.training.dynamic_sampling import PassRates, UpdateSamples
from steer.training.init import start
from steer.training.loading import check_engine
from steer.training.loss import LOSSES
from steer.training.steering_mixin import make_optimizer
from steer.vectors import SteeringVectors

# What members may differ in, and what all of them share: everything of `SteeringGRPOConfig` that a population
# heeds. Fields that are in neither must be at their defaults.
OWN = frozenset(
    {
        "seed", "learning_rate", "lr_by_layer", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
        "max_steps", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
        "max_grad_norm", "advantage", "scale_rewards", "loss_type", "beta", "reward_weights",
        "mask_truncated_completions", "shuffle_dataset", "skip_zero_advantage", "use_bias_correction_kl",
        "importance_sampling_level", "epsilon", "epsilon_high", "delta", "dynamic_sampling_rounds",
        "pass_rate_floor",
    }
)  # fmt: skip
SHARED = frozenset(
    {
        "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps",
        "generation_batch_size", "steps_per_generation", "max_completion_length", "temperature", "top_k",
        "top_p", "min_p", "sample_rows", "num_train_epochs", "save_steps", "save_strategy", "disable_tqdm",
        "chat_template_kwargs", "trust_remote_code",
        "use_cpu", "output_dir", "use_vllm", "vllm_mode", "vllm_gpu_memory_utilization",
        "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_clip_max", "vllm_mismatch_warn", "vllm_mismatch_stop",
        "vllm_enforce_eager",
        "disable_dropout", "router_aux_loss_coef",
    }
)  # fmt: skip
# They say how a run is watched or started; here they change nothing.
IDLE = frozenset(
    {
        "logging_steps", "logging_first_step", "logging_strategy", "log_level",
        "log_on_each_node", "save_total_limit", "dataloader_pin_memory", "dataloader_num_workers",
        "ddp_timeout", "run_name", "per_device_eval_batch_size",
    }
)  # fmt: skip


@dataclass
class Member:
    """
    One run: `name`, and what `SteeringGRPOTrainer` would be given. Below, what it has become: `step` updates,
    a record of each in `log`, validations in `history`, and in `stopped` why no more will follow. `init` has
    the vectors that it starts from, if any, with the name of their artifact.
    """

    name: str
    reward_funcs: Sequence[RewardFunction]
    args: SteeringGRPOConfig
    steering: SteeringConfig
    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # its validations
    best: dict[str, torch.Tensor] | None = None  # its vectors at the best of those in turn
    init: tuple[str, Artifact] | None = None

    def prepare(self, vectors: SteeringVectors, problems: int) -> None:
        """Optimizer, schedule and random numbers, as a run over that many problems begins with them."""
        args = self.args
        self.vectors = vectors
        if self.init is not None:
            name, saved = self.init
            start(vectors, saved, name)
        self.reward_funcs = [_reward(f) for f in self.reward_funcs]
        weights = args.reward_weights
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise SteerError(
                f"member {self.name}: {len(weights)} reward_weights for {len(self.reward_funcs)} reward "
                "functions; give one each"
            )
        self.reward_weights = torch.tensor(weights or [1.0] * len(self.reward_funcs))
        self.metrics: dict[str, list[float]] = defaultdict(list)
        # A member's whole batch is on its process, however many there are.
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        group = args.num_generations
        if rows % group:
            raise SteerError(
                f"an update of a member has {rows} samples (per_device_train_batch_size x "
                f"gradient_accumulation_steps), which is not a multiple of num_generations={group}"
            )
        self.prompts_a_step = rows // group
        self.steps_an_epoch = problems // self.prompts_a_step
        if not self.steps_an_epoch:
            raise SteerError(
                f"the data set has {problems} problems, a step takes {self.prompts_a_step}; give more "
                "problems, or lower per_device_train_batch_size or gradient_accumulation_steps"
            )
        self.problems = problems
        self.pass_rates = PassRates(problems, args)
        epochs = ceil(args.num_train_epochs * self.steps_an_epoch)
        self.steps = args.max_steps if args.max_steps > 0 else epochs
        self.optimizer = make_optimizer(args, vectors, vectors.parameters())
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=args.get_warmup_steps(self.steps),
            num_training_steps=self.steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        # A reward may draw from Python's generator, which a run seeds for itself and keeps in checkpoints.
        self.random = random.Random(args.seed).getstate()
        self.watch = VectorLog(vectors, self.metrics)
        self.watch.on_train_begin()

    @property
    def active(self) -> bool:
        return self.stopped is None and self.step < self.steps

    def draw(self) -> UpdateSamples:
        """The groups of the coming update, still without samples: problems in the order of trl's sampler."""
        epoch, turn = divmod(self.step, self.steps_an_epoch)
        order = torch.arange(self.problems)
        if self.args.shuffle_dataset:
            order = torch.randperm(
                self.problems, generator=torch.Generator().manual_seed(self.args.seed + epoch)
            )
        chosen = order[turn * self.prompts_a_step : (turn + 1) * self.prompts_a_step].tolist()
        return UpdateSamples(self.args, self.pass_rates, chosen, self.rollout_step, self.reward_weights)

    @property
    def rollout_step(self) -> int:
        """The micro-batches so far: what a run alone keys the random numbers of its samples by."""
        return self.step * self.args.gradient_accumulation_steps

    def state(self) -> dict[str, Any]:
        """All that the coming updates depend on, in types that `torch.load` reads without executing any."""
        return {
            "vectors": self.vectors.tensors(),
            "saved": self.watch.saved,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.random,
            "pass_rates": self.pass_rates.rates,
            "step": self.step,
            "log": self.log,
            "stopped": self.stopped,
            "history": self.history,
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.vectors.set_tensors(state["vectors"])
        self.watch.saved = state["saved"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.random = state["random"]
        self.pass_rates.rates = state.get("pass_rates", self.pass_rates.rates)
        self.step, self.log, self.stopped = state["step"], state["log"], state["stopped"]
        self.history, self.best = state.get("history", []), state.get("best")


def _reward(function: Any) -> RewardFunction:
    """`function`, checked at every call; SteerError for the kinds of reward that trl alone can call."""
    if isinstance(function, str | nn.Module):
        raise SteerError("a population takes reward functions, not reward models; train with `steer train`")
    if inspect.iscoroutinefunction(checked := guard(function)):
        raise SteerError(
            f"reward function {checked.__name__!r} is async, which a population does not call; give a plain "
            "function"
        )
    return checked


def check_model(model: PreTrainedModel, args: SteeringGRPOConfig) -> None:
    """
    SteerError for a model that the engine does not steer, where one is used, and for one that a run alone
    trains with a term or noise that a population does not have.
    """
    if args.use_vllm:
        check_engine(model)
    if compat.recomputes_activations(model):
        raise SteerError("a population cannot be trained with gradient checkpointing; switch it off")
    config = model.config.get_text_config()
    weight = args.router_aux_loss_coef
    if weight is None and hasattr(config, "output_router_logits"):
        weight = getattr(config, "router_aux_loss_coef", 0.0)
    if weight:
        raise SteerError(
            f"a population has no router loss of mixtures of experts, whose weight is {weight} here; set "
            "router_aux_loss_coef=0"
        )
    for name, module in model.named_modules():
        rate = 0.0 if args.disable_dropout or not isinstance(module, nn.Dropout) else module.p
        if isinstance(own := getattr(module, "attention_dropout", None), float):
            rate = rate or own
        if rate:
            raise SteerError(
                f"{name} has a dropout of {rate}, which a population does not apply; set "
                "disable_dropout=true, and attention_dropout=0 in the model's config where it has one"
            )


def check_supported(args: SteeringGRPOConfig) -> None:
    """SteerError for a setting that a population does not heed and that is not at its default."""
    if args.loss_type not in LOSSES:
        raise SteerError(
            f"loss_type={args.loss_type!r} is not for a population, which knows {', '.join(LOSSES)}; train "
            "this one alone with `steer train`"
        )
    if args.num_iterations != 1 or args.steps_per_generation != args.gradient_accumulation_steps:
        raise SteerError(
            "in a population a generation feeds one update: leave num_iterations at 1 and "
            "steps_per_generation and generation_batch_size unset"
        )
    default: Any = SteeringGRPOConfig(output_dir=args.output_dir, use_cpu=args.use_cpu)
    names = sorted({f.name for f in fields(args)} - OWN - SHARED - IDLE)
    changed = [n for n in names if getattr(args, n) != getattr(default, n)]
    if changed:
        told = ", ".join(f"{name}={getattr(args, name)!r}" for name in changed[:3])
        raise SteerError(
            f"a population does not know what to do with {told}; leave it out, or train with `steer train`"
        )


def agreed(all_args: Sequence[SteeringGRPOConfig]) -> SteeringGRPOConfig:
    """The settings that members share; SteerError where they do not."""
    if not all_args:
        raise SteerError("the population has no members; give at least one")
    first = all_args[0]
    for name in sorted(SHARED):
        values = {repr(getattr(args, name)) for args in all_args}
        if len(values) > 1:
            raise SteerError(
                f"members share one batch, but {name} is {' and '.join(sorted(values))}; give all the same"
            )
    return first


def read_states(folder: Path) -> dict[str, dict[str, Any]]:
    """By member, the furthest state in `folder`, whichever process wrote it; `file` says where it was."""
    furthest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("state-*.pt")):
        try:
            states = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no single kind for a file that is not one of its own
            raise SteerError(
                f"{path} is not a state of a population ({type(error).__name__}); remove it to begin "
                "its members again"
            ) from error
        for name, state in states.items():
            if name not in furthest or state["step"] > furthest[name]["step"]:
                furthest[name] = {**state, "file": path.name}
    return furthest

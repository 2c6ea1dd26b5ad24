"""
`SteeringGRPOConfig`: trl's GRPO settings with defaults that fit vectors, and the few settings only vectors
have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl import GRPOConfig

from steer.engine.logprobs import logprobs_mode
from steer.errors import SteerError, shown
from steer.training.settings import IGNORED_BY_GRPO
from steer.training.trainer_config import SteeringTrainerConfig

ADVANTAGES = ("loo", "group")
# The losses of trl by what they average over; `skip_zero_advantage` must know it of every one.
ROW_LOSSES = ("grpo", "sapo", "dr_grpo", "luspo")
BATCH_TOKEN_LOSSES = ("bnpo",)
STEP_TOKEN_LOSSES = ("dapo", "cispo", "vespo")
LOSSES = ROW_LOSSES + BATCH_TOKEN_LOSSES + STEP_TOKEN_LOSSES
# Keys that `generation_kwargs` would take, for which there is a setting that the scores follow too.
_SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **dict.fromkeys(("max_new_tokens", "max_tokens"), "max_completion_length"),
}


@dataclass
class SteeringGRPOConfig(SteeringTrainerConfig, GRPOConfig):  # type: ignore[misc]  # bf16 is never None
    """
    All of trl's `GRPOConfig`. The defaults follow "Small Vectors, Big Effects" (arXiv 2509.06608):
    leave-one-out baseline, no division by the standard deviation, no KL term, one update a batch, token-level
    loss, gradient clip 2, constant learning rate after 3 % warm-up. Vectors need rates about a thousand times
    those of a full fine-tune.
    """

    _argument_group_name = "training"
    ignored: ClassVar = IGNORED_BY_GRPO
    method: ClassVar = "grpo"

    advantage: str = field(
        default="loo",
        metadata={
            "help": "loo: reward minus the mean of the other samples of its prompt (RLOO, arXiv "
            "2402.14740); needs "
            "scale_rewards none. group: reward minus the group's mean, scaled as `scale_rewards` says (GRPO)."
        },
    )
    fast_sampler: bool = field(
        default=True,
        metadata={
            "help": "Sample with steer's own loop (shared prompts, row-wise seeds) instead of generate()."
        },
    )
    sample_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows that fast_sampler draws at once on a device, whole groups; default: all of a step."
        },
    )
    update_rows: int = field(
        default=32,
        metadata={
            "help": "Rows whose activations an update holds at once; the others follow, and the gradient is "
            "the same. 0: all of per_device_train_batch_size."
        },
    )
    update_memory: float | None = field(
        default=None,
        metadata={
            "help": "GB that the activations of an update may take on a device: fewer than update_rows rows "
            "are held at once where they would take more. Default: a quarter of the memory of the GPU, on a "
            "CPU of the machine. 0: no limit."
        },
    )
    recompute_mlps: bool | None = field(
        default=None,
        metadata={
            "help": "Compute what is inside of MLPs again in the backward pass: a quarter of the memory, a "
            "quarter more time, the same gradient bit for bit. Default: for single rows that are above "
            "update_memory."
        },
    )
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Compute a prompt shared by a group once in the update. Off under gradient checkpointing."
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={
            "help": "Leave rows whose advantage is zero out of the update, where that changes no gradient."
        },
    )
    dynamic_sampling_rounds: int = field(
        default=0,
        metadata={
            "help": "Dynamic sampling (DAPO, arXiv 2503.14476): replace groups whose samples all have the "
            "same reward by groups of other problems, which are drawn and scored in up to this many more "
            "rounds. Groups that are left then stay. 0: off."
        },
    )
    pass_rate_floor: float = field(
        default=1.0,
        metadata={
            "help": "Sample problems less often that are always or never solved: a problem whose running "
            "pass rate is p keeps its place in an update with probability max(pass_rate_floor, "
            "1 - p^n - (1 - p)^n), n = num_generations, and otherwise another one takes it. The first "
            "reward function decides what passes. 1: off."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Divide advantages by the standard deviation of the 'group', the 'batch' or 'none'."
        },
    )
    num_generations: int = field(default=16, metadata={"help": "Samples of each prompt."})
    max_completion_length: int = field(default=256, metadata={"help": "Most tokens of a completion."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Samples in one forward and backward pass on each device."}
    )
    vllm_enforce_eager: bool | None = field(
        default=None,
        metadata={
            "help": "Start vLLM without compiling. Default: where a run on a CPU is too short for compiling "
            "to pay, fewer than 200,000 sampled tokens. Without max_steps their number is not known, and "
            "vLLM compiles."
        },
    )
    vllm_mismatch_warn: float | None = field(
        default=0.05,
        metadata={
            "help": "Warn where the log-probabilities of vLLM are this far from the trainer's: the mean "
            "absolute difference over an update's tokens. null: never."
        },
    )
    vllm_mismatch_stop: float | None = field(
        default=0.2,
        metadata={"help": "Stop the run where they are this far apart. null: never."},
    )
    if TYPE_CHECKING:  # trl's `__post_init__` fills these in and reads JSON
        output_dir: str = field(default="trainer_output")
        generation_batch_size: int = field(default=1)
        steps_per_generation: int = field(default=1)
        generation_kwargs: dict[str, Any] | None = field(default=None)
        chat_template_kwargs: dict[str, Any] | None = field(default=None)
        lr_scheduler_kwargs: dict[str, Any] | None = field(default=None)
        model_init_kwargs: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            if "divisible by num_generations" not in str(error):
                raise
            raise SteerError(self._odd_groups()) from error
        if self.loss_type not in LOSSES:
            raise SteerError(f"loss_type={self.loss_type!r} is unknown; choose one of {', '.join(LOSSES)}")
        if self.loss_type == "cispo" and (self.epsilon_high or 0) < 1:  # trl would take epsilon for None
            raise SteerError(
                f"loss_type=cispo with epsilon_high={self.epsilon_high}: it bounds the weight itself; give "
                "one from 1, such as 5.0"
            )
        if self.advantage not in ADVANTAGES:
            raise SteerError(
                f"advantage={self.advantage!r} is unknown; choose one of {', '.join(ADVANTAGES)}"
            )
        if self.advantage == "loo" and self.scale_rewards != "none":
            raise SteerError(
                "advantage=loo does not divide by a standard deviation, but "
                f"scale_rewards={self.scale_rewards!r}; "
                "set scale_rewards=none or advantage=group"
            )
        if self.advantage == "loo" and self.multi_objective_aggregation != "sum_then_normalize":
            raise SteerError(
                "advantage=loo does not divide by a standard deviation, but "
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} does; set it to "
                "sum_then_normalize, or advantage=group"
            )
        if named := sorted(_SAMPLING.keys() & (self.generation_kwargs or {}).keys()):
            raise SteerError(
                f"generation_kwargs has {', '.join(named)}, which samples are scored without; set "
                f"{', '.join(_SAMPLING[name] for name in named)} instead"
            )
        if self.use_vllm:
            if (seed := (self.generation_kwargs or {}).get("seed")) is not None:
                raise SteerError(
                    f"generation_kwargs has seed={shown(seed)}, with which vLLM begins every request: the "
                    "samples of a prompt are the same, or those of each step; leave it out"
                )
            logprobs_mode(self)  # refuses sampling whose log-probabilities do not compare
        elif self.vllm_structured_outputs_regex is not None:
            raise SteerError(
                "vllm_structured_outputs_regex has no effect without vLLM; set use_vllm=true, or leave it out"
            )
        if self.sync_ref_model:
            raise SteerError(
                "sync_ref_model=true cannot work: the reference policy is the same model with its "
                "vectors off; "
                "set sync_ref_model=false"
            )

    def _odd_groups(self) -> str:
        """That the samples of a generation are not whole groups, in the settings that a user gives."""
        size, group = self.generation_batch_size, self.num_generations
        parts = {
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "processes": self.world_size,
            "steps_per_generation": self.steps_per_generation or self.gradient_accumulation_steps,
        }
        if parts["steps_per_generation"] == self.gradient_accumulation_steps:
            parts["gradient_accumulation_steps"] = parts.pop("steps_per_generation")
        made = " x ".join(f"{name}={value}" for name, value in parts.items() if value != 1)
        less = max((n for n in range(2, min(group, size) + 1) if size % n == 0), default=None)
        fix = f"num_generations={less}, or " if less else ""
        more = group * -(-self.per_device_train_batch_size // group)
        return (
            f"{size} samples at once ({made}) are not a multiple of num_generations={group}, the samples "
            "of a "
            f"prompt; set {fix}per_device_train_batch_size={more}"
        )

    def sampled_tokens(self) -> int | None:
        """The most tokens that a process samples in all; None where the number of updates is not set."""
        if self.max_steps < 1:
            return None
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        rounds = 1 + self.dynamic_sampling_rounds
        return self.max_steps * rows * rounds * self.max_completion_length // self.num_iterations

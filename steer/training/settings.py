"""
Settings of trl and transformers that cannot work here: values out of range, and those that nothing reads.

A run honours a setting, has no use for it and says so, or refuses it. `check` refuses what no trainer of
`steer` reads, `check_recipe` what a recipe does not read either, and `idle` names what plays no part beside
the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from steer.errors import SteerError, one_line, shown

if TYPE_CHECKING:
    from transformers import TrainingArguments


Kind = TypeVar("Kind")


class Range(NamedTuple):
    """Values from `low` to `high`; `open` leaves `low` itself out."""

    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open else f"from {self.low:g}"
        return low if self.high == math.inf else f"{low} to {self.high:g}"


POSITIVE, COUNT, NOT_NEGATIVE = Range(0, open=True), Range(1), Range(0)
_COUNTS: tuple[str, ...] = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "max_length",
)
_COUNTS += (
    "num_iterations",
    "steps_per_generation",
    "generation_batch_size",
    "sample_rows",
    "save_total_limit",
)
_WEIGHTS = ("learning_rate", "weight_decay", "max_grad_norm", "beta", "epsilon", "epsilon_high", "delta")
RANGES: dict[str, Range] = {
    **dict.fromkeys(("temperature", "num_train_epochs", "repetition_penalty", "adam_epsilon"), POSITIVE),
    **dict.fromkeys(_COUNTS, COUNT),
    **dict.fromkeys((*_WEIGHTS, "top_k", "seed", "update_rows", "update_memory"), NOT_NEGATIVE),
    "dynamic_sampling_rounds": NOT_NEGATIVE,
    **dict.fromkeys(("vllm_mismatch_warn", "vllm_mismatch_stop"), POSITIVE),
    "num_generations": Range(2),
    "warmup_steps": NOT_NEGATIVE,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "top_p": Range(0, 1, open=True),
    "top_entropy_quantile": Range(0, 1, open=True),
    "min_p": Range(0, 1),
    "pass_rate_floor": Range(0, 1, open=True),
    "adam_beta1": Range(0, 1 - 1e-9),
    "adam_beta2": Range(0, 1 - 1e-9),
}
HINTS = {
    "temperature": "at 0 all samples of a prompt are the same one, and no reward differs from another",
    "pass_rate_floor": "at 0 a problem that was never solved once would never be tried again",
    "num_generations": "an advantage compares a sample with the others of its prompt",
}

_ORDER = "the order of the problems is decided by `seed` and `shuffle_dataset` alone"
# By name: why a value other than the default would be ignored, or what it would break without a word.
IGNORED: dict[str, str] = {
    "optim_target_modules": "it chooses weight matrices, and none is trained",
    "use_liger_kernel": "its kernels were not checked beside the vectors' hooks",
    "liger_kernel_config": "use_liger_kernel is refused",
    "hub_always_push": "an upload ends before the run goes on, and none is left out",
}
# The same of GRPO, of supervised training and of DPO alone.
IGNORED_BY_GRPO: dict[str, str] = {
    "data_seed": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "label_smoothing_factor": "policy gradients have no labels to smooth",
    "remove_unused_columns": "reward functions would not be given the answers of the problems",
}
_ATTEND = "texts in one row would attend to each other where attention is not FlashAttention"
IGNORED_BY_SFT: dict[str, str] = {
    "chat_template_path": "it may add tokens to the base model, which is frozen; set the tokenizer's "
    "chat_template",
    "packing": _ATTEND,
    "packing_strategy": "packing is refused",
    "eval_packing": _ATTEND,
    "padding_free": _ATTEND,
}
IGNORED_BY_DPO: dict[str, str] = {
    "padding_free": "this version of trl pads all the same",
    "label_smoothing_factor": "the loss of DPO has label_smoothing",
    "pad_token": "trl's DPOTrainer does not read it; set the tokenizer's pad_token",
    "precompute_ref_log_probs": "the reference model is the base itself, and takes no memory of its own",
    "precompute_ref_batch_size": "precompute_ref_log_probs is refused",
}
LOADING: dict[str, str] = {
    "model_init_kwargs": "the model is loaded before the trainer sees it; load it as it should be, or "
    "give the trainer its name",
}
_NO_EVALUATION = "a recipe evaluates on its own, before and after training, on --eval_data"
_RESUMES = "a recipe resumes from the last checkpoint without being told"
_LOADS = "a recipe loads the model by settings of its own, such as model_revision and model_dtype"
IGNORED_BY_RECIPES: dict[str, str] = {
    "model_init_kwargs": _LOADS,
    "eval_strategy": _NO_EVALUATION,
    "eval_on_start": _NO_EVALUATION,
    "do_eval": _NO_EVALUATION,
    "do_predict": _NO_EVALUATION,
    "load_best_model_at_end": _NO_EVALUATION,
    "resume_from_checkpoint": _RESUMES,
    "save_only_model": f"{_RESUMES}, and without the optimizer's state it would go on as another run",
}
_PREPARES = (
    "a recipe makes the tokens itself: prompts as they are asked, answers with the token that ends them, and "
    "nothing longer than max_length"
)
# The same of a recipe that trains on given answers.
IGNORED_BY_ANSWER_RECIPES: dict[str, str] = {
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc"), _PREPARES),
    **dict.fromkeys(("truncation_mode", "eos_token", "assistant_only_loss"), _PREPARES),
    "completion_only_loss": f"{_PREPARES}, and the loss is on the answers alone",
}


class Switch(NamedTuple):
    """Settings whose names begin with one of `names` and none of `but` are read only where `on` says so."""

    names: tuple[str, ...]
    on: Callable[[Any], bool]
    why: str
    but: tuple[str, ...] = ()


def _ratios_differ(args: Any) -> bool:
    """Whether a sample enters updates of another policy than the one that drew it, as trl tells it."""
    return args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0


def _weighs(args: Any, level: str = "") -> bool:
    """Whether what vLLM drew is weighed by importance, at this level."""
    weighed = args.use_vllm and args.vllm_importance_sampling_correction
    return weighed and args.vllm_importance_sampling_mode.startswith(level)


def _level_matters(args: Any) -> bool:
    """
    Whether the gradient of a sample's ratio differs from that of its tokens' ratios: where they are not 1, or
    where its tokens have other factors beside.
    """
    factors = args.top_entropy_quantile < 1 or (args.beta != 0 and args.use_bias_correction_kl)
    return _ratios_differ(args) or factors or _weighs(args, "token")


_ONE_UPDATE = "a generation feeds one update, in which all ratios of probabilities are 1"
SWITCHES = (
    Switch(
        (
            "vllm_enforce_eager", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size",
            "vllm_max_model_length", "vllm_enable_sleep_mode",
        ),
        lambda args: args.vllm_mode == "colocate",
        "vllm_mode is server, which is started with settings of its own",
    ),
    Switch(("vllm_",), lambda args: args.use_vllm, "use_vllm is false"),
    # At a ratio of 1 nothing is clipped, sapo has a slope of 1 at every temperature, and vespo a weight of 1.
    Switch(("epsilon", "sapo_"), _ratios_differ, _ONE_UPDATE),
    Switch(("vespo_",), lambda args: _ratios_differ(args) or _weighs(args), _ONE_UPDATE),
    Switch(("delta",), lambda args: args.delta < 1 or _ratios_differ(args), _ONE_UPDATE),
    Switch(("importance_sampling_level",), _level_matters, _ONE_UPDATE),
    Switch(
        ("off_policy_mask_threshold",),
        lambda args: args.off_policy_mask_threshold < 0 or args.use_vllm or _ratios_differ(args),
        _ONE_UPDATE,
    ),
    Switch(("sapo_",), lambda args: args.loss_type == "sapo", "loss_type is not sapo"),
    Switch(("vespo_",), lambda args: args.loss_type == "vespo", "loss_type is not vespo"),
    Switch(
        ("epsilon",),
        lambda args: args.loss_type not in ("sapo", "vespo"),
        "sapo and vespo clip no ratio",
    ),
    Switch(
        ("epsilon",),
        lambda args: args.loss_type != "cispo",
        "cispo reads epsilon_high alone",
        but=("epsilon_high",),
    ),
    Switch(
        ("delta",),
        lambda args: args.loss_type not in ("cispo", "sapo", "vespo"),
        "cispo, sapo and vespo do not read it",
    ),
    Switch(
        ("importance_sampling_level",),
        lambda args: args.loss_type != "vespo" or (args.beta != 0 and args.use_bias_correction_kl),
        "vespo weighs whole samples itself",
    ),
    Switch(("use_bias_correction_kl",), lambda args: args.beta != 0, "beta is 0"),
    Switch(
        ("update_rows",),
        lambda args: args.top_entropy_quantile == 1
        and not args.entropy_coef
        and not args.use_adaptive_entropy
        and not args.router_aux_loss_coef,
        "a batch is not divided where one of top_entropy_quantile, entropy_coef, use_adaptive_entropy and "
        "router_aux_loss_coef is set",
    ),
    Switch(("ref_model_",), lambda args: args.sync_ref_model, "sync_ref_model is false"),
    Switch(
        ("entropy_coef_", "entropy_target"),
        lambda args: args.use_adaptive_entropy,
        "use_adaptive_entropy is false",
    ),
    Switch(
        ("gradient_checkpointing_kwargs",),
        lambda args: args.gradient_checkpointing,
        "gradient_checkpointing is false",
    ),
    Switch(
        ("transformers_continuous_batching_config",),
        lambda args: args.use_transformers_continuous_batching,
        "use_transformers_continuous_batching is false",
    ),
    Switch(
        ("label_smoothing",),
        lambda args: bool({"robust", "exo_pair", "aot", "aot_unpaired"} & set(args.loss_type)),
        "no loss_type reads it",
        but=("label_smoothing_factor",),
    ),
    # Of supervised training: the others refuse it.
    Switch(("label_smoothing_factor",), lambda args: args.loss_type == "nll", "loss_type is not nll"),
    Switch(
        ("length_column_name",),
        lambda args: args.train_sampling_strategy in ("group_by_length", "batch_rebalance"),
        "train_sampling_strategy does not go by length",
    ),
    Switch(("discopop_",), lambda args: "discopop" in args.loss_type, "no loss_type is discopop"),
    Switch(
        ("f_alpha_divergence_coef",),
        lambda args: args.f_divergence_type == "alpha_divergence",
        "f_divergence_type is not alpha_divergence",
    ),
    Switch(("sample_rows",), lambda args: args.fast_sampler, "fast_sampler is false"),
    Switch(
        ("sample_rows",),
        lambda args: args.repetition_penalty == 1.0
        and not args.generation_kwargs
        and not args.cache_implementation
        and not args.use_transformers_continuous_batching,
        "generate() samples where one of repetition_penalty, generation_kwargs, cache_implementation and "
        "use_transformers_continuous_batching is set",
    ),
    Switch(("sample_rows",), lambda args: not args.use_vllm, "vLLM samples"),
    Switch(
        (
            "eval_", "per_device_eval_batch_size", "num_generations_eval", "prediction_loss_only",
            "label_names", "include_for_metrics", "batch_eval_metrics", "metric_for_best_model",
            "greater_is_better", "bf16_full_eval", "fp16_full_eval",
        ),
        lambda args: args.eval_strategy != "no",
        "trl evaluates nothing here",
    ),
)  # fmt: skip


def check_ranges(args: TrainingArguments) -> None:
    """Refuse a number that is NaN, infinite or out of its range, before anything computes with it."""
    for f in fields(args):
        value = getattr(args, f.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise SteerError(
                    f"{f.name}={value!r} is not a finite number; give a finite number, or leave it out"
                )
            if f.name in RANGES and not RANGES[f.name].holds(number):
                hint = f": {HINTS[f.name]}" if f.name in HINTS else ""
                raise SteerError(f"{f.name}={value!r} is out of range; give a value {RANGES[f.name]}{hint}")
    for name in ("num_generations", "max_completion_length"):
        if getattr(args, name, 1) is None:
            raise SteerError(f"{name} is null; give a number {RANGES[name]}")
    if args.max_steps == 0:
        raise SteerError("max_steps=0 trains for num_train_epochs; give a number from 1, or leave it out")


@contextmanager
def refusals() -> Iterator[None]:
    """Inside, what trl and transformers refuse of the settings is a `SteerError`."""
    try:
        yield
    except SteerError:
        raise
    except (ValueError, ImportError) as error:
        raise SteerError(one_line(error)) from error


def check(args: TrainingArguments, ignored: Mapping[str, str]) -> None:
    """Refuse a setting that no trainer of `steer` reads, and those in `ignored`, which this one does not."""
    _refuse(args, {**IGNORED, **ignored})


def check_loaded(args: TrainingArguments) -> None:
    """Refuse settings that say how to load a model, beside one that is loaded."""
    _refuse(args, LOADING)


def check_recipe(args: TrainingArguments) -> None:
    """Refuse a setting that a recipe does not read."""
    _refuse(args, {**IGNORED_BY_RECIPES, **IGNORED_BY_ANSWER_RECIPES})


def idle(args: TrainingArguments) -> dict[str, str]:
    """By name, the settings that were changed and play no part, with the reason."""
    return {
        name: switch.why
        for name in changed(args)
        for switch in SWITCHES
        if name.startswith(switch.names) and not name.startswith(switch.but) and not switch.on(args)
    }


def changed(args: TrainingArguments) -> list[str]:
    """The names of the settings that are not at the default of their dataclass."""

    def default(f: Any) -> Any:
        return f.default if f.default_factory is MISSING else f.default_factory()

    return [f.name for f in fields(args) if getattr(args, f.name) != default(f)]


def unpublished(args: Kind) -> Kind:
    """A copy for a run that only tries something: it reports, uploads and keeps tables of nothing."""
    tried: Any = copy.copy(args)
    tried.report_to, tried.log_completions, tried.push_to_hub = [], False, False
    return tried


def _refuse(args: TrainingArguments, reasons: Mapping[str, str]) -> None:
    different = set(changed(args))
    for name, why in reasons.items():
        if name in different:
            raise SteerError(f"{name}={shown(getattr(args, name))} has no effect: {why}")

"""
What steer uses of torch, transformers, trl and peft beyond their documented interfaces: private names,
methods that its trainers override, and names that it replaces. Each has one place here and an entry in
`APIS`, with the parameters that steer relies on and the version they were checked with; tests/test_compat.py
names the entry that another version changed. vLLM's are in `steer.engine.compat`.

Nothing of these libraries is imported before a function here is called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from torch import nn

MORE = "..."  # other parameters may follow: steer passes them on


@dataclass(frozen=True)
class Api:
    """
    One name of another library.

    Args:
        name: where it is, from its module on.
        checked: the version of the library that steer was checked with.
        use: what steer does with it.
        parameters: those of a function, in order, `MORE` at the end where others may follow; None for a class
            or a value.
    """

    name: str
    checked: str
    use: str
    parameters: tuple[str, ...] | None = None


def changed(api: Api) -> str | None:
    """How `api` differs from what steer relies on, in one sentence; None where it does not."""
    about = f"{api.name} (checked with {api.checked}; steer {api.use})"
    module, _, rest = api.name.rpartition(".")
    parts = [rest]
    while True:
        try:
            value: Any = import_module(module)
            break
        except ModuleNotFoundError as error:
            module, _, part = module.rpartition(".")
            if not module:
                return f"{about}: {error}"
            parts.insert(0, part)
    for part in parts:
        if not hasattr(value, part):
            return f"{about}: {value.__name__} has no {part}"
        value = getattr(value, part)
    if api.parameters is None:
        return None
    expected, have = list(api.parameters), list(inspect.signature(value).parameters)
    if expected[-1:] == [MORE]:
        expected.pop()
        have = have[: len(expected)]
    return None if have == expected else f"{about}: its parameters are {have}, expected {expected}"


_TRAINER, _GRPO = "transformers.Trainer", "trl.GRPOTrainer"
_VLLM = "trl.generation.vllm_generation.VLLMGeneration"
_TRANSFORMERS, _TRL, _TORCH = "transformers 5.19.0", "trl 1.16.0", "torch 2.13.0"
_SELF = ("self",)

APIS: tuple[Api, ...] = (
    # ---- values and functions that are used or replaced in the functions below
    Api("torch.cpu._is_avx512_bf16_supported", _TORCH, "chooses the precision on a CPU by it", ()),
    Api("torch.cpu._is_amx_tile_supported", _TORCH, "chooses the precision on a CPU by it", ()),
    Api("torch._C._current_graph_task_id", _TORCH, "tells by it that a backward pass runs"),
    Api(
        "torch.nn.Module._replicate_for_data_parallel",
        _TORCH,
        "tells by what it sets that a copy runs",
        _SELF,
    ),
    Api("torch._dynamo.convert_frame.input_codes", _TORCH, "tells by it that something was compiled"),
    Api("transformers.trainer._is_peft_model", _TRANSFORMERS, "answers for it under DeepSpeed", ("model",)),
    Api("transformers.trainer.save_fsdp_model", _TRANSFORMERS, "leaves it out", ("fsdp_plugin", MORE)),
    Api(
        "transformers.integrations.peft.PeftAdapterMixin._hf_peft_config_loaded",
        _TRANSFORMERS,
        "sets it on a quantised model with vectors",
    ),
    Api(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        _TRANSFORMERS,
        "replaces it by name on a CPU",
        ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", MORE),
    ),
    Api("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", _TRANSFORMERS, "reads what is replaced"),
    Api("transformers.PreTrainedConfig._attn_implementation", _TRANSFORMERS, "puts it back after a change"),
    Api("trl.trainer.utils._ChunkedLogProbFunction", _TRL, "replaces it on a CPU"),
    Api(
        "trl.kernels.chunked_logprob.ChunkedLogProbFunction.forward",
        _TRL,
        "computes the same for a frozen head",
        (
            *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
            *("final_logit_softcapping", "logit_scale", "outputs"),
        ),
    ),
    Api("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", _TRL, "sets it on a CPU"),
    Api("trl.kernels.chunked_logprob._addmm_fp32", _TRL, "replaces it on a CPU", ("acc", "a", "b")),
    Api(
        "trl.trainer.utils.add_fused_lm_head",
        _TRL,
        "calls it",
        ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    ),
    Api("trl.trainer.utils.nanstd", _TRL, "calls it", ("tensor", "dim", "keepdim")),
    Api(
        "trl.models.unwrap_model_for_generation",
        _TRL,
        "calls it",
        ("model", "accelerator", "gather_deepspeed3_params", MORE),
    ),
    Api("trl.trainer.grpo_trainer.VLLMGeneration", _TRL, "replaces it by its own subclass"),
    Api("trl.generation.vllm_generation.empty_cache", _TRL, "calls it before the engine wakes up", ()),
    # ---- methods that `steer.training`'s trainers override
    Api(f"{_GRPO}._compute_loss", _TRL, "overrides it", (*_SELF, "model", "inputs")),
    Api(f"{_GRPO}._tokenize_prompts", _TRL, "overrides it", (*_SELF, "prompts")),
    Api(
        f"{_GRPO}._generate_single_turn",
        _TRL,
        "overrides it",
        (*_SELF, "prompt_ids", "images", "multimodal_fields", MORE),
    ),
    Api(f"{_GRPO}._generate", _TRL, "overrides it", (*_SELF, "prompts")),
    Api(
        f"{_GRPO}._tool_call_loop",
        _TRL,
        "calls it",
        (
            *(*_SELF, "prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images"),
            "multimodal_fields",
        ),
    ),
    Api(
        "trl.chat_template_utils.parse_response",
        _TRL,
        "calls it",
        ("tokenizer", "ids", "prefix", "tools"),
    ),
    Api(f"{_GRPO}._generate_and_score_completions", _TRL, "overrides it", (*_SELF, "inputs")),
    Api(
        f"{_GRPO}._calculate_rewards",
        _TRL,
        "overrides it",
        (*_SELF, "inputs", "prompts", "completions", "completion_ids_list"),
    ),
    Api(f"{_GRPO}._prepare_inputs", _TRL, "overrides it", (*_SELF, "generation_batch")),
    Api(
        f"{_GRPO}._get_per_token_logps_and_entropies",
        _TRL,
        "overrides it",
        (
            *_SELF,
            *("model", "input_ids", "attention_mask", "logits_to_keep"),
            *("batch_size", "compute_entropy", "compute_aux_loss", MORE),
        ),
    ),
    Api(f"{_GRPO}._get_train_sampler", _TRL, "overrides it", (*_SELF, "dataset")),
    Api(f"{_GRPO}._save_checkpoint", _TRL, "overrides it", (*_SELF, "model", "trial")),
    Api(f"{_GRPO}._load_optimizer_and_scheduler", _TRL, "overrides it", (*_SELF, "checkpoint")),
    Api(f"{_GRPO}._tag_names", _TRL, "overrides it"),
    Api("trl.DPOTrainer._prepare_dataset", _TRL, "overrides it", (*_SELF, "dataset", MORE)),
    Api(f"{_TRAINER}._init_training_state", _TRANSFORMERS, "overrides it", (*_SELF, "max_steps", MORE)),
    Api("transformers.TrainerState.compute_steps", _TRANSFORMERS, "calls it", (*_SELF, "args", "max_steps")),
    Api(f"{_TRAINER}._run_epoch", _TRANSFORMERS, "overrides it", (*_SELF, MORE)),
    Api(f"{_TRAINER}._save_rng_state", _TRANSFORMERS, "overrides it", (*_SELF, "output_dir")),
    Api(f"{_TRAINER}._save_optimizer_and_scheduler", _TRANSFORMERS, "overrides it", (*_SELF, "output_dir")),
    Api(f"{_TRAINER}._push_from_checkpoint", _TRANSFORMERS, "overrides it", (*_SELF, "checkpoint_folder")),
    Api(f"{_TRAINER}._prepare_for_training", _TRANSFORMERS, "overrides it", (*_SELF, MORE)),
    Api(
        f"{_TRAINER}._load_from_checkpoint",
        _TRANSFORMERS,
        "overrides it",
        (*_SELF, "resume_from_checkpoint", "model"),
    ),
    Api(f"{_TRAINER}._load_best_model", _TRANSFORMERS, "overrides it", _SELF),
    Api(f"{_TRAINER}._get_output_dir", _TRANSFORMERS, "calls it", (*_SELF, "trial")),
    # ---- methods that `steer.engine.rollout` overrides
    Api(f"{_VLLM}._init_vllm", _TRL, "overrides it", _SELF),
    Api(f"{_VLLM}.sync_weights", _TRL, "overrides it", _SELF),
    Api(f"{_VLLM}.generate", _TRL, "overrides it", (*_SELF, MORE)),
)

# Attributes of a `trl.GRPOTrainer` that trl 1.16.0 sets when it is made, and steer's trainers read or set.
TRAINER_ATTRIBUTES = (
    *("_buffered_inputs", "_dist", "_entropy_bonus_enabled", "_logs", "_metrics", "_step", "_tokenizer"),
    *("_last_world_entropy", "_pending_extra_logs", "_pending_metrics", "entropy_coef"),
    "use_adaptive_entropy",
    *("aux_loss_enabled", "beta", "eos_token_ids", "generation_config", "generation_kwargs", "loss_type"),
    *("model_accepts_loss_kwargs", "multi_objective_aggregation", "ref_model", "repetition_penalty"),
    *("reward_weights", "top_entropy_quantile", "use_transformers_continuous_batching", "use_vllm"),
    *("vllm_importance_sampling_correction",),
)
# Those that it sets for each batch, where the model has tools; tests/training/test_tool_calls.py reads them.
BATCH_ATTRIBUTES = ("_async_tool_dicts", "_sync_tool_dicts")
# Those that trl sets where an engine samples: of a `VLLMGeneration` that sleeps, and of a `GRPOTrainer`.
ENGINE_ATTRIBUTES = ("_llm_weights_sleeping", "_last_loaded_step")
# Those of a `torch.nn.Module`, torch 2.13.0.
MODULE_ATTRIBUTES = ("_forward_hooks", "_forward_pre_hooks")


# What transformers calls the cache that a forward takes and returns: since 5.24 `cache`, before that
# `past_key_values`, and in a model of state spaces alone `cache_params`.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@cache
def _parameters(forward: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def is_hooked(module: nn.Module) -> bool:
    """Whether a forward hook is on the module itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of this module's class names the argument `name`; `**kwargs` does not count."""
    return name in _parameters(type(module).forward)


def cache_name(module: nn.Module) -> str | None:
    """The name under which the forward of `module` takes a cache; None where it takes none."""
    return next((name for name in CACHE_NAMES if takes(module, name)), None)


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments of a forward of `module` that reads and extends `cache`."""
    return {cache_name(module) or "past_key_values": cache, "use_cache": True}


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments or in the output of a forward; None where there is none."""
    return next((given[name] for name in CACHE_NAMES if name in given and given[name] is not None), None)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Inside, the model's attention is transformers' own code, which also returns the attention maps."""
    parts = {name: getattr(model.config, name, None) for name in ("", *model.config.sub_configs) if name}
    before = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    before[""] = model.config._attn_implementation
    if before[""] == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def in_backward() -> bool:
    """Whether this thread runs a backward pass, where checkpointed layers compute their output again."""
    import torch

    return torch._C._current_graph_task_id() != -1


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made this copy of a module, to run it in a thread of its own."""
    return getattr(module, "_is_replica", False)


def forget_compiled() -> None:
    """
    Let compiled models be compiled again at their next pass: a graph does not notice that hooks are added or
    removed. An engine in this process is compiled again, too.
    """
    import torch

    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.input_codes.seen:
        torch.compiler.reset()


def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16 matrices."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def recomputes_activations(model: Any) -> bool:
    """Whether gradient checkpointing is on. transformers from 5.20 on warns of the name it had before."""
    name = "is_activation_checkpointing"
    return bool(getattr(model, name) if hasattr(model, name) else model.is_gradient_checkpointing)


@contextmanager
def trainable_when_quantised(model: nn.Module) -> Iterator[None]:
    """
    Inside, transformers' trainer takes a quantised model: it asks for an adapter that it knows of. What is
    trained has the precision that it had when trl, which rounds it to bfloat16, has made its trainer.
    """
    quantised = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if not quantised:
        yield
        return
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    with patch.object(model, "_hf_peft_config_loaded", True):
        yield
    for parameter, values in trained:
        parameter.data = values.to(parameter.device)


def base_left_out() -> AbstractContextManager:
    """
    Inside, transformers' checkpoints under DeepSpeed (as for PEFT models) and FSDP do without the frozen
    base; they would hold all of it each time.
    """
    import transformers.trainer

    return patch.multiple(
        transformers.trainer,
        _is_peft_model=lambda model: True,
        save_fsdp_model=lambda *args, **kwargs: None,
    )


class HeadFunction(Protocol):
    """What computes log-probabilities from hidden states and an LM head."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple: ...


def fused_head(function: type[HeadFunction]) -> AbstractContextManager:
    """Inside, trl's fused LM head calls `function.apply` in place of `ChunkedLogProbFunction.apply`."""
    from trl.trainer import utils

    return patch.object(utils, "_ChunkedLogProbFunction", function)


def set_head_tiles(tokens: int) -> None:
    """Let trl's fused LM head work on so many tokens at a time."""
    from trl.kernels import chunked_logprob

    chunked_logprob.TOKEN_CHUNK_SIZE = tokens


def set_head_products() -> None:
    """
    Let trl's fused LM head multiply bfloat16 numbers as such on a CPU, with sums in float32.

    trl converts both to float32 first and multiplies those, which takes three times as long where the CPU
    multiplies bfloat16. The products are exact either way; the order of the sums differs.
    """
    from trl.kernels import chunked_logprob

    chunked_logprob._addmm_fp32 = _add_products


def _add_products(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """acc += a @ b, for a float32 `acc`."""
    import torch

    matmul = cast(Any, torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    if acc.device.type == "cpu" and a.dtype == b.dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        acc.addmm_(a.float(), b.float())
    finally:
        matmul.fp32_precision = before


def vllm_backend(made: Callable[..., Any]) -> AbstractContextManager:
    """Inside, a trl trainer with `use_vllm` calls `made` where it would make a `VLLMGeneration`."""
    from trl.trainer import grpo_trainer

    return patch.object(grpo_trainer, "VLLMGeneration", made)


def vllm_engine(made: Callable[..., Any]) -> AbstractContextManager:
    """Inside, trl's `VLLMGeneration` calls `made(LLM, **settings)` where it would call vLLM's `LLM`."""
    from functools import partial

    from trl.generation import vllm_generation

    return patch.object(vllm_generation, "LLM", partial(made, vllm_generation.LLM))

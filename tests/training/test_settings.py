"""Every setting of trl is honoured, named as without effect, or refused; none is ignored without a word."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from steer.compat import recomputes_activations
from steer.errors import SteerError
from steer.training import settings
from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.config import SteeringGRPOConfig

# Honoured by transformers, trl or steer, or about logs, checkpoints and the hub. A name that is new in trl
# belongs here only when it was seen to have its effect; else to the tables of `steer.training.settings`.
HONOURED = """
    accelerator_config adam_beta1 adam_beta2 adam_epsilon advantage auto_find_batch_size
    average_tokens_across_devices beta bf16 cache_implementation cast_lm_head_to_fp32
    chat_template_kwargs dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_dropout
    disable_tqdm do_train ds3_gather_for_generation dynamic_sampling_rounds
    enable_jit_checkpoint entropy_coef
    fast_sampler fp16 fsdp fsdp_config full_determinism generation_batch_size
    generation_kwargs gradient_accumulation_steps gradient_checkpointing hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
    include_num_input_tokens_seen learning_rate local_rank log_completions
    log_completions_hub_repo log_level log_level_replica log_multimodal log_on_each_node
    log_unique_prompts logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    loss_type lr_by_layer lr_scheduler_kwargs lr_scheduler_type mask_truncated_completions
    max_completion_length max_grad_norm max_steps max_tool_calling_iterations min_p
    multi_objective_aggregation neftune_noise_alpha
    num_completions_to_print num_generations num_iterations num_train_epochs
    optim optim_args output_dir pad_to_multiple_of parallelism_config pass_rate_floor
    per_device_train_batch_size
    project push_to_hub recompute_mlps repetition_penalty report_to restore_callback_states_from_checkpoint
    reward_weights router_aux_loss_coef run_name save_on_each_node save_steps save_strategy
    save_total_limit scale_rewards seed share_prompts shuffle_dataset skip_memory_metrics
    skip_zero_advantage steps_per_generation sync_ref_model temperature tf32 top_entropy_quantile top_k
    top_p trust_remote_code torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id update_memory use_adaptive_entropy
    use_cache use_cpu use_transformers_continuous_batching use_transformers_paged
    use_vllm warmup_steps weight_decay
    """
# Names that later versions of transformers have for gradient_checkpointing and its arguments.
LATER = {"activation_checkpointing", "activation_checkpointing_kwargs"}


def make(**changes: Any) -> SteeringGRPOConfig:
    return SteeringGRPOConfig(**{"output_dir": "unused", "use_cpu": True, "report_to": "none", **changes})


# What the trainers of given answers read beside these.
GIVEN = "activation_offloading data_seed max_length remove_unused_columns train_sampling_strategy"
KINDS: dict[Any, str] = {
    SteeringGRPOConfig: "",
    SteeringSFTConfig: f"{GIVEN} pad_token",
    SteeringDPOConfig: f"{GIVEN} f_divergence_type ld_alpha loss_weights use_weighting",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_somewhere(kind: Any) -> None:
    named = {*settings.IGNORED, *kind.ignored, *settings.IGNORED_BY_RECIPES}
    named |= set(settings.IGNORED_BY_ANSWER_RECIPES)
    prefixes = tuple(name for switch in settings.SWITCHES for name in switch.names)
    known = {f.name for f in fields(kind)}
    rest = {name for name in known - named if not name.startswith(prefixes)} - LATER
    honoured = {*HONOURED.split(), *KINDS[kind].split()}
    assert rest <= honoured
    if kind is SteeringGRPOConfig:
        assert rest == honoured
    assert set(kind.ignored) | set(KINDS[kind].split()) <= known


def test_every_name_is_a_setting() -> None:
    known = {f.name for kind in KINDS for f in fields(kind)}
    assert {*settings.IGNORED, *settings.IGNORED_BY_RECIPES, *settings.IGNORED_BY_ANSWER_RECIPES} <= known
    assert set(settings.RANGES) <= known


def test_the_defaults_are_in_range_and_nothing_is_idle() -> None:
    assert settings.idle(make()) == {}
    settings.check_recipe(make())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 0.0}, "temperature=0.0.*above 0: at 0 all samples"),
        ({"temperature": math.nan}, "temperature=nan is not a finite"),
        ({"learning_rate": math.inf}, "learning_rate=inf is not a finite"),
        ({"num_generations": 0}, "num_generations=0.*from 2"),
        ({"save_steps": math.inf}, "save_steps"),
        ({"top_p": 1.5}, "top_p=1.5.*above 0 to 1"),
        ({"max_completion_length": 0}, "max_completion_length=0.*from 1"),
        ({"num_generations": None}, "num_generations is null; give a number from 2"),
        ({"max_completion_length": None}, "max_completion_length is null; give a number from 1"),
        ({"max_steps": 0}, "max_steps=0 trains for num_train_epochs"),
        ({"reward_weights": [1.0, math.nan]}, "reward_weights"),
        ({"data_seed": 3}, "data_seed=3 has no effect: the order"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"hub_always_push": True}, "hub_always_push=True has no effect"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy=checkpoint is not supported.*set every_save"),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy=all_checkpoints is not supported"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"chat_template_kwargs": "[1]"}, "not a mapping"),
        ({"loss_type": "cispo"}, "epsilon_high=None: it bounds the weight itself; give one from 1"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high=0.28: it bounds the weight itself"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SteerError, match=named) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 16},
        {"do_eval": True},
        {"resume_from_checkpoint": "runs/demo/checkpoint-10"},
        {"save_only_model": True},
        {"model_init_kwargs": {"dtype": "float32"}},
    ],
)
def test_what_a_recipe_does_not_read_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SteerError, match="a recipe"):
        settings.check_recipe(make(**changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vllm_gpu_memory_utilization": 0.5}, "use_vllm is false"),
        ({"sapo_temperature_neg": 2.0}, "loss_type is not sapo"),
        ({"ref_model_mixup_alpha": 0.5}, "sync_ref_model is false"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "gradient_checkpointing is false"),
        ({"sample_rows": 4, "fast_sampler": False}, "fast_sampler is false"),
        ({"sample_rows": 4, "use_vllm": True}, "vLLM samples"),
        ({"per_device_eval_batch_size": 16}, "trl evaluates nothing here"),
        ({"epsilon_high": 0.28}, settings._ONE_UPDATE),
        ({"delta": 2.0}, settings._ONE_UPDATE),
        (
            {"epsilon_high": 0.28, "steps_per_generation": 1, "gradient_accumulation_steps": 2},
            settings._ONE_UPDATE,
        ),
        ({"epsilon_high": 5.0, "loss_type": "cispo"}, settings._ONE_UPDATE),
        ({"sapo_temperature_neg": 2.0, "loss_type": "sapo"}, settings._ONE_UPDATE),
        ({"vespo_k_pos": 1.0, "loss_type": "vespo"}, settings._ONE_UPDATE),
        ({"importance_sampling_level": "sequence"}, settings._ONE_UPDATE),
        ({"importance_sampling_level": "sequence", "use_vllm": True}, settings._ONE_UPDATE),
        ({"off_policy_mask_threshold": 0.5}, settings._ONE_UPDATE),
        (
            {"epsilon": 0.1, "loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
            "cispo reads epsilon_high alone",
        ),
        (
            {"delta": 2.0, "loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
            "cispo, sapo and vespo do not read it",
        ),
        ({"epsilon": 0.1, "loss_type": "sapo", "num_iterations": 2}, "sapo and vespo clip no ratio"),
        (
            {"importance_sampling_level": "sequence", "loss_type": "vespo"},
            "vespo weighs whole samples itself",
        ),
        ({"use_bias_correction_kl": False}, "beta is 0"),
    ],
)
def test_what_plays_no_part_is_named(changes: dict[str, Any], why: str) -> None:
    (name, *_) = changes
    assert settings.idle(make(**changes)) == {name: why}


@pytest.mark.parametrize(("loss_type", "why"), [("nll", None), ("dft", "loss_type is not nll")])
def test_labels_are_smoothed_in_one_loss_of_sft(loss_type: str, why: str | None) -> None:
    smoothed = SteeringSFTConfig("unused", use_cpu=True, label_smoothing_factor=0.1, loss_type=loss_type)
    assert settings.idle(smoothed).get("label_smoothing_factor") == why


@pytest.mark.parametrize(
    "changes",
    [
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.1},
        {"use_adaptive_entropy": True},
        {"router_aux_loss_coef": 0.1},
    ],
)
def test_rows_of_an_update_that_is_not_divided_play_no_part(changes: dict[str, Any]) -> None:
    told = settings.idle(make(update_rows=4, **changes))
    assert told.keys() == {"update_rows"} and told["update_rows"].startswith("a batch is not divided where")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0, "num_iterations": 2},
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "num_iterations": 2},
        {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
        {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
        {"importance_sampling_level": "sequence", "num_iterations": 2},
        {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence", "beta": 0.1},
        {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0, "num_iterations": 2},
        {"epsilon_high": 0.3, "steps_per_generation": 2},
        {"delta": 0.5},
        {"importance_sampling_level": "sequence", "loss_type": "vespo", "beta": 0.1},
        {"use_bias_correction_kl": False, "beta": 0.1},
        {"update_rows": 4},
    ],
)
def test_what_has_its_switch_is_not_idle(changes: dict[str, Any]) -> None:
    assert settings.idle(make(**changes)) == {}


@pytest.mark.parametrize(
    "changes", [{"repetition_penalty": 1.1}, {"generation_kwargs": {"num_beams": 2}},
                {"cache_implementation": "static"}]
)  # fmt: skip
def test_rows_of_another_sampler_play_no_part(changes: dict[str, Any]) -> None:
    told = settings.idle(make(sample_rows=4, **changes))
    assert told.keys() == {"sample_rows"} and told["sample_rows"].startswith("generate() samples where")


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        sorted(f.name for f in fields(SteeringGRPOConfig) if f.type in ("int", "float", int, float))
    ),
    st.sampled_from([0, -1, math.nan, math.inf, 10**30, 1e-300]),
)
def test_odd_numbers_are_a_config_or_a_named_refusal(name: str, value: float) -> None:
    try:
        make(**{name: value})
    except ValueError as error:  # SteerError, or trl's and transformers' own
        assert str(error)


@pytest.mark.parametrize("asked", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": False}])
def test_no_warning_comes_of_a_default(asked: dict[str, bool], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = SteeringGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **asked)
    assert args.gradient_checkpointing is asked.get("gradient_checkpointing", False)
    later = getattr(args, "activation_checkpointing", args.gradient_checkpointing)  # its name from 5.20 on
    assert later is args.gradient_checkpointing


def test_checkpointing_is_known_of_a_model(build_tiny: Any) -> None:
    model = build_tiny("llama")
    assert not recomputes_activations(model)
    model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recomputes_activations(model)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_generations": 6},
            r"16 samples at once (per_device_train_batch_size=16) are not a multiple of "
            "num_generations=6, the "
            "samples of a prompt; set num_generations=4, or per_device_train_batch_size=18",
        ),
        (
            {"num_generations": 8, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},
            "10 samples at once (per_device_train_batch_size=5 x gradient_accumulation_steps=2) are not a "
            "multiple of num_generations=8, the samples of a prompt; set num_generations=5, or "
            "per_device_train_batch_size=8",
        ),
        (
            {"num_generations": 4, "per_device_train_batch_size": 1, "steps_per_generation": 3},
            "3 samples at once (steps_per_generation=3) are not a multiple of num_generations=4, the "
            "samples of "
            "a prompt; set num_generations=3, or per_device_train_batch_size=4",
        ),
    ],
)
def test_groups_that_do_not_fit_are_told_in_the_users_settings(asked: dict[str, int], message: str) -> None:
    with pytest.raises(SteerError) as error:
        make(**asked)
    assert str(error.value) == message
    less = int(message.partition("num_generations=")[2].partition("set num_generations=")[2].split(",")[0])
    more = int(message.rpartition("=")[2])
    make(**{**asked, "num_generations": less})
    make(**{**asked, "per_device_train_batch_size": more})

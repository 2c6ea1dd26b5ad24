"""Each member of a population becomes what it becomes alone, in a run of `SteeringGRPOTrainer` itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.steering import fill, logits, relative, tokens
from helpers.training import (
    config,
    far,
    ids_of,
    logged,
    make_trainer,
    parity,
    problems,
    same,
    target_share,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteerError, SteeringConfig
from steer.generation import sampler, scoring
from steer.generation.completion import Completion
from steer.generation.verify import fast_paths
from steer.tasks.rewards import RandomReward
from steer.training.config import SteeringGRPOConfig
from steer.training.sweep.member import IDLE, OWN, SHARED, Member, check_supported, read_states
from steer.training.sweep.trainer import PopulationTrainer
from steer.vector_sets import Population

# (steering, settings, reward) of each member of a mixed population
MIXED: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "first": ({"layers": "0"}, {}, parity),
    "last, other seed": ({"layers": "2"}, {"seed": 11, "learning_rate": 0.2}, parity),
    "all": ({"layers": "all"}, {"lr_by_layer": "geometric:0.01:0.1"}, parity),
    "adaptive": ({"kind": "adaptive", "layers": "1"}, {}, parity),
    "shared": ({"kind": "shared", "rank": 2}, {"lr_scheduler_type": "linear"}, parity),
    "attention": ({"site": "attn_out", "layers": "1"}, {"max_grad_norm": 0.01}, target_share),
    "before": (
        {"site": "resid_pre", "layers": "1-2"},
        {"advantage": "group", "scale_rewards": "group"},
        parity,
    ),
    "completion": ({"positions": "completion"}, {"loss_type": "grpo"}, parity),
    "prompt": ({"positions": "prompt", "layers": "1"}, {"loss_type": "dr_grpo"}, parity),
    "random": ({"layers": "0"}, {"loss_type": "bnpo"}, RandomReward()),
    "kl": ({"layers": "1"}, {"beta": 0.1, "warmup_steps": 2}, parity),
    "dynamic": ({"layers": "1"}, {"dynamic_sampling_rounds": 2, "pass_rate_floor": 0.1, "beta": 0.1}, parity),
    "batch": ({"layers": "2"}, {"advantage": "group", "scale_rewards": "batch", "weight_decay": 0.1}, parity),
}
COMMON = {"max_steps": 5, "per_device_train_batch_size": 8}


@pytest.fixture(scope="module")
def solo(
    build_tiny: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """The trainer of a run alone, after it."""

    def run(tokenizer: PreTrainedTokenizerFast, steering: dict, changes: dict, reward: Any) -> Any:
        args = config(tmp_path_factory.mktemp("solo"), **{**COMMON, **changes})
        trainer = make_trainer(
            build_tiny("llama", initializer_range=0.3), tokenizer, args, reward, SteeringConfig(**steering)
        )
        trainer.train()
        return trainer

    return run


def population(
    model: PreTrainedModel, tokenizer: Any, folder: Path, specs: dict[str, Any], data: Dataset | None = None
) -> PopulationTrainer:
    members = [
        Member(name, [reward], config(folder, **{**COMMON, **own}), SteeringConfig(**steering))
        for name, (steering, own, reward) in specs.items()
    ]
    return PopulationTrainer(model, members, data or problems(), tokenizer, folder / "state-0.pt")


def test_every_member_equals_its_run_alone(build_tiny, tiny_tokenizer, tmp_path, solo) -> None:
    together = population(build_tiny("llama", initializer_range=0.3), tiny_tokenizer, tmp_path, MIXED)
    together.train()
    by_name = {member.name: member for member in together.members}
    for name, spec in MIXED.items():
        alone, member = solo(tiny_tokenizer, *spec), by_name[name]
        got, expected = member.vectors.tensors(), alone.vectors.tensors()
        assert max(t.norm() for t in expected.values()) > 0, name
        # float32 sums in another order; Adam divides by the gradient's size, which keeps the difference small
        assert far(got, expected) < 1e-4, name
        for key in ("reward", "loss", "grad_norm", "learning_rate", "entropy", "completions/mean_length"):
            mine = [row[key] for row in member.log]
            assert mine == pytest.approx(logged(alone, key), rel=2e-3, abs=2e-5), (name, key)
        counted = {key for key in member.log[0] if key.startswith(("dynamic_sampling/", "pass_rate/"))}
        assert bool(counted) == (name == "dynamic")
        for key in counted:
            assert [row[key] for row in member.log] == logged(alone, key), (name, key)


@pytest.mark.parametrize(
    ("beta", "corrected", "level"),
    [(0.1, True, "token"), (0.1, False, "sequence"), (1.0, True, "sequence"), (1.0, False, "token")],
)
def test_a_member_with_a_kl_term_equals_its_run_alone(
    build_tiny, tiny_tokenizer, tmp_path, solo, beta: float, corrected: bool, level: str
) -> None:
    """Ten updates at a rate that takes the policy far from the base, so that the term has weight."""
    changes = {
        "beta": beta,
        "use_bias_correction_kl": corrected,
        "importance_sampling_level": level,
        "max_steps": 10,
        "learning_rate": 0.1,
    }
    spec = ({"layers": "all"}, changes, parity)
    together = population(
        build_tiny("llama", initializer_range=0.3),
        tiny_tokenizer,
        tmp_path,
        {"kl": spec, "other": MIXED["last, other seed"]},
    )
    together.train()
    (member,) = [m for m in together.members if m.name == "kl"]
    alone = solo(tiny_tokenizer, *spec)
    kl = logged(alone, "kl")
    assert max(kl) > 0.01
    assert [row["kl"] for row in member.log] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    # float32 sums in another order, over 10 updates of Adam
    assert far(member.vectors.tensors(), alone.vectors.tensors()) < 1e-4


def test_a_common_beginning_is_read_once_for_each_member(
    build_tiny, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"what is {n}+{n % 7}?" for n in range(8)]
    data = Dataset.from_dict({"prompt": prompts, "number": list(range(8))})
    specs = {name: MIXED[name] for name in ("first", "all", "adaptive", "prompt", "completion")}
    found = []
    for worth in (1, 1 << 30):
        monkeypatch.setattr(scoring, "WORTH_A_PASS", worth)
        model = build_tiny("llama", initializer_range=0.3)
        together = population(model, tiny_tokenizer, tmp_path, specs, data)
        together.train()
        found.append({member.name: member.vectors.tensors() for member in together.members})
    for name in specs:
        assert far(found[0][name], found[1][name]) < 1e-4, name


def test_members_with_positions_train_the_same_on_plain_paths(
    build_tiny, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("first", "completion", "prompt")
    specs = {n: (MIXED[n][0], {**MIXED[n][1], "max_steps": 2}, MIXED[n][2]) for n in names}
    found = []
    for plain in (False, True):
        model = build_tiny("llama", initializer_range=0.3)
        together = population(model, tiny_tokenizer, tmp_path, specs)
        if plain:
            slow = replace(together._paths, **dict.fromkeys(("sampler", "scorer", "common"), "not tried"))
            together._paths = slow
            monkeypatch.setattr(sampler, "fast_paths", lambda model, slow=slow: slow)
        together.train()
        found.append({member.name: member.vectors.tensors() for member in together.members})
    for name in names:
        assert max(t.norm() for t in found[0][name].values()) > 0
        assert far(found[1][name], found[0][name]) < 1e-3, name  # Adam divides by the gradient's size


# ---- sets of vectors in one model


def test_each_row_has_a_prompt_of_its_own_length(tiny_llama: PreTrainedModel) -> None:
    ids, lengths = tokens(batch=5), torch.tensor([4, 3, 7, 5, 9])
    base = logits(tiny_llama, ids)
    population = Population(tiny_llama)
    for seed, positions in enumerate(("completion", "last_prompt")):
        fill(population.add(positions, SteeringConfig(positions=positions)), seed=seed)
    names = list(population.sets)
    owner = torch.tensor([-1, 0, 0, 0, 1])
    with population.prompt_length(lengths), population.rows(owner):
        together = logits(tiny_llama, ids)
    assert relative(together[:1], base[:1]) < 1e-5
    for row in range(1, 5):
        part = slice(row, row + 1)
        with population.prompt_length(lengths[part]), population.only(names[owner[row]]):
            alone = logits(tiny_llama, ids[part])
        # batches of another size sum in another order
        assert relative(together[part], alone) < 1e-5
        assert relative(alone, base[part]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("plain", [False, True])
def test_an_evaluation_knows_where_the_prompts_of_a_set_end(
    build_tiny, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """Prompts of so long a common beginning that it is read once, for vectors that do not ask."""
    prompts = [[*tokens(1, 60)[0].tolist(), token] for token in range(5, 12)]
    sampling = sampler.Sampling(6, (), temperature=0.0)
    expected = {}
    for positions in ("all", "completion"):
        model = build_tiny("llama", initializer_range=0.3)
        fill(steer.attach(model, SteeringConfig(positions=positions)))
        expected[positions] = ids_of(sampler.rollout(model, prompts, sampling))
    assert expected["all"] != expected["completion"]
    model = build_tiny("llama", initializer_range=0.3)
    paths = fast_paths(model)
    if plain:
        paths = replace(paths, sampler="not tried")
    monkeypatch.setattr(sampler, "fast_paths", lambda model: paths)
    population = Population(model)
    for positions in expected:
        fill(population.add(positions, SteeringConfig(positions=positions)))
    for positions, drawn in expected.items():
        with population.only(positions):
            assert ids_of(sampler.rollout(model, prompts, sampling, share_beginning=True)) == drawn
    population.remove_all()
    assert not [name for name in model.__dict__ if name.startswith("steering")]


def test_rows_are_steered_by_their_own_set(tiny_model: PreTrainedModel) -> None:
    population = Population(tiny_model)
    configs = [
        SteeringConfig(layers="0"),
        SteeringConfig(layers="1-2", site="attn_out"),
        SteeringConfig(layers="all", scale=0.5),
    ]
    for i, where in enumerate(configs):
        fill(population.add(str(i), where), seed=i)
    ids = tokens(batch=5)
    base = logits(tiny_model, ids)
    with population.rows(torch.tensor([-1, 0, 1, 1, 2])):
        together = logits(tiny_model, ids)
    assert torch.equal(logits(tiny_model, ids), base), "outside of `rows` the model is the base model"
    alone = [base[:1]]
    for name, rows in (("0", [1]), ("1", [2, 3]), ("2", [4])):
        with population.only(name):
            alone.append(logits(tiny_model, ids[rows]))
    # batches of another size sum in another order; experts of a mixture, too
    assert relative(together, torch.cat(alone)) < 1e-5
    assert all(relative(part, base[: len(part)]) > 1e-3 for part in alone[1:])
    population.remove_all()
    assert torch.equal(logits(tiny_model, ids), base)
    assert any(p.requires_grad for p in tiny_model.parameters())


def test_a_row_reaches_no_other_set_and_no_layer_below(tiny_llama: PreTrainedModel) -> None:
    population = Population(tiny_llama)
    one = population.add("one", SteeringConfig(layers="1"))
    two = population.add("two", SteeringConfig(layers="2"))
    graph = []
    for layer in tiny_llama.model.layers:
        layer.register_forward_hook(lambda m, a, output: graph.append(output.requires_grad))
    with population.rows(torch.tensor([0, 1])):
        out = tiny_llama(tokens(batch=2)).logits
    assert graph == [False, True, True]
    out[0].pow(2).sum().backward()
    assert one.parameters()[0].grad.norm() > 0
    assert two.parameters()[0].grad is None or two.parameters()[0].grad.norm() == 0
    graph.clear()
    with population.rows(torch.tensor([1, 1])):
        tiny_llama(tokens(batch=2))
    assert graph == [False, False, True]


def test_what_a_population_refuses(tiny_llama: PreTrainedModel) -> None:
    population = Population(tiny_llama)
    population.add("one", SteeringConfig(layers="1"))
    with pytest.raises(SteerError, match="name of its own"):
        population.add("one", SteeringConfig())
    with pytest.raises(SteerError, match="layers 0 to 2"):
        population.add("two", SteeringConfig(layers="3"))
    with pytest.raises(SteerError, match="in the order of the sets"), population.rows(torch.tensor([0, -1])):
        pass
    population.remove_all()
    steer.attach(tiny_llama)
    with pytest.raises(SteerError, match="detach"):
        Population(tiny_llama)


def test_what_rewards_measure_is_of_the_first_round(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    calls: list[int] = []

    def reward(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        calls.append(len(completions))
        log_metric("call", float(len(calls)))
        return [0.0] * len(completions)

    specs = {"one": ({"layers": "1"}, {"dynamic_sampling_rounds": 3, "max_steps": 1}, reward)}
    together = population(build_tiny("llama"), tiny_tokenizer, tmp_path, specs)
    together.train()
    assert len(calls) == 4 and [row["call"] for row in together.members[0].log] == [1.0]


# ---- members stop, and go on


def test_a_state_goes_on_to_the_same_bits(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    names = ("last, other seed", "all", "adaptive", "random")
    specs = {name: MIXED[name] for name in names}

    def make(folder: Path) -> PopulationTrainer:
        folder.mkdir(exist_ok=True)
        model = build_tiny("llama", initializer_range=0.3)
        return population(model, tiny_tokenizer, folder, specs)

    whole = make(tmp_path / "whole")
    whole.train()
    make(tmp_path / "cut").train(until=3)
    again = make(tmp_path / "cut")
    again.load(read_states(tmp_path / "cut"))
    assert {member.step for member in again.members} == {3}
    again.train()
    for one, other in zip(whole.members, again.members, strict=True):
        assert same(one.vectors.tensors(), other.vectors.tensors()), one.name
        for key in ("reward", "loss", "grad_norm", "entropy"):
            assert [row[key] for row in one.log] == [row[key] for row in other.log], (one.name, key)


def test_a_member_that_diverges_stops_alone(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    specs = {"calm": MIXED["first"], "wild": ({"layers": "1"}, {"learning_rate": 1e38}, parity)}
    together = population(build_tiny("llama", initializer_range=0.3), tiny_tokenizer, tmp_path, specs)
    together.train()
    calm, wild = together.members
    assert wild.stopped and "diverged" in wild.stopped and wild.step < wild.steps
    assert calm.stopped is None and calm.step == calm.steps
    assert all(torch.isfinite(t).all() for t in wild.vectors.tensors().values())
    alone = population(
        build_tiny("llama", initializer_range=0.3), tiny_tokenizer, tmp_path, {"calm": MIXED["first"]}
    )
    alone.train()
    assert far(calm.vectors.tensors(), alone.members[0].vectors.tensors()) < 1e-4


# What a population does not implement. A field of trl or transformers that is new is in none of the sets.
REFUSED = frozenset(
    {
        "accelerator_config", "auto_find_batch_size", "average_tokens_across_devices",
        "batch_eval_metrics", "bf16", "bf16_full_eval", "cache_implementation",
        "cast_lm_head_to_fp32", "data_seed", "dataloader_drop_last",
        "dataloader_in_order", "dataloader_multiprocessing_context",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_backend",
        "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
        "ddp_static_graph", "debug", "deepspeed", "do_eval", "do_predict", "do_train",
        "ds3_gather_for_generation", "enable_jit_checkpoint", "entropy_coef", "entropy_coef_delta",
        "entropy_coef_max", "entropy_coef_min", "entropy_target", "eval_accumulation_steps",
        "eval_delay", "eval_do_concat_batches", "eval_on_start", "eval_steps", "eval_strategy",
        "eval_use_gather_object", "fast_sampler", "fp16", "fp16_full_eval", "fsdp", "fsdp_config",
        "full_determinism", "generation_kwargs", "gradient_checkpointing",
        "gradient_checkpointing_kwargs", "greater_is_better", "hub_always_push", "hub_model_id",
        "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "ignore_data_skip",
        "include_for_metrics", "include_num_input_tokens_seen", "label_names",
        "label_smoothing_factor", "length_column_name", "liger_kernel_config",
        "load_best_model_at_end", "local_rank", "log_completions", "log_completions_hub_repo",
        "log_level_replica", "log_multimodal", "log_unique_prompts", "logging_nan_inf_filter",
        "max_tool_calling_iterations", "metric_for_best_model", "model_init_kwargs",
        "multi_objective_aggregation", "neftune_noise_alpha", "num_completions_to_print",
        "num_generations_eval", "num_iterations", "off_policy_mask_threshold",
        "optim_target_modules", "pad_to_multiple_of", "parallelism_config", "prediction_loss_only",
        "project", "push_to_hub", "recompute_mlps", "ref_model_mixup_alpha", "ref_model_sync_steps",
        "remove_unused_columns", "repetition_penalty", "report_to",
        "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "sapo_temperature_neg",
        "sapo_temperature_pos", "save_on_each_node", "save_only_model", "share_prompts",
        "skip_memory_metrics", "sync_ref_model", "tf32", "top_entropy_quantile", "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps",
        "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
        "train_sampling_strategy", "transformers_continuous_batching_config",
        "update_memory", "update_rows", "use_adaptive_entropy", "use_cache", "use_liger_kernel",
        "use_transformers_continuous_batching", "use_transformers_paged", "vespo_k_neg",
        "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "vllm_enable_sleep_mode",
        "vllm_group_port", "vllm_importance_sampling_cap", "vllm_model_impl",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
        "vllm_structured_outputs_regex",
    }
)  # fmt: skip


def test_every_setting_is_honoured_irrelevant_or_refused(tmp_path: Path) -> None:
    parts = (OWN, SHARED, IDLE, REFUSED)
    names = {f.name for f in fields(SteeringGRPOConfig)}
    assert sum(map(len, parts)) == len(set().union(*parts)), "in two of the sets"
    assert set().union(*parts) == names
    args = config(tmp_path)
    check_supported(args)
    for name in REFUSED:
        kept = getattr(args, name)
        setattr(args, name, "changed")
        with pytest.raises(SteerError, match=name):
            check_supported(args)
        setattr(args, name, kept)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss_type='cispo' is not for a population"),
        ({"steps_per_generation": 4}, "one update"),
        ({"num_iterations": 2}, "num_iterations at 1"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward_weights for 1 reward functions"),
        ({"reward_weights": []}, "0 reward_weights for 1 reward functions"),
    ],
)
def test_settings_that_members_cannot_have_are_refused(
    build_tiny, tiny_tokenizer, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(SteerError, match=named):
        population(build_tiny("llama"), tiny_tokenizer, tmp_path, {"one": ({}, change, parity)})


@pytest.mark.parametrize(
    ("reward", "named"),
    [(torch.nn.Linear(1, 1), "not reward models"), ("some/model", "not reward models")],
    ids=["module", "name"],
)
def test_reward_models_are_refused(build_tiny, tiny_tokenizer, tmp_path, reward: Any, named: str) -> None:
    with pytest.raises(SteerError, match=named):
        population(build_tiny("llama"), tiny_tokenizer, tmp_path, {"one": ({}, {}, reward)})


def test_async_rewards_are_refused(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    async def later(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    with pytest.raises(SteerError, match="'later' is async"):
        population(build_tiny("llama"), tiny_tokenizer, tmp_path, {"one": ({}, {}, later)})


@pytest.mark.parametrize(
    ("architecture", "shape", "given", "cure"),
    [
        ("gpt2", {"resid_pdrop": 0.1}, {}, {"disable_dropout": True}),
        ("llama", {"attention_dropout": 0.1}, {}, None),
        ("mixtral", {}, {"router_aux_loss_coef": None}, {}),
    ],
)
def test_a_model_that_trains_otherwise_alone_is_refused(
    build_tiny, tiny_tokenizer, tmp_path: Path, architecture: str, shape: dict, given: dict, cure: dict | None
) -> None:
    specs = {"one": ({}, given, parity)}
    with pytest.raises(SteerError, match=r"dropout of 0\.1|router_aux_loss_coef=0"):
        population(build_tiny(architecture, **shape), tiny_tokenizer, tmp_path, specs)
    if cure is not None:
        cured = {"one": ({}, {**cure, "max_steps": 1}, parity)}
        population(build_tiny(architecture, **shape), tiny_tokenizer, tmp_path, cured).train()


def test_rewards_are_given_what_trl_gives_them(build_tiny, tiny_tokenizer, tmp_path: Path, solo) -> None:
    def watch(seen: list) -> Any:
        def reward(completion_ids: list, trainer_state: Any, log_extra: Any, **columns: Any) -> list[float]:
            log_extra("length", [len(ids) for ids in completion_ids])
            seen.append((trainer_state.global_step, trainer_state.max_steps, sorted(columns)))
            return [float(len(ids)) for ids in completion_ids]

        return reward

    seen: tuple[list, list] = [], []
    spec = ({}, {"max_steps": 2})
    solo(tiny_tokenizer, *spec, watch(seen[0]))
    specs = {"one": (*spec, watch(seen[1]))}
    population(build_tiny("llama"), tiny_tokenizer, tmp_path, specs).train()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("advantage", ["loo", "group"])
def test_a_member_with_unscored_samples_equals_its_run_alone(
    build_tiny, tiny_tokenizer, tmp_path: Path, solo, advantage: str
) -> None:
    def sparse(completion_ids: list, number: list, **columns: Any) -> list[float | None]:
        # a group of none, one of a single sample, and others
        known = [i > 4 and (i < 6 or i > 7) and sum(ids) % 3 > 0 for i, ids in enumerate(completion_ids)]
        scores = parity(completion_ids, number)
        return [score if k else None for k, score in zip(known, scores, strict=True)]

    shape = {"per_device_train_batch_size": 16, "advantage": advantage}
    spec = ({"layers": "1"}, shape, sparse)
    alone = solo(tiny_tokenizer, *spec)
    model = build_tiny("llama", initializer_range=0.3)
    together = population(model, tiny_tokenizer, tmp_path, {"one": spec})
    together.train()
    got, expected = together.members[0].vectors.tensors(), alone.vectors.tensors()
    assert max(t.norm() for t in expected.values()) > 0
    assert far(got, expected) < 1e-4
    for key in ("reward", "reward_std", "frac_reward_zero_std"):
        assert [row[key] for row in together.members[0].log] == pytest.approx(logged(alone, key)), key


def test_members_must_share_what_is_shared(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    specs = {"one": ({}, {}, parity), "two": ({}, {"max_completion_length": 4}, parity)}
    with pytest.raises(SteerError, match="max_completion_length is 4 and 8"):
        population(build_tiny("llama"), tiny_tokenizer, tmp_path, specs)
    (tmp_path / "state-0.pt").write_bytes(b"no state")
    with pytest.raises(SteerError, match="not a state of a population"):
        read_states(tmp_path)


class _Engine:
    """Samples four tokens a row; the engine tells the log-probability of the first two of them."""

    def sync(self, sets: Any) -> int:
        return 0

    def sample(self, names: list[str], prompts: list[list[int]], seeds: list[int]) -> list[Completion]:
        return [
            Completion([80 + row % 3, 81, 82, 83], False, [-0.5, -0.7, math.nan, math.nan])
            for row in range(len(prompts))
        ]


@pytest.mark.parametrize("trainer_logp", [0.0, math.nan])
def test_an_engine_is_judged_by_the_tokens_that_it_tells(
    build_tiny, tiny_tokenizer, tmp_path, monkeypatch, trainer_logp
) -> None:
    own = {"vllm_mismatch_warn": None, "vllm_mismatch_stop": 0.65}
    together = population(
        build_tiny("llama"), tiny_tokenizer, tmp_path, {"one": ({"layers": "1"}, own, target_share)}
    )
    together.engine = _Engine()
    scored = torch.full((8, 4), trainer_logp)
    monkeypatch.setattr(together, "_score", lambda *args: (scored[: len(args[0])], scored[: len(args[0])]))
    if math.isnan(trainer_logp):
        with pytest.raises(SteerError, match="one, update 1: the engine's log-probabilities are nan "):
            together.update(together.members)
    else:
        together.update(together.members)
        assert together.members[0].log[-1]["engine/mean"] == pytest.approx(0.6)


def test_an_engine_refills_with_seeds_of_their_own(build_tiny, tiny_tokenizer, tmp_path) -> None:
    class Engine(_Engine):
        def sample(self, names: list[str], prompts: list[list[int]], given: list[int]) -> list[Completion]:
            seeds.extend(given)
            return super().sample(names, prompts, given)

    def flat(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    seeds: list[int] = []
    own = {"vllm_mismatch_stop": 100.0, "dynamic_sampling_rounds": 2}
    together = population(build_tiny("llama"), tiny_tokenizer, tmp_path, {"one": ({}, own, flat)})
    together.engine = Engine()
    together.update(together.members)
    assert len(seeds) == len(set(seeds)) == 24
    log = together.members[0].log[-1]
    assert (log["dynamic_sampling/rounds"], log["dynamic_sampling/wasted"]) == (2, 1.0)


def test_a_member_that_diverges_beside_an_engine_ends_alone(
    build_tiny, tiny_tokenizer, tmp_path, monkeypatch
) -> None:
    own = {"vllm_mismatch_stop": 100.0, "vllm_importance_sampling_correction": False}
    specs = {"one": ({"layers": "1"}, own, parity), "two": ({"layers": "1"}, own, parity)}
    together = population(build_tiny("llama"), tiny_tokenizer, tmp_path, specs)
    together.engine = _Engine()
    score, broken = together._score, together._number["two"]

    def diverged(owner: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = score(owner, inputs)
        return logp * torch.where(owner == broken, math.nan, 1.0)[:, None], entropy

    monkeypatch.setattr(together, "_score", diverged)
    together.update(together.members)
    stopped = {member.name: member.stopped for member in together.members}
    assert stopped["one"] is None and stopped["two"].startswith("diverged: the gradient of update 1")

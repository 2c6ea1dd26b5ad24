"""Each member of a population becomes what it becomes alone, in a run of `SteeringGRPOTrainer` itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from steering import fill, logits, relative, tokens
from training import config, far, logged, make_trainer, parity, problems, same, target_share
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteerError, SteeringConfig
from steer.population import Population
from steer.rewards import RandomReward
from steer.train import step
from steer.train.member import Member, read_states
from steer.train.population import PopulationTrainer

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


def test_a_common_beginning_is_read_once_for_each_member(
    build_tiny, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"what is {n}+{n % 7}?" for n in range(8)]
    data = Dataset.from_dict({"prompt": prompts, "number": list(range(8))})
    specs = {name: MIXED[name] for name in ("first", "all", "adaptive", "prompt", "completion")}
    found = []
    for worth in (1, 1 << 30):
        monkeypatch.setattr(step, "WORTH_A_PASS", worth)
        model = build_tiny("llama", initializer_range=0.3)
        together = population(model, tiny_tokenizer, tmp_path, specs, data)
        together.train()
        found.append({member.name: member.vectors.tensors() for member in together.members})
    for name in specs:
        assert far(found[0][name], found[1][name]) < 1e-4, name


# ---- sets of vectors in one model


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


def test_members_must_share_what_is_shared(build_tiny, tiny_tokenizer, tmp_path: Path) -> None:
    specs = {"one": ({}, {}, parity), "two": ({}, {"max_completion_length": 4}, parity)}
    with pytest.raises(SteerError, match="max_completion_length is 4 and 8"):
        population(build_tiny("llama"), tiny_tokenizer, tmp_path, specs)
    for change, named in (({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
                          ({"steps_per_generation": 4}, "one update")):  # fmt: skip
        with pytest.raises(SteerError, match=named):
            population(build_tiny("llama"), tiny_tokenizer, tmp_path, {"one": ({}, change, parity)})
    (tmp_path / "state-0.pt").write_bytes(b"no state")
    with pytest.raises(SteerError, match="no state of a population"):
        read_states(tmp_path)

"""Supervised training and DPO of vectors on a tiny Llama, and the mixin before another trainer of trl."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.steering import fill
from helpers.training import SPREAD, logged, same
from trl import KTOConfig, KTOTrainer

import steer
from steer import (
    SteerError,
    SteeringConfig,
    SteeringDPOConfig,
    SteeringDPOTrainer,
    SteeringSFTConfig,
    SteeringSFTTrainer,
    SteeringTrainerConfig,
    SteeringTrainerMixin,
    artifact,
)
from steer.generation import allocator

# Of unequal length, so that batches are padded.
ROWS = {
    "prompt": ["1+1=", "2+30=", "9", "12-4=", "x+x", "7*8="],
    "completion": ["2", "32", "9.", "8", "2x", "56"],
    "chosen": ["2", "32", "9.", "8", "2x", "56"],
    "rejected": ["17", "3", "10", "16!", "y", "1"],
}
LEARN: dict[str, Any] = {"max_steps": 20, "learning_rate": 0.1}


@dataclass
class SteeringKTOConfig(SteeringTrainerConfig, KTOConfig):
    pass


class SteeringKTOTrainer(SteeringTrainerMixin, KTOTrainer):
    pass


KINDS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "sft": (SteeringSFTTrainer, SteeringSFTConfig, ("prompt", "completion")),
    "dpo": (SteeringDPOTrainer, SteeringDPOConfig, ("prompt", "chosen", "rejected")),
    "kto": (SteeringKTOTrainer, SteeringKTOConfig, ("prompt", "completion", "label")),
}


@pytest.fixture
def run(build_tiny: Callable, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """`run("sft", steering=..., resume=..., **settings)`: the trainer of a tiny Llama, at its end."""

    def start(
        kind: str,
        steering: SteeringConfig | None = None,
        resume: Path | None = None,
        folder: str = "run",
        train: bool = True,
        model: Any = None,
        more: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        trainer, config, columns = KINDS[kind]
        rows = {**ROWS, "label": [True, False] * 3}
        defaults: dict[str, Any] = {
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 7, "max_steps": 2,
            "per_device_train_batch_size": 2, "learning_rate": 0.05, "warmup_steps": 0,
            "save_strategy": "no",
        }  # fmt: skip
        made = trainer(
            model or build_tiny("llama", initializer_range=SPREAD),
            config(str(tmp_path / folder), **{**defaults, **settings}),
            steering,
            **{
                "train_dataset": Dataset.from_dict({name: rows[name] for name in columns}),
                "processing_class": tiny_tokenizer,
                **(more or {}),
            },
        )
        if train:
            made.train(resume_from_checkpoint=str(resume) if resume else None)
        return made

    return start


# ---- every kind


def test_the_best_checkpoint_is_loaded_at_the_end(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse_and_worse(self: SteeringSFTTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": float(self.state.global_step)}

    monkeypatch.setattr(SteeringSFTTrainer, "evaluate", worse_and_worse, raising=False)
    data = Dataset.from_dict({name: ROWS[name] for name in ("prompt", "completion")})
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = run("sft", max_steps=2, load_best_model_at_end=True, more={"eval_dataset": data}, **every)
    folder = Path(trainer.args.output_dir)
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-1")
    kept = trainer.vectors.tensors()
    assert same(kept, artifact.read(folder / "checkpoint-1").tensors)
    assert not same(kept, artifact.read(folder / "checkpoint-2").tensors)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_falls_and_only_vectors_change(run: Any, build_tiny: Any, kind: str) -> None:
    before = {n: p.clone() for n, p in build_tiny("llama", initializer_range=SPREAD).named_parameters()}
    trainer = run(kind, **LEARN)
    losses = logged(trainer, "loss")
    assert len(losses) == 20 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    own = set(trainer.vectors.named_parameters())
    after = {n: p.detach() for n, p in trainer.model.named_parameters() if n not in own}
    assert same(before, after)
    assert all(t.norm() > 0 for t in trainer.vectors.tensors().values())
    assert logged(trainer, "layer/1/norm") or kind == "kto"


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_step_looks_at_the_memory_that_is_kept(
    run: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(allocator, "limit_kept_memory", asked.append)
    run(kind)
    assert asked == [torch.device("cpu")] * 2


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_checkpoint_is_an_artifact_and_a_resumed_run_the_unbroken_one(
    run: Any, build_tiny: Any, tmp_path: Path, kind: str
) -> None:
    # three batches an epoch: the checkpoint is in the second one, and in the middle of its order
    settings = {"max_steps": 7, "save_steps": 4, "save_strategy": "steps", "lr_scheduler_type": "linear"}
    whole = run(kind, folder="whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {artifact.TENSOR_FILE, artifact.CONFIG_FILE, "optimizer.pt", "trainer_state.json"} <= names
    assert not any(name.startswith(("model", "pytorch_model", "adapter")) for name in names)
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 100_000
    loaded = steer.load(checkpoint, build_tiny("llama", initializer_range=SPREAD))
    assert same(loaded.tensors(), artifact.read(checkpoint).tensors)
    random.seed(99)
    torch.manual_seed(99)
    resumed = run(kind, folder="resumed", resume=checkpoint, **settings)
    assert not same(artifact.read(checkpoint).tensors, whole.vectors.tensors())
    assert same(resumed.vectors.tensors(), whole.vectors.tensors())
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_layers_have_their_rates(run: Any) -> None:
    trainer = run("sft", lr_by_layer="0:0.3,2:0.001", max_steps=1, optim="sgd", max_grad_norm=0)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.3, 0.05, 0.001])
    one = run("sft", max_steps=1, optim="sgd", max_grad_norm=0, learning_rate=1.0).vectors.tensors()
    for (name, tensor), rate in zip(trainer.vectors.tensors().items(), rates, strict=True):
        torch.testing.assert_close(tensor, one[name] * rate)


# ---- the losses, against loops of their own


def batch(trainer: Any) -> dict[str, torch.Tensor]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def log_probs(model: Any, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sums over the counted tokens of rows, one row and one token at a time, without padding."""
    sums = []
    for row, counted in zip(ids, counts, strict=True):
        last = int(counted.nonzero().max())
        logits = model(input_ids=row[None, : last + 1]).logits[0]
        own = [logits[i - 1].log_softmax(-1)[row[i]] for i in range(1, last + 1) if counted[i]]
        sums.append(torch.stack(own).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("positions", ["all", "completion", "prompt"])
def test_the_loss_of_dpo_is_that_of_a_float64_loop(
    run: Any, build_tiny: Any, tmp_path: Path, positions: str
) -> None:
    """The reference is the base; loss and gradient agree to 1e-4, which is float32 against float64."""
    trainer = run("dpo", SteeringConfig(positions=positions), train=False, beta=0.3)
    fill(trainer.vectors, 0.05)
    inputs = batch(trainer)
    with trainer._told(inputs):
        loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    loss.backward()
    got = [p.grad for p in trainer.vectors.parameters()]

    base = build_tiny("llama", initializer_range=SPREAD).double()
    policy = build_tiny("llama", initializer_range=SPREAD).double()
    vectors = steer.attach(policy, SteeringConfig(positions=positions))
    fill(vectors, 0.05)
    ids, counts = inputs["input_ids"], inputs["completion_mask"]
    starts = counts.argmax(1)
    assert len(set(starts.tolist())) > 1 and not inputs["attention_mask"].all(), "nothing is padded"
    sums = []
    for i, start in enumerate(starts):
        with vectors.prompt_length(int(start)):
            sums.append(log_probs(policy, ids[i : i + 1], counts[i : i + 1]))
    with torch.no_grad():
        reference = log_probs(base, ids, counts)
    ratio = torch.cat(sums) - reference
    better, worse = ratio.chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.3 * (better - worse)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(expected.item() - 0.6931) > 1e-3, "the vectors do nothing"
    for mine, parameter in zip(got, vectors.parameters(), strict=True):
        assert (mine - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


def test_the_loss_of_sft_is_on_the_completion_alone(run: Any, build_tiny: Any) -> None:
    trainer = run("sft", train=False)
    fill(trainer.vectors, 0.05)
    inputs = batch(trainer)
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    policy = build_tiny("llama", initializer_range=SPREAD).double()
    fill(steer.attach(policy), 0.05)
    counts = inputs["labels"] != -100
    # the completion and the token that ends it
    assert int(counts.sum()) < int(inputs["attention_mask"].sum())
    expected = -log_probs(policy, inputs["input_ids"], counts).sum() / counts.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("kind", "positions"), [("sft", "prompt"), ("dpo", "prompt"), ("dpo", "completion")])
def test_checkpointing_changes_nothing(run: Any, kind: str, positions: str) -> None:
    steering = SteeringConfig(positions=positions)
    plain = run(kind, steering, max_steps=3)
    other = run(kind, steering, max_steps=3, gradient_checkpointing=True)
    assert all(tensor.norm() > 0 for tensor in plain.vectors.tensors().values())
    for name, tensor in plain.vectors.tensors().items():
        torch.testing.assert_close(other.vectors.tensors()[name], tensor)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_no_second_model_is_made(run: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a reference model was loaded")

    monkeypatch.setattr(f"trl.trainer.{kind}_trainer.create_model_from_path", load)
    trainer = run(kind)
    assert list(trainer.ref_model.parameters()) == []
    ids = torch.tensor([[3, 4, 5]])
    with trainer.vectors.disabled(), torch.no_grad():
        expected = trainer.model(input_ids=ids).logits
    assert torch.equal(trainer.ref_model(input_ids=ids).logits, expected)


# ---- bad input


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "second model": ("dpo", {"more": {"ref_model": torch.nn.Linear(1, 1)}}, "drop ref_model"),
    "moving reference": ("dpo", {"sync_ref_model": True}, "sync_ref_model=true cannot work"),
    "reference before": ("dpo", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True has no"),
    "noise": ("dpo", {"neftune_noise_alpha": 5.0}, "would put noise into the reference model too"),
    "no beta": ("dpo", {"beta": 0.0}, "beta=0 leaves no gradient"),
    "length": ("dpo", {"max_length": 0}, "max_length=0 is out of range"),
    "peft": ("sft", {"more": {"peft_config": object()}}, "drop peft_config"),
    "packing": ("sft", {"packing": True}, "packing=True has no effect"),
    "padding": ("dpo", {"pad_token": "<pad>"}, "pad_token='<pad>' has no effect: trl's DPOTrainer does"),
    "template": ("sft", {"chat_template_path": "x"}, "it may add tokens to the base model"),
    "rate": ("kto", {"learning_rate": -1.0}, "learning_rate=-1.0 is out of range"),
    "rates": ("dpo", {"lr_by_layer": "0-x"}, "lr_by_layer='0-x' is not readable"),
    "no prompt": (
        "sft",
        {"steering": SteeringConfig(positions="prompt"), "completion_only_loss": False},
        "positions='prompt' needs to know where a prompt ends",
    ),
    "no prompt in the data": (
        "sft",
        {
            "steering": SteeringConfig(positions="completion"),
            "more": {"train_dataset": Dataset.from_dict({"text": ["1+1=2", "2+2=4"]})},
        },
        "positions='completion' needs to know where a prompt ends",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_work_is_one_line(run: Any, case: str) -> None:
    kind, settings, expected = REFUSED[case]
    with pytest.raises(SteerError) as error:
        run(kind, train=False, **settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_settings_of_trl_alone_are_refused(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    args: Any = KTOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(SteerError, match="args is a KTOConfig, and SteeringKTOTrainer needs"):
        SteeringKTOTrainer(tiny_llama, args, processing_class=tiny_tokenizer)
    assert "steering_vectors" not in tiny_llama.__dict__


def test_a_model_that_trls_head_does_not_fit_is_refused(run: Any, build_tiny: Any, monkeypatch: Any) -> None:
    from steer.generation.trial import Trial

    monkeypatch.setattr(Trial, "_head", lambda self: "its head is another")
    model = build_tiny("llama", initializer_range=SPREAD)
    with pytest.raises(SteerError, match=r"its head is another, and SteeringSFTTrainer .* train by GRPO"):
        run("sft", model=model, train=False)
    assert "steering_vectors" not in model.__dict__

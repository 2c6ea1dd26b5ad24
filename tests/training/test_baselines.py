"""Full fine-tuning and peft's methods under the trainer that vectors have: same steps, exact checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.training import SPREAD, config, make_trainer, parity, problems
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from steer.errors import SteerError
from steer.evaluation import variants
from steer.training.baselines import Baseline, BaselineGRPOTrainer, peft_config, readable
from steer.training.resuming import newest_checkpoint

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def base(build_tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return build_tiny("llama", initializer_range=SPREAD)


@pytest.fixture
def run(base: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable:
    """`run(method, ...)`: a trainer for a copy of `base` that has done its steps."""

    def trained(method: str, resume: bool | str = False, what: dict | None = None, **changes: Any):
        trainer = BaselineGRPOTrainer(
            copy.deepcopy(base),
            parity,
            config(tmp_path / "run", **changes),
            Baseline(method, **(what or {})),
            train_dataset=problems(),
            processing_class=tiny_tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    return trained


def weights(trainer: BaselineGRPOTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of any number."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


# ---- the same step, whatever is trained


def test_beft_on_the_down_projections_becomes_the_steering_vectors(
    run: Callable, base: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    steering = make_trainer(copy.deepcopy(base), tiny_tokenizer, config(tmp_path / "vectors", max_steps=3))
    steering.train()
    biases = list(weights(run("beft", what={"target_modules": ["down_proj"]}, max_steps=3)).values())
    vectors = list(steering.vectors.effective().values())
    assert len(biases) == len(vectors) == 3 and all(vector.norm() > 0.05 for vector in vectors)
    for bias, vector in zip(biases, vectors, strict=True):
        # the bias is added before the residual, the vector after it: sums in another order
        assert torch.allclose(bias.flatten(), vector, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_sharing_prompts_and_leaving_rows_out_changes_no_update(run: Callable, method: str) -> None:
    rate = 1e-4 if method == "full" else 1e-2
    cheap = run(method, learning_rate=rate)
    plain = run(method, learning_rate=rate, share_prompts=False, skip_zero_advantage=False)
    start = weights(run(method, learning_rate=rate, max_steps=1))
    assert distance(weights(cheap), start) > rate / 2, "nothing was trained"
    # Adam divides by the size of the gradient: rounding shows where that is near zero, and nowhere else
    pairs = zip(weights(cheap).values(), weights(plain).values(), strict=True)
    apart = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    assert apart.mean() < 1e-3 * rate and apart.max() < 2.1 * rate


def test_a_full_fine_tune_trains_every_weight(run: Callable, base: PreTrainedModel) -> None:
    before = dict(base.named_parameters())
    after = weights(run("full", learning_rate=1e-3))
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_leaves_the_base_alone(run: Callable, base: PreTrainedModel) -> None:
    trainer = run("lora", learning_rate=1e-2)
    with torch.no_grad():
        changed = trainer.model(IDS).logits
        with trainer.reference():
            assert torch.equal(trainer.model(IDS).logits, base(IDS).logits)
    assert not torch.allclose(changed, base(IDS).logits, atol=1e-3)


# ---- counts


def test_the_count_of_trained_numbers_is_what_was_asked_for(run: Callable) -> None:
    def count(method: str, **what: Any) -> int:
        return sum(w.numel() for w in weights(run(method, what=what, max_steps=1)).values())

    # width 32, inner width 48, 4 heads and 2 groups of 8
    assert count("lora", lora_rank=1, target_modules=["o_proj"], target_layers="0,2") == 2 * (32 + 32)
    assert count("lora", lora_rank=2) == 3 * 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert count("beft", target_modules=["down_proj"]) == 3 * 32
    assert count("tinylora", tinylora_u=5, lora_rank=2, target_modules=["q_proj", "v_proj"]) == 3 * 2 * 5


def test_layers_that_differ_are_adapted_each_by_its_own_modules(
    build_tiny: Callable[..., PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = build_tiny("qwen3_moe", mlp_only_layers=[1])  # the experts of layers 0 and 2 are no nn.Linear
    dense = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    attention = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "qkvo"}

    def adapted(**what: Any) -> set[str]:
        made: Any = peft_config(Baseline("lora", **what), model)
        return set(made.target_modules)

    with caplog.at_level("INFO"):
        assert adapted() == dense | attention
        assert "target_modules" not in caplog.text
        assert adapted(target_modules=["down_proj"]) == {"model.layers.1.mlp.down_proj"}
    assert "layers 0, 2 have no down_proj; the others are adapted" in caplog.text
    with pytest.raises(SteerError, match=r"are q_proj, .*o_proj; there is no down_proj"):
        adapted(target_modules=["down_proj"], target_layers="0,2")


def test_an_adapter_on_a_quantised_base_keeps_its_precision(
    base: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base.is_quantized = base.is_loaded_in_4bit = True  # as transformers tells it of 4 bits
    trainer = BaselineGRPOTrainer(
        base,
        parity,
        config(tmp_path),
        Baseline("lora"),
        train_dataset=problems(),
        processing_class=tiny_tokenizer,
    )
    assert {weight.dtype for weight in weights(trainer).values()} == {torch.float32}


# ---- on disk


@pytest.mark.parametrize("method", ["full", "lora", "tinylora"])
def test_a_stopped_run_ends_where_an_unbroken_one_does(run: Callable, method: str, tmp_path: Path) -> None:
    changes = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    unbroken = run(method, max_steps=3, output_dir=str(tmp_path / "unbroken"), **changes)
    run(method, max_steps=2, **changes)
    found = newest_checkpoint(tmp_path / "run", readable)
    assert found == tmp_path / "run" / "checkpoint-2"
    resumed = run(method, resume=str(found), max_steps=3, **changes)
    assert resumed.state.global_step == 3
    assert distance(weights(resumed), weights(unbroken)) == 0.0


@pytest.mark.parametrize("method", ["lora", "beft", "tinylora"])
def test_the_saved_adapter_is_one_that_peft_loads(
    run: Callable, base: Any, method: str, tmp_path: Path
) -> None:
    trainer = run(method, learning_rate=0.05)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("*.bin"))
    plain = copy.deepcopy(base)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        expected = trainer.model(IDS).logits
        assert not torch.allclose(expected, base(IDS).logits, atol=1e-3)
        assert torch.allclose(loaded(IDS).logits, expected, atol=1e-5)
        assert torch.equal(loaded.unload()(IDS).logits, base(IDS).logits)
    # and `steer eval` counts what was trained, not what was drawn
    (_, variant) = variants.collect(variants.Variant("base"), adapters=[str(tmp_path / "adapter")])
    assert variant.parameters == sum(w.numel() for w in weights(trainer).values())


def test_the_saved_model_is_whole_and_without_pickles(run: Callable, tmp_path: Path) -> None:
    trainer = run("full", learning_rate=1e-3)
    trainer.save_model(str(tmp_path / "model"))
    assert {p.suffix for p in (tmp_path / "model").iterdir()} <= {".safetensors", ".json", ".jinja"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, trainer.model(IDS).logits)


def test_a_model_of_mixed_training_is_saved_as_it_learned(run: Callable, tmp_path: Path) -> None:
    """What was sampled and differentiated were rounded weights; a checkpoint has those behind them."""
    trainer = run("full", learning_rate=1e-3, bf16=True)
    trainer.save_model(str(tmp_path / "model"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    rounded = {name: weight.bfloat16().float() for name, weight in weights(trainer).items()}
    assert distance(rounded, dict(whole.named_parameters())) == 0 < distance(rounded, weights(trainer))
    assert {p.suffix for p in (tmp_path / "model").iterdir()} <= {".safetensors", ".json", ".jinja"}

    trainer.save_model(str(tmp_path / "checkpoint"), _internal_call=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert distance(weights(trainer), dict(exact.named_parameters())) == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_in_shards_is_saved_whole_whatever_the_launcher_says(
    run: Callable, tmp_path: Path, bf16: bool
) -> None:
    """FSDP's launcher keeps checkpoints in shards, and transformers then writes no model beside them."""
    trainer = run("full", learning_rate=1e-3, max_steps=1, bf16=bf16)
    trainer.is_fsdp_enabled = True
    trainer.save_model(str(tmp_path / "checkpoint"), _internal_call=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert distance(weights(trainer), dict(loaded.named_parameters())) == 0
    readable(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "tokenizer.json").exists()


def test_a_checkpoint_that_was_cut_short_is_passed_over(run: Callable, tmp_path: Path) -> None:
    run("lora", max_steps=2, save_strategy="steps", save_steps=1)
    file = tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert newest_checkpoint(tmp_path / "run", readable) == tmp_path / "run" / "checkpoint-1"
    file.unlink()
    assert newest_checkpoint(tmp_path / "run", readable) == tmp_path / "run" / "checkpoint-1"


# ---- bad input


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ({"method": "lor"}, {}, "method='lor' is unknown; choose one of full, lora"),
        ({"method": "lora", "lora_rank": 0}, {}, "lora_rank=0 is below 1"),
        ({"method": "lora", "target_modules": ["c_attn"]}, {}, r"are q_proj.*; there is no c_attn"),
        ({"method": "lora", "target_layers": "3"}, {}, "layer 3 does not exist"),
        ({"method": "full"}, {"beta": 0.1}, "set beta=0"),
        ({"method": "lora"}, {"use_vllm": True}, "drop use_vllm"),
        ({"method": "lora"}, {"lr_by_layer": "0:0.1"}, "is for vectors"),
    ],
)
def test_what_cannot_be_trained_is_said(
    base: Any, tiny_tokenizer: Any, tmp_path: Path, what: dict, changes: dict, message: str
) -> None:
    with pytest.raises(SteerError, match=message):
        BaselineGRPOTrainer(
            base,
            parity,
            config(tmp_path, **changes),
            Baseline(**what),
            train_dataset=problems(),
            processing_class=tiny_tokenizer,
        )


def test_a_method_that_this_peft_lacks_is_said(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft, "TinyLoraConfig")
    with pytest.raises(SteerError, match=r"peft [\d.]+ has no TinyLoraConfig; install a newer peft"):
        peft_config(Baseline("tinylora"), base)

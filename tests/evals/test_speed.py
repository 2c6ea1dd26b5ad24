"""`evals.speed`: what it counts and compares, on a tiny model and on figures made up for the purpose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.training import model_folder
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.utils import add_fused_lm_head

import steer
from evals import speed, speed_workers, step_timing
from steer.generation.decoding import pad_left
from steer.generation.scoring import add_group_scoring

# of one variant, in two rounds
FIGURES = {
    "steer@float32": ({"step s": 2.0, "update s": 1.0}, {"step s": 4.0, "update s": 1.0}),
    "trl-lora@float32": ({"step s": 12.0, "update s": 3.0}, {"step s": 12.0, "update s": 5.0}),
    "trl-lora@bfloat16": ({"step s": 90.0, "update s": 30.0},),
    "generate@float32": ({"tokens/s": 100.0}, {"tokens/s": 100.0}),
    "generate-static@float32": ({"tokens/s": 90.0}, {"tokens/s": 120.0}),
    "vllm-steered@float32": ({"tokens/s": 400.0}, {"tokens/s": 440.0}),
}


def test_the_table_compares_the_best_of_both_sides() -> None:
    rows = {row["row"]: row for row in speed.table({n: list(runs) for n, runs in FIGURES.items()})}
    assert list(rows) == [
        "rollout, against `generate`",
        "GRPO step, against trl's LoRA r4",
        "update, against trl's LoRA r4",
    ]
    rollout, step, update = rows.values()
    assert rollout["other"] == ["generate-static@float32", 105.0] and rollout["steer"][1] == 420.0
    assert (rollout["ratio"], rollout["low"], rollout["high"]) == (4.0, 440 / 120, 400 / 90)
    assert (step["ratio"], step["low"], step["high"]) == (4.0, 3.0, 6.0)
    assert (update["ratio"], update["low"], update["high"]) == (4.0, 3.0, 5.0)
    assert update["other"][0] == "trl-lora@float32"
    assert "| **4** | 3 to 6 | 6 |" in speed.markdown(list(rows.values()))


def test_what_lost_the_first_round_is_not_measured_again() -> None:
    found = {name: list(runs) for name, runs in FIGURES.items()}
    assert [name for name in found if speed.hopeless(name, found)] == ["trl-lora@bfloat16"]


@pytest.mark.parametrize("native", [True, False])
def test_every_method_gets_the_machines_dtypes(monkeypatch, native: bool) -> None:
    monkeypatch.setattr(speed_workers, "fast", lambda: "bfloat16" if native else "float32")
    names = [name.split("@") for name in speed_workers.plan()]
    for method in ("generate", "generate-static", "steer", "trl-lora"):
        dtypes = {dtype for name, dtype in names if name == method}
        assert dtypes == ({"float32", "bfloat16"} if native else {"float32"})
    assert set(speed_workers.plan("step")) | set(speed_workers.plan("rollout")) == set(speed_workers.plan())


def test_update_flops_are_those_of_the_update(build_tiny) -> None:
    """Against torch's own count of the products that an update runs, those of attention apart."""
    model = build_tiny("llama")
    vectors = steer.attach(model)
    add_fused_lm_head(model, 1.0, outputs=("log_probs", "entropy"))
    add_group_scoring(model)
    prompts = [[5, 6, 7, 8], [9, 5, 6, 7]]
    ids, mask = pad_left([prompts[i // 3] for i in range(6)], torch.device("cpu"))
    completions = torch.randint(3, 97, (6, 5))
    with FlopCounterMode(display=False) as counter:
        scored = model(
            score_group=True,
            prompt_ids=ids,
            prompt_mask=mask,
            completion_ids=completions,
            completion_mask=torch.ones_like(completions),
        )
        torch.autograd.grad(scored.log_probs.sum(), vectors.parameters())
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    # The last token of each prompt meets the layers with each completion's first; the last token of a
    # completion predicts nothing. So the layers see 2 x 3 tokens of prompts and 6 x 5 others. And the query,
    # output and MLP of the last layer have no use, nor a gradient, for a prompt's tokens.
    layer = model.model.layers[-1]
    unused = [layer.self_attn.q_proj, layer.self_attn.o_proj, *(m for m in layer.mlp.children())]
    spare = sum(m.weight.numel() for m in unused if hasattr(m, "weight"))
    assert products == step_timing.update_flops(model, 6, 30) - 2 * 6 * spare


@pytest.mark.parametrize(("cache", "lengths"), [("static", [6, 6]), (None, [4, 6])])
def test_a_static_cache_is_warmed_at_its_length(
    build_tiny, tiny_tokenizer: Any, tmp_path: Path, monkeypatch, cache: str | None, lengths: list[int]
) -> None:
    model = build_tiny("llama", max_position_embeddings=512)
    folder = model_folder(tmp_path / "model", model, tiny_tokenizer)
    for name, value in {"BATCH": 4, "LENGTH": 6}.items():
        monkeypatch.setattr(speed_workers, name, value)
    asked: list[int] = []
    monkeypatch.setattr(type(model), "generate", lambda self, **given: asked.append(given["max_new_tokens"]))
    speed_workers.generate(cache, "float32", str(folder))
    assert asked == lengths


def test_a_full_sync_is_of_weights_on_the_device(monkeypatch) -> None:
    """Beside vectors that go to an engine on a GPU, copies between places on the CPU would look slow."""
    moved: list[str] = []

    class Model(torch.nn.Linear):
        def to(self, place: Any) -> Any:
            moved.append(place)
            return self

    monkeypatch.setattr("steer.models.load_model", lambda name, dtype: Model(3, 2))
    monkeypatch.setattr("steer.engine.push", lambda llm, vectors: SimpleNamespace(bytes=5))
    monkeypatch.setattr(speed_workers, "device", lambda: "the GPU")
    found = speed_workers._sync(None, None, "float32", "a model")
    assert moved == ["the GPU"] and found["full MB"] == 8 * 4 / 1e6 and found["sync MB"] == 5e-6


def test_prompt_tokens() -> None:
    assert step_timing.prompt_tokens([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3]]) == 2 + 1 + 2 + 1
    assert step_timing.prompt_tokens([[1, 2, 3]]) == 3


@pytest.mark.parametrize("method", ["steer", "trl-lora", "trl-full", "profile"])
def test_a_measured_step(build_tiny, tiny_tokenizer: Any, tmp_path: Path, monkeypatch, method: str) -> None:
    model = build_tiny("llama", max_position_embeddings=512)
    folder = model_folder(tmp_path / "model", model, tiny_tokenizer)
    for name, value in {"PROMPTS": 2, "SAMPLES": 2, "TOKENS": 3}.items():
        monkeypatch.setattr(speed_workers, name, value)
    found = speed_workers.step(method, "float32", str(folder), 2)
    if method == "profile":
        assert found["aten::mm"] > 0 and sum(found.values()) < 1.001
    else:
        assert found["step s"] > found["update s"] > 0 and found["step s"] > found["rollout s"] > 0
        assert (found["step s"] - found["update s"] - found["rollout s"]) > -1e-6
        assert ("peak GFLOP/s" in found) is (method == "steer")

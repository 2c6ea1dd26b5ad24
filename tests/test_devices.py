"""Devices that are not here: GPUs without float64 (Apple's), CUDA, models spread over several places."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.single import Single, without_float64
from helpers.steering import fill, logits, relative, tokens
from helpers.training import config, make_trainer, parity
from transformers import AutoModelForCausalLM, PreTrainedModel

import steer
from steer import SteeringConfig
from steer.config import SITES
from steer.evaluation.engines import HfEngine
from steer.final_norm import through_final_norm
from steer.models import load_model
from steer.tasks import grading
from steer.threads import busy_cpus, usable_cpus

# ---- without float64


def test_the_stand_in_refuses_float64() -> None:
    tensor = torch.ones(3).as_subclass(Single)
    for wrong in (lambda: (tensor * 2).double(), lambda: tensor.to(torch.float64)):
        with pytest.raises(TypeError, match="no float64"):
            wrong()
    assert (tensor * 2).cpu().double().sum() == 6


@pytest.mark.parametrize("site", SITES)
def test_vectors_are_attached_without_float64(tiny_llama: PreTrainedModel, tmp_path: Path, site: str) -> None:
    plain = fill(steer.attach(copy.deepcopy(tiny_llama), SteeringConfig(site=site)))
    plain.save(tmp_path / "vectors")
    model: Any = without_float64(tiny_llama)
    vectors = steer.load(tmp_path / "vectors", model)
    steered = logits(model, tokens())
    assert isinstance(steered, Single)
    assert torch.equal(steered.cpu(), logits(plain.model, tokens()))
    assert vectors.norms() == plain.norms()
    made = model.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert torch.equal(made.cpu(), plain.model.generate(tokens(), max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("kind", ["adaptive", "shared"])
def test_other_kinds_without_float64(tiny_llama: PreTrainedModel, kind: str) -> None:
    asked = SteeringConfig(kind=kind, **({"rank": 2} if kind == "shared" else {}))
    plain = fill(steer.attach(copy.deepcopy(tiny_llama), asked))
    vectors = fill(steer.attach(without_float64(tiny_llama), asked))
    assert relative(logits(tiny_llama, tokens()).cpu(), logits(plain.model, tokens())) < 1e-6
    tiny_llama(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in vectors.parameters())


def test_the_final_norm_is_read_without_float64(build_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # so that `module.cpu()` makes ordinary parameters
    overwrites = "torch.__future__.get_overwrite_module_params_on_conversion"
    monkeypatch.setattr(overwrites, lambda: True)
    for model_type in ("llama", "gemma2", "gpt2"):
        model, rows = build_tiny(model_type), torch.randn(2, 32)
        expected = through_final_norm(model, rows)
        torch.testing.assert_close(through_final_norm(without_float64(model), rows), expected)


# ---- CUDA and others, faked


def test_sampling_for_an_evaluation_is_on_whatever_accelerator_there_is(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: PreTrainedModel
) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> PreTrainedModel:
        asked.append(options["device_map"])
        return tiny_llama

    monkeypatch.setattr("steer.models.load_model", load)
    for device in ("mps", "cuda"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda name=device: torch.device(name))
        HfEngine("model", None, "float32")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    HfEngine("model", None, "float32")
    assert asked == ["mps", "cuda", None]


def test_quantised_weights_go_to_the_gpu(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def from_pretrained(*args: Any, **options: Any) -> Any:
        seen.append((options["device_map"], options.get("quantization_config")))
        return tiny_llama, {"missing_keys": []}

    tiny_llama.save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    load_model(str(tmp_path), load_in_8bit=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    load_model(str(tmp_path), load_in_8bit=True)
    load_model(str(tmp_path), load_in_8bit=True, device_map="auto")
    load_model(str(tmp_path))
    assert [device for device, _ in seen] == [None, {"": 1}, "auto", None]
    assert [config is not None for _, config in seen] == [True, True, True, False]


# ---- not Linux


def test_without_linux_the_cpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus() == os.cpu_count()
    assert busy_cpus(0.001) == float("inf")


def test_a_grading_worker_starts_where_memory_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limited: list[int] = []

    def setrlimit(which: int, limits: Any) -> None:
        if which == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")
        limited.append(which)

    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    before = signal.getsignal(signal.SIGTERM)
    try:
        grading._start_worker()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert limited == [resource.RLIMIT_CORE]


# ---- spread over places


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_a_device_map_of_the_loader(tiny_llama: PreTrainedModel, tmp_path: Path, place: str) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")
    where: Any = "auto"
    if place == "disk":
        names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
        where = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load_model(str(tmp_path / "model"), device_map=where)
    away = {p.device.type for p in model.model.layers[1].parameters()}
    assert away == ({"meta"} if place == "disk" else {"cpu"})
    expected = fill(steer.attach(tiny_llama))
    vectors = fill(steer.attach(model))
    assert {p.device.type for p in vectors.parameters()} == {"cpu"}
    assert torch.equal(logits(model, tokens()), logits(tiny_llama, tokens()))
    vectors.save(tmp_path / "vectors")
    steer.detach(model)
    steer.load(tmp_path / "vectors", model)
    assert torch.equal(logits(model, tokens()), logits(tiny_llama, tokens()))
    for one in (model, tiny_llama):
        one(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for a, b in zip(model.steering_vectors.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_model_with_layers_on_disk_is_trained(build_tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    plain = build_tiny("llama", initializer_range=0.3)
    plain.save_pretrained(tmp_path / "model")
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    where = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk", "model.layers.2": "cpu"}
    model = load_model(str(tmp_path / "model"), device_map=where)
    found = []
    for name, one in (("plain", plain), ("spread", model)):
        trainer = make_trainer(one, tiny_tokenizer, config(tmp_path / name), parity)
        trainer.train()
        found.append(trainer.vectors.tensors())
    for a, b in zip(*(tensors.values() for tensors in found), strict=True):
        assert a.norm() > 0
        torch.testing.assert_close(a, b)

"""The artifact: exact round trips, wrong models and places refused, writes that never tear the old one."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.artifacts import content, saved_vectors, steered
from helpers.steering import message
from safetensors import safe_open
from transformers import PreTrainedModel

import steer
from steer import SteerError, artifact
from steer.artifact import CARD_FILE, CONFIG_FILE, TENSOR_FILE

Build = Callable[..., PreTrainedModel]


@pytest.fixture
def folder(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    return saved_vectors(tiny_llama, tmp_path / "vectors")


# --- round trips


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_saving_and_loading_is_exact(build_tiny: Build, tmp_path, dtype):
    model, ids = build_tiny("llama"), torch.arange(3, 15)[None]
    config = {
        "layers": "0,last",
        "site": "mlp_out",
        "scale": 0.1,
        "dtype": dtype,
        "provenance": {"a": [1, None]},
    }
    vectors = steered(model, **config)
    saved = vectors.tensors()
    expected = model(ids).logits
    assert vectors.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    other = build_tiny("llama")
    loaded = steer.load(tmp_path / "new" / "folder", other)
    assert loaded.config == vectors.config
    assert loaded is steer.attached(other)
    for name, tensor in loaded.tensors().items():
        assert tensor.dtype == saved[name].dtype == getattr(torch, dtype)
        assert torch.equal(tensor, saved[name])
    assert list(loaded.tensors()) == list(saved)
    assert torch.equal(other(ids).logits, expected)


def test_every_architecture_comes_back(tiny_model, tmp_path):
    ids = torch.arange(3, 15)[None]
    steered(tiny_model).save(tmp_path)
    expected = tiny_model(ids).logits
    steer.detach(tiny_model)
    assert not torch.equal(tiny_model(ids).logits, expected)
    steer.load(str(tmp_path), tiny_model)
    assert torch.equal(tiny_model(ids).logits, expected)


def test_loaded_vectors_can_be_trained_further(folder, tiny_llama):
    vectors = steer.load(folder, tiny_llama)
    trainable = [name for name, p in tiny_llama.named_parameters() if p.requires_grad]
    assert trainable == list(vectors.named_parameters())


def test_the_folder_holds_the_card_the_tensors_and_the_config_twice(folder, tiny_llama):
    names = ["README.md", "steering.safetensors", "steering_config.json"]
    assert sorted(content(folder)) == [CARD_FILE, TENSOR_FILE, CONFIG_FILE] == names
    sidecar = json.loads((folder / CONFIG_FILE).read_text())
    with safe_open(folder / TENSOR_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["steering_config"]) == sidecar
        assert sorted(file.keys()) == [f"model.layers.{i}.steering.vector" for i in range(3)]
    assert sidecar["base_model_name_or_path"] == "org/tiny"
    assert (sidecar["hidden_size"], sidecar["num_hidden_layers"], sidecar["model_type"]) == (32, 3, "llama")
    assert sidecar["provenance"] == {"recipe": "test", "scores": [0.5]}
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644  # a shared folder stays readable for others


def test_saving_again_replaces_the_files(folder, tiny_llama):
    before = content(folder)
    vectors = steer.load(folder, tiny_llama)
    vectors.scale = 2
    vectors.save(folder)
    after = content(folder)
    assert sorted(after) == sorted(before)
    assert all(after[name] != before[name] for name in before)


def test_equal_vectors_make_equal_files(folder, tmp_path):
    """The library behind the format writes metadata in random order; six writes would agree once in 32."""
    made = artifact.read(folder)
    written = {(artifact.write(tmp_path / str(n), made) / TENSOR_FILE).read_bytes() for n in range(6)}
    assert written == {(folder / TENSOR_FILE).read_bytes()}


def test_the_tensor_file_alone_is_an_artifact(folder, tiny_llama, tmp_path):
    alone = (folder / TENSOR_FILE).rename(tmp_path / "renamed.safetensors")
    vectors = steer.load(alone, tiny_llama)
    assert vectors.config.provenance == {"recipe": "test", "scores": [0.5]}
    assert all(norm > 0 for norm in vectors.norms().values())


def test_a_lone_file_is_not_compared_with_another_artifacts_config(folder, tiny_llama):
    steer.load(folder, tiny_llama).scale = 3
    other = steer.attached(tiny_llama).save(folder.parent / "other")
    path = (other / TENSOR_FILE).rename(folder / "three.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert artifact.read(path).config.scale == 3


# --- wrong models


@pytest.mark.parametrize(
    ("model_type", "shape", "named"),
    [
        ("llama", {"hidden_size": 64}, "hidden_size=32"),
        ("llama", {"num_hidden_layers": 4}, "num_hidden_layers=3"),
        ("qwen2", {}, "model_type=llama"),
    ],
)
def test_vectors_of_another_model_are_refused(folder, build_tiny: Build, model_type, shape, named):
    model = build_tiny(model_type, **shape)
    with pytest.raises(SteerError, match="same shape") as error:
        steer.load(folder, model)
    assert named in message(error)
    assert "org/tiny" in message(error)
    assert all(p.requires_grad for p in model.parameters())  # untouched: nothing attached, nothing frozen
    steer.attach(model)


def test_loading_over_attached_vectors_is_refused_and_keeps_them(folder, tiny_llama):
    vectors = steered(tiny_llama)
    with pytest.raises(SteerError, match="already") as error:
        steer.load(folder, tiny_llama)
    message(error)
    assert steer.attached(tiny_llama) is vectors


# --- places


@pytest.mark.parametrize(
    "source",
    ["nowhere", "a/b/c", "nowhere.safetensors", "two words/of folder", "/no/such/folder", "", "./x", "a/b.c"],
)
def test_a_source_that_is_not_there_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SteerError) as error:
        artifact.read(source)
    assert source in message(error)


def test_a_hub_id_that_is_not_cached_is_refused_without_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SteerError, match="hub") as error:
        artifact.read("org/vectors")
    assert "org/vectors" in message(error)


def test_a_folder_without_vectors_is_refused(tmp_path):
    with pytest.raises(SteerError, match=TENSOR_FILE) as error:
        artifact.read(tmp_path)
    message(error)


@pytest.mark.parametrize("inner", ["", "below"])
def test_saving_onto_a_file_is_refused(tiny_llama, tmp_path, inner):
    target = tmp_path / "taken"
    target.write_text("mine")
    with pytest.raises(SteerError, match="cannot save") as error:
        steered(tiny_llama).save(target / inner)
    assert str(target) in message(error)
    assert target.read_text() == "mine"


# --- no space


@pytest.mark.parametrize(
    ("module", "function", "at"),
    [
        (os, "fsync", 1),
        (os, "fsync", 2),
        (os, "replace", 1),
        (tempfile, "mkstemp", 1),
        (tempfile, "mkstemp", 2),
    ],
)
def test_a_full_disk_leaves_the_old_artifact_whole(tiny_llama, folder, monkeypatch, module, function, at):
    before = content(folder)
    vectors = steer.load(folder, tiny_llama)
    vectors.scale = 5
    vectors.set_tensors({name: t + 1 for name, t in vectors.tensors().items()})
    real, calls = getattr(module, function), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, function, fail)
    with pytest.raises(SteerError, match="No space left") as error:
        vectors.save(folder)
    assert str(folder) in message(error)
    assert content(folder) == before  # the same bytes, and no temporary file beside them


def test_a_full_disk_leaves_nothing_of_a_first_save(tiny_llama, tmp_path, monkeypatch):
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SteerError, match="No space left") as error:
        steered(tiny_llama).save(tmp_path / "new")
    message(error)
    assert list(tmp_path.rglob("*.*")) == []

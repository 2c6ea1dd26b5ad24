"""Artifacts with wrong tensors, configs or sidecars, and files that are none: each refused in one line."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path

import pytest
import torch
from helpers.artifacts import change, content, saved_vectors
from helpers.steering import message
from safetensors.torch import save, save_file
from transformers import PreTrainedModel

import steer
from steer import SteerError, SteeringConfig, artifact
from steer.artifact import CONFIG_FILE, TENSOR_FILE
from steer.artifact_file import MAX_BYTES


@pytest.fixture
def folder(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    return saved_vectors(tiny_llama, tmp_path / "vectors")


# --- wrong content

FIRST = "model.layers.0.steering.vector"
FAULTS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": ({FIRST: None}, "layers.0"),
    "additional": ({"model.layers.7.steering.vector": torch.zeros(32)}, "layers.7"),
    "foreign": ({"lm_head.weight": torch.zeros(32)}, "lm_head.weight"),
    "none": ({f"model.layers.{i}.steering.vector": None for i in range(3)}, "no vectors"),
    "NaN": ({FIRST: torch.full((32,), torch.nan)}, "NaN"),
    "one Inf": ({FIRST: torch.cat([torch.zeros(31), torch.tensor([-torch.inf])])}, "Inf"),
    "integers": ({FIRST: torch.zeros(32, dtype=torch.int64)}, "I64"),
    "bools": ({FIRST: torch.zeros(32, dtype=torch.bool)}, "BOOL"),
    "short": ({FIRST: torch.zeros(31)}, "(31,)"),
    "empty": ({FIRST: torch.zeros(0)}, "(0,)"),
    "matrix": ({FIRST: torch.zeros(1, 32)}, "(1, 32)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_set_of_tensors_is_refused(folder, tiny_llama, fault):
    tensors, named = FAULTS[fault]
    change(folder, tensors)
    with pytest.raises(SteerError) as error:
        steer.load(folder, tiny_llama)
    assert named in message(error)
    assert "steering_vectors" not in tiny_llama.__dict__
    assert all(p.requires_grad for p in tiny_llama.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vectors_that_diverged_are_not_saved(tiny_llama, folder, value):
    before = content(folder)
    vectors = steer.load(folder, tiny_llama)
    with torch.no_grad():
        vectors.parameters()[1][5] = value
    with pytest.raises(SteerError, match=r"layers\.1\.steering.*NaN or Inf") as error:
        vectors.save(folder)
    assert "learning rate" in message(error)
    assert content(folder) == before


def test_a_file_cut_at_every_tenth_byte_is_refused(folder):
    path = folder / TENSOR_FILE
    whole = path.read_bytes()
    for length in range(0, len(whole), 10):
        path.write_bytes(whole[:length])
        with pytest.raises(SteerError, match="safetensors") as error:
            artifact.read(folder)
        message(error)
    path.write_bytes(whole)
    assert len(artifact.read(folder).tensors) == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 64,
        b"\xff" * 64,
        b"garbage that is longer than eight bytes",
        struct.pack("<Q", 10) + b"{not json}" + b"\0" * 128,
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 4,  # a pickle must not be run, or even recognised
    ],
)
def test_other_bytes_are_refused(folder, data):
    (folder / TENSOR_FILE).write_bytes(data)
    with pytest.raises(SteerError, match="not a readable safetensors file") as error:
        artifact.read(folder)
    message(error)


def test_a_huge_file_is_refused_before_it_is_read(folder):
    os.truncate(folder / TENSOR_FILE, MAX_BYTES + 1)  # sparse: takes no space
    with pytest.raises(SteerError, match="more than any set of steering vectors") as error:
        artifact.read(folder)
    message(error)


def test_safetensors_of_another_program_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"lm_head.weight": torch.zeros(4, 4)}, path, metadata=metadata)
        with pytest.raises(SteerError, match="not written by steer") as error:
            artifact.read(path)
        message(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "9" * 5000, '{"layers": '])
def test_an_embedded_config_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({FIRST: torch.zeros(32)}, metadata={"steering_config": text}))
    with pytest.raises(SteerError, match="steering config") as error:
        artifact.read(path)
    assert len(message(error)) < 1000


@pytest.mark.parametrize("version", [3, 99])
def test_an_artifact_of_a_newer_format_is_refused(folder, tiny_llama, version):
    change(folder, format_version=version)
    with pytest.raises(SteerError, match=f"format {version} is newer") as error:
        steer.load(folder, tiny_llama)
    message(error)


@pytest.mark.parametrize(
    "config",
    [
        {"site": "elsewhere"},
        {"site": ["resid_post"]},
        {"layers": ""},
        {"layers": {"a": 1}},
        {"layers": "0-7"},
        {"layers": "9" * 5000},
        {"scale": "big"},
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"num_hidden_layers": "3"},
        {"alpha": 2},
    ],
)
def test_an_embedded_config_with_wrong_values_is_refused(folder, tiny_llama, config):
    change(folder, **config)
    with pytest.raises(SteerError) as error:
        steer.load(folder, tiny_llama)
    message(error)
    assert all(p.requires_grad for p in tiny_llama.parameters())


# --- the sidecar


def test_an_edited_sidecar_is_reported_and_not_used(folder, tiny_llama):
    sidecar = folder / CONFIG_FILE
    values = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(values | {"scale": -3.0}))
    with pytest.warns(UserWarning, match=r"steering_config\.json differs"):
        vectors = steer.load(folder, tiny_llama)
    assert vectors.scale == 1.0


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe\0", b"[" * 100_000, b'{"format_version": 3}', b'{"alpha": 1}', b"null"]
)
def test_a_damaged_sidecar_is_reported_and_not_needed(folder, tiny_llama, damage):
    # the tensor file is a whole artifact: whatever stands beside it cannot make it unreadable
    (folder / CONFIG_FILE).write_bytes(damage)
    with pytest.warns(UserWarning, match=r"steering_config\.json"):
        vectors = steer.load(folder, tiny_llama)
    assert vectors.scale == 1.0


def test_an_unchanged_or_missing_sidecar_is_silent(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = artifact.read(folder).config
        (folder / CONFIG_FILE).write_text(json.dumps(first.to_dict()))  # other white space says the same
        artifact.read(folder)
        (folder / CONFIG_FILE).unlink()
        assert artifact.read(folder).config == first


def test_a_provenance_with_nan_scores_is_no_edit(folder, tiny_llama):
    vectors = steer.load(folder, tiny_llama)
    vectors.config.provenance = {"kl": float("nan")}
    vectors.save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artifact.read(folder)


def test_a_signalling_nan_is_refused_without_a_warning(tmp_path):
    config = SteeringConfig(layers=0, hidden_size=2, num_hidden_layers=1, model_type="llama")
    bits = torch.tensor([0x7F800001, 0], dtype=torch.int32).view(torch.float32)
    whole = save(
        {"model.layers.0.steering.vector": bits},
        metadata={"steering_config": json.dumps(config.to_dict())},
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reader in (artifact.read, artifact.read_numpy):
            with pytest.raises(SteerError, match="holds NaN or Inf"):
                reader(path)


def test_a_changed_bit_is_told_by_the_checksum(folder):
    path = folder / TENSOR_FILE
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # a bit of a mantissa: still a number
    path.write_bytes(content)
    with pytest.raises(SteerError, match="checksum") as error:
        artifact.read(folder)
    message(error)

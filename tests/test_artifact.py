"""The artifact: exact round trips, refusal of whatever is not one, writes that never tear the old one."""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from transformers import PreTrainedModel

import steer
from steer import SteerError, SteeringConfig, SteeringVectors, artifact
from steer.artifact import CARD_FILE, CONFIG_FILE, TENSOR_FILE, Artifact
from steer.artifact_file import MAX_BYTES

Build = Callable[..., PreTrainedModel]


def message(error: pytest.ExceptionInfo[SteerError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def steered(model: PreTrainedModel, **config: Any) -> SteeringVectors:
    vectors = steer.attach(model, SteeringConfig(**config))
    with torch.no_grad():
        for index, parameter in enumerate(vectors.parameters()):
            parameter.copy_(torch.randn(32, generator=torch.Generator().manual_seed(index)))
    return vectors


@pytest.fixture
def folder(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """Saved vectors of all three layers of `tiny_llama`, which has been detached again."""
    tiny_llama.config._name_or_path = "org/tiny"
    out = steered(tiny_llama, provenance={"recipe": "test", "scores": [0.5]}).save(tmp_path / "vectors")
    steer.detach(tiny_llama)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> None:
    """Rewrite the tensor file with other tensors (None takes one out) or another embedded config."""
    path = folder / TENSOR_FILE
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["steering_config"]) | config
        kept: dict[str, torch.Tensor | None] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept |= tensors or {}
    text = json.dumps(values)
    save_file({n: t for n, t in kept.items() if t is not None}, path, metadata={"steering_config": text})
    (folder / CONFIG_FILE).write_text(text)


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


# --- fuzz

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(path: Path) -> None:
    """Either a checked artifact or one line of SteerError; anything else is a crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = artifact.read(path)
        except SteerError as error:
            assert "\n" not in str(error)
        else:
            artifact.check(found, "fuzz")


@FUZZ
@given(
    data=st.binary(max_size=300) | st.binary(max_size=200).map(lambda b: struct.pack("<Q", len(b) // 2) + b)
)
def test_random_bytes_are_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(SteerError) as error:
        artifact.read(path)
    message(error)


@FUZZ
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_changed_bytes_never_crash(tmp_path, places):
    config = SteeringConfig(hidden_size=4, num_hidden_layers=3, layers=0, model_type="llama")
    artifact.write(tmp_path, Artifact(config, {FIRST: torch.arange(4.0)}))
    path = tmp_path / TENSOR_FILE
    data = bytearray(path.read_bytes())
    for place, byte in places:
        data[int(place * len(data))] = byte
    path.write_bytes(data)
    read_or_refuse(path)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@FUZZ
@given(
    values=st.dictionaries(st.sampled_from(list(SteeringConfig.__dataclass_fields__)), ANYTHING, max_size=3)
)
def test_any_json_values_in_the_config_never_crash(tmp_path, values):
    path = tmp_path / TENSOR_FILE
    text = json.dumps({"hidden_size": 4, "num_hidden_layers": 3, "model_type": "llama"} | values)
    path.write_bytes(save({FIRST: torch.arange(4.0)}, metadata={"steering_config": text}))
    (tmp_path / CONFIG_FILE).write_text(text)
    read_or_refuse(path)


def test_a_changed_bit_is_told_by_the_checksum(folder):
    path = folder / TENSOR_FILE
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # a bit of a mantissa: still a number
    path.write_bytes(content)
    with pytest.raises(SteerError, match="checksum") as error:
        artifact.read(folder)
    message(error)

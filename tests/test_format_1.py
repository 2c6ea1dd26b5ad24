"""
Files of artifact format 1 still load. Those in tests/data/format-1 were written by steer 0.1.0: an artifact
from four updates of a tiny Llama, and its exports that carry the config.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.format_1 import downgrade
from helpers.steering import message
from helpers.training import SPREAD, same

import steer
from steer import SteerError, SteeringConfig, artifact
from steer.artifact_file import CONFIG_FILE, TENSOR_FILE
from steer.artifact_scores import MEASURED
from steer.config import FORMAT_VERSION
from steer.export import gguf, peft
from steer.prompt import PromptSpec

DATA = Path(__file__).parent / "data" / "format-1"
VECTORS = DATA / "vectors"
NEW = {
    "base_model_name_or_path": "model",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "format_version": FORMAT_VERSION,
}


@pytest.fixture
def model(build_tiny: Any) -> Any:
    """The base that the vectors were trained in: its tokenizer had ten tokens added to the tests' own."""
    return build_tiny("llama", initializer_range=SPREAD, vocab_size=107)


def embedded(folder: Path) -> dict[str, Any]:
    content = (folder / TENSOR_FILE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["steering_config"])


def as_read(config: SteeringConfig) -> dict[str, Any]:
    """A config without the checksum of the vectors that its scores are of, which reading adds."""
    values = config.to_dict()
    values["provenance"] = {k: v for k, v in values["provenance"].items() if k != MEASURED}
    return values


def test_the_fixture_is_of_format_1() -> None:
    for values in (embedded(VECTORS), json.loads((VECTORS / CONFIG_FILE).read_text())):
        assert values["format_version"] == 1
        assert (values["width"], values["depth"], values["base_model"]) == (32, 3, "model")
        assert not {"hidden_size", "num_hidden_layers", "base_model_name_or_path"} & set(values)


def test_an_artifact_loads_as_the_object_of_today() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the config beside the tensors says the same
        saved = artifact.read(VECTORS)
    old = embedded(VECTORS)
    kept = {k: v for k, v in old.items() if k not in ("width", "depth", "base_model")}
    prompt = PromptSpec(old["provenance"]["run"]["template"])
    assert prompt.template == "plain" != PromptSpec().template
    assert as_read(saved.config) == {**kept, **NEW, "prompt": prompt.to_dict(), "base_adapter": None}
    assert saved.config.provenance["results"]["after"]["problems"] == 6
    assert {name: tuple(t.shape) for name, t in saved.tensors.items()} == {
        f"model.layers.{i}.steering.vector": (32,) for i in range(3)
    }
    assert all(tensor.norm() > 0 for tensor in saved.tensors.values())
    assert as_read(artifact.read_numpy(VECTORS).config) == as_read(saved.config)
    assert SteeringConfig.from_dict(saved.config.to_dict()) == saved.config


def test_an_artifact_steers_its_model(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # by its checksum it is the base that they were made for
        vectors = steer.load(VECTORS, model)
    assert same(vectors.tensors(), artifact.read(VECTORS).tensors)


def test_what_is_written_is_of_the_present_format(tmp_path: Path) -> None:
    saved = artifact.read(VECTORS)
    folder = artifact.write(tmp_path / "again", saved)
    for values in (embedded(folder), json.loads((folder / CONFIG_FILE).read_text())):
        assert {name: values[name] for name in NEW} == NEW
        assert not {"width", "depth", "base_model"} & set(values)
    again = artifact.read(folder)
    assert again.config == saved.config and same(again.tensors, saved.tensors)


def test_exports_with_a_config_of_format_1_are_read_whole(model: Any) -> None:
    saved = artifact.read(VECTORS)
    for read, path in ((gguf.read, DATA / "vectors.gguf"), (peft.read, DATA / "peft")):
        found = read(path, model)
        assert as_read(found.config) == {**as_read(saved.config), "layers": found.config.layers}
        assert same(found.tensors, saved.tensors)


def test_downgraded_files_are_those_that_format_1_wrote(tmp_path: Path) -> None:
    """What other tests make with `downgrade` is what the old version left."""
    folder = artifact.write(tmp_path / "vectors", artifact.read(VECTORS))
    downgrade(folder)
    assert embedded(folder) == embedded(VECTORS)
    assert (folder / CONFIG_FILE).read_text() == (VECTORS / CONFIG_FILE).read_text()
    assert artifact.read(folder).config == artifact.read(VECTORS).config


def test_a_damaged_file_of_format_1_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(VECTORS, tmp_path / "vectors"))
    content = bytearray((folder / TENSOR_FILE).read_bytes())
    content[-1] ^= 1
    (folder / TENSOR_FILE).write_bytes(content)
    with pytest.raises(SteerError, match="checksum"):
        artifact.read(folder)


@pytest.mark.parametrize(
    ("version", "field"),
    [
        (1, "hidden_size"),
        (1, "num_hidden_layers"),
        (1, "base_model_name_or_path"),
        (2, "width"),
        (2, "depth"),
    ],
)
def test_each_format_has_its_own_names(version: int, field: str) -> None:
    with pytest.raises(SteerError, match="unknown fields") as error:
        SteeringConfig.from_dict({"format_version": version, field: 3})
    assert field in message(error)


def test_a_config_in_memory_is_of_the_present_format() -> None:
    with pytest.raises(SteerError, match="from_dict") as error:
        SteeringConfig(format_version=1)
    message(error)
    assert SteeringConfig.from_dict({"format_version": 1}).format_version == FORMAT_VERSION


def test_arithmetic_of_both_formats(tmp_path: Path) -> None:
    old, new = artifact.read(VECTORS), artifact.read(artifact.write(tmp_path / "new", artifact.read(VECTORS)))
    total = old + new
    for layer, vector in total.by_layer().items():
        torch.testing.assert_close(vector, 2 * old.by_layer()[layer])

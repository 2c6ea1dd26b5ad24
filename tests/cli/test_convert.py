"""`steer import`, `export` and `diff`: which model the vectors are for, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.steering import fill
from helpers.training import model_folder

import steer
from steer import artifact
from steer.cli import main
from steer.config import Condition


@pytest.fixture
def place(tmp_path: Path, build_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two models and vectors of the first, in other tools' files as well."""
    monkeypatch.chdir(tmp_path)
    model = build_tiny("llama")
    model_folder(tmp_path / "model", model, tiny_tokenizer)
    model_folder(tmp_path / "deeper", build_tiny("qwen2", num_hidden_layers=4), tiny_tokenizer)
    config = steer.SteeringConfig(layers="1-2", base_model_name_or_path="model")
    fill(steer.attach(model, config)).save("vectors")
    for kind, name in (("lm-eval", "v.pt"), ("npy", "v.npy"), ("gguf", "v.gguf"), ("peft", "adapter")):
        assert main(["export", "vectors", "--to", kind, "--out", name]) == 0
    return tmp_path


@pytest.mark.parametrize(("source", "model"), [("v.pt", "deeper"), ("v.pt", "model"), ("v.npy", "model")])
def test_a_file_that_names_no_model_is_imported_when_that_is_confirmed(
    place: Path, capsys: pytest.CaptureFixture[str], source: str, model: str
) -> None:
    argv = ["import", source, "--model", model, "--out", "out"]
    assert main(argv) == 1
    assert f"if they were made for {model}, add --confirm-model" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main([*argv, "--confirm-model"]) == 0
    kind = "lm-eval" if source == "v.pt" else "arrays"
    found = artifact.read("out").config
    assert found.provenance == {"import": {"format": kind, "file": source, "base_model": None}}
    page = (Path("out") / "README.md").read_text()
    assert f"Imported from `{source}` ({kind}), which does not say for which model" in page


@pytest.mark.parametrize("source", ["v.gguf", "adapter"])
def test_a_file_of_steer_knows_its_model(place: Path, source: str) -> None:
    assert main(["import", source, "--model", "model", "--out", "out"]) == 0
    assert artifact.read("out").config == artifact.read("vectors").config


@pytest.mark.parametrize("source", ["v.gguf", "adapter"])
def test_a_file_of_steer_for_another_model_is_imported_when_that_is_confirmed(
    place: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    (place / "model").rename("copy")
    argv = ["import", source, "--model", "copy", "--out", "out"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "says that its vectors are for 'model'; if they were made for copy, add --confirm-model" in error
    assert main([*argv, "--confirm-model"]) == 0
    found, before = artifact.read("out").config, artifact.read("vectors").config
    assert (found.base_model_name_or_path, found.base_checksum) == ("copy", None)
    assert (found.layers, found.hidden_size, found.prompt) == (
        before.layers,
        before.hidden_size,
        before.prompt,
    )
    assert main(["import", source, "--model", "./copy", "--out", "again"]) == 1, "the file is as it was"
    (place / "model").symlink_to("copy")
    assert main(["import", source, "--model", "./copy", "--out", "again"]) == 0, "one place, two names"


@pytest.mark.parametrize("kind", ["constant", "shared"])
def test_the_scale_of_an_export_is_that_of_its_part_too(place: Path, build_tiny: Any, kind: str) -> None:
    # Two layers are fewer than the rank: the part has constant vectors.
    config = steer.SteeringConfig(kind=kind, rank=3, scale=0.5, base_model_name_or_path="model")
    fill(steer.attach(build_tiny("llama"), config)).save("half")
    argv = ["export", "half", "--to", "npy", "--scale", "2"]
    assert main([*argv, "--out", "whole.npy"]) == 0
    assert main([*argv, "--layers", "1-2", "--out", "part.npy"]) == 0
    whole, part = np.load("whole.npy"), np.load("part.npy")
    assert not part[0].any() and np.allclose(part[1:], whole[1:]) and np.abs(part[1:]).max() > 0.1


@pytest.mark.parametrize(("kind", "source"), [("gguf", "back.gguf"), ("peft", "back")])
def test_vectors_of_a_foreign_file_go_through_a_file_of_steer(place: Path, kind: str, source: str) -> None:
    assert main(["import", "v.npy", "--model", "model", "--out", "first", "--confirm-model"]) == 0
    assert main(["export", "first", "--to", kind, "--out", source]) == 0
    assert main(["import", source, "--model", "model", "--out", "second"]) == 0
    assert artifact.read("second").config == artifact.read("first").config


def test_an_adapter_that_names_its_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file("adapter/adapter_model.safetensors")
    save_file(tensors, "adapter/adapter_model.safetensors", {"format": "pt"})  # as PEFT writes it
    config = Path("adapter/adapter_config.json")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": "user/other"}))
    argv = ["import", "adapter", "--model", "model", "--out", "out"]
    assert main(argv) == 1
    assert "says that its vectors are for 'user/other'" in capsys.readouterr().err
    config.write_text(json.dumps({**values, "base_model_name_or_path": "model"}))
    assert main(argv) == 0
    expected = {"format": "peft", "file": "adapter", "base_model": "model"}
    assert artifact.read("out").config.provenance == {"import": expected}


@pytest.mark.parametrize("source", ["nothing", "nothing.gguf", "", "x" * 5000])
def test_a_source_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    assert main(["import", source, "--model", "model", "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert "there is no file or folder" in error or "cannot read" in error
    assert "must end in" not in error


def test_an_array_with_a_row_of_the_embeddings(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = np.concatenate([np.zeros((1, 32), np.float32), np.load("v.npy")])
    np.save("hidden.npy", hidden)
    argv = ["import", "hidden.npy", "--model", "model", "--out", "out", "--confirm-model"]
    assert main(argv) == 1
    assert "give --embeddings-row" in capsys.readouterr().err
    assert main([*argv, "--embeddings-row"]) == 0
    assert artifact.read("out").config.layers == "1-2"
    assert main(["import", "v.gguf", "--model", "model", "--out", "no", "--embeddings-row"]) == 1
    assert "--embeddings-row is for arrays" in capsys.readouterr().err


def test_direction_0_of_a_file_that_does_not_tell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(Path("other.gguf"), "controlvector")
    for block in (0, 1):
        writer.add_tensor(f"direction.{block}", np.full(32, block + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    argv = ["import", "other.gguf", "--model", "model", "--out", "out", "--confirm-model"]
    assert main(argv) == 1
    assert "give --block-0 keep, else --block-0 drop" in capsys.readouterr().err
    assert main([*argv, "--block-0", "keep"]) == 0
    assert artifact.read("out").config.layers == "0-1"
    assert main([*argv, "--block-0", "drop", "--force"]) == 0
    assert artifact.read("out").config.layers == "1"
    assert main(["import", "v.npy", "--model", "model", "--out", "no", "--block-0", "drop"]) == 1
    assert "--block-0 is for GGUF control vectors" in capsys.readouterr().err


def test_a_gguf_model_takes_no_hub_id(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["export", "vectors", "--to", "gguf-model", "--model", "user/model", "--out", "out.gguf"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "give a local .gguf file or the name of bundled weights (smollm2-135m-instruct, " in error
    assert "hub" not in error


def test_diff_of_two_families_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["import", "v.pt", "--model", "deeper", "--out", "other", "--confirm-model"]
    assert main(argv) == 0
    assert main(["diff", "vectors", "vectors"]) == 0
    assert "note:" not in capsys.readouterr().out
    assert main(["diff", "vectors", "other"]) == 0
    shown = capsys.readouterr().out
    assert "model_type: llama | qwen2" in shown and "num_hidden_layers: 3 | 4" in shown
    assert "note: the two are for models of different families or depths" in shown
    assert main(["diff", "vectors", "other", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["differ"]["model_type"] == ["llama", "qwen2"] and "families" in told["note"]


def test_diff_tells_of_a_condition(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = artifact.read("vectors").with_condition(Condition(0, 0.25), torch.ones(32), {"made": "here"})
    artifact.write("conditional", made)
    assert main(["diff", "vectors", "conditional"]) == 0
    assert "condition: None | Condition(layer=0, threshold=0.25)" in capsys.readouterr().out


def test_a_plain_copy_loads_no_donor(place: Path) -> None:
    argv = [
        "transfer",
        "vectors",
        "--to",
        "model",
        "--from",
        "nothing",
        "--method",
        "direct",
        "--out",
        "moved",
    ]
    assert main([*argv, "--no-rescale"]) == 0
    moved, before = (artifact.read(name).by_layer() for name in ("moved", "vectors"))
    torch.testing.assert_close(moved, before)
    assert main([*argv, "--force"]) == 1, "to rescale, the donor is read"


def test_scales_of_constant_vectors_are_refused_before_any_answer(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> torch.nn.Module:
        raise AssertionError("loaded")

    monkeypatch.setattr("steer.lens.inputs.load_model", load)
    assert main(["lens", "scales", "vectors", "--model", "model"]) == 1
    assert "scale maps need adaptive vectors" in capsys.readouterr().err

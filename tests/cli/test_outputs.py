"""Output paths of commands: parents are made, nothing is replaced without --force, and then as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.training import model_folder

import steer
from steer.artifact import TENSOR_FILE
from steer.cli import main
from steer.sae import SAE, SAEConfig, save_sae


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    steer.attach(tiny_llama, steer.SteeringConfig(layers="1-2")).save("vectors")
    save_sae(SAE(SAEConfig(d_in=8, d_sae=16, k=2)), tmp_path / "sae")
    return tmp_path


COMMANDS = {
    **{kind: ["export", "vectors", "--to", kind] for kind in ("peft", "gguf", "lm-eval", "npz")},
    "checkpoint": ["export", "vectors", "--to", "checkpoint", "--model", "model"],
    "import": ["import", "array.npz", "--model", "model"],
    "transfer": ["transfer", "vectors", "--to", "model", "--from", "model", "--method", "direct"],
    "sae": ["sae", "convert", "sae"],
}
SUFFIX = {"npz": ".npz", "gguf": ".gguf", "lm-eval": ".pt"}


def words(name: str, out: str) -> list[str]:
    return [*COMMANDS[name], *(["--out"] if name != "sae" else []), out]


def content(path: Path | str) -> dict[str, bytes]:
    path = Path(path)
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_rule(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["export", "vectors", "--to", "npz", "--out", "array.npz"]) == 0
    out = f"new/parents/out{SUFFIX.get(name, '')}"
    assert main(words(name, out)) == 0, capsys.readouterr().err
    made = content(out)
    if Path(out).is_dir():
        (Path(out) / "left over").write_text("from before")
    else:
        Path(out).write_bytes(b"from before")
    before = content(out)
    capsys.readouterr()
    assert main(words(name, out)) == 1
    assert f"{out} exists already" in capsys.readouterr().err
    assert content(out) == before
    assert main([*words(name, out), "--force"]) == 0
    assert content(out).keys() == made.keys()
    assert content(out) != before


def test_a_folder_of_something_else_is_never_deleted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("years")
    assert main([*words("peft", "mine"), "--force"]) == 1
    assert "a folder of other files" in capsys.readouterr().err
    assert content("mine") == {"thesis.tex": b"years"}


def test_the_source_is_never_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content("vectors")
    assert main([*words("peft", "vectors"), "--force"]) == 1
    assert "is what the command reads" in capsys.readouterr().err
    assert content("vectors") == before


def test_a_failed_replacement_leaves_what_was_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(words("transfer", "out")) == 0
    before = content("out")

    def fail(folder: Any, artifact: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / TENSOR_FILE).write_bytes(b"half")
        raise steer.SteerError("the disk is full")

    monkeypatch.setattr("steer.artifact.write", fail)
    assert main([*words("transfer", "out"), "--force"]) == 1
    assert content("out") == before
    assert [path.name for path in place.glob(".out*")] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--to", "npz", "--model", "model"], "--model is for --to checkpoint, gguf-model and peft"),
        (["--to", "peft", "--block-0", "drop"], "--block-0 is for --to gguf"),
    ],
)
def test_an_option_that_the_format_does_not_use_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], change: list[str], expected: str
) -> None:
    assert main(["export", "vectors", *change, "--out", "out.npz"]) == 1
    assert expected in capsys.readouterr().err
    assert not Path("out.npz").exists()


def test_errors_name_options_of_the_command_line(
    place: Path, capsys: pytest.CaptureFixture[str], tiny_llama: Any
) -> None:
    steer.detach(tiny_llama)
    vectors = steer.attach(tiny_llama, steer.SteeringConfig(layers="0-1"))
    vectors.set_tensors({name: tensor + 1 for name, tensor in vectors.tensors().items()})
    vectors.save("first")
    assert main(["export", "first", "--to", "gguf", "--out", "v.gguf"]) == 1
    error = capsys.readouterr().err
    assert "(--block-0 drop)" in error and "block_0=" not in error

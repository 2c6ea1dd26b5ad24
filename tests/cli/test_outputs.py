"""Output paths of commands: parents are made, nothing is replaced without --force, and then as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.evaluating import make_run
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
    "import": ["import", "array.npz", "--model", "model", "--confirm-model"],
    "transfer": ["transfer", "vectors", "--to", "model", "--from", "model", "--method", "direct"],
    "sae": ["sae", "convert", "sae"],
    "lens logit": ["lens", "logit", "vectors", "--model", "model"],
    "lens directions": ["lens", "directions", "vectors"],
}
SUFFIX = {"npz": ".npz", "gguf": ".gguf", "lm-eval": ".pt", "lens logit": ".svg", "lens directions": ".png"}


def words(name: str, out: str) -> list[str]:
    option = {"sae": [], "lens logit": ["--plot"], "lens directions": ["--plot"]}.get(name, ["--out"])
    return [*COMMANDS[name], *option, out]


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


def test_a_model_that_is_read_is_never_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "vectors", "--to", "npz", "--out", "array.npz"]) == 0
    Path("model", "words.jsonl").write_text('{"positive": "a", "negative": "b"}\n')
    before = content("model")
    for argv in (
        words("checkpoint", "model"),
        words("import", "model"),
        words("transfer", "model"),
        ["transfer", "vectors", "--to", "array.npz", "--from", "model", "--out", "model"],
        ["calibrate", "vectors", "--target-kl", "0.05", "--model", "model", "--out", "model"],
        ["extract", "token", "7", "--model", "model", "--out", "model"],
        ["extract", "pairs", "model/words.jsonl", "--model", "user/name", "--out", "model"],
    ):
        assert main([*argv, "--force"]) == 1
        assert "model is what the command reads" in capsys.readouterr().err, argv
    assert content("model") == before


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "model.safetensors"],
        ["config.json", "model-00001-of-00002.safetensors", "steering_config.json"],
        ["config.json", "pytorch_model.bin"],
        ["config.json", "tokenizer.json"],
        ["adapter_config.json", "adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.bin"],
    ],
)
def test_models_and_adapters_that_steer_did_not_write_are_kept(
    place: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    Path("mine").mkdir()
    for name in names:
        Path("mine", name).write_bytes((2).to_bytes(8, "little") + b"{}")
    before = content("mine")
    assert main([*words("peft", "mine"), "--force"]) == 1
    assert "a folder of other files" in capsys.readouterr().err
    assert content("mine") == before


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
        (["--to", "npy"], "--to npy writes a .npy file, and --out is 'out.npz'"),
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


def test_a_file_is_not_written_over_a_folder_nor_the_reverse(place: Path, capsys) -> None:
    Path("file").write_text("mine")
    for argv in (words("checkpoint", "file"), words("peft", "file"), words("sae", "file")):
        assert main([*argv, "--force"]) == 1
        assert "file is a file, and a folder is written" in capsys.readouterr().err
    Path("folder.npz").mkdir()
    assert main([*words("npz", "folder.npz"), "--force"]) == 1
    assert "is a folder, and a file is written" in capsys.readouterr().err
    assert Path("file").read_text() == "mine"


def test_a_folder_with_folders_inside_is_never_deleted(place: Path, capsys) -> None:
    """A run's folder has a table too, and all that was trained beside it."""
    (place / "run" / "vectors").mkdir(parents=True)
    (place / "run" / "table.md").write_text("scores")
    assert main([*words("peft", "run"), "--force"]) == 1
    assert "a folder of other files" in capsys.readouterr().err
    assert (place / "run" / "vectors").is_dir()


def test_a_folder_that_cannot_be_written(place: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(words("npz", "out.npz")) == 1
    assert "no permission to write in" in capsys.readouterr().err


def test_outputs_of_the_lens_are_refused_before_the_model_is_loaded(
    place: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("steer.lens.inputs.load_model", load)
    for name in ("page.html", "figure.png"):
        Path(name).write_text("from before")
    Path("figures").mkdir()
    (Path("figures") / "mine.png").write_text("mine")
    for argv, expected in (
        (["report", "--out", "page.html"], "page.html exists already: give another --out, or --force"),
        (["report", "--figures", "figures"], "figures exists already: give another --figures, or --force"),
        (["report", "--figures", "figures", "--force"], "a folder of other files"),
        (["logit", "--plot", "figure.png"], "figure.png exists already: give another --plot, or --force"),
        (["logit", "--plot", "figures"], "figures is a folder, and a file is written; give another --plot"),
        (["logit", "--plot", "figure.doc"], "'figure.doc' is not the name of a figure: it must end in .png"),
        (["logit", "--plot", "page.html/figure.png"], "page.html is a file, not a folder"),
    ):
        assert main(["lens", argv[0], "vectors", "--model", "model", *argv[1:]]) == 1
        assert expected in capsys.readouterr().err


def test_a_page_of_scores_is_replaced_with_force_alone(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run", {"base": [[True], [False]], "good": [[True], [True]]})
    argv = ["compare", str(run), "--out", str(tmp_path / "new" / "page")]
    assert main(argv) == 0
    left = tmp_path / "new" / "page" / "old.png"
    left.write_text("from before")
    assert main(argv) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0
    assert not left.exists()
    assert main(["compare", str(run), "--out", str(run), "--force"]) == 1
    assert "is what the command reads" in capsys.readouterr().err

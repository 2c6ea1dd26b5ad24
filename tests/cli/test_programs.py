"""`steer train` and the other programs: one piece of code for the command, the recipe and the wheel."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers.paths import ROOT

import steer.training.recipe
from steer.cli import main, programs
from steer.recipe_files import LAUNCHER, recipes_folder

# A recipe, and the words of the command that is the same program.
DOORS = {
    "grpo_steer": ["train"],
    "sft_steer": ["train", "--method", "sft"],
    "dpo_steer": ["train", "--method", "dpo"],
    "grpo_baseline": ["train-baseline"],
    "layer_sweep": ["sweep"],
    "train_sae": ["sae", "train"],
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Programs that are noted and not run: name and words."""
    found: list[tuple[str, list[str]]] = []

    def noting(name: str) -> Callable[[list[str]], int]:
        return lambda words: found.append((name, words)) or 0

    for name, (_, text) in programs.PROGRAMS.items():
        monkeypatch.setitem(programs.PROGRAMS, name, (noting(name), text))
    return found


@pytest.mark.parametrize(("recipe", "command"), DOORS.items())
def test_a_recipe_and_its_command_are_one_program(recipe, command, seen, monkeypatch) -> None:
    words = ["--config", "demo", "--x", "-1", "a", "--help", "-h", "--config=b"]
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    assert not end.value.code
    assert main([*command, *words]) == 0
    name = " ".join(word for word in command[:2] if not word.startswith("-"))
    assert seen == [(name, [*command[len(name.split()) :], *words])] * 2


def test_every_recipe_has_a_command() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.py")} == set(DOORS)
    assert all(programs.find(command) for command in DOORS.values())


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_help_teaches_with_examples(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"usage: steer {name}")
    assert f"\n    steer {name} " in out and "python -m" not in out


def test_the_list_of_commands_has_all(capsys: pytest.CaptureFixture) -> None:
    for words in ([], ["sae"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    out = capsys.readouterr().out
    for name, (_, text) in programs.PROGRAMS.items():
        assert f"    {name.split()[-1]}" in out and " ".join(text.split()[:3]) in out


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from steer.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_compare_has_two_forms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert main(["compare", "nowhere", "--out", "page"]) == 1
    assert "nowhere" in capsys.readouterr().err
    for words in (["--config", "compare-tin"], ["--config=compare-tin"]):
        assert main(["compare", *words]) == 1
        assert "steer's: compare-tiny, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("steer.evaluation.browse.collect", ["browse", "runs"]),
        ("steer.evaluation.run.evaluate", ["eval", "--model", "m", "--benchmarks", "gsm8k", "--out", "runs"]),
    ],
)
def test_a_reader_that_has_seen_enough_ends_a_program_quietly(place, words, monkeypatch) -> None:
    def gone(*args: object, **kwargs: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    turned: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "dup2", lambda old, new: turned.append(new))  # of the tests' own output
        patched.setattr(place, gone)
        assert main(words) == 0
    assert turned == [sys.stdout.fileno()]


@pytest.mark.parametrize("launcher", [["--launcher", "ddp"], ["--launcher=ddp"]])
def test_a_launcher_starts_the_same_command(launcher: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    def execv(path: str, words: list[str]) -> None:
        raise Replaced(words)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv(LAUNCHER, "")  # so that it is put back afterwards
    with pytest.raises(Replaced) as replaced:
        main(["sweep", "--config", "demo", *launcher, "--each_layer", "all"])
    words = replaced.value.args[0]
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    launch = launch_command_parser().parse_args(words[3:])
    assert launch.config_file == str(recipes_folder() / "accelerate" / "ddp.yaml")
    assert launch.module and launch.training_script == "steer.cli"
    assert launch.training_script_args == ["sweep", "--config", "demo", "--each_layer", "all"]
    assert os.environ[LAUNCHER] == "ddp", "for the command that find_lr prints"


@pytest.mark.parametrize(
    ("words", "named"), [(["--launcher"], "--launcher needs"), (["--launcher", "dpd"], "steer's: ddp, ")]
)
def test_a_wrong_launcher_is_one_line(words, named, capsys) -> None:
    assert main(["train", *words]) == 1
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "launched", "kept"),
    [(None, False, "0"), ("2,3", False, "2"), ("", False, ""), ("2,3", True, "2,3")],
)
def test_without_a_launcher_one_gpu_is_visible(visible, launched, kept, monkeypatch) -> None:
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("WORLD_SIZE", "2" if launched else None)):
        if value is None:
            monkeypatch.setenv(name, "")  # so that it is put back afterwards
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(steer.training.recipe, "start", lambda run: None)
    assert main(["train", "--config", "demo"]) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == kept

"""Configs and launchers that come with the package are found by name; a path works too."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.steering import message

from steer import recipe_files
from steer.errors import SteerError
from steer.recipe_files import config_file, launcher_file, recipes_folder


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file("demo") == ROOT / "recipes" / "configs" / "demo.yaml"
    assert launcher_file("ddp") == ROOT / "recipes" / "accelerate" / "ddp.yaml"
    (tmp_path / "mine.yaml").write_text("model: x\n")
    assert config_file("mine.yaml") == Path("mine.yaml")
    (tmp_path / "demo").mkdir()  # a folder is no config
    assert config_file("demo") == recipes_folder() / "configs" / "demo.yaml"


@pytest.mark.parametrize("given", ["dem", "configs/demos.yaml", "x" * 5000, "\0", ""])
def test_an_unknown_name_lists_what_there_is(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteerError) as error:
        config_file(given)
    text = message(error)
    names = text.rpartition(": ")[2].split(", ")
    assert sorted(names) == sorted(path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml"))
    if "dem" in given:
        assert names[0] == "demo"


def test_the_folder_in_a_wheel_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "steer"
    package.mkdir(parents=True)
    monkeypatch.setattr(recipe_files, "__file__", str(package / "recipe_files.py"))
    with pytest.raises(SteerError, match="pip install steer-rl"):
        recipes_folder()
    for folder in (package.parent / "recipes", package / "recipes"):  # the first as in a clone
        (folder / "configs").mkdir(parents=True)
        assert recipes_folder() == folder

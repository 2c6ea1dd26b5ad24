"""`steer play` on the command line, and the vectors of its demo."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.paths import ROOT

from steer.cli import main, play
from steer.play.demo import MODEL, demo_artifacts


@pytest.fixture(autouse=True)
def gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked for first; none of these tests comes as far as the page."""
    monkeypatch.setattr("steer.extras.find_spec", lambda name: True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "takes artifacts or --demo, and neither was given"),
        (["--demo", "x"], "takes artifacts or --demo, and both were given"),
        (["nowhere"], "nowhere"),
        (["a=VECTORS", "a=VECTORS"], "two sets have one name (a, a); write NAME=ARTIFACT"),
        (["VECTORS", "--model", "nowhere.gguf"], "nowhere.gguf"),
        (["VECTORS", "--dtype", "float31"], "dtype 'float31'"),
    ],
)
def test_what_cannot_work_is_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = str(ROOT / "evals/results/demo/vectors")
    assert main(["play", *(word.replace("VECTORS", demo) for word in words)]) == 1
    told = capsys.readouterr().err
    assert line in told and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_port_is_a_number(port: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["play", "--demo", "--port", port])
    assert "--port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("::", True)],
)
def test_a_page_for_other_machines_is_warned_of(
    host: str, warned: bool, monkeypatch: Any, capsys: Any
) -> None:
    served: list[str] = []
    page = SimpleNamespace(build_page=lambda *_: "page", launch=lambda _, host, port: served.append(host))
    monkeypatch.setitem(sys.modules, "steer.play.page", page)
    assert main(["play", "--demo", "--host", host]) == 0
    assert served == [host]
    assert ("without a password" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("runs/math/vectors", "math"),
        ("runs/math/vectors@0.5", "math"),
        ("runs/math/steering.safetensors", "steering.safetensors"),
        ("brief", "brief"),
        ("user/brief", "brief"),
        ("a=b/c=d", "a"),
        ("./x=y", "x=y"),
    ],
)
def test_a_set_is_named_after_its_folder_or_run(given: str, name: str) -> None:
    assert play._named(given)[0] == name


def test_the_demo_prefers_your_own_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    artifacts, about = demo_artifacts()
    assert list(artifacts) == ["arithmetic", "cheerful"]
    assert {made.config.base_model_name_or_path for made in artifacts.values()} == {MODEL}
    assert "come with steer" in about and "extract" in about
    (artifacts["arithmetic"] * 0.5).save_pretrained("runs/demo/vectors")
    again, about = demo_artifacts()
    assert again["arithmetic"].config.scale == 0.5 and "of your `runs/demo`" in about


def test_the_wheel_has_the_vectors_of_the_demo() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert built["wheel"]["force-include"]["evals/results/demo/vectors"] == "steer/play/vectors/arithmetic"
    shipped = built["sdist"]["include"]
    assert "/evals/results/demo/vectors" in shipped
    assert not {"/tests", "/docs", "/evals/*.py"} & set(shipped), "they do not run without the repository"


def test_the_card_of_cheerful_names_the_file_it_is_made_of() -> None:
    folder = ROOT / "steer/play/vectors"
    made = json.loads((folder / "cheerful/steering_config.json").read_text())["provenance"]["extract"]
    import hashlib

    digest = hashlib.sha256((folder / "cheerful.jsonl").read_bytes()).hexdigest()
    assert made["sha256"] == digest[:16] and made["from"] == "contrasts in cheerful.jsonl"

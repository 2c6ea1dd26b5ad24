"""`steer pack`: artifacts on the hub, which is a folder here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.artifacts import content, equal
from helpers.hub import fake_hub
from helpers.steering import fill

import steer
from steer import SteeringConfig
from steer.artifact import CARD_FILE, CONFIG_FILE, TENSOR_FILE
from steer.cli import main


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_hub(tmp_path, monkeypatch)


@pytest.fixture
def folder(build_tiny: Any, remote: Any, tmp_path: Path) -> Path:
    """An artifact, beside the hub."""
    model = build_tiny("llama")
    model.config._name_or_path = "org/tiny"
    return fill(steer.attach(model, SteeringConfig(layers="1-2"))).save(tmp_path / "mine")


def refused(words: list[str], capsys: Any) -> str:
    assert main(words) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_an_artifact_goes_to_the_hub_is_listed_and_comes_back(folder: Path, remote: Any, capsys: Any) -> None:
    assert main(["pack", "push", str(folder), "me/vectors", "--private", "--message", "First"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name} " in told for name in (CARD_FILE, CONFIG_FILE, TENSOR_FILE))
    assert f"{(folder / TENSOR_FILE).stat().st_size:,} bytes" in told and told.endswith(
        "me/vectors/commit/1\n"
    )
    assert ("create_repo", "me/vectors", {"private": True, "exist_ok": True}) in remote.calls
    sent = {"commit_message": "First", "revision": None}
    assert ("upload_folder", "me/vectors", sent) in remote.calls
    assert 'steer.load("me/vectors", model)' in (remote.home / "me/vectors" / CARD_FILE).read_text()

    assert main(["pack", "list", "me"]) == 0
    told = capsys.readouterr().out
    assert told == "me/vectors\n    org/tiny, layers 1-2 at resid_post, constant, 1 KB\n"

    assert main(["pack", "pull", "me/vectors"]) == 0
    assert "vectors: an artifact" in capsys.readouterr().out
    assert equal(steer.read("vectors"), steer.read(folder))
    assert sorted(content(Path("vectors"))) == sorted([CARD_FILE, CONFIG_FILE, TENSOR_FILE])
    assert (Path("vectors") / CARD_FILE).read_text() == (remote.home / "me/vectors" / CARD_FILE).read_text()


def test_a_card_is_written_into_a_folder_alone(folder: Path, remote: Any, capsys: Any) -> None:
    assert main(["pack", "push", str(folder), "me/vectors"]) == 0
    assert "'me/vectors' is not a folder" in refused(["card", "me/vectors"], capsys)
    assert not Path("me").exists()
    assert "is not a folder" in refused(["card", str(folder / TENSOR_FILE)], capsys)


def test_a_dry_run_uploads_nothing(folder: Path, remote: Any, capsys: Any) -> None:
    assert main(["pack", "push", str(folder), "me/vectors", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert (
        "nothing was uploaded" in told and "# Steering vectors for org/tiny" in told and TENSOR_FILE in told
    )
    assert remote.calls == []


def test_a_card_of_ones_own_is_pushed_and_pulled_as_it_is(folder: Path, remote: Any) -> None:
    (folder / CARD_FILE).write_text("---\ntags: [steering-vectors]\n---\nmine")
    assert main(["pack", "push", str(folder), "me/vectors"]) == 0
    assert main(["pack", "pull", "me/vectors", "--revision", "v1", "--out", "there"]) == 0
    assert Path("there", CARD_FILE).read_text().endswith("mine")
    assert ("download", "me/vectors", TENSOR_FILE, "v1", None) in remote.calls


def test_a_repository_without_a_card_gets_one(folder: Path, remote: Any) -> None:
    assert main(["pack", "push", str(folder), "me/vectors"]) == 0
    (remote.home / "me/vectors" / CARD_FILE).unlink()
    assert main(["pack", "pull", "me/vectors"]) == 0
    assert "# Steering vectors for org/tiny" in Path("vectors", CARD_FILE).read_text()


def test_lists_are_by_author_and_tag(folder: Path, remote: Any, capsys: Any) -> None:
    for name in ("me/one", "you/two"):
        assert main(["pack", "push", str(folder), name]) == 0
    (remote.home / "you/not-vectors").mkdir()
    (remote.home / "you/not-vectors" / CARD_FILE).write_text("---\ntags: [other]\n---\n")
    capsys.readouterr()

    def names(*words: str) -> list[str]:
        assert main(["pack", "list", *words, "--json"]) == 0
        return [one["repo_id"] for one in json.loads(capsys.readouterr().out)]

    assert names() == ["me/one", "you/two"]
    assert names("you") == ["you/two"] and names("--limit", "1") == ["me/one"]
    assert names("--tag", "base_model:org/tiny") == ["me/one", "you/two"]
    assert names("--tag", "base_model:org/other") == []
    assert main(["pack", "list", "nobody", "--tag", "x"]) == 0
    assert capsys.readouterr().out == "the hub has no steering vectors of nobody with the tag x\n"


def test_a_repository_that_cannot_be_read_hides_no_other(folder: Path, remote: Any, capsys: Any) -> None:
    for name in ("me/one", "me/two"):
        assert main(["pack", "push", str(folder), name]) == 0
    (remote.home / "me/one" / CONFIG_FILE).write_text("{")
    (remote.home / "me/two" / TENSOR_FILE).unlink()
    capsys.readouterr()
    assert main(["pack", "list"]) == 0
    told = capsys.readouterr().out
    assert "me/one\n    cannot be read: " in told
    assert "me/two\n    org/tiny, layers 1-2 at resid_post, constant, no tensor file\n" in told


def test_what_is_no_artifact_is_not_pulled(folder: Path, remote: Any, capsys: Any) -> None:
    assert main(["pack", "push", str(folder), "me/vectors"]) == 0
    there = remote.home / "me/vectors" / TENSOR_FILE
    cut = there.read_bytes()
    there.write_bytes(cut[:-4])
    assert "safetensors" in refused(["pack", "pull", "me/vectors"], capsys)
    altered = bytearray(cut)
    altered[-1] ^= 1
    there.write_bytes(altered)
    refused(["pack", "pull", "me/vectors"], capsys)
    there.unlink()
    assert f"did not give {TENSOR_FILE}" in refused(["pack", "pull", "me/vectors"], capsys)
    assert not Path("vectors").exists()
    assert "'mine' is a folder here; give USER/NAME" in refused(
        ["pack", "pull", "mine", "--out", "x"], capsys
    )
    assert "is no id of the hub" in refused(["pack", "pull", "a b/c", "--out", "x"], capsys)


def test_a_folder_is_replaced_with_force_only(folder: Path, remote: Any, capsys: Any) -> None:
    assert main(["pack", "push", str(folder), "me/vectors"]) == 0
    (steer.read(folder) * 3).save_pretrained("vectors")
    before = content(Path("vectors"))
    line = refused(["pack", "pull", "me/vectors"], capsys)
    assert line == "error: vectors exists already: give another --out, or --force to replace it\n"
    (remote.home / "me/vectors" / TENSOR_FILE).rename(remote.home / "kept")
    refused(["pack", "pull", "me/vectors", "--force"], capsys)
    assert content(Path("vectors")) == before
    (remote.home / "kept").rename(remote.home / "me/vectors" / TENSOR_FILE)
    assert main(["pack", "pull", "me/vectors", "--force"]) == 0
    assert equal(steer.read("vectors"), steer.read(folder))


def test_a_hub_out_of_reach_is_one_line(folder: Path, remote: Any, monkeypatch: Any, capsys: Any) -> None:
    def offline(*arguments: Any, **keywords: Any) -> Any:
        raise ConnectionError("Cannot reach https://huggingface.co:\noffline mode is enabled")

    for name in ("list_models", "create_repo"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    assert "cannot be searched (Cannot reach" in refused(["pack", "list"], capsys)
    assert "offline mode is enabled" in refused(["pack", "pull", "me/vectors"], capsys)
    assert "cannot push to me/vectors" in refused(["pack", "push", str(folder), "me/vectors"], capsys)
    refused(["pack", "push", "nowhere", "me/vectors"], capsys)

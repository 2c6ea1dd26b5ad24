"""Recorded scores stay with the vectors that they were measured with, and with no others."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import fill

import steer
from steer import artifact
from steer.artifact_scores import MEASURED, for_export, with_scores
from steer.export import gguf, peft

SCORE = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "problems": 10}
MADE: dict[str, Any] = {"recipe": "grpo_steer", "results": {"after": SCORE}, "controls": {"coin": SCORE}}


@pytest.fixture
def saved(tiny_llama: Any, tmp_path: Path) -> Path:
    """An artifact with scores."""
    vectors = fill(steer.attach(tiny_llama, steer.SteeringConfig(provenance=MADE)))
    folder = vectors.save(tmp_path / "vectors")
    steer.detach(tiny_llama)
    return folder


def scores(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in (artifact.read(folder).config.provenance or {}).items() if k != "recipe"}


def test_unchanged_vectors_keep_their_scores(saved, tiny_llama, tmp_path: Path, caplog) -> None:
    assert scores(saved).items() >= {"results": {"after": SCORE}, "controls": {"coin": SCORE}}.items()
    vectors = steer.load(saved, tiny_llama)
    vectors.scale = 0.5
    vectors.scale = 1.0
    again = vectors.save(tmp_path / "again")
    assert scores(again) == scores(saved) and "0.500" in (again / "README.md").read_text()
    checksum = scores(again)[MEASURED]
    assert checksum and str(checksum) not in (again / "README.md").read_text()
    assert not caplog.records


@pytest.mark.parametrize("change", ["scale", "values", "positions"])
def test_changed_vectors_lose_them(
    change: str, saved: Path, tiny_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = steer.load(saved, tiny_llama)
    if change == "scale":
        vectors.scale = 0.5
    elif change == "values":
        with torch.no_grad():
            vectors.parameters()[1][3] += 1e-3
    else:
        vectors.config = replace(vectors.config, positions="completion")
    with caplog.at_level(logging.WARNING, logger="steer"):
        again = vectors.save(tmp_path / "again")
    assert scores(again) == {} and "None were recorded" in (again / "README.md").read_text()
    assert "scores are of other vectors or of another scale" in caplog.text


def test_scores_that_are_measured_anew_stay(saved: Path, tmp_path: Path) -> None:
    found = artifact.read(saved)
    changed = replace(found.config, scale=2.0, provenance={"results": {"after": {**SCORE, "accuracy": 0.9}}})
    again = artifact.write(tmp_path / "again", replace(found, config=changed))
    assert scores(again)["results"]["after"]["accuracy"] == 0.9


def test_an_artifact_of_an_older_version_is_told_too(saved: Path) -> None:
    """It does not say which vectors its scores are of: those that it holds when it is read."""
    found = artifact.read(saved)
    old = replace(found.config, provenance=MADE)
    read = with_scores(old, found.tensors)
    assert read.provenance == {**MADE, MEASURED: found.config.provenance[MEASURED]}
    assert with_scores(replace(read, scale=3.0), found.tensors).provenance == {"recipe": "grpo_steer"}
    assert with_scores(replace(old, provenance=None), found.tensors).provenance is None
    empty = replace(old, provenance={"results": {}})
    assert with_scores(empty, found.tensors) is empty


def test_a_file_of_another_tool_has_the_scores_of_its_vectors(
    saved: Path, tiny_llama: Any, tmp_path: Path
) -> None:
    found = artifact.read(saved)
    half = replace(found, config=replace(found.config, scale=0.5))
    for source, expected in ((found, MADE), (half, {"recipe": "grpo_steer"})):
        assert for_export(source.config, source.tensors).provenance == expected
        folder = peft.write(source, tmp_path / "adapter")
        assert peft.read(folder, tiny_llama).config.provenance == expected
        file = gguf.write(source, tmp_path / "kept.gguf", block_0="keep")
        assert gguf.read(file, tiny_llama).config.provenance == expected
    with pytest.warns(UserWarning, match="left out"):
        file = gguf.write(found, tmp_path / "dropped.gguf", block_0="drop")
    assert gguf.read(file, tiny_llama).config.provenance == {"recipe": "grpo_steer", "block_0": "drop"}

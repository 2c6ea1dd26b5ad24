"""Peak memory over the dictionary: what parameters promise, the table, and a real measurement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.steering import message

from evals import sae_memory
from steer.errors import SteerError
from steer.sae import SAE, SAEConfig


@pytest.mark.parametrize("settings", [{}, {"encoder": "kron"}, {"encoder": "kron", "m": 4, "n": 8}])
def test_parameters_are_those_of_the_sae(settings):
    config = SAEConfig(24, 64, 4, **settings)
    assert sae_memory.parameters(config) == sum(p.numel() for p in SAE(config).parameters())


def test_what_is_measured_is_written_and_not_measured_again(tmp_path, monkeypatch):
    calls = []

    def measured(command, **options):
        size, m = map(int, command[4:6])
        calls.append((size, m))
        assert options["env"]["MALLOC_MMAP_THRESHOLD_"] == "65536"
        return SimpleNamespace(returncode=0, stdout=f"{size / (2 if m else 1)}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", measured)
    monkeypatch.setattr(sae_memory, "medians", lambda sides, rounds: {"step": 3.0})
    monkeypatch.setattr(sae_memory, "step", lambda *args: None)
    words = ["--sizes", "512", "1024", "--width", "64", "--k", "4", "--out", str(tmp_path)]
    sae_memory.main(words)
    assert len(calls) == 2 * len(sae_memory.HEADS)
    sae_memory.main(words)
    assert len(calls) == 2 * len(sae_memory.HEADS)
    table = (tmp_path / "memory.md").read_text()
    promise = sae_memory.parameters(SAEConfig(64, 512, 4, encoder="kron")) / sae_memory.parameters(
        SAEConfig(64, 512, 4)
    )
    assert f"| 512 | 512 | 3 | memory 0.50 ({promise:.2f}), time 1.00 |" in table
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "memory.json").read_text())["saes"]) == len(calls)
    with pytest.raises(SteerError) as error:
        sae_memory.main([*words, "--batch", "8"])
    assert "results with another batch" in message(error)


def test_the_committed_table_is_that_of_the_committed_numbers():
    folder = Path(sae_memory.__file__).parent / "results" / "sae"
    found = json.loads((folder / "memory.json").read_text())
    assert (folder / "memory.md").read_text() == sae_memory.markdown(found)


@pytest.mark.slow
def test_a_peak_is_four_numbers_a_parameter_and_a_batch(tmp_path):
    """AdamW in float32; 8 MB for the batch and for what the allocator keeps."""
    words = ["--sizes", "16384", "--width", "256", "--k", "4", "--batch", "64", "--rounds", "1"]
    sae_memory.main([*words, "--out", str(tmp_path)])
    for row in json.loads((tmp_path / "memory.json").read_text())["saes"]:
        held = row["parameters"] * 16 / 2**20
        assert held * 0.97 < row["peak_mb"] < held * 1.05 + 8, row

"""The covariance toy: what it measures, on decoders for which the answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evals import sae_covariance as toy


@pytest.fixture
def s() -> torch.Tensor:
    return toy.covariance(blocks=4, seed=0, width=24)


def test_the_rv_coefficient_is_that_of_the_formula(s):
    other = toy.covariance(blocks=2, seed=1, width=24)
    expected = torch.trace(s @ other) / (torch.trace(s @ s) * torch.trace(other @ other)).sqrt()
    assert toy.rv(s, other) == pytest.approx(expected.item())
    assert toy.rv(s, 7 * s) == pytest.approx(1) and toy.rv(s, other) < 1


def test_a_decoder_with_that_covariance_is_recognised_in_any_order_and_sign(s):
    values, vectors = torch.linalg.eigh(s)
    root = (
        vectors @ values.sqrt().diag() @ vectors.T
    )  # rows r with r_i r_j = s_ij, largest at their coordinate
    generator = torch.Generator().manual_seed(0)
    shuffled = root[torch.randperm(24, generator=generator)]
    shuffled = shuffled * (torch.rand(24, 1, generator=generator) < 0.5).double().mul(2).sub(1)
    assert toy.recovered(s, shuffled) == pytest.approx(1, abs=1e-6)
    assert toy.recovered(s, torch.randn(24, 24, generator=generator)) < 0.8


def test_activations_have_the_covariance(s):
    x = toy.sample(s, 20_000, seed=0)
    torch.testing.assert_close((x.T @ x / len(x)).double(), s, rtol=0, atol=0.06)
    assert torch.linalg.eigvalsh(s).min() > 0
    sizes = [len(set(row.tolist())) for row in s.unique(dim=0)]
    assert len(s.unique()) == 1 + 1 + 4 and max(sizes) <= 3  # 0, 1 and a correlation for each block


def test_the_committed_table_is_that_of_the_committed_numbers():
    folder = Path(toy.__file__).parent / "results" / "sae"
    found = json.loads((folder / "covariance.json").read_text())
    assert (folder / "covariance.md").read_text() == toy.markdown(found)
    row = toy.markdown(found).splitlines()[-1]
    ahead = [
        part["KronSAE h=16 m=2 n=4"]["trained"] - part["TopK"]["trained"] for part in found["covariances"]
    ]
    assert f"| {sum(ahead) / len(ahead):+.3f} ± " in row  # of the same covariance


def test_the_study_writes_a_row_for_every_autoencoder(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "BLOCKS", (2, 4))
    toy.main(["--seeds", "1", "--steps", "3", "--batch", "32", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "covariance.json").read_text())
    assert [part["blocks"] for part in found["covariances"]] == [2, 4]
    table = (tmp_path / "covariance.md").read_text()
    assert table == toy.markdown(found)
    assert all(f"| {name} |" in table for name in toy.SAES) and "random rows 0." in table
    part = found["covariances"][0]["TopK"]
    assert 0 < part["untrained"] < 1 and part["trained"] != part["untrained"]

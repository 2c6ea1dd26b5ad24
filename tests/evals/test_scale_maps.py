"""The study of adaptive coefficients on a tiny model."""

from __future__ import annotations

import json

import pytest
from helpers.paths import ROOT
from helpers.steering import fill
from helpers.training import model_folder, write_problems

import steer
from evals import scale_maps


def test_numbers_and_strips_beside_random_readouts(tiny_llama, tiny_tokenizer, tmp_path, capsys) -> None:
    folder = model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    config = steer.SteeringConfig("adaptive", base_model_name_or_path=str(folder))
    source = fill(steer.attach(tiny_llama, config)).save_pretrained(tmp_path / "vectors")
    data = tmp_path / "sums.jsonl"
    write_problems(data, range(10, 14), modulus=10)
    out = tmp_path / "new" / "adaptive"
    argv = [
        "--data",
        str(data),
        "--problems",
        "3",
        "--max-new-tokens",
        "4",
        "--draws",
        "2",
        "--out",
        str(out),
    ]
    scale_maps.main([str(source), *argv])
    told = capsys.readouterr().out
    assert (out.parent / "adaptive.png").is_file() and (out.parent / "adaptive-random.png").is_file()
    draws = json.loads((out.parent / "adaptive.json").read_text())["draws"]
    assert {kind: len(found) for kind, found in draws.items()} == {
        **{"trained": 1, "random direction": 2, "random read-out too": 2}
    }
    (trained,), (first, _), (other, _) = draws.values()
    assert first["std"][0] == pytest.approx(trained["std"][0])  # nothing is before the first layer
    assert other["std"][0] != pytest.approx(trained["std"][0], rel=1e-3)
    assert sorted(trained["spread"])[1] == pytest.approx(
        float(next(line for line in told.splitlines() if "deviation / mean" in line).split(" | ")[1]),
        abs=0.006,
    )


def test_the_page_quotes_the_committed_result() -> None:
    lines = scale_maps.table(json.loads((ROOT / "evals/results/lens/adaptive.json").read_text()))
    page = (ROOT / "docs/lens.md").read_text().splitlines()
    assert set(lines[:7]) <= set(page)

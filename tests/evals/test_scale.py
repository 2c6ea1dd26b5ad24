"""Sizes by calculation: against published sizes, and against what a small model really keeps."""

from __future__ import annotations

import pytest
import torch
from helpers.paths import ROOT
from transformers import PreTrainedModel

import steer
from evals.scale import GB, MODELS, SMOLLM2, Shape, main, row, table

# as counted from the published checkpoints
PARAMETERS = {
    "1.5B": 1_543_714_304,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "70B": 70_553_706_496,
}


def test_parameters_are_those_of_the_checkpoints() -> None:
    assert {name: shape.parameters for name, shape in MODELS.items()} == PARAMETERS
    assert SMOLLM2.parameters == 134_515_008
    assert MODELS["7B"].vectors == 100_352  # the paper's count, arXiv 2509.06608


def test_a_row_adds_up() -> None:
    one, eight = (row("7B", MODELS["7B"], gpus, 1000, 24.0) for gpus in (1, 8))
    assert one["layout"] == eight["layout"] == "whole copy" and one["weights_bytes"] == 2 * PARAMETERS["7B"]
    assert one["gradient_bytes"] == 0 and eight["gradient_bytes"] == 2 * 7 / 8 * 4 * 100_352
    assert one["tokens_per_second"] == pytest.approx(128 * 16 * 1000 * 314 / 86400)
    assert eight["tokens_per_second_a_gpu"] == one["tokens_per_second"] / 8
    assert row("70B", MODELS["70B"], 1, 1000, 24.0)["layout"] == "does not fit"
    sharded = row("70B", MODELS["70B"], 8, 1000, 24.0)
    assert sharded["weights_bytes"] == pytest.approx(141.1 * GB / 8, rel=1e-3)
    assert sharded["shard_bytes"] == pytest.approx(2 * 141.1 * GB * 7 / 8, rel=1e-3)
    lines = table([1, 8, 64], 1000, 24.0).splitlines()
    assert len(lines) == 2 + 4 * 3 and len({line.count("|") for line in lines}) == 1


def test_the_page_holds_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evals.scale"])
    main()
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "distributed.md").read_text()


def test_the_graph_is_as_large_as_calculated(tiny_llama: PreTrainedModel) -> None:
    config = tiny_llama.config
    shape = Shape(3, 32, 48, 4, 2, 8, config.vocab_size)
    assert shape.parameters == sum(p.numel() for p in tiny_llama.parameters())
    steer.attach(tiny_llama)
    weights = {p.untyped_storage().data_ptr() for p in tiny_llama.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dim() > 1 and tensor.shape[-1] > 1:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    tokens = 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiny_llama.model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    # rotations, which all layers share, and the log-sums of attention are left out of the formula
    assert sum(kept.values()) / tokens == pytest.approx(shape.graph(size=4), rel=0.06)

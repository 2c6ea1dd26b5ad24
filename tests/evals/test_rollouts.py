"""`evals.rollouts`: the 8-bit checkpoint, what is said of importance weights, and the table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evals import int8_checkpoint, rollouts
from evals.rollout_workers import VARIANTS


def test_a_weight_is_its_8_bits_times_their_scale_up_to_half_a_step() -> None:
    weight = torch.randn(5, 7) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [1.0]])
    bits, scale = int8_checkpoint.quantize(weight)
    assert bits.dtype == torch.int8 and scale.shape == (5, 1)
    assert torch.all((bits * scale - weight).abs() <= scale * 0.5001)
    assert bits[[0, 1, 2, 4]].abs().amax(1).tolist() == [127] * 4 and not bits[3].any()


def test_the_checkpoint_has_the_decoders_matrices_in_8_bits(build_tiny, tmp_path: Path) -> None:
    model = build_tiny("llama")
    model.save_pretrained(tmp_path / "model")
    size = int8_checkpoint.write(tmp_path / "model", tmp_path / "int8", torch.bfloat16)
    made = load_file(tmp_path / "int8" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in made.values()) == size
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            again = made[f"{name}.weight"].float() * made[f"{name}.weight_scale"]
            assert made[f"{name}.weight"].dtype == torch.int8
            torch.testing.assert_close(again, state[f"{name}.weight"].float(), atol=0.01, rtol=0.01)
    others = [t.dtype for name, t in made.items() if "proj" not in name]
    assert others and set(others) == {torch.bfloat16}
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["hidden_size"] == model.config.hidden_size


def test_effective_sample_size() -> None:
    assert rollouts.effective(torch.zeros(4)) == pytest.approx(1)
    assert rollouts.effective(torch.tensor([0.0, -100.0, -100.0, -100.0])) == pytest.approx(1 / 4)
    # (1 + 3)^2 / (2 * (1 + 9))
    assert rollouts.effective(torch.tensor([0.0, math.log(3)])) == pytest.approx(0.8)


def test_mismatch_of_rows_of_unequal_length() -> None:
    found = rollouts.mismatch([[0.0, 0.5, -0.5], [0.25], [2.0, 2.0]])
    assert found["mean"] == pytest.approx(5.25 / 6) and found["max"] == 2
    assert found["tokens a row"] == 2
    weights = [1.0, math.exp(0.25), math.exp(4)]
    assert found["effective rows"] == pytest.approx(sum(weights) ** 2 / 3 / sum(w**2 for w in weights))
    assert found["rows left out"] == pytest.approx(1 / 3)  # a ratio of 55


def test_the_table_has_a_speed_for_every_length() -> None:
    runs = [
        {"length": n, "tokens": 10 * n, "cpu": seconds, "resident GB": 1.5}
        for n, seconds in ((8, 1.0), (16, 4.0), (8, 2.0), (16, 4.0))
    ]
    record = {"variants": {"torch": {"start cpu": 9.0, "runs": runs}}}
    assert rollouts.speed(runs, 8) == 60 and rollouts.speed(runs, 16) == 40
    assert rollouts.markdown(record).endswith("| torch | 60 | 40 | 9 | 1.50 |")
    scored = {"mean": 0.0123, "max": 1.0, "effective rows": 0.5}
    record["variants"]["torch"]["mismatch"] = scored
    table = rollouts.markdown(record)
    assert table.endswith("| torch | 60 | 40 | 9 | 1.50 | 0.0123 | 1 | 0.5 |")
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_scoring_needs_the_sampler_that_has_the_trainers_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rollouts", "--mismatch", "8", "--variants", VARIANTS[1]])
    with pytest.raises(SystemExit):
        rollouts.main()
    assert "--mismatch needs the variant torch" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["rollouts", "--rows", "12"])
    with pytest.raises(SystemExit):
        rollouts.main()
    assert "--rows 12 is no multiple of 8" in capsys.readouterr().err
    monkeypatch.setattr(rollouts.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["rollouts"])
    with pytest.raises(SystemExit, match="vLLM is not installed here"):
        rollouts.main()

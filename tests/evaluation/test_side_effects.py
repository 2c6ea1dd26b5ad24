"""Side effects against a plain computation; the scale that has a given size of them; `steer calibrate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.steering import fill, message
from helpers.training import SPREAD, model_folder

import steer
from steer import SteerError, SteeringConfig
from steer.cli import main
from steer.evaluation.neutral_text import prose
from steer.evaluation.side_effects import NeutralText, calibrate

TEXTS = ["The bakery opens at six.", "A river begins as a thin stream.", "x"]


def test_the_neutral_text_is_plain_english() -> None:
    assert len(prose()) > 10 and all(len(part.split()) > 30 and part.isascii() for part in prose())


@torch.no_grad()
def test_measured_is_what_a_plain_loop_gives(tiny_model: Any, tiny_tokenizer: Any) -> None:
    def log_probs(ids: torch.Tensor) -> torch.Tensor:
        return tiny_model(ids).logits[0, :-1].double().log_softmax(-1)

    vectors = fill(steer.attach(tiny_model, SteeringConfig(scale=0.5)))
    found = NeutralText(vectors, tiny_tokenizer, TEXTS)
    effects = found.measure(2.0)
    kl, losses, base_losses = [], [], []
    for text in TEXTS[:2]:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        with vectors.disabled():
            base = log_probs(ids)
        vectors.scale = 1.0
        steered = log_probs(ids)
        vectors.scale = 0.5
        kl.append((steered.exp() * (steered - base)).sum(1))
        losses.append(-steered[range(len(steered)), ids[0, 1:]])
        base_losses.append(-base[range(len(base)), ids[0, 1:]])
    assert effects.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert effects.perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)
    assert found.base_perplexity == pytest.approx(torch.cat(base_losses).mean().exp().item(), rel=1e-4)
    assert found.tokens == sum(map(len, kl))
    assert found.measure(0.0).kl == pytest.approx(0, abs=1e-6)
    assert vectors.scale == 0.5


@pytest.mark.parametrize("aim", [{"target_kl": 0.003}, {"target_kl": 0.2}, {"max_perplexity": 1.05}])
def test_the_scale_has_the_side_effects_asked_for(
    build_tiny: Any, tiny_tokenizer: Any, aim: dict[str, float]
) -> None:
    model = build_tiny("llama", initializer_range=SPREAD)
    text = NeutralText(fill(steer.attach(model), std=0.3), tiny_tokenizer, TEXTS)
    if "max_perplexity" in aim:
        aim = {"max_perplexity": aim["max_perplexity"] * text.base_perplexity}
    factor, effects = calibrate(text, **aim)
    assert factor > 0
    assert text.measure(factor) == effects
    if "target_kl" in aim:
        assert effects.kl == pytest.approx(aim["target_kl"], rel=0.011)
    else:
        room = aim["max_perplexity"] - text.base_perplexity
        assert effects.perplexity == pytest.approx(aim["max_perplexity"], abs=0.011 * room)


@pytest.mark.parametrize(
    ("aim", "expected"),
    [
        ({}, "give one of"),
        ({"target_kl": 1.0, "max_perplexity": 100.0}, "give one of"),
        ({"target_kl": 0.0}, "above 0"),
        ({"target_kl": -1.0}, "above 0"),
        ({"target_kl": math.nan}, "out of range"),
        ({"target_kl": 1e9}, "does not reach 1e+09"),
        ({"max_perplexity": 1.0}, "above the base's"),
    ],
)
def test_what_no_scale_has(tiny_llama: Any, tiny_tokenizer: Any, aim: dict, expected: str) -> None:
    text = NeutralText(fill(steer.attach(tiny_llama)), tiny_tokenizer, TEXTS)
    with pytest.raises(SteerError) as error:
        calibrate(text, **aim)
    assert expected in message(error)


def test_positions_of_a_prompt_are_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="last_prompt")))
    with pytest.raises(SteerError) as error:
        NeutralText(vectors, tiny_tokenizer, TEXTS)
    assert "positions=last_prompt" in message(error)
    steer.detach(tiny_llama)
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(positions="completion")))
    assert NeutralText(vectors, tiny_tokenizer, TEXTS).measure().kl > 0


def test_the_command(
    tmp_path: Path,
    build_tiny: Any,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_tiny("llama", initializer_range=SPREAD)
    folder = model_folder(tmp_path / "model", model, tiny_tokenizer)
    fill(steer.attach(model, SteeringConfig(scale=2.0))).save(tmp_path / "v")
    asked = ["calibrate", str(tmp_path / "v"), "--model", str(folder), "--target-kl", "0.05"]
    assert main([*asked, "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    made = steer.read(tmp_path / "out")
    assert made.config.scale == told["scale"] == pytest.approx(2 * told["factor"])
    assert told["kl"] == pytest.approx(0.05, rel=0.011)
    assert made.config.provenance["calibration"]["kl"] == told["kl"]
    assert [row["scale"] / told["scale"] for row in told["curve"]] == pytest.approx([0.25, 0.5, 1, 1.5, 2])
    kl = [row["kl"] for row in told["curve"]]
    assert kl == sorted(kl) and kl[2] == told["kl"]
    card = (tmp_path / "out" / "README.md").read_text()
    for row in told["curve"]:
        assert f"| {row['scale']:.4g} | {row['kl']:.4g} | {row['perplexity']:.4g} |" in card
    assert "### calibration" not in card, "it is told once"
    assert "calibration" not in (2 * made).config.provenance, "another scale has other side effects"
    assert main(asked) == 0
    assert "KL " in capsys.readouterr().out
    huge = {"scale": 9.0, "kl": math.inf, "perplexity": math.inf}  # as of half precision
    with monkeypatch.context() as patched:
        patched.setattr("steer.evaluation.side_effects.curve", lambda *args: [huge])
        assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["curve"] == [{"scale": 9.0, "kl": None, "perplexity": None}]
    assert main([*asked[:-1], "1e9"]) == 1
    assert "does not reach" in capsys.readouterr().err

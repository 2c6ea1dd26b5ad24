"""`python -m evals.sae_study --tiny`: the whole plan on a tiny model, stopped and continued."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.steering import message

from evals import sae_study, sae_study_tables
from steer.errors import SteerError
from steer.sae import load_sae
from steer.sae.config import SAEConfig, forward_flops
from steer.stats import t_quantile


@pytest.fixture
def arguments(build_tiny, tiny_tokenizer, tmp_path):
    """The command's words for a tiny model; its tokenizer has no words for the letter probe."""
    build_tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    for name, plus in (("texts", 7), ("unseen", 8)):
        rows = [{"problem": f"What is {a} + {plus}?", "solution": f"{a + plus}. " * 5} for a in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--tiny", "--model", str(tmp_path / "model"), "--layer", "1"]
    words += ["--texts", str(tmp_path / "texts.jsonl"), "--heldout", str(tmp_path / "unseen.jsonl")]
    return [*words, "--tokens", "768", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]


def test_the_study_is_made_once_and_goes_on(arguments, tmp_path, monkeypatch):
    measured, calls = sae_study._measured, []

    def stopped(sae, folder, *rest):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(folder.parent.name + "/" + folder.name)
        return measured(sae, folder, *rest)

    monkeypatch.setattr(sae_study, "_measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        sae_study.main(arguments)
    half = json.loads((tmp_path / "out" / "study.json").read_text())
    assert len(half["passes"]["64/0"]["equal_tokens"]) == 5
    monkeypatch.setattr(sae_study, "_measured", lambda *a: calls.append(str(a[1])[-99:]) or measured(*a))
    sae_study.main(arguments)
    args = sae_study.parser().parse_args(arguments)
    args.__dict__.update({**sae_study.TINY, "tokens": 768})
    names = list(sae_study.variants(64, args))
    assert len(names) == 11 and len(calls) == 2 * (len(names) + 2)
    sae_study.main(arguments)  # nothing is left to do
    assert len(calls) == 2 * (len(names) + 2)

    results = json.loads((tmp_path / "out" / "study.json").read_text())
    part = results["passes"]["64/1"]
    assert set(part["equal_tokens"]) == set(names) and set(part["equal_flops"]) == set(sae_study.KRON)
    assert {row["trained_tokens"] for row in part["equal_tokens"].values()} == {part["tokens"]}
    assert part["outcome"]["stopped"] in ("flat", "capped")
    assert part["outcome"]["steps"] * 64 == part["tokens"] <= 768
    assert {step for step, _ in part["history"]} >= {4, part["outcome"]["steps"]}
    dense, kron = SAEConfig(32, 64, 4), SAEConfig(32, 64, 4, encoder="kron", m=4, n=4)
    equal = part["tokens"] * forward_flops(dense) // forward_flops(kron) // 64 * 64
    assert part["equal_flops"]["kron-m4n4"]["trained_tokens"] == equal > part["tokens"]
    assert load_sae(tmp_path / "work" / "64-1" / "matryoshka").cfg.prefixes == [2, 6, 14, 30, 64]
    assert part["equal_tokens"]["kron-m2n4-product"]["config"]["interaction"] == "product"
    first = results["passes"]["64/0"]
    assert first["equal_tokens"]["topk"]["explained"] != part["equal_tokens"]["topk"]["explained"]  # seeds
    assert (tmp_path / "out" / "study.png").stat().st_size > 10_000

    table = (tmp_path / "out" / "study.md").read_text()
    values = [results["passes"][f"64/{seed}"]["equal_tokens"]["kron-m2n4"] for seed in (0, 1)]
    a, b = (row["explained"]["4"] for row in values)
    half_width = t_quantile(1) * abs(a - b) / 2  # of two values: sd / sqrt(2)
    row = next(line for line in table.splitlines() if line.startswith("| kron-m2n4 |"))
    assert f" {(a + b) / 2:.4f} ± {half_width:.4f} " in row
    ratio = forward_flops(SAEConfig(32, 64, 4, encoder="kron")) / forward_flops(dense)
    assert f"| {ratio:.3f} | {mean_tokens(results):,.0f} |" in row
    assert part["equal_tokens"]["kron-m2n4"]["tokens"] == 100  # all of them, though no whole batches
    found = part["equal_tokens"]["kron-m2n4"]["head_correlation"]
    assert -1 <= found["within"] <= 1 and "head_correlation" not in part["equal_tokens"]["topk"]
    assert "| 64, correlation of two features | in one head |" in table
    for label in ("| plain product |", "| HierarchicalTopK with KronSAE, one SAE |", "64, equal FLOPs"):
        assert label in table


def mean_tokens(results) -> float:
    return sum(results["passes"][f"64/{seed}"]["tokens"] for seed in (0, 1)) / 2


@pytest.mark.slow
def test_a_stopped_study_ends_with_the_numbers_of_one_that_was_not(arguments, tmp_path, monkeypatch):
    """Stopped in the middle of training, after a checkpoint: equal to the last bit."""
    short = [*arguments, "--seeds", "1", "--tokens", "1280"]
    sae_study.main([*short, "--work", str(tmp_path / "whole"), "--out", str(tmp_path / "whole")])
    update, steps = sae_study.SAETrainer._update, []

    def stopped(self, run, x):
        if self.step == 10:
            raise KeyboardInterrupt
        return update(self, run, x)

    monkeypatch.setattr(sae_study.SAETrainer, "_update", stopped)
    with pytest.raises(KeyboardInterrupt):
        sae_study.main(short)
    monkeypatch.setattr(
        sae_study.SAETrainer, "_update", lambda self, *a: steps.append(self.step) or update(self, *a)
    )
    sae_study.main(short)
    assert steps[0] == 8
    one, other = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("out", "whole"))
    assert one == other


def test_results_of_other_settings_and_too_few_texts_are_refused(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text(json.dumps({"facts": {"model": "another"}, "passes": {}}))
    with pytest.raises(SteerError) as error:
        sae_study.main(arguments)
    assert "results with another model" in message(error)
    with pytest.raises(SteerError) as error:
        sae_study.main([*arguments, "--cache-tokens", "1000000", "--work", str(tmp_path / "large")])
    assert "--cache-tokens asks for 1,000,000" in message(error)
    with pytest.raises(SteerError) as error:
        sae_study.main([*arguments, "--k", "3"])
    assert "--k 3 is not among --l0 [2, 4, 8]" in message(error)


@pytest.mark.parametrize("name", ["eval_every", "windows"])
def test_settings_that_change_the_numbers_are_not_mixed(tmp_path, name):
    args, model = sae_study.parser().parse_args([]), SimpleNamespace(dtype=torch.float32)
    (tmp_path / "study.json").write_text(json.dumps(sae_study._open(tmp_path, model, args)))
    setattr(args, name, 7)
    with pytest.raises(SteerError, match=f"results with another {name}"):
        sae_study._open(tmp_path, model, args)


def test_the_estimate_counts_every_sae(arguments, capsys):
    sae_study.main([*arguments, "--estimate", "--dictionaries", "64", "128", "--rounds", "1"])
    out = capsys.readouterr().out
    assert out.count("ms a step of 64") == 11 + 3  # the larger dictionary has TopK and KronSAE alone
    assert out.count("hours for each million tokens") == 2


def test_an_interval_is_that_of_student():
    middle, half = sae_study_tables.interval([1.0, 2.0, 4.0])
    assert middle == pytest.approx(7 / 3)
    assert half == pytest.approx(4.303 * 1.5275 / 3**0.5, rel=1e-3)  # t of 2 degrees of freedom
    assert sae_study_tables.cell([0.5]) == "0.5000"
    assert sae_study_tables.cell([0.5, None]) == ""

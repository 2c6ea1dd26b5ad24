"""`python -m evals.sae` on a tiny model: every SAE trained and measured once, whatever stops it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.steering import message

from evals import sae as evals_sae
from evals import sae_diff, sae_measure
from steer.errors import SteerError
from steer.sae import load_sae
from steer.sae.config import SAEConfig, forward_flops
from steer.sae.features import Feature, of_equal_mass
from steer.sae.letters import Absorption


@pytest.fixture
def command(build_tiny, tiny_tokenizer, tmp_path, monkeypatch):
    """The command's arguments, for few and short runs; the tiny tokenizer has no words for the letters."""
    folder = tmp_path / "model"
    build_tiny("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    rows = [{"problem": f"What is {a} + 7?", "solution": f"{a} + 7 = {a + 7}. " * 5} for a in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(evals_sae, "L0", (2, 4, 32))
    monkeypatch.setattr(evals_sae, "BATCH", 64)
    monkeypatch.setattr(sae_measure, "absorption", lambda *args: Absorption(0.25, 0.5, 0.5, 0.5, 3, 30))
    texts = str(tmp_path / "texts.jsonl")
    return [
        *("sae.py", "tables", "--model", str(folder), "--layer", "1", "--texts", texts, "--heldout", texts),
        *("--tokens", "640", "--cache-tokens", "600", "--heldout-tokens", "200", "--windows", "2"),
        *("--small", "64", "--large", "128"),
        *("--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")),
    ]


def test_tables_are_made_once_and_go_on(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command)
    train, calls = evals_sae._train, []

    def stopped(run, *args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(run.name)
        return train(run, *args)

    monkeypatch.setattr(evals_sae, "_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        evals_sae.main()
    half = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert list(half["saes"]) == calls
    monkeypatch.setattr(evals_sae, "_train", lambda run, *args: calls.append(run.name) or train(run, *args))
    evals_sae.main()
    evals_sae.main()  # nothing is left to do
    assert calls == [run.name for run in evals_sae.runs(64, 128)]
    saes = json.loads((tmp_path / "out" / "tables.json").read_text())["saes"]
    assert {n: saes[n] for n in half["saes"]} == half["saes"]
    assert set(saes["hierarchical-64"]["explained"]) == {"2", "4", "32"}
    dense, kron = SAEConfig(32, 64, 32), SAEConfig(32, 64, 32, encoder="kron")
    tokens = 640 * forward_flops(dense) // forward_flops(kron)
    assert saes["kron-m2n4-64"]["trained_tokens"] == tokens // 64 * 64
    assert load_sae(tmp_path / "work" / "kron-m4n4-128" / "sae").cfg.heads == 8
    table = (tmp_path / "out" / "tables.md").read_text()
    equal = [saes["topk-64-l0=32-tokens-of-m2n4"], saes["kron-m2n4-64"]]
    assert equal[0]["trained_tokens"] == equal[1]["trained_tokens"] > saes["topk-64-l0=32"]["trained_tokens"]
    assert equal[0]["config"] == saes["topk-64-l0=32"]["config"]
    assert "| kron-m4n4-128, equal FLOPs |" in table and "| topk-128, tokens of kron-m4n4 |" in table
    assert "hierarchical-kron-64, one model" in table
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000


def test_the_committed_tables_are_those_of_the_committed_numbers():
    folder = Path(evals_sae.__file__).parent / "results" / "sae"
    results = json.loads((folder / "tables.json").read_text())
    assert set(results["saes"]) == {run.name for run in evals_sae.runs(2048, 8192)}
    assert (folder / "tables.md").read_text() == evals_sae.markdown(results, 2048, 8192)


def test_results_of_other_settings_are_not_mixed(command, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tables.json").write_text(json.dumps({"facts": {"model": "another"}}))
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SteerError) as error:
        evals_sae.main()
    assert "other settings" in message(error)


def test_an_sae_of_other_settings_is_not_taken_for_one_of_these(command, tmp_path, monkeypatch):
    one = [evals_sae.Run("topk-64-l0=4", {"d_sae": 64, "k": 4})]
    monkeypatch.setattr(evals_sae, "runs", lambda small, large: one)
    monkeypatch.setattr(evals_sae, "plot", lambda *args: None)

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        evals_sae.main()

    run()
    facts = json.loads((tmp_path / "out" / "tables.json").read_text())["facts"]
    assert (facts["heldout"], facts["windows"], facts["dead_after"]) == (["texts.jsonl"], 2, 250_000)
    assert facts["precision"] in ("float32", "bfloat16")
    monkeypatch.setattr(evals_sae, "SAETrainer", None)  # nothing is trained from here on
    elsewhere = ("--out", str(tmp_path / "elsewhere"))
    run(*elsewhere, "--windows", "3")  # which is no setting of the training
    for option, value, name in (("--dead-after", "300", "dead_after"), ("--tokens", "704", "tokens")):
        with pytest.raises(SteerError, match=f"trained with another {name}.*give another --work") as error:
            run("--out", str(tmp_path / name), option, value)
        message(error)
        with pytest.raises(SteerError, match=f"other settings: {name} was .*another --out and --work"):
            run(option, value)
    with pytest.raises(SteerError, match="other settings: windows was 2, now 3"):
        run("--windows", "3")
    path = tmp_path / "out" / "tables.json"  # as 0.1.0 wrote it
    old = json.loads(path.read_text())
    del old["facts"]["windows"], old["facts"]["precision"]
    path.write_text(json.dumps(old))
    run("--windows", "3")
    assert json.loads(path.read_text())["facts"] == old["facts"]


def test_others_of_equal_mass_are_told_beside_the_surest_features_of_right_answers():
    """Of 12 features 9 are of right answers, so 3 others are left: as many cannot be compared."""
    features = [Feature(i, 0.5, 0.4, 0.1, 0, 0.2, 0.5, 0.5, 1.0 + i % 3, 1.0, [], [], []) for i in range(12)]
    assert sae_diff._comparable(features, [0, 1, 2]) == [0, 1, 2]
    assert sae_diff._comparable(features, [4, 1, 5, 2, 6, 7]) == [4, 1, 5]
    assert sae_diff._comparable(features, list(range(9))) == [0]
    assert sae_diff._comparable(features, list(range(12))) == sae_diff._comparable(features, []) == []
    chosen = sae_diff._comparable(features, [0, 1, 2])
    sets = [of_equal_mass(features, chosen, seed) for seed in range(sae_diff.SETS)]
    assert [sae_diff._mass(features, one) for one in (chosen, *sets)] == pytest.approx([6 / 24] * 6)
    content = {
        **{"model": "m", "vectors": "v", "layer": 1, "completions": 4, "problems": 2, "right": 2},
        **{"differences": 9, "tested_features": 12, "significant": 3, "heldout_problems": 5, "accuracy": {}},
        "sae": {"features": 64, "k": 4, "explained": {4: 0.5}},
        "mass": {"right answers": 0.25, "others": [0.25, 0.24]},
    }
    assert (
        "the surest features of right answers 0.250, the sets of others 0.250, 0.240."
        in sae_diff.markdown(content)
    )
    content["mass"]["others"] = []
    assert "Mass" not in sae_diff.markdown(content)

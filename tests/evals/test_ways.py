"""`evals.ways` on a tiny random model: every part, the table and the plot, and a study that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from evals import ways, ways_table
from evals.ways import PARTS, Plan, Study
from steer import artifact


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_every_way_is_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--tiny", "--seeds", "0", "1", "--out", str(tmp_path)]
    ways.main([*words, "--parts", "sft"])  # trains what it needs first
    record = json.loads((tmp_path / "ways.json").read_text())
    assert {"grpo-0", "grpo-1", "grpo-3", "sft-0", "sft-1", "tuning-sft"} <= record["cells"].keys()
    ways.main(words)
    record = json.loads((tmp_path / "ways.json").read_text())
    assert not record["impossible"] and record["chosen"].keys() == {"mean", "sft", "dpo"}
    rows = {row["method"]: row for row in record["rows"]}
    assert rows.keys() == {"base", "base, 8 examples", *PARTS}
    assert all(rows[method]["by_seed"].keys() == {"0", "1"} for method in PARTS)
    text = (tmp_path / "ways.md").read_text()
    for method in PARTS:
        assert f"| {ways_table.TITLES[method]} |" in text
        assert all(one["kl"] > 0 for one in ways_table.side_effects(record, method))
    assert (tmp_path / "ways.png").stat().st_size > 5000
    work = tmp_path / "work"
    made = artifact.read(work / "grpo-from-mean-0" / "vectors").config.provenance
    assert made["training"]["max_steps"] == 2 and "start-0" in made["init"]["from"]
    assert len(list((work / "start-0" / "completions").iterdir())) == 2
    rate = record["chosen"]["dpo"]["value"]
    made = artifact.read(work / "dpo-1" / "vectors").config.provenance
    assert made["training"]["learning_rate"] == rate and made["data"]["from"].endswith("grpo-1")
    cells = record["cells"]
    monkeypatch.setattr(Study, "train", lambda *_: pytest.fail("trained again"))
    ways.main(words)
    assert json.loads((tmp_path / "ways.json").read_text())["cells"] == cells
    with pytest.raises(SystemExit, match="holds a study with other settings"):
        ways.main([*words, "--updates", "5"])


def test_the_seed_that_chooses_is_not_reported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="seed 3 chooses rates and strengths"):
        ways.main(["--tiny", "--seeds", "0", "3", "--out", str(tmp_path)])


def test_a_study_that_would_train_other_than_it_says_is_refused(tmp_path: Path) -> None:
    words = ["--tiny", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="has a seed twice"):
        ways.main([*words, "--seeds", "1", "1"])
    with pytest.raises(SystemExit, match="--updates 1 leaves none after a mean difference"):
        ways.main([*words, "--updates", "1"])
    assert not (tmp_path / "ways.json").exists()


def test_the_best_on_training_problems_is_chosen_and_the_smaller_of_equals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(Plan({}, 0.1), tmp_path / "out", tmp_path)
    study.__dict__["training_problems"] = tmp_path / "training.jsonl"
    accuracy = {"0.1": 0.25, "0.2": 0.75, "0.3": 0.75}

    def evaluate(self: Study, out: Path, *words: str) -> None:
        rows = [{"method": name, "accuracy": {"value": value}} for name, value in accuracy.items()]
        out.mkdir(parents=True)
        (out / "scores.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(Study, "evaluate", evaluate)
    monkeypatch.setattr(Study, "rates", lambda *_: ({name: float(name) for name in accuracy}, []))
    study.choose("sft")
    assert study.record["chosen"]["sft"] == {"what": "rate", "value": 0.2, "tried": accuracy}


def test_differences_are_turned_to_be_minus_grpo() -> None:
    pair = {"method": "grpo", "other": "sft", "verdict": "better", "corrected_p": 0.01}
    pair["difference"] = {"value": 0.2, "low": 0.1, "high": 0.4}
    assert ways_table._against(pair)[1:] == ["-0.200 [-0.400, -0.100]", "0.01", "worse"]
    pair = {**pair, "method": "sft", "other": "grpo"}
    assert ways_table._against(pair)[1:] == ["+0.200 [+0.100, +0.400]", "0.01", "better"]

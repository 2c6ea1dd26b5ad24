"""The first example of the README prints what the README says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.paths import ROOT


@pytest.mark.real
def test_the_first_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert found
    (tmp_path / "evals").symlink_to(ROOT / "evals")
    monkeypatch.chdir(tmp_path)
    exec(compile(found[1], "README.md", "exec"), {"__name__": "__example__"})
    printed, said = (text.splitlines() for text in (capsys.readouterr().out, found[2]))
    assert len(printed) == len(said)
    # what the base says to the end depends on the precision that the machine computes in
    assert [line for line in printed if "base" not in line] == [line for line in said if "base" not in line]


def test_the_numbers_of_the_comparison_are_those_of_its_record() -> None:
    record = json.loads((ROOT / "evals/results/compare-long-sums-0.5b/scores.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    full, vectors = rows["full"], rows["steering"]
    best, share = rows[vectors["best_base"]]["lenient"]["value"], vectors["elicited_share"]
    said = [f"answers {best:.3f} of 1,000"]
    said += ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["accuracy"]) for row in (full, vectors)]
    said += [f"{share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}] times"]
    text = " ".join((ROOT / "README.md").read_text().split())
    for row in (full, vectors):
        *first, last = (f"{accuracy:.2f}" for accuracy in row["by_seed"].values())
        said.append(f"({', '.join(first)} and {last}")
    assert not [one for one in said if one not in text]
    # "no significant difference", and the criterion that was stated before
    assert [pair["verdict"] for pair in record["pairs"]] == ["no difference shown"] and share["low"] > 0.7

"""A run in one small file: compared as the folder is, and refused when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.evaluating import make_run

from steer.errors import SteerError
from steer.evaluation import compare
from steer.evaluation.collect import collect
from steer.evaluation.pack import TEXTS, pack, read_packed, read_run
from steer.evaluation.store import read_completions, read_problems, read_settings
from steer.identity import MERGED

RIGHT = {
    "base": [[n % 4 == 0, n % 3 == 0, False, True] for n in range(12)],
    "steering#0": [[n % 4 > 0, True, n % 2 == 0, False] for n in range(12)],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", RIGHT)


@pytest.fixture
def packed(run: Path, tmp_path: Path) -> Path:
    pack(run, tmp_path / "run.json", {"method": "steering", "seed": 0})
    return tmp_path / "run.json"


def test_a_packed_run_is_the_run(run, packed):
    settings, problems, completions = read_run(packed)
    assert (settings, problems) == (read_settings(run), read_problems(run))
    kept = read_run(run)[2]  # its answers graded leniently as well: the made-up run has no such column
    late = [sample >= TEXTS for sample in kept["sample"]]
    assert any(late) and not all(late)
    kept["text"] = ["" if is_late else text for text, is_late in zip(kept["text"], late, strict=True)]
    assert completions == kept
    assert read_run(packed, ["sample", "correct"])[2] == {k: kept[k] for k in ("sample", "correct")}
    assert read_packed(packed)["about"] == {"method": "steering", "seed": 0}


def test_a_merged_base_is_named_by_what_it_is_made_of(run, tmp_path):
    """And not by a folder of this machine's cache."""
    merged = tmp_path / "cache" / "merged" / "0123"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text(
        json.dumps({MERGED: {"base": "smol", "checksum": "abc", "adapter": "a"}})
    )
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "model": str(merged)}))
    pack(run, tmp_path / "run.json")
    for place in (run, tmp_path / "run.json"):
        assert read_run(place)[0]["model"] == "smol with adapter abc"
    assert str(tmp_path) not in (tmp_path / "run.json").read_text()


def test_scores_are_those_of_the_folder(run, packed):
    assert compare.score(collect([packed]), "base") == compare.score(collect([run]), "base")


def test_packed_runs_and_folders_stand_side_by_side(run, tmp_path):
    other = make_run(tmp_path / "other", {"steering#1": RIGHT["base"]})
    pack(other, tmp_path / "other.json")
    rows = compare.score(collect([run, tmp_path / "other.json"]), "base")
    assert {row["method"]: row["seeds"] for row in rows} == {"base": 1, "steering": 2}


def test_the_file_is_smaller_than_its_columns_written_out(run, packed):
    whole = json.dumps(read_completions(run)) + json.dumps(read_problems(run))
    assert packed.stat().st_size < len(whole)
    assert max(map(len, packed.read_text().splitlines())) < 3000, "a line for each problem and column"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: "[]", "is not a packed run of `steer eval`"),
        (lambda text: text.replace('"rows": 96', '"rows": 95'), "is not a packed run"),
        (lambda text: text.replace('"id":"p3"', '"name":"p3"'), "is not a packed run"),
    ],
)
def test_a_damaged_file_is_named(packed, change, expected):
    whole = packed.read_text()
    packed.write_text(change(whole))
    assert packed.read_text() != whole
    with pytest.raises(SteerError, match=expected) as caught:
        read_run(packed)
    assert str(packed) in str(caught.value)

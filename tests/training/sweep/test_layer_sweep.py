"""The recipe for populations as a user runs it: whole, killed, added to, halved, on several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.launching import LAUNCHERS, ROOT, environment, launcher, run_folder, run_here, started
from helpers.training import far, same
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steer import artifact
from steer.lens.layer_study import with_scores
from steer.training.arguments import PopulationArguments
from steer.training.run_settings import RunSettings
from steer.training.sweep.grid import members
from steer.training.sweep.member import check_supported, read_states

RECIPE, SOLO = ROOT / "recipes" / "layer_sweep.py", ROOT / "recipes" / "grpo_steer.py"
STEPS = 6
NAMES = ["layer-0", "layer-1", "layer-2", "together", "coin"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture
def base(
    place: Path, build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with all that a population needs: `model/`, `train.jsonl`, `heldout.jsonl`, `config.yaml`."""
    members: list[dict[str, Any]] = [
        {"name": "together", "layers": "all", "lr_by_layer": None, "learning_rate": "2e-2"},
        {"name": "coin", "layers": "1", "rewards": ["random"], "reward_weights": [1.0]},
    ]
    settings = {"each_layer": "all", "lr_by_layer": "0:0.02,1-2:0.05", "population": members}
    return run_folder(place, build_tiny, tiny_tokenizer, 12, **settings, max_steps=STEPS, use_cpu=True)


def command(base: Path, *changes: str) -> list[str]:
    return [sys.executable, str(RECIPE), "--config", str(base / "config.yaml"), *changes]


@pytest.fixture
def here(base: Path) -> Callable[..., str | None]:
    """
    The recipe run inside this process, to save the imports; the line that it ends with, if it is refused.
    """

    def run(*changes: str, script: Path = RECIPE, config: Path = base / "config.yaml") -> str | None:
        try:
            run_here(script, "--config", str(config), *changes)
        except SystemExit as end:
            line = str(end.code)
            assert line.startswith("error: ") and "\n" not in line, line
            return line
        return None

    return run


@pytest.fixture
def whole(base: Path, here: Callable[..., str | None]) -> Path:
    """The folder of a run that was never stopped."""
    if not (base / "whole" / "sweep.png").exists():
        assert here() is None
    return base / "whole"


def vectors(folder: Path) -> dict[str, Any]:
    return {p.parent.name: artifact.read(p).tensors for p in sorted(folder.glob("members/*/vectors"))}


def test_the_recipe_for_one_set_trains_a_population_too(base: Path, whole: Path, here) -> None:
    told = ["--only", "layer-2"]
    assert here(*told, "--output_dir", str(base / "other"), script=SOLO) is None
    assert vectors(base / "other").keys() == {"layer-2"}
    assert far(vectors(base / "other")["layer-2"], vectors(whole)["layer-2"]) < 1e-4  # other rows beside it
    assert "learning_rates" in here(*told, "--lr_sweep", "1e-2", script=SOLO)


def test_a_whole_run_leaves_everything_behind(whole: Path) -> None:
    assert set(vectors(whole)) == set(NAMES)
    found = json.loads((whole / "sweep.json").read_text())
    assert [row["member"] for row in found["members"]] == NAMES
    for row in found["members"]:
        results = json.loads((whole / "members" / row["member"] / "results.json").read_text())
        assert results["steps"] == STEPS == row["updates"] and results["after"]["problems"] == 12
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        assert row["gain"]["value"] == pytest.approx(
            results["after"]["accuracy"] - found["untrained"]["accuracy"]
        )
        assert row["lenient"]["value"] >= row["accuracy"]["value"]
        assert row["norm"] > 0, "the reward never differed: nothing was tested"
        log = json.loads((whole / "members" / row["member"] / "log.json").read_text())
        assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    rates = {row["member"]: row["learning_rate"] for row in found["members"]}
    assert rates["layer-0"] == 0.02 and rates["layer-2"] == 0.05 and rates["together"] == 0.02
    saved = artifact.read(whole / "members" / "layer-2" / "vectors")
    assert saved.config.layers == "2" and saved.config.provenance["member"] == "layer-2"
    assert "| layers | 2 |" in (whole / "members" / "layer-2" / "vectors" / "README.md").read_text()
    pairs = found["pairs"]
    assert pairs["layers"] == [0, 1, 2] and len(pairs["pairs"]) == 3
    assert (whole / "sweep.png").read_bytes().startswith(b"\x89PNG")
    text = (whole / "sweep.md").read_text()
    assert {"before", "longer", "elicited", "constant"} == set(found["base"])
    assert "| untrained |" in text and "The best elicited base is untrained" in text
    assert "tokens |" in text and "| always " in text and "| together |" in text and "All 3 together" in text
    assert "one seed of training: the intervals are over problems only" in text
    assert pairs["joint_member"] == "together"
    assert pairs["joint"] == {row["member"]: row for row in found["members"]}["together"]["accuracy"]["value"]
    assert f"- layers 0 and 1: {pairs['told']['0 and 1']}" in text


def test_old_records_of_pairs_get_the_published_score() -> None:
    """Written when the sum of the vectors stood for the jointly trained set; five pairs had a score of 1."""
    old = json.loads((ROOT / "evals" / "results" / "layer-sweep" / "sweep.json").read_text())
    assert old["pairs"]["pairs"][0][1] == 0
    wrong = [[None, 1.0, 1.0, 1.0]] * 4
    found = with_scores({**old["pairs"], "score": wrong}, old["members"])
    assert found["joint_member"] == "all-layers-lr-0.01"
    assert found["score"][0] == [None] * 4
    assert (
        found["told"]["2 and 6"] == "undefined: the jointly trained set has 0.907, the best of the two 0.947"
    )
    # (0.547 - 0.893) / (0.907 - 0.893), in 75ths
    assert found["score"][2][3] == pytest.approx((41 - 67) / (68 - 67))


def test_a_member_is_the_run_of_grpo_steer(whole: Path, base: Path, here, tmp_path: Path) -> None:
    """The other recipe, given the member's settings on its command line."""
    settings = yaml.safe_load((base / "config.yaml").read_text())
    solo = {k: v for k, v in settings.items() if k not in ("each_layer", "population", "lr_by_layer")}
    config = tmp_path / "solo.yaml"
    config.write_text(yaml.safe_dump(solo))
    coin = "--layers 1 --lr_by_layer 0:0.02,1-2:0.05 --rewards random --reward_weights 1.0"
    for name, changes in (("layer-2", "--layers 2 --learning_rate 0.05"), ("coin", coin)):
        out = tmp_path / name
        assert here(*changes.split(), "--output_dir", str(out), script=SOLO, config=config) is None
        alone = artifact.read(out / "vectors").tensors
        assert far(vectors(whole)[name], alone) < 1e-4  # float32 sums in another order
        mine = json.loads((whole / "members" / name / "results.json").read_text())
        theirs = json.loads((out / "results.json").read_text())
        assert (mine["before"], mine["after"]) == (theirs["before"], theirs["after"])


def test_a_finished_run_changes_nothing(whole: Path, here) -> None:
    def contents() -> dict[str, bytes]:
        files = [p for p in whole.rglob("*") if p.is_file() and p.suffix != ".png"]
        return {str(p): p.read_bytes() for p in sorted(files)}

    before = contents()
    assert here() is None
    assert contents() == before


def test_killed_and_started_again_it_ends_with_the_same_vectors(whole: Path, base: Path, here) -> None:
    folder = base / "killed"
    with (base / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command(base, "--output_dir", str(folder)),
            cwd=base,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while not (folder / "state-0.pt").exists():
                assert process.poll() is None, (base / "killed.log").read_text()
                time.sleep(0.005)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not (folder / "members").exists()
    assert here("--output_dir", str(folder)) is None
    found, expected = vectors(folder), vectors(whole)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


def test_members_are_added_and_resumed_alone(whole: Path, base: Path, here) -> None:
    folder = base / "added"
    changes = ("--output_dir", str(folder), "--winners", "0")
    coin = "{name: coin, layers: 1, rewards: [random], reward_weights: [1.0]}"
    assert here(*changes, "--each_layer", "0", "--population", coin, "--only", "layer-0") is None
    assert set(vectors(folder)) == {"layer-0"}
    assert here(*changes, "--only", "layer-2", "together") is None
    assert set(vectors(folder)) == {"layer-0", "layer-2", "together"}
    assert {name: state["step"] for name, state in read_states(folder).items()} == {
        "layer-0": STEPS,
        "layer-2": STEPS,
        "together": STEPS,
    }
    for name, tensors in vectors(folder).items():
        assert far(tensors, vectors(whole)[name]) < 1e-4, name
    line = here(*changes, "--lr_by_layer", "0:0.5", "--only", "layer-0")
    assert line and "layer-0" in line and "learning_rate was 0.02, now 0.5" in line


def test_halving_stops_the_worse_half(base: Path, here) -> None:
    folder = base / "halved"
    changes = ("--output_dir", str(folder), "--halve_at", "2", "4", "--winners", "0")
    assert here(*changes) is None
    rungs = json.loads((folder / "halving.json").read_text())
    assert set(rungs["2"]) == set(NAMES) and set(rungs["4"]) == {n for n in NAMES if rungs["2"][n]["kept"]}
    for record in rungs.values():
        assert record["coin"]["kept"], "a control with another reward is no rival"
        kept = [entry["score"] for name, entry in record.items() if entry["kept"] and name != "coin"]
        gone = [entry["score"] for entry in record.values() if not entry["kept"]]
        assert max(gone, default=-1.0) < min(kept) and len(kept) >= len(gone)
        # no more than half go on, but for those that are as good as the last of them
        assert sum(score > min(kept) for score in kept) < (len(kept) + len(gone) + 1) // 2
    assert sum(not entry["kept"] for record in rungs.values() for entry in record.values()) >= 1
    for name in NAMES:
        results = json.loads((folder / "members" / name / "results.json").read_text())
        last = max(int(rung) for rung in rungs if name in rungs[rung])
        stopped = not rungs[str(last)][name]["kept"]
        assert results["steps"] == (last if stopped else STEPS)
        assert (f"halved at update {last}" in (results["stopped"] or "")) == stopped
    assert "Stopped early" in (folder / "sweep.md").read_text()


def test_halving_among_layers_leaves_each_layer_its_best_rate(base: Path, here) -> None:
    folder = base / "rates"
    rates = ("--each_layer", "0,2", "--learning_rates", "0.01", "0.03", "0.1")
    changes = ("--halve_among", "layers", "--halve_at", "4", "--keep", "0.3", "--winners", "0")
    assert here("--output_dir", str(folder), *rates, *changes) is None
    record = json.loads((folder / "halving.json").read_text())["4"]
    leagues = [[n for n in record if n.startswith(f"layer-{layer}-")] for layer in (0, 2)]
    assert [len(names) for names in leagues] == [3, 3] and len(record) == 8
    for names in [*leagues, ["together"], ["coin"]]:
        best = max(record[name]["score"] for name in names)
        assert [record[name]["kept"] for name in names] == [record[name]["score"] == best for name in names]
    assert not all(entry["kept"] for entry in record.values())
    lines = (folder / "sweep.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| layers | 0.01 | 0.03 | 0.1 |"))
    for line, layer in ((lines[head + 2], 0), (lines[head + 4], 2)):
        means = [record[f"layer-{layer}-lr-{rate}"]["score"] for rate in (0.01, 0.03, 0.1)]
        assert [float(cell) for cell in line.split("|")[2:5]] == pytest.approx(means, abs=1e-3)


@pytest.mark.slow
def test_four_processes_divide_the_members(whole: Path, base: Path) -> None:
    processes = 4
    folder = base / "divided"
    launch = launcher(LAUNCHERS / "cpu-2.yaml", "--num_processes", str(processes))
    done = started([*launch, *command(base, "--output_dir", str(folder), "--halve_at", "4")[1:]], base)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in folder.glob("state-*.pt")} == {f"state-{i}.pt" for i in range(processes)}
    assert set(vectors(folder)) == set(NAMES)
    record = json.loads((folder / "halving.json").read_text())["4"]
    assert set(record) == set(NAMES)
    for name, tensors in vectors(folder).items():
        if record[name]["kept"]:
            assert far(tensors, vectors(whole)[name]) < 1e-4, name
    assert done.stdout.count("| untrained |") == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("--each_layer", "7"), "layers 0 to 2"),
        (("--population", "{layrs: 1}"), "layrs"),
        (("--population", "{max_completion_length: 4}"), "share model, data and batches"),
        (("--population", "{name: ../x, layers: 1}"), "becomes a folder"),
        (("--population", "{layers: 1}", "{layers: 1}"), "two members"),
        (("--population", "{layers: 1, rewards: [correct01]}"), "change both together"),
        (("--population", "{name: x, layers: null}"), "cannot be null"),
        (("--only", "layer-9"), "there are layer-0"),
        (("--loss_type", "vespo"), "dapo"),
        (("--num_iterations", "2"), "one update"),
        (("--top_entropy_quantile", "0.2"), "top_entropy_quantile"),
        (("--keep", "1.5"), "between 0 and 1"),
        (("--halve_on", "luck"), "validation"),
        (("--halve_at", "4", "--pass_rate_floor", "0.2"), "set halve_on=validation"),
        (("--halve_among", "friends"), "layers"),
        (("--winners", "1"), "2 layers"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_one_line(here, tmp_path: Path, changes: tuple[str, ...], named: str) -> None:
    line = here("--output_dir", str(tmp_path / "out"), *changes)
    assert line and named in line


def test_the_demo_config_is_every_layer_alone_and_all_together() -> None:
    arguments = ["--config", str(ROOT / "recipes" / "configs" / "layer-sweep-demo.yaml"), "--use_cpu", "true"]
    settings = RunSettings.parse("layer_sweep", arguments=arguments, population=PopulationArguments)
    found = members(settings, 30, arguments)
    layers = [str(layer) for layer in range(30) for _ in range(3)]
    assert [m.steering.layers for m in found] == [*layers, "all", "all", "all"]
    rates = [m.training.learning_rate for m in found]
    assert rates == [*[0.1, 0.3, 1.0] * 30, 5e-3, 1e-2, 2e-2]
    for member in found:
        check_supported(member.training)


def test_the_seeds_config_is_ten_seeds_of_all_layers() -> None:
    arguments = ["--config", str(ROOT / "recipes" / "configs" / "seeds-demo.yaml"), "--use_cpu", "true"]
    settings = RunSettings.parse("layer_sweep", arguments=arguments, population=PopulationArguments)
    found = members(settings, 30, arguments)
    assert [m.training.seed for m in found] == [*range(10)]
    for member in found:
        assert member.steering.layers == "all"
        check_supported(member.training)


def test_a_sharding_launcher_is_refused(here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    line = here("--output_dir", str(tmp_path / "out"))
    assert line and "ddp.yaml" in line

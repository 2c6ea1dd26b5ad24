"""The recipe as a user runs it: whole, again, killed and restarted, on two processes, with bad input."""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers.format_1 import downgrade, old_config
from helpers.hub import fake_hub
from helpers.launching import LAUNCHERS, ROOT, environment, launcher, run_folder, run_here, started
from helpers.training import far, last_checkpoint, same
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import steer
from steer import SteeringConfig, artifact
from steer.cli import main as steer_command
from steer.files import held
from steer.training import recipe
from steer.training.resuming import log_history
from steer.training.steering_trainer import SteeringGRPOTrainer

RECIPE = ROOT / "recipes" / "grpo_steer.py"
STEPS = 8  # the second epoch begins after 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture
def base(
    place: Path, build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with everything a run needs: `model/`, `train.jsonl`, `heldout.jsonl` and `config.yaml`."""
    # YAML 1.1 reads an exponent without a point as text
    rate = {"learning_rate": "2e-2", "max_steps": STEPS, "use_cpu": True, "train_limit": 24}
    chosen = {"dynamic_sampling_rounds": 2, "pass_rate_floor": 0.2}
    return run_folder(place, build_tiny, tiny_tokenizer, 6, **rate, **chosen)


def command(base: Path, *changes: str) -> list[str]:
    return [sys.executable, str(RECIPE), "--config", str(base / "config.yaml"), *changes]


@pytest.fixture
def here(base: Path, recipe: Callable[..., str]) -> Callable[..., str]:
    """The recipe run inside this process; what it said."""
    return lambda *changes, **how: recipe(RECIPE, "--config", str(base / "config.yaml"), *changes, **how)


@pytest.fixture
def whole(base: Path) -> Path:
    """The folder of a run that was never stopped; its output is in `whole.log`."""
    if not (base / "whole.log").exists():
        done = started(command(base), base)
        assert done.returncode == 0, done.stdout + done.stderr
        (base / "whole.log").write_text(done.stdout)
        (base / "whole.err").write_text(done.stderr)
    return base / "whole"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- a whole run


def test_a_whole_run_leaves_everything_behind(whole: Path, base: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results["steps"] == STEPS and results["trained_numbers"] == 3 * 32
    assert results["machine"].keys() == {"processor", "cores"}
    for stage in ("before", "longer", "elicited", "after"):
        assert results[stage]["problems"] == 6 and 0 <= results[stage]["accuracy"] <= 1
        assert results[stage]["lenient"] >= results[stage]["accuracy"]
        answers = json.loads((whole / f"samples_{stage}.json").read_text())
        assert [a["answer"] for a in answers] == [str((n + n % 7) % 10) for n in range(40, 46)]
    assert (whole / "training.png").read_bytes().startswith(b"\x89PNG")
    saved = artifact.read(whole / "vectors")
    assert all(t.norm() > 0 for t in saved.tensors.values()), "the reward never differed: nothing was tested"
    assert saved.config.provenance["training"]["learning_rate"] == 2e-2
    assert saved.config.base_model_name_or_path == str(base / "model")
    assert same(artifact.read(whole / f"checkpoint-{STEPS}").tensors, saved.tensors)


def test_a_whole_run_prints_the_table_and_the_places(whole: Path, base: Path) -> None:
    text = (base / "whole.log").read_text()
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["boxed"])
    names = [line.split("  ")[0] for line in lines[head + 1 : head + 6]]
    results = json.loads((whole / "results.json").read_text())
    examples, constant = results["elicited"]["examples"], results["constant"]["answer"]
    assert 0 < examples < 8, "the tiny model's context holds some of the examples"
    base_rows = ["untrained", "untrained, 12 tokens", f"untrained, {examples} examples, 12 tokens"]
    assert names == [*base_rows, f"always {constant}", "steered"]
    assert "best elicited base: " in text
    for name in ("vectors", "results.json", "training.png"):
        assert str(whole / name) in text
    assert "96 trainable parameters" in text
    assert f"{STEPS} updates" in text
    assert text.count("(answer: ") == 3
    assert "training:" in (base / "whole.err").read_text(), "no progress bar"


def test_curves_without_a_checkpoint(base: Path, here: Callable[..., str]) -> None:
    folder = base / "unsaved"
    words = ["--save_strategy", "no", "--max_steps", "2", "--eval_data", "none", "--output_dir", str(folder)]
    here(*words, plots=True)
    assert (folder / "training.png").exists() and not list(folder.glob("checkpoint-*"))
    assert [row["step"] for row in log_history(folder) if "reward" in row] == [1, 2]


def test_the_time_of_training_does_not_depend_on_how_often_is_logged() -> None:
    seconds = [1.0, 2.0, 3.0, 4.0, 5.0]
    for logged in ([1, 2, 3, 4, 5], [3, 5], [1, 3, 5], [5]):
        starts = [0, *logged]
        rows = [
            {"step": step, "seconds/wall": sum(seconds[start:step]) / (step - start)}
            for start, step in zip(starts, logged, strict=False)
        ]
        rows.append({"step": 5, "train_runtime": 20.0})
        assert recipe.logged_seconds(rows, "seconds/wall") == sum(seconds)


def test_the_history_of_an_older_run(tmp_path: Path) -> None:
    assert log_history(tmp_path) == []
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert log_history(tmp_path) == [{"step": 10}]


def test_the_printed_command_uses_the_vectors(whole: Path, base: Path) -> None:
    lines = (base / "whole.log").read_text().splitlines()
    tool, *arguments = shlex.split(lines[lines.index("Use them:") + 1])
    assert tool.endswith("steer") and "--vectors" in arguments
    problems = [json.loads(row)["problem"] for row in (base / "heldout.jsonl").read_text().splitlines()]
    assert arguments[arguments.index("--prompt") + 1] in problems
    assert steer_command(arguments) == 0


def test_a_finished_run_says_so_and_changes_nothing(whole: Path, here: Callable[..., str]) -> None:
    before = contents(whole)
    said = here()
    assert "finished" in said and "steered" in said
    after = contents(whole)
    assert {n for n in before if n != "training.png"} == {n for n in after if n != "training.png"}
    assert [n for n in before if n != "training.png" and before[n] != after[n]] == []
    assert last_checkpoint(whole) == whole / f"checkpoint-{STEPS}"


def test_a_run_uploads_its_vectors_with_their_scores(
    here: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = fake_hub(tmp_path, monkeypatch)

    def repo(self: SteeringGRPOTrainer, token: str | None = None) -> None:
        self.hub_model_id = "me/vectors"

    def refuse(self: object, **arguments: object) -> None:
        raise OSError("503 Server Error")

    monkeypatch.setattr(SteeringGRPOTrainer, "init_hf_repo", repo)
    folder = tmp_path / "out"
    words = ["--output_dir", str(folder), "--max_steps", "2", "--examples", "0"]
    words += ["--push_to_hub", "true", "--hub_model_id", "me/vectors", "--hub_strategy", "end"]
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.HfApi.upload_folder", refuse)
        with pytest.raises(SystemExit, match="error: cannot push to me/vectors"):
            here(*words)
    assert "after" in json.loads((folder / "results.json").read_text())
    assert "finished" in here(*words)
    assert [call[0] for call in remote.calls].count("upload_folder") == 1
    place = remote.home / "me" / "vectors"
    assert artifact.read(place).config.provenance["results"]["after"]["problems"] == 6
    assert 'steer.load("me/vectors", model)' in (place / artifact.CARD_FILE).read_text()


# ---- killed, and on two processes


def test_killed_between_steps_and_started_again_ends_with_the_same_vectors(
    whole: Path, base: Path, here: Callable[..., str]
) -> None:
    folder = base / "killed"
    arguments = command(base, "--output_dir", str(folder))
    with (base / "killed.log").open("w") as log:
        process = subprocess.Popen(
            arguments, cwd=base, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not (folder / "checkpoint-4").exists():
                assert process.poll() is None, (base / "killed.log").read_text()
                time.sleep(0.005)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "vectors").exists() and not (folder / f"checkpoint-{STEPS}").exists()
    left = last_checkpoint(folder)
    assert left is not None
    assert f"going on from {left}" in here("--output_dir", str(folder))
    assert same(artifact.read(folder / "vectors").tensors, artifact.read(whole / "vectors").tensors)
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == STEPS and "after" in results
    expected = json.loads((whole / "results.json").read_text())
    assert (results["before"], results["after"]) == (expected["before"], expected["after"])


def test_a_run_that_an_older_version_began_goes_on(
    whole: Path, here: Callable[..., str], tmp_path: Path
) -> None:
    """Stopped before its end, with a checkpoint of format 1 and settings under their old names."""
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "vectors")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    left = last_checkpoint(folder)
    assert left is not None
    downgrade(left)
    results = json.loads((folder / "results.json").read_text())
    for name in ("asked", "after", "steps"):
        del results[name]
    (folder / "results.json").write_text(json.dumps(results))
    settings = json.loads((folder / "run.json").read_text())
    chosen = SteeringConfig(**settings["steering"])
    settings["steering"] = old_config(chosen.to_dict())
    assert settings["steering"]["depth"] is None
    (folder / "run.json").write_text(json.dumps(settings))

    with pytest.raises(SystemExit, match="layers was 'all', now '1'"):
        here("--output_dir", str(folder), "--layers", "1")
    assert f"going on from {left}" in here("--output_dir", str(folder))
    saved = artifact.read(folder / "vectors")
    assert same(saved.tensors, artifact.read(whole / "vectors").tensors)


def test_stopped_after_its_last_update_it_trains_no_further(
    whole: Path, here: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "vectors")
    results = json.loads((folder / "results.json").read_text())
    del results["asked"], results["after"]
    (folder / "results.json").write_text(json.dumps(results))
    here("--output_dir", str(folder))
    assert json.loads((folder / "results.json").read_text())["steps"] == STEPS
    assert same(artifact.read(folder / "vectors").tensors, artifact.read(whole / "vectors").tensors)


def test_a_run_goes_on_with_another_schedule(here: Callable[..., str], tmp_path: Path) -> None:
    """Two updates at the whole rate, then the way to zero; the next rate was already set at the stop."""
    out = tmp_path / "out"
    for more in (("--max_steps", "2"), ("--max_steps", "4", "--lr_scheduler_type", "linear")):
        here("--output_dir", str(out), "--warmup_steps", "0", *more)
    assert json.loads((out / "run.json").read_text())["training"]["lr_scheduler_type"] == "linear"
    checkpoint = last_checkpoint(out)
    assert checkpoint is not None
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([2e-2, 2e-2, 2e-2, 5e-3])


def test_two_processes_give_the_vectors_of_one(whole: Path, base: Path) -> None:
    launch = [*launcher(LAUNCHERS / "cpu-2.yaml"), *command(base)[1:]]
    folder = base / "two"
    done = started([*launch, "--output_dir", str(folder), "--per_device_train_batch_size", "16"], base)
    assert done.returncode == 0, done.stdout + done.stderr
    # rank 1 was there, and drew its own half
    assert {p.name for p in (folder / f"checkpoint-{STEPS}").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    got, expected = (artifact.read(f / "vectors").tensors for f in (folder, whole))
    # the gradient is summed in another order; samples and rewards are the same ones
    assert far(got, expected) < 1e-4
    logs = [
        json.loads((f / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for f in (folder, whole)
    ]
    rewards = [[row["reward"] for row in log["log_history"] if "reward" in row] for log in logs]
    assert rewards[0] == pytest.approx(rewards[1]) and len(set(rewards[0])) > 1
    assert done.stdout.count("untrained  ") >= 1 and done.stdout.count("best elicited base") == 1


@pytest.fixture
def apart() -> Iterator[list[list[str]]]:
    """
    Two network namespaces joined by a cable, as two machines are: for each, the words that run a command in
    it. The first has the address 10.77.0.1.
    """
    names = [f"steer-{os.getpid()}-{i}" for i in (0, 1)]
    ends = [f"st{os.getpid() % 100000}x{i}" for i in (0, 1)]

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, timeout=30)

    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add {ends[0]} type veth peer name {ends[1]}")
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip(f"link set {end} netns {name}")
            ip(f"-n {name} addr add 10.77.0.{i + 1}/24 dev {end}")
            ip(f"-n {name} link set {end} up")
            ip(f"-n {name} link set lo up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here ({error})")
    try:
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            for name, end in zip(names, ends, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


@pytest.mark.slow
def test_a_machine_dies_and_the_run_goes_on_with_nothing_lost(
    whole: Path, base: Path, apart: list[list[str]]
) -> None:
    folder = base / "apart"
    changes = ["--output_dir", str(folder), "--per_device_train_batch_size", "16"]
    place = "MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 WORLD_SIZE=2 LOCAL_RANK=0 ACCELERATE_USE_CPU=true"

    def both() -> list[subprocess.Popen[str]]:
        logs = [(base / f"apart-{rank}.log").open("w") for rank in (0, 1)]
        return [
            subprocess.Popen(
                [*apart[rank], *place.split(), f"RANK={rank}", *command(base, *changes)],
                cwd=base, env=environment(), stdout=log, stderr=log, start_new_session=True, text=True,
            )
            for rank, log in enumerate(logs)
        ]  # fmt: skip

    def said(rank: int) -> str:
        return (base / f"apart-{rank}.log").read_text()

    first, second = both()
    try:
        while not (folder / "checkpoint-4" / "trainer_state.json").exists():
            assert first.poll() is None and second.poll() is None, said(0) + said(1)
            time.sleep(0.005)
        os.killpg(second.pid, signal.SIGKILL)
        assert first.wait(timeout=200) == 1
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    errors = [line for line in said(0).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "process 0 of 2 lost another one" in errors[0], said(0)
    assert "start the same command again" in errors[0] and "Traceback" not in said(0)
    assert not (folder / "vectors").exists()
    for rank, process in enumerate(both()):
        assert process.wait(timeout=300) == 0, said(rank)
    assert f"going on from {folder}" in said(0)
    got, expected = (artifact.read(f / "vectors").tensors for f in (folder, whole))
    # the gradient is summed in another order than in one process
    assert far(got, expected) < 1e-4


# ---- bad input: one line that says how to fix it


@pytest.fixture
def refused(base: Path, tmp_path: Path) -> Callable[..., str]:
    """The one line with which the recipe ends, run inside this process to save the imports."""

    def run(*changes: str, config: Path | None = None) -> str:
        arguments = command(base, "--output_dir", str(tmp_path / "out"), *changes)[1:]
        if config is not None:
            arguments[2] = str(config)
        with pytest.raises(SystemExit) as caught:
            run_here(RECIPE, *arguments[1:])
        line = str(caught.value.code)
        assert line.startswith("error: ") and "\n" not in line, line
        return line

    return run


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("--layers", "7"), "0 to 2"),
        (("--layers", ""), "'all'"),
        (("--layers", "2-1"), "smaller layer first"),
        (("--site", "resid"), "resid_post"),
        (("--rewards", "corect", "--reward_weights", "1.0"), "correct01"),
        (("--template", "boxd"), "boxed_short"),
        (("--train_data", "missing.jsonl"), "no file"),
        (("--model", "no-such-folder/x/y"), "no-such-folder"),
        (("--lr_by_layer", "9:0.1"), "0 to 2"),
        (("--advantage", "median"), "loo, group"),
        (("--reward_weights", "1.0"), "reward"),
        (("--num_generations", "5"), "num_generations"),
        (("--learnin_rate", "1"), "unknown setting learnin_rate; did you mean learning_rate?"),
        (("--max_steps", "many"), "max_steps"),
        (("--train_limit", "2"), "data set"),
        (("--loss_type", "grop"), "dr_grpo"),
        (("--levels", "9"), "levels"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_one_line(refused, changes: tuple[str, ...], named: str) -> None:
    assert named in refused(*changes)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"problem": "1+1"}\n', "'answer'"),
        ('{"problem": "1+1", "answer": ""}\n', "'answer'"),
        ("", "no problems"),
        ("not json\n", "line 1"),
    ],
)
def test_a_wrong_data_file_is_one_line(refused, tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    assert named in refused("--train_data", str(path))


def test_a_missing_config_file_is_one_line(refused, tmp_path: Path) -> None:
    line = refused(config=tmp_path / "layer-sweep.yaml")
    assert "layer-sweep.yaml" in line and "the name of one of steer's: layer-sweep-demo, " in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learnin_rate": 1}, "learnin_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        (["no", "mapping"], "mapping"),
        ("a: b: c", "YAML"),
    ],
)
def test_a_wrong_config_file_is_one_line(
    refused, base: Path, tmp_path: Path, change: object, named: str
) -> None:
    settings = yaml.safe_load((base / "config.yaml").read_text())
    path = tmp_path / "config.yaml"
    if isinstance(change, dict):
        change = {**settings, **change}
    path.write_text(change if isinstance(change, str) else yaml.safe_dump(change))
    assert named in refused(config=path)


def test_a_folder_with_another_run_or_other_files_is_one_line(refused, whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    line = refused("--learning_rate", "0.5", "--output_dir", str(whole))
    assert "learning_rate was 0.02, now 0.5" in line and "--output_dir" in line
    assert contents(whole) == before
    # which a run takes that goes on; this one is finished
    line = refused("--lr_scheduler_type", "linear", "--output_dir", str(whole))
    assert "lr_scheduler_type was 'constant_with_warmup', now 'linear'" in line
    assert contents(whole) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("text")
    assert "--output_dir" in refused("--output_dir", str(tmp_path / "thesis"))
    (tmp_path / "file").write_text("")
    assert "--output_dir" in refused("--output_dir", str(tmp_path / "file"))


def test_a_folder_that_another_run_writes_to_is_one_line(refused, tmp_path: Path) -> None:
    with held(tmp_path / "out", "--output_dir"):
        line = refused()
    assert f"is in use: process {os.getpid()} on " in line and "another --output_dir" in line


def test_a_mistake_found_late_does_not_claim_the_folder(refused, tmp_path: Path) -> None:
    # or the corrected command would be turned away for being "another run"
    assert "layer 7 does not exist" in refused("--layers", "7")
    assert "layer 8 does not exist" in refused("--layers", "8")


def test_the_recipe_ends_with_status_1_and_no_traceback(base: Path, tmp_path: Path) -> None:
    done = started(command(base, "--output_dir", str(tmp_path / "out"), "--layers", "7"), base)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.rstrip().endswith(errors[0])


def test_help_names_the_groups(recipe: Callable[..., str]) -> None:
    said = recipe(RECIPE, "--help")
    for group in ("model, data and reward", "steering vectors", "training"):
        assert f"{group}:" in said
    assert "--lr_by_layer" in said and "%%" not in said


def test_the_shipped_configs_are_readable() -> None:
    from trl import TrlParser

    from steer.config import SteeringArguments
    from steer.training import run as runs
    from steer.training.config import SteeringGRPOConfig

    configs = ROOT / "recipes" / "configs"
    others = ("sae-", "compare-", "gate-", "layer-sweep-", "seeds-", "demo-")  # with tests of their own
    files = sorted(p for p in configs.glob("*.yaml") if not p.name.startswith(others))
    assert files
    for path in files:
        parser = TrlParser([runs.RunConfig, SteeringArguments, SteeringGRPOConfig])
        changes = ["--use_cpu", "true", "--bf16", "false"]
        run, chosen, training = parser.parse_args_and_config(["--config", str(path), *changes])
        steer.SteeringConfig(**vars(chosen))
        assert isinstance(training.learning_rate, float) and run.model, path
        assert torch.isfinite(torch.tensor(training.learning_rate))


def test_a_process_group_ends_with_the_run_though_a_cycle_holds_it(tmp_path: Path) -> None:
    class Trainer:
        """Refers to itself, as trainers do by their callbacks."""

        def __init__(self, group: object) -> None:
            self.itself, self.group = self, group

    gc.disable()  # nothing else must break the cycle
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
        )
        trainer = Trainer(torch.distributed.distributed_c10d._get_default_group())
        group = weakref.ref(trainer.group)
        del trainer
        recipe.leave_processes()
        assert group() is None  # its threads are joined where it is deleted
    finally:
        gc.enable()

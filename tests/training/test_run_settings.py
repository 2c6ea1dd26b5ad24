"""One run's settings: what identifies it on disk, across versions, and what its artifact says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from helpers.paths import ROOT

from steer.cli import layer_sweep, train, train_baseline
from steer.errors import SteerError
from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.arguments import PopulationArguments
from steer.training.config import SteeringGRPOConfig
from steer.training.recipe import begin
from steer.training.run import RUN_FILE, RunConfig, claim_output_dir
from steer.training.run_settings import METHODS, RunSettings
from steer.training.same_result import CONTINUED, WATCHING, differences
from steer.training.sweep import grid
from steer.training.sweep.member import IDLE, OWN, SHARED
from steer.training.sweep.run import POPULATION_FILE, claim_sweep_dir

PARTS = (RunConfig, SteeringGRPOConfig, SteeringSFTConfig, SteeringDPOConfig)
# Folders of runs that version 0.1 began, with the command lines that began them.
OLD = ROOT / "tests" / "data" / "runs"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)  # the command lines name recipes/configs/demo.yaml
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # later tests must not inherit use_cpu


def began(recipe: str, folder: Path) -> list[str]:
    """A copy of the old run at `folder`, with something computed; returns its command line."""
    shutil.copytree(OLD / recipe, folder)
    arguments = json.loads((folder / "arguments.json").read_text())
    (folder / "arguments.json").rename(folder / "results.json")
    return arguments


@pytest.mark.parametrize("module", [train, train_baseline], ids=["grpo_steer", "grpo_baseline"])
def test_a_run_begun_by_version_0_1_goes_on(module: Any, request: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = began(request.node.callspec.id, folder)
    settings = module.parse(arguments)
    claim_output_dir(folder, settings.identity(), settings.defaults())
    assert json.loads((folder / RUN_FILE).read_text()) == settings.identity()
    for changed, named in (
        (["--learning_rate", "0.5"], r"learning_rate was 0\.00\d, now 0\.5"),
        (["--prefix", "Step"], "prefix was '(To)?', now 'Step'"),
        (["--advantage", "group"], "advantage was 'loo', now 'group'"),
    ):
        settings = module.parse([*arguments, *changed])
        with pytest.raises(SteerError, match=f"holds another run: {named}"):
            claim_output_dir(folder, settings.identity(), settings.defaults())
    free = ["--save_steps", "1", "--max_steps", "7", "--samples_shown", "0", "--lr_scheduler_type", "linear"]
    settings = module.parse([*arguments, *free])
    claim_output_dir(folder, settings.identity(), settings.defaults())


def test_a_run_of_another_recipe_is_another_run(tmp_path: Path) -> None:
    began("grpo_baseline", folder := tmp_path / "run")
    settings = train.parse(json.loads((OLD / "grpo_steer" / "arguments.json").read_text()))
    with pytest.raises(SteerError, match=r"holds another run: .* more"):
        claim_output_dir(folder, settings.identity(), settings.defaults())


def claimed(folder: Path, line: list[str]) -> list[RunSettings]:
    """The members of a population that has made `folder` its home."""
    settings = RunSettings.parse("layer_sweep", arguments=line, population=PopulationArguments)
    members = grid.members(settings, 30, line)
    claim_sweep_dir(folder, settings, members, {m.member for m in members})
    return members


def test_a_population_begun_by_version_0_1_goes_on(tmp_path: Path) -> None:
    arguments = began("layer_sweep", folder := tmp_path / "run")

    def claim(*changes: str) -> list[str]:
        return [m.member for m in claimed(folder, [*arguments, *changes])]

    assert claim() == ["lr-0.001", "lr-0.003", "control"]
    assert {*json.loads((folder / POPULATION_FILE).read_text())} == {"lr-0.001", "lr-0.003", "control"}
    with pytest.raises(SteerError, match=r"another member control: .*rewards was \['random'\], now"):
        claim("--population", "{name: control, rewards: [format], reward_weights: [1.0]}")
    with pytest.raises(SteerError, match="holds another run: max_completion_length was 16, now 5"):
        claim("--max_completion_length", "5")


def test_a_trained_member_takes_another_schedule_only_with_more_updates(tmp_path: Path) -> None:
    arguments = [*began("layer_sweep", folder := tmp_path / "run"), "--max_steps", "7"]
    first, *_ = claimed(folder, arguments)
    linear, of_it = ["--lr_scheduler_type", "linear"], folder / "members" / first.member
    of_it.mkdir(parents=True)
    asked = [7, first.training.num_train_epochs]
    (of_it / "results.json").write_text(json.dumps({"asked": asked, "steps": 7}))
    before = (folder / POPULATION_FILE).read_text()
    with pytest.raises(SteerError, match=r"another member lr-0\.001: lr_scheduler_type was 'constant"):
        claimed(folder, [*arguments, *linear])
    assert (folder / POPULATION_FILE).read_text() == before
    claimed(folder, [*arguments, *linear, "--max_steps", "8"])


def test_members_have_the_words_of_either_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "demo", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train.parse([*words, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    seeds = ["--seeds", "0", "1"]
    printed = ["--config", str(tmp_path / "printed.yaml")]
    lines = [[*words, *seeds, "--method", "grpo"], [*printed, *seeds]]
    found = [grid.members(train.parse(line), 30, line) for line in lines]
    settings = RunSettings.parse("layer_sweep", None, [*words, *seeds], population=PopulationArguments)
    expected = grid.members(settings, 30, [*words, *seeds])
    assert [m.member for m in expected] == ["seed-0", "seed-1"]
    for members in found:
        assert [m.identity() for m in members] == [m.identity() for m in expected]
        assert [m.provenance() for m in members] == [m.provenance() for m in expected]
        assert all(m.rates is None and m.finder is None for m in members)


def test_what_differs_is_named_and_what_is_new_is_at_its_default() -> None:
    have = {"run": {"a": 1, "gone": None, "left": 2}, "steering": {"format_version": 1, "width": None}}
    wanted = {"run": {"a": 1, "new": 5}, "steering": {}}
    assert differences(have, wanted, {"run": {"new": 5}}) == ["left was 2, and is not a setting of this run"]
    assert differences(have, wanted, {"run": {"new": 4}})[1] == "new was 4, now 5"
    assert differences({}, {"run": {"a": 1}}, {"run": {"a": 1}}) == ["a was None, now 1"]
    assert differences({"baseline": {"method": "lora"}, "run": {}}, {"run": {}}, {}) == [
        "method was 'lora', and is not a setting of this run"
    ]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_on_given_answers_goes_on_with_the_batches_it_began_with(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    words = ["--config", f"demo-{method}", "--use_cpu", "true", "--output_dir", str(folder)]

    def claim(*changes: str) -> None:
        settings = train.parse([*words, *changes])
        claim_output_dir(folder, settings.identity(), settings.defaults())

    claim()
    (folder / "results.json").write_text("{}")
    claim("--dataloader_num_workers", "1", "--dataloader_pin_memory", "true")
    with pytest.raises(SteerError, match="dataloader_drop_last was False, now True"):
        claim("--dataloader_drop_last", "true")
    with pytest.raises(SteerError, match="accelerator_config was "):
        claim("--accelerator_config", '{"even_batches": false}')
    begun = json.loads((folder / RUN_FILE).read_text())
    size = begun["answers"]["examples_per_update"]
    with monkeypatch.context() as patched:
        patched.setattr(METHODS[method][0], "world_size", 2)
        with pytest.raises(SteerError, match=f"examples_per_update was {size}, now {2 * size}"):
            claim()
    # an older version named none of them
    del begun["answers"]["examples_per_update"]
    for name in ("dataloader_drop_last", "dataloader_in_order", "accelerator_config"):
        del begun["training"][name]
    (folder / RUN_FILE).write_text(json.dumps(begun))
    claim()


def test_the_list_of_settings_that_change_no_result_names_settings() -> None:
    names = {f.name for part in PARTS for f in fields(part)}
    assert names >= WATCHING | CONTINUED | IDLE | OWN | SHARED
    assert {"report_to", "save_steps", "logging_steps", "hub_token", "samples_shown"} <= WATCHING
    # by prefix only where nothing else begins so
    results = {"seed", "eval_data", "eval_limit", "max_steps", "temperature", "train_limit", "model"}
    assert not results & WATCHING
    assert IDLE <= WATCHING and not WATCHING & OWN and not OWN & SHARED


def test_provenance_is_what_was_set_and_what_is_essential() -> None:
    arguments = json.loads((OLD / "grpo_steer" / "arguments.json").read_text())
    more = ["--weight_decay", "0.1", "--save_steps", "3", "--hub_token", "hf_secret", "--max_steps", "9"]
    made = train.parse([*arguments, *more]).provenance()
    assert made["recipe"] == "grpo_steer" and made["run"]["template"] == "boxed_short"
    training = made["training"]
    assert training["weight_decay"] == 0.1 and training["lr_by_layer"] == "geometric:0.003:0.1"
    assert training["advantage"] == "loo" and training["max_steps"] == 9, "essential, though a default"
    assert training["reward_weights"] == [1.0, 0.25]
    assert not {"save_steps", "hub_token", "adam_beta1", "output_dir"} & set(training)
    assert "hf_secret" not in json.dumps(made)
    one = replace(train.parse(arguments), member="layer-3").provenance()
    assert one["member"] == "layer-3" and "member" not in made


def test_percent_signs_in_help_are_written_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the dataclasses are as they were
        with pytest.raises(SystemExit):
            train.parse(["--help"])
        text = capsys.readouterr().out
        assert "%%" not in text and "%(" not in text and "--lr_by_layer" in text


def test_layer_sweep_takes_no_sweep_of_rates() -> None:
    with pytest.raises(SteerError, match="lr_sweep"):
        RunSettings.parse(
            "layer_sweep", layer_sweep.__doc__, ["--lr_sweep", "1"], population=PopulationArguments
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lerning_rate", "1e-3"], "unknown setting lerning_rate; did you mean learning_rate?"),
        (["--qqq", "1"], "unknown setting qqq; --help lists the settings"),
    ],
)
def test_a_misspelt_setting_is_named_with_the_nearest(words: list[str], expected: str) -> None:
    with pytest.raises(SteerError) as error:
        RunSettings.parse("grpo_steer", arguments=words)
    assert str(error.value) == expected


def test_a_misspelt_setting_of_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("num_generation: 8\n")
    with pytest.raises(SteerError, match="unknown setting num_generation; did you mean num_generations"):
        RunSettings.parse("grpo_steer", arguments=["--config", str(tmp_path / "run.yaml")])


def test_a_revision_with_vllm_is_refused_unless_an_adapter_is_merged(tmp_path: Path) -> None:
    words = ["--config", "demo", "--output_dir", str(tmp_path), "--use_vllm", "true"]
    words += ["--vllm_mode", "colocate", "--model_revision", "v2"]
    with pytest.raises(SteerError, match="model_revision='v2' with use_vllm"):
        begin(RunSettings.parse("grpo_steer", None, words))
    begin(RunSettings.parse("grpo_steer", None, [*words, "--base_adapter", str(tmp_path)]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--sweep_only true", "sweep_only=True would have no effect without lr_sweep"),
        (
            "--sweep_steps 3 --validation_samples 2",
            "sweep_steps=3, validation_samples=2 would have no effect",
        ),
        ("--lr_sweep 0.1 --sweep_steps -3", "sweep_steps=-3 is out of range"),
        ("--lr_sweep 0.1 --validation_samples 0", "validation_samples=0 is out of range"),
        ("--seeds 0 1 --keep 0.3", "keep=0.3 would have no effect without halve_at"),
        ("--seeds 0 1 --halve_on validation --halve_among layers", "halve_on=validation, halve_among=layers"),
        ("--seeds 0 1 --validation_problems 0", "validation_problems=0 is out of range"),
        ("--seeds 0 1 --halve_at 2 --validation_problems 8", "without halve_on=validation"),
        (
            "--seeds 0 1 --halve_at 2 --halve_on validation --validation_problems 8 --validate_every 2",
            "validation_problems=8 would have no effect with validate_every",
        ),
        ("--winners 2", "winners=2 would have no effect without a population"),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, words: str, expected: str) -> None:
    line = ["--config", "demo", "--use_cpu", "true", "--output_dir", str(tmp_path), *words.split()]
    with pytest.raises(SteerError) as error:
        begin(train.parse(line))
    assert expected in str(error.value)


@pytest.mark.parametrize("setting", ["scale", "learning_rate"])
def test_a_number_that_is_not_finite_is_refused_with_a_fix(tmp_path: Path, setting: str) -> None:
    words = ["--config", "demo", "--output_dir", str(tmp_path), f"--{setting}", "nan"]
    with pytest.raises(SteerError, match=f"^{setting}=nan is not a finite number; give "):
        RunSettings.parse("grpo_steer", None, words)

"""`--help` shows the default of every setting, and `--print_config` a config file of all of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.paths import ROOT

from steer.arguments import Help, shown_default
from steer.cli import main, train, train_baseline, train_sae
from steer.config import SteeringArguments
from steer.evaluation import options
from steer.sae import SAEConfig
from steer.sae.schedule import TrainConfig
from steer.training.arguments import FinderArguments, PopulationArguments, SweepArguments
from steer.training.baselines import Baseline
from steer.training.config import SteeringGRPOConfig
from steer.training.run import RunConfig
from steer.training.run_settings import RunSettings

CONFIGS = ROOT / "recipes" / "configs"
SHARED = (RunConfig, SteeringArguments, SteeringGRPOConfig)
PARTS: dict[str, tuple[Any, ...]] = {
    "train": (*SHARED, SweepArguments, FinderArguments, PopulationArguments),
    "train-baseline": (*SHARED, SweepArguments, Baseline),
    "sweep": (*SHARED, PopulationArguments),
}


def parse_sweep(words: list[str]) -> RunSettings:
    return RunSettings.parse("layer_sweep", None, words, population=PopulationArguments)


PARSERS: dict[str, Callable[[list[str]], RunSettings]] = {
    "train": train.parse,
    "train-baseline": train_baseline.parse,
    "sweep": parse_sweep,
}


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The help of each option of a program, by the option's name."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    found = re.split(r"^  (?=--?\w)", text, flags=re.MULTILINE)[1:]
    return {block.split()[0].rstrip(",").lstrip("-"): " ".join(block.split()) for block in found}


@pytest.mark.parametrize("command", PARTS)
def test_help_shows_every_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys, command)
    for part in PARTS[command]:
        for field in fields(part):
            if field.init:
                assert "default: " in shown[field.name], field.name
    assert "(default: 200)" in shown["eval_limit"] and "(default: 0.001)" in shown["learning_rate"]
    assert "(default: true)" in shown["share_prompts"] and "(default: correct)" in shown["rewards"]
    assert "(default: not set)" in shown["patience"]
    assert "default: 0.1 for validate_every, 0.3 for lr_sweep." in shown["validation"]
    shown = help_of(capsys, command, "--config", "demo")
    assert "(default: 75)" in shown["eval_limit"] and "(default: correct01 format)" in shown["rewards"]


def test_help_of_the_other_programs_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    asked = help_of(capsys, "eval")
    assert "(default: 1)" in asked["workers"] and "(default: not set)" in asked["columns"]
    for words in (("eval",), ("compare",), ("compare", "--config", "compare-tiny")):
        for name, text in help_of(capsys, *words).items():
            flag = re.match(r"--?[\w-]+(, --?[\w-]+)* [a-z]", text)  # no value follows the names
            assert flag or "default: " in text or name in ("model", "benchmarks", "out", "config"), text
    with pytest.raises(SystemExit):
        main(["sae", "train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for part in (train_sae.RunConfig, TrainConfig, SAEConfig):
        for field in fields(part):
            line = f"{field.name} {field.metadata['help']}"
            if field.default is not MISSING and "default: " not in line:
                line += f" (default: {shown_default(field.default)})"
            assert line in shown


def test_texts_that_name_a_default_are_left_alone() -> None:
    parser = argparse.ArgumentParser(formatter_class=Help)
    parser.add_argument("--a", default=3, help="100 %% of it; default: all")
    parser.add_argument("--b", default=[1, 2], type=int, nargs="+", help="two")
    parser.add_argument("--c", action="store_true", help="a switch")
    parser.add_argument("--d", required=True, help="needed")
    text = parser.format_help()
    assert "100 % of it; default: all\n" in text and "two (default: 1 2)" in text
    assert text.count("(default") == 1
    assert options.parser("").format_help()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--config", "demo"]),
        ("train", ["--config", "demo", "--seed", "3", "--layers", "4-9", "--rewards", "correct01",
                   "--reward_weights", "1.0", "--lr_scheduler_type", "cosine", "--save_strategy", "no",
                   "--columns", "problem=question", "--prefix", "To: é", "--lr_sweep", "1e-3", "2e-05",
                   "--sweep_steps", "4", "--validation_samples", "2", "--sweep_only"]),
        ("train-baseline", ["--config", "demo", "--method", "lora", "--target_modules", "q_proj", "v_proj"]),
        ("sweep", ["--config", "layer-sweep-demo", "--halve_at", "4", "8"]),
        ("train", ["--config", "deepscaler-qwen2.5-math-7b", "--use_cpu", "--bf16", "false"]),
    ],
)  # fmt: skip
def test_a_printed_config_gives_the_same_settings(
    command: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, *words, "--print_config"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    assert set(yaml.safe_load(text)) == {
        f.name for part in PARTS[command] for f in fields(part) if f.init and f.name != "hub_token"
    }
    one, other = PARSERS[command](words), PARSERS[command](["--config", str(file)])
    assert other.identity() == one.identity()
    assert other.training.to_dict() == one.training.to_dict()
    for name in ("run", "steering", "rates", "population", "baseline"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left and asdict(left)) == (right and asdict(right))


def test_a_printed_config_keeps_the_environment_and_no_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_TEST", "")
    file = tmp_path / "own.yaml"
    file.write_text("env: {STEER_TEST: x}\nhub_token: secret\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(file), "--use_cpu", "--print_config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["env"] == {"STEER_TEST": "x"} and "secret" not in text


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("sae-*.yaml")))
def test_a_printed_config_of_saes_gives_the_same_settings(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", config, "layer=3", "lr=1e-5"]
    with pytest.raises(SystemExit) as end:
        main(["sae", "train", *words, "--print_config"])
    assert end.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    run, training = train_sae.parse(words)
    again, training_again = train_sae.parse(["--config", str(file)])
    assert training_again == training
    assert asdict(again) | {"saes": None} == asdict(run) | {"saes": None}
    for name, values in run.saes.items():
        assert SAEConfig(**{"d_in": 576, **again.saes[name]}) == SAEConfig(**{"d_in": 576, **values})

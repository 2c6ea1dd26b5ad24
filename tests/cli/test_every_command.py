"""
Every command of `steer`, new ones too, with paths and numbers that it cannot use: one line on standard error,
exit code 1 or 2, and no traceback.

Each option of each command is given in turn what it cannot use, beside arguments that work: a third of it, or
all of it in the slow tests. Training, serving and sampling for an evaluation do not begin: what is given has
been read before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import every_command
from helpers.evaluating import make_run
from helpers.training import model_folder, write_problems

import steer
from steer.cli import main
from steer.sae import SAE, SAEConfig, save_sae

COMMANDS = {" ".join(words): (words, parser) for words, parser in every_command()}
LENS = ["--model", "model", "--data", "sums.jsonl", "--problems", "1", "--max-new-tokens", "1"]
# Required arguments by the name that the parser has for them; vectors where it is none of these.
REQUIRED = {
    "artifacts": ["vectors", "vectors"],
    "model": ["model"],
    "prompt": ["1+1="],
    "to": ["model"],
    "source": ["array.npy"],
    "sae": ["sae"],
    "target": ["new/target"],
    "out": ["new/out"],
    "runs": ["run"],
    "benchmarks": ["sums.jsonl"],
    "overrides": [],
    "file": ["pairs.jsonl"],
    "run_folder": ["run"],
    "feature": ["1"],
    "token": ["7"],
    "repo_id": ["me/vectors"],
    "texts": ["sums.jsonl"],
}
# Further arguments, which let a command come as far as it can in little time.
MORE = {
    "export": ["--to", "npy", "--out", "new/out.npy"],
    "import": ["--confirm-model"],
    "transfer": ["--from", "model", "--method", "direct", "--max-new-tokens", "1", "--check-limit", "1"],
    "generate": ["--max-new-tokens", "1"],
    "pack pull": ["--out", "new/pulled"],
    "pack push": ["--dry-run"],
    "calibrate": ["--model", "model", "--target-kl", "0.001"],
    "lens logit": ["--model", "model", "--top", "1"],
    "lens jacobian": ["--limit", "1", "--length", "2"],
    "lens transfer": LENS[2:],
    **{f"lens {name}": LENS for name in ("report", "shift", "patch", "persistence", "compose", "sweep")},
    "lens scales": LENS,
    **{
        f"lens {name}": [*LENS, "--draws", "1"]
        for name in ("attention", "baselines", "conventions", "downstream", "entropy", "spectrum")
    },
    "lens features": [*LENS, "--sae-layer", "1", "--draws", "1", "--max-new-tokens", "4"],
    "lens patch": [*LENS, "--layers", "1"],
    "lens compose": [*LENS, "--layers", "0-1"],
    "lens sweep": [*LENS, "--scales", "1"],
    "extract condition": ["--model", "model"],
    "extract sae": ["--model", "model", "--layers", "1"],
    "extract answers": ["--model", "model", "--tokens", "completion"],
    "eval": ["--template", "plain", "--max-new-tokens", "1", "--samples", "0", "--examples", "0"],
    "train": ["--config", "train.yaml"],
    "train-baseline": ["--config", "train.yaml"],
    "sweep": ["--config", "train.yaml", "--learning_rates", "1e-3"],
}
REPLACED = {  # other values of required arguments
    ("export", "to"): [],
    ("grading-check", "source"): ["run"],
    ("play", "artifacts"): ["vectors"],
    ("extract condition", "vectors"): ["late"],
    ("sae train", "config"): ["sae.yaml"],
    ("compare --config", "config"): ["compare.yaml"],
    ("lens scales", "artifact"): ["adaptive"],
}
PATHS = [
    "nothing",
    "",
    "empty",
    "folder",
    "empty/below-a-file",
    "ünï/日本.npz",
    "\udcff",
    "x" * 5000,
    "/dev/null",
]
NOISE = ["noise.safetensors", "noise.gguf", "noise.jsonl"]
NUMBERS = ["nan", "-1", "0", "inf", "9" * 30, "1e999", "½", ""]
NUMERIC = {"int", "float", "finite", "whole", "count", "at_least", "read"}  # names of parsers' types
OFTEN = 100  # a program with more options has those of transformers: they are given one of the values each


class Stopped(BaseException):
    """The command has read all that it was given."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stopped


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """pytest keeps what is logged, and pytest-xdist cannot send a name that is not UTF-8."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def ready(
    place: Path, build_tiny: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The working directory, with whatever the commands read; what takes long is replaced by `Stopped`."""
    monkeypatch.chdir(place)
    for name in ("steer.training.recipe._evaluate", "steer.training.recipe._train", "os.execv"):
        monkeypatch.setattr(name, stop)
    for name in ("steer.cli.layer_sweep.train_members", "steer.evaluation.run._sample"):
        monkeypatch.setattr(name, stop)
    monkeypatch.setattr("steer.training.comparison.Comparison.call", stop)
    monkeypatch.setattr("steer.sae.trainer.SAETrainer.train", stop)
    for name in ("steer.cli.play._serve", "steer.pack.pull", "steer.hub.search"):
        monkeypatch.setattr(name, stop)
    for name in ("serve", "play"):
        monkeypatch.setattr(f"steer.cli.{name}.require", lambda *args: None)
    monkeypatch.setattr("steer.cli.prepare_environment", lambda: None)
    monkeypatch.setenv("STEER_CACHE", str(place / "cache"))
    if (place / "model").exists():
        return place
    model = build_tiny("llama")
    model_folder(place / "model", model, tiny_tokenizer)
    config = steer.SteeringConfig(base_model_name_or_path="model", provenance={"run": {"template": "plain"}})
    vectors = steer.attach(model, config)
    vectors.set_tensors({name: torch.ones_like(t) for name, t in vectors.tensors().items()})
    vectors.save("vectors")
    steer.detach(model)
    config = steer.SteeringConfig("adaptive", base_model_name_or_path="model", provenance=config.provenance)
    steer.attach(model, config).save("adaptive")
    late = steer.artifact.from_vectors({2: torch.ones(32)}, model)
    late.save_pretrained("late")
    assert main(["export", "vectors", "--to", "npy", "--out", "array.npy"]) == 0
    save_sae(SAE(SAEConfig(d_in=32, d_sae=64, k=2)), place / "sae")
    write_problems(place / "sums.jsonl", range(10, 12), modulus=10)
    make_run(place / "run", {"base": [[True], [False]]})
    training = {
        "model": "model",
        "train_data": "sums.jsonl",
        "eval_data": "none",
        "template": "plain",
        "output_dir": "new/train",
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "max_completion_length": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
    }
    plan = {
        "config": "train.yaml",
        "methods": {"steering": {"recipe": "grpo_steer", "learning_rate": 0.1}},
        "evaluation": {"benchmarks": ["sums.jsonl"]},
        "output_dir": "new/runs",
        "out": "new/comparison",
    }
    texts = {
        "model": "model",
        "texts": ["sums.jsonl"],
        "window": 8,
        "saes": {"one": {"d_sae": 64, "k": 2}},
        "output_dir": "new/saes",
    }
    for name, values in (("train", training), ("compare", plan), ("sae", texts)):
        (place / f"{name}.yaml").write_text(yaml.safe_dump(values))
    pairs = [{"positive": f"1+{n}=", "negative": f"2+{n}="} for n in range(4)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (place / "empty").write_bytes(b"")
    (place / "folder").mkdir()
    for name in (*NOISE, "ünï/日本.npz"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(bytes(range(256)))
    return place


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments that take a value of the user's own."""
    return [a for a in parser._actions if a.nargs != 0 and not a.choices and a.metavar != "COMMAND"]


def numeric(action: argparse.Action) -> bool:
    return getattr(action.type, "__name__", "") in NUMERIC


def words(name: str, changed: argparse.Action | None = None, value: str = "") -> list[str]:
    """A command line that works, but for the one argument that is `changed`."""
    start, parser = COMMANDS[name]
    options, positionals = [], []
    for action in parser._actions:
        good = REPLACED.get((name, action.dest), REQUIRED.get(action.dest, ["vectors"]))
        if action is changed and not action.option_strings:
            positionals.append(value)
        elif not action.option_strings and action.nargs != argparse.PARSER:
            positionals += good if action.required or action.nargs is None else []
        elif action.required and good and action.dest != "config":
            options += [action.option_strings[0], *good]
        elif action.required and action.dest == "config" and name == "sae train":
            options += ["--config", *good]
    found = [*start, *(REPLACED[name, "config"] if name == "compare --config" else [])]
    found += [*positionals, *options, *MORE.get(name, [])]
    if changed is not None and changed.option_strings:
        option = changed.option_strings[-1 if changed.option_strings[-1].startswith("--") else 0]
        found += [option, value] if changed.nargs in ("+", "*") else [f"{option}={value}"]
    return found


def call(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command, and its last line on standard error; one line there begins an error."""
    shutil.rmtree("new", ignore_errors=True)
    capsys.readouterr()
    told = ""
    try:
        with warnings.catch_warnings():
            code = main(argv)
    except Stopped:
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        told = end.code if isinstance(end.code, str) else ""
    lines = [line for line in (capsys.readouterr().err + told).splitlines() if line.strip()]
    if code:
        errors = [line for line in lines if re.match(r"(steer[\w -]*: )?error: ", line)]
        assert code in (1, 2), f"exit code {code}"
        assert len(errors) == 1 and errors == lines[-1:], lines[-5:]
    return code, lines[-1] if lines else ""


def wrong(name: str, values: Iterator[tuple[argparse.Action, str]], capsys: Any) -> list[str]:
    """What the command makes of each value, where it is not one line."""
    found = []
    for action, value in values:
        argv = words(name, action, value)
        try:
            code, _ = call(argv, capsys)
        except (Exception, AssertionError) as error:
            found.append(f"{ascii(' '.join(argv))[:300]}: {type(error).__name__}: {str(error)[:300]}")
            continue
        if not code and numeric(action) and value not in ("0", "-1", "9" * 30):
            found.append(f"{' '.join(argv)[:300]}: is taken for a number")
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_default(name: str) -> None:
    parser = COMMANDS[name][1]
    optional = [a for a in parser._actions if a.option_strings and a.nargs != 0 and not a.required]
    told = parser.format_help()
    assert len(re.findall(r"\bdefault:", told)) >= len([a for a in optional if a.help != argparse.SUPPRESS])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_arguments_that_work(name: str, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = call(words(name), capsys)
    assert (code, line) == (1, f"error: {REFUSE[name]}") if name in REFUSE else code == 0, line


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_values_that_cannot_be_used(
    step: int, name: str, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All values of each option, or every third of them, from another one on for each option."""
    actions = options(COMMANDS[name][1])
    turns, starts = itertools.count(), itertools.count(list(COMMANDS).index(name))

    def values() -> Iterator[tuple[argparse.Action, str]]:
        for action in actions:
            every = NUMBERS if numeric(action) else [*PATHS, NOISE[next(turns) % len(NOISE)]]
            known = action.dest in seen(name) - {*OUTPUTS} and bool(action.option_strings)
            if known and len(actions) > OFTEN:
                continue
            if known or len(actions) > OFTEN:
                every = [every[next(turns) % len(every)]]
            else:
                every = every[next(starts) % step :: step]
            for value in every:
                yield action, value

    found = wrong(name, values(), capsys)
    assert not found, "\n".join(found)


def seen(name: str) -> set[str]:
    """The options that commands walked before this one have too: they are given one of the values each."""
    before = itertools.takewhile(lambda other: other != name, COMMANDS)
    return {action.dest for other in before for action in options(COMMANDS[other][1])}


# Commands that refuse what they are given here, and what they say.
REFUSE = {
    "lens report": "a report needs at least 24 problems, got 1; raise --problems",
    "lens baselines": "0 of 1 steered answers are right, 0 of those that choose the length and 0 of those "
    "that measure; both need one: give more problems",
    "extract answers": "run: benchmark 'sums' asks chats, which a run does not keep; give pairs",
}
OUTPUTS = ("out", "plot", "figures", "target", "output_dir")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_without_permission(
    name: str, ready: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user who may not write to `locked`; root, who runs some of the tests, may write anywhere."""
    (ready / "locked").mkdir(exist_ok=True)
    locked = str(ready / "locked")

    def inside(path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(locked + os.sep)

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
            if inside(path):
                raise PermissionError(13, "Permission denied", path)
            return real(path, *args, **kwargs)

        return refuse

    for function in ("mkdir", "open", "rename", "replace"):
        monkeypatch.setattr(os, function, refusing(getattr(os, function)))
    for action in options(COMMANDS[name][1]):
        if action.dest in OUTPUTS:
            suffix = {"plot": ".png", "out": ".npy" if name == "export" else ""}.get(action.dest, "")
            code, line = call(words(name, action, f"locked/new/out{suffix}"), capsys)
            assert code == 1 and re.search(f"ermission|cannot|{REFUSE.get(name, '-')}", line), line

"""The comparison as one command on a tiny model: everything once, nothing twice, failures told at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.evaluating import make_base
from helpers.launching import run_here
from helpers.paths import ROOT
from helpers.training import write_problems
from peft import LoraConfig, get_peft_model

from steer import artifact
from steer.cli import compare
from steer.errors import SteerError
from steer.evaluation import options
from steer.evaluation import run as evaluation
from steer.evaluation.pack import read_packed
from steer.evaluation.plan import read_plan
from steer.models import load_model
from steer.recipe_files import launcher_file
from steer.tasks.data import load_problems, save_problems
from steer.tasks.elicited import choose
from steer.training import comparison_records as records
from steer.training.arguments import SweepArguments
from steer.training.comparison import Comparison, Failed
from steer.training.comparison_report import curve
from steer.training.validation import split

CONFIGS = sorted((ROOT / "recipes" / "configs").glob("compare-*.yaml"))
GATES = sorted((ROOT / "recipes" / "configs").glob("gate-*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture
def plan(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    """A comparison of three methods and a control on a tiny model, two seeds."""
    if not (place / "compare.yaml").exists():
        make_base(place, build_tiny, tiny_tokenizer)
        write_problems(place / "train.jsonl", range(40), modulus=10)
        training = {
            "model": str(place / "model"),
            "train_data": str(place / "train.jsonl"),
            "eval_data": str(place / "sums.jsonl"),
            "template": "plain",
            "rewards": ["correct01", "format"],
            "max_steps": 2,
            "num_generations": 8,
            "per_device_train_batch_size": 16,
            "max_completion_length": 3,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        (place / "train.yaml").write_text(yaml.safe_dump(training))
        comparison = {
            "config": str(place / "train.yaml"),
            "launcher": "cpu",
            "seeds": [0, 1],
            "sweep": {"sweep_steps": 1, "validation_samples": 2},
            "reference": "full",
            "methods": {
                "steering": {"recipe": "grpo_steer", "learning_rate": 0.02},
                "full": {
                    "recipe": "grpo_baseline",
                    "method": "full",
                    "lr_sweep": [1e-4, 1e-3],
                    "model_dtype": "float32",
                    "bf16": True,
                },
                "random-reward": {"like": "steering", "rewards": ["random"]},
            },
            "prefixes": ["To"],
            "examples": 2,
            "evaluation": {"benchmarks": [str(place / "sums.jsonl")], "samples": 2},
            "output_dir": str(place / "work"),
            "out": str(place / "out"),
        }
        (place / "compare.yaml").write_text(yaml.safe_dump(comparison))
    return place / "compare.yaml"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the processes inside this one, which has everything imported already; returns what they were."""
    seen: list[list[str]] = []

    def call(self: Any, words: list[str]) -> None:
        seen.append(words)
        if words[1:4] == ["-m", "steer.cli", "eval"]:
            if code := evaluation.main(words[4:]):
                raise Failed(f"exit code {code}")
            return
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        try:
            run_here(Path(words[script]), *words[script + 1 :])
        except SystemExit as error:
            raise Failed(f"exit code {error.code}") from error

    monkeypatch.setattr(Comparison, "call", call)
    return seen


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report without its figures, which take longer than a tiny run."""
    monkeypatch.setattr("steer.evaluation.plots.draw", lambda *_: {})


def test_everything_is_done_once_and_reported(plan, calls, place, capsys):
    assert compare.main(["--config", str(plan)]) == 0
    out = place / "out"
    names = {"base", "elicited", *(f"{m}-{s}" for m in ("steering", "full", "random-reward") for s in (0, 1))}
    assert {path.stem for path in (out / "runs").iterdir()} == names

    # the elicited base has examples out of the training problems that all runs share
    elicited = read_packed(out / "runs" / "elicited.json")["settings"]["variants"]["base, 2 examples"]
    training = load_problems(str(place / "train.jsonl")).to_list()
    held_out = [row["problem"] for row in load_problems(str(place / "sums.jsonl"))]
    assert elicited["asked"]["sums"]["examples"] == [list(pair) for pair in choose(training, 2, held_out)]

    # a rate was chosen among those asked for, on problems that are neither trained on then nor held out, with
    # a seed that is not reported
    chosen = json.loads((out / "sweeps" / "full.json").read_text())
    tried = {row["learning_rate"]: row["accuracy"] for row in chosen["tried"]}
    assert set(tried) == {1e-4, 1e-3} and tried[chosen["chosen"]] == max(tried.values())
    assert chosen["asked"]["training"]["seed"] == 2
    assert not list((place / "work" / "full-sweep").rglob("*.safetensors"))

    about = {path.stem: read_packed(path)["about"] for path in (out / "runs").iterdir()}
    assert about["full-1"]["learning_rate"] == chosen["chosen"]
    assert about["random-reward-0"]["learning_rate"] == 0.02
    # what learned under the rounding of bfloat16 is measured under it
    assert read_packed(out / "runs" / "full-1.json")["settings"]["dtype"] == "bfloat16"
    assert about["full-1"]["dtype"] == "bfloat16" and about["steering-1"]["dtype"] == "auto"
    assert about["steering-1"]["seed"] == 1
    results = about["steering-0"]["results"]
    assert results["trained_numbers"] == 3 * 32 and results["steps"] == 2
    assert results["training_cpu_seconds"] > 0 and results["versions"]["torch"]
    assert len(about["steering-0"]["curve"]["reward"]) == 2

    scores = json.loads((out / "scores.json").read_text())
    assert scores["base"] == "base" and scores["reference"] == "full"
    seeds = {row["method"]: row["seeds"] for row in scores["rows"]}
    untrained = {"base": 1, "base + To": 1, "base, 2 examples": 1}
    assert seeds == untrained | {"steering": 2, "full": 2, "random-reward": 2}
    numbers = {row["method"]: row["parameters"] for row in scores["rows"]}
    assert numbers["steering"] == 96 and numbers["full"] == results_of(about, "full")["trained_numbers"]
    for file in ("index.html", "table.md", "training.md", "accuracy.png", "training.png"):
        assert (out / file).stat().st_size > 0
    assert "| steering | 96 | 0.02 | 0, 1 | 2 |" in (out / "training.md").read_text()

    # nothing is done again, not even without the folder of work
    calls.clear()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (place / "work").rename(place / "elsewhere")
    assert compare.main(["--config", str(plan)]) == 0
    (place / "elsewhere").rename(place / "work")
    assert calls == []
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def results_of(about: dict[str, Any], method: str) -> dict[str, Any]:
    return about[f"{method}-0"]["results"]


def test_a_base_with_an_adapter_is_compared_with_the_model_without(plan, calls, no_figures, place, tmp_path):
    """What the adapter costs shows, with the examples and the room that the base is given."""
    base = load_model(str(place / "model"))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = {"base_adapter": str(tmp_path / "adapter")}
    places = {"out": str(tmp_path / "out"), "output_dir": str(tmp_path / "work")}
    changed = replace(read_plan(str(plan)), settings=adapter, longer=5, prefixes=(), **places)
    comparison = Comparison(changed)
    assert "no-adapter" in dict(comparison.jobs()) and "no-adapter" not in dict(
        Comparison(read_plan(plan)).jobs()
    )
    comparison.untrained()
    comparison.without_adapter()
    calls.clear()
    comparison.without_adapter()
    assert not calls, "done once"
    comparison.report()
    packed = read_packed(tmp_path / "out" / "runs" / "no-adapter.json")
    assert packed["settings"]["model"] == str(place / "model")
    assert packed["settings"]["benchmarks"]["sums"]["max_new_tokens"] == 5
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"base", "without adapter", "without adapter, 2 examples"}
    assert len({row["best_base"] for row in rows if row["decoding"] == "greedy"}) == 1


def test_what_fails_holds_up_no_other(plan, calls, no_figures, place, capsys):
    broken = yaml.safe_load(plan.read_text())
    broken["methods"]["steering"]["layers"] = "7"  # the model has three
    broken |= {"seeds": [0], "output_dir": str(place / "broken"), "out": str(place / "broken-out")}
    broken["methods"].pop("full")
    broken["methods"]["random-reward"]["layers"] = "all"
    (place / "broken.yaml").write_text(yaml.safe_dump(broken))
    assert compare.main(["--config", str(place / "broken.yaml")]) == 1
    assert "failed: steering-0" in capsys.readouterr().err
    kept = {path.stem for path in (place / "broken-out" / "runs").iterdir()}
    assert kept == {"base", "elicited", "random-reward-0"}


def test_methods_alone(plan, calls, no_figures, place, capsys):
    chosen = ["--config", str(plan), "--out", str(place / "alone"), "--seeds", "1", "--methods"]
    assert compare.main([*chosen, "random-reward"]) == 0
    assert {path.stem for path in (place / "alone" / "runs").iterdir()} == {"random-reward-1"}
    assert compare.main([*chosen, "magic"]) == 1
    assert "no method magic" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"benchmarks": ["x.jsonl"], "seeds": 3}, "; it has seeds"),
        ({"samples": 2}, "evaluation needs benchmarks, a list"),
        ({"benchmarks": "x.jsonl"}, "evaluation needs benchmarks, a list"),
    ],
)
def test_an_evaluation_that_would_be_ignored_is_refused(place, plan, asked, expected):
    whole = yaml.safe_load(plan.read_text()) | {"evaluation": asked}
    (place / "unknown.yaml").write_text(yaml.safe_dump(whole))
    with pytest.raises(SteerError, match=expected):
        read_plan(str(place / "unknown.yaml"))


def test_settings_of_a_sweep_stay_with_the_sweep(plan, place, monkeypatch):
    original = read_plan(str(plan))
    own = {"validation_samples": 3, "validation": 5}
    methods = {**original.methods, "full": {**original.methods["full"], **own}}
    where = {"out": str(place / "swept"), "output_dir": str(place / "swept-work")}
    sweep = {**original.sweep, "validation": 7}
    comparison = Comparison(replace(original, methods=methods, sweep=sweep, **where))
    assert "validation_samples" not in comparison.settings("full")[0]
    seen: list[dict[str, Any]] = []

    def launch(self: Any, job: str, settings: dict[str, Any], launcher: str) -> None:
        seen.append(settings)
        raise Failed("stopped")

    monkeypatch.setattr(Comparison, "launch", launch)
    with pytest.raises(Failed):
        comparison.rate("full")
    assert {name: seen[0][name] for name in own} == own and seen[0]["lr_sweep"]


def test_what_an_evaluation_says_is_what_steer_eval_is_asked(plan, place):
    comparison = Comparison(read_plan(str(plan)))
    said = {"temperature": 0.5, "limit": 3, "chat_template_kwargs": {"enable_thinking": False}}
    columns = {"columns": {"answer": "gold"}}
    changed = Comparison(
        replace(comparison.plan, evaluation={**comparison.plan.evaluation, **said, **columns})
    )
    assert not {"--columns", "--limit"} & set(changed.evals(place, ("columns", "limit")))
    args = options.parser("").parse_args([*changed.evals(place)[4:], "--benchmarks", "x", "--model", "m"])
    assert {name: getattr(args, name) for name in said} == said
    assert args.columns == "answer=gold"


@pytest.mark.parametrize("columns", [None, {}])
def test_what_an_evaluation_leaves_empty_is_as_if_not_said(plan, place, columns):
    comparison = Comparison(read_plan(str(plan)))
    empty = {"template": None, "prefix": None, "samples": None, "columns": columns}
    evaluation = {**comparison.plan.evaluation, **empty}
    changed = Comparison(replace(comparison.plan, evaluation=evaluation))
    assert changed.evals(place) == comparison.evals(place)
    assert changed.asked()["samples"] == 8


def test_chosen_seeds_leave_the_seed_of_the_rates_alone(plan, monkeypatch, capsys):
    def seen(given: Any) -> None:
        raise SteerError(f"seeds {given.seeds}, rates with {given.sweep_seed}")

    monkeypatch.setattr(compare, "Comparison", seen)
    assert compare.main(["--config", str(plan), "--seeds", "1"]) == 1
    assert "seeds (1,), rates with 2" in capsys.readouterr().err


def test_what_was_begun_with_another_schedule_or_length_is_not_taken_for_these(plan, tmp_path, monkeypatch):
    def fail(self: Any, words: list[str]) -> None:
        raise Failed("stopped")

    monkeypatch.setattr(Comparison, "call", fail)
    settings = yaml.safe_load(plan.read_text())
    settings["methods"]["shared"] = {"like": "steering", "together": True}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    work = tmp_path / "work"
    original = read_plan(str(tmp_path / "compare.yaml"))
    original = replace(original, output_dir=str(work), out=str(tmp_path / "out"))
    linear = {"lr_scheduler_type": "linear"}
    for job, left, change, told in (
        (lambda one: one.trained("steering", 0), "steering-0/results.json", linear, "lr_scheduler_type was"),
        (lambda one: one.trained("shared", 0), "shared/state-0.pt", {"max_steps": 3}, "max_steps was 2, now"),
        (lambda one: one.rate("full"), "full-sweep/lr-0.001/x", {"max_steps": 3}, "max_steps was 2, now"),
    ):
        with pytest.raises(Failed, match="stopped"):
            job(Comparison(original))
        (work / left).parent.mkdir(parents=True)
        (work / left).touch()
        with pytest.raises(Failed, match="stopped"):
            job(Comparison(replace(original, seeds=(0, 3))))  # other seeds beside it
        changed = replace(original, settings=change)
        with pytest.raises(SteerError, match=rf"begun with other settings than these: {told}.*remove that"):
            job(Comparison(changed))
        shutil.rmtree(work / left.split("/")[0])
        with pytest.raises(Failed, match="stopped"):
            job(Comparison(changed))


def test_the_curve_of_a_run_is_that_of_its_log(tmp_path):
    (tmp_path / "curve.json").write_text(json.dumps({"reward": [0.5], "accuracy": [], "length": []}))
    assert curve(tmp_path)["reward"] == [0.5], "the log is gone"
    (tmp_path / "log.json").write_text(json.dumps([{"step": 1, "reward": 0.25}, {"step": 2, "reward": 1.0}]))
    assert curve(tmp_path) == {"reward": [0.25, 1.0], "accuracy": [], "length": []}
    assert json.loads((tmp_path / "curve.json").read_text())["reward"] == [0.25, 1.0]


def test_a_config_may_leave_model_and_length_at_their_defaults(plan, place, tmp_path):
    training = yaml.safe_load((place / "train.yaml").read_text())
    left = {name: value for name, value in training.items() if name not in ("model", "max_completion_length")}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(left))
    comparison = Comparison(replace(read_plan(str(plan)), config=str(tmp_path / "train.yaml")))
    assert comparison.base_settings() == {"model": "smollm2-135m-instruct"}
    assert comparison.base() == ["--model", "smollm2-135m-instruct"]
    assert comparison.asked()["max_new_tokens"] == 256


def test_results_of_other_settings_are_not_taken_for_these(plan, calls, place):
    comparison = Comparison(read_plan(str(plan)))
    comparison.untrained()
    changed = replace(comparison.plan, evaluation={**comparison.plan.evaluation, "samples": 3})
    with pytest.raises(
        SteerError, match=r"base\.json was made with other settings than these: samples was 2, now 3; move"
    ):
        Comparison(changed).untrained()


def test_a_result_of_another_base_is_not_taken_for_this_one(plan, calls, place, tmp_path):
    original = replace(read_plan(str(plan)), examples=0, prefixes=(), out=str(tmp_path))
    Comparison(original).untrained()
    for change in ({"base_adapter": "adapter"}, {"model_revision": "v2"}, {"model": "another"}):
        changed = Comparison(replace(original, settings=change))
        with pytest.raises(SteerError, match=r"base\.json was made with other settings than these: \w+ was "):
            changed.untrained()


@pytest.mark.parametrize("job", ["untrained", "longer", "elicited", "system_prompt"])
def test_results_that_do_not_name_their_base_are_known_by_their_evaluation(job, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Comparison, "evaluate", None)  # nothing is made
    plan = read_plan("compare-tiny")
    getattr(Comparison(plan), job)()
    for change in ({"base_adapter": "adapter"}, {"model_revision": "v2"}, {"model": "another"}):
        with pytest.raises(SteerError, match="was made with other settings than these"):
            getattr(Comparison(replace(plan, settings={**plan.settings, **change})), job)()


def test_controls_of_other_training_problems_are_not_taken_for_these(plan, tmp_path, monkeypatch):
    def call(self: Any, words: list[str]) -> None:
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        row = {"method": "system 1", "accuracy": {"value": 0.5}}
        (out / "scores.json").write_text(json.dumps({"rows": [row]}))

    def evaluate(self: Any, job: str, model: list[str], asked: dict[str, Any], about: Any = None) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        made = {"about": {"hash": records.digest(asked), "asked": asked}, "completions": {}}
        (self.runs / f"{job}.json").write_text(json.dumps(made))

    monkeypatch.setattr(Comparison, "call", call)
    monkeypatch.setattr(Comparison, "evaluate", evaluate)
    places = {"out": str(tmp_path / "out"), "output_dir": str(tmp_path / "work")}
    original = replace(read_plan(str(plan)), systems=("Be brief.",), **places)
    write_problems(tmp_path / "other.jsonl", range(40, 60), modulus=10)
    changed = replace(original, settings={"train_data": str(tmp_path / "other.jsonl")})
    jobs = ("elicited", "without_adapter", "system_prompt")
    for job in jobs:
        getattr(Comparison(original), job)()
    monkeypatch.setattr(Comparison, "evaluate", None)  # nothing more is made
    for job in jobs:
        getattr(Comparison(original), job)()
        with pytest.raises(SteerError, match=r"train_data was '.*train.jsonl', now '.*other.jsonl'"):
            getattr(Comparison(changed), job)()
    for file in (tmp_path / "out" / "runs").iterdir():  # as an older version left them
        made = json.loads(file.read_text())
        made["about"]["asked"].pop("data")
        made["about"]["hash"] = records.digest(made["about"]["asked"])
        file.write_text(json.dumps(made))
    for job in jobs:
        getattr(Comparison(changed), job)()
    without = replace(changed, examples=0)
    with pytest.raises(SteerError, match="examples was 2, now 0"):
        Comparison(without).without_adapter()


def test_problems_that_are_written_are_read_back_as_they_were(tmp_path):
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 3"}]
    rows = [
        {"prompt": chat, "answer": ["4", "four"], "level": 2, "hint": "a sum"},
        {"prompt": chat[1:], "problem": "one and three", "answer": "4", "level": 1, "hint": "easy"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_problems(str(tmp_path / "mine.jsonl"))
    save_problems(tmp_path / "written.jsonl", read)
    assert load_problems(str(tmp_path / "written.jsonl")).to_list() == read.to_list()
    assert read[0]["messages"] == chat and read[0]["golds"] == ["4", "four"]


def test_the_best_system_prompt_is_chosen_on_validation_problems(
    plan, place, calls, build_tiny, tiny_tokenizer
):
    make_base(place / "chat", build_tiny, tiny_tokenizer, max_position_embeddings=512)
    training = yaml.safe_load((place / "train.yaml").read_text()) | {"template": "boxed_short"}
    training["model"] = str(place / "chat" / "model")
    (place / "chat.yaml").write_text(yaml.safe_dump(training))
    plan = yaml.safe_load((place / "compare.yaml").read_text())
    plan |= {"config": str(place / "chat.yaml"), "systems": ["Be brief.", "Box it."]}
    plan |= {"output_dir": str(place / "chat-work"), "out": str(place / "chat-out")}
    (place / "chat-compare.yaml").write_text(yaml.safe_dump(plan))
    Comparison(read_plan(str(place / "chat-compare.yaml"))).system_prompt()
    packed = read_packed(place / "chat-out" / "runs" / "system-prompt.json")
    tried = packed["about"]["tried"]
    assert set(tried) == {"Be brief.", "Box it."}
    assert tried[packed["about"]["chosen"]] == max(tried.values())
    assert packed["settings"]["variants"]["system prompt"]["system"] == packed["about"]["chosen"]
    held_out = {row["problem"] for row in packed["problems"]}
    validation = load_problems(str(place / "chat-work" / "validation.jsonl"))["problem"]
    assert validation and not held_out & set(validation)


def test_a_stopped_comparison_leaves_no_process_behind(plan, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    opened: list[Any] = []

    class Interrupted(subprocess.Popen):
        """As if Ctrl-C came once its child, a process of its own as a launcher's is, has begun."""

        def wait(self, timeout: float | None = None) -> int:
            if opened:
                return super().wait(timeout)
            opened.append((tmp_path / "fifo").open())
            assert opened[0].readline() == "begun\n"
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    script = f"(echo begun; sleep 60; echo lives on) > {tmp_path}/fifo & wait"
    with pytest.raises(KeyboardInterrupt):
        Comparison(read_plan(plan)).call(["sh", "-c", script])
    with opened[0] as fifo:
        assert fifo.read() == "", "its end: no process has it open any more"


# ---- the sweep


def test_a_validation_split_keeps_like_problems_together():
    from datasets import Dataset

    texts = [f"What is {a} {op} {b}?" for a in range(12) for b in range(12) for op in "+*"]
    train, validation = split(Dataset.from_dict({"problem": texts}), 0.3)
    assert 0.2 < len(validation) / len(texts) < 0.4
    words = [{tuple(sorted(row["problem"][:-1].split())) for row in part} for part in (train, validation)]
    assert not words[0] & words[1]
    assert {row["problem"] for part in (train, validation) for row in part} == set(texts)


def test_a_split_that_leaves_nothing_is_said():
    from datasets import Dataset

    with pytest.raises(SteerError, match="validation=3 leaves 0 problems to train and 3 to validate on"):
        split(Dataset.from_dict({"problem": ["a", "b", "c"]}), 3)


# ---- the files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_comparisons_that_come_with_steer(path, monkeypatch):
    """Readable, its recipes take its settings, and `lora-equal` has as many numbers as the vectors."""
    monkeypatch.chdir(ROOT)
    comparison = Comparison(read_plan(str(path)))
    assert comparison.plan.reference in comparison.plan.methods
    assert {"steering", "full", "lora-equal", "lora-r4", "random-reward", "format-reward"} <= set(
        comparison.plan.methods
    )
    for text in comparison.plan.evaluation["benchmarks"]:
        evaluation.benchmarks.parse(text)
    for name in comparison.plan.methods:
        settings, launcher = comparison.settings(name)
        assert launcher_file(launcher).is_file()
        known = [*module_fields(settings["recipe"]), "recipe"]
        assert set(settings) <= set(known)
    lora, _ = comparison.settings("lora-r4")  # as published: arXiv 2509.06608 and its authors' files
    assert (lora["method"], lora["lora_rank"], lora["lora_alpha"]) == ("lora", 4, 4)
    assert lora["target_modules"] == ["down_proj"]
    assert 1e-4 in (lora.get("learning_rate"), *comparison.plan.methods["lora-r4"].get("lr_sweep", []))
    width, depth = SHAPES[comparison.shared["model"]]
    equal = comparison.plan.methods["lora-equal"]
    assert equal["target_modules"] == ["o_proj"] and equal["lora_rank"] == 1
    assert len(equal["target_layers"].split(",")) * 2 * width == depth * width


def test_tools_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = yaml.safe_load((ROOT / "recipes" / "configs" / "compare-tiny.yaml").read_text())
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**plan, "config": "calculator"}))
    with pytest.raises(SteerError, match=r"calculator.yaml with tools: .* `steer eval`, which calls none"):
        Comparison(read_plan(str(tmp_path / "plan.yaml")))


@pytest.mark.parametrize("path", GATES, ids=lambda path: path.stem)
def test_gates_train_one_seed_that_no_comparison_reports(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(read_plan(str(path)))
    problems = comparison.shared["train_data"]
    plans = [read_plan(str(config)) for config in CONFIGS]
    reported = {seed for one in plans if one.settings.get("train_data") == problems for seed in one.seeds}
    assert reported
    assert "full" in comparison.plan.methods and not set(comparison.plan.seeds) & reported
    assert comparison.plan.examples and comparison.plan.longer
    assert all("validation" in text for text in comparison.plan.evaluation["benchmarks"])
    for method in comparison.plan.methods:
        settings, _ = comparison.settings(method)
        assert set(settings) <= {*module_fields(settings["recipe"]), "recipe"}


def test_the_paper_comparison_has_the_published_rates(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan("compare-paper")
    rates = {name: plan.methods[name]["learning_rate"] for name in ("steering", "full", "lora-r4")}
    assert rates == {"steering": 1e-3, "full": 1e-6, "lora-r4": 1e-4}


def test_results_that_are_kept_were_made_with_the_settings_of_their_plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = Comparison(read_plan("compare-tiny"))
    found = set()
    for file in sorted(comparison.runs.glob("*.json")):
        about = read_packed(file)["about"]
        if "method" in about:
            settings, _ = comparison.settings(about["method"])
            settings |= {"seed": about["seed"], "learning_rate": comparison.rate(about["method"])}
            assert file.stem == f"{about['method']}-{about['seed']}"
            assert comparison.done(file.stem, {"evaluation": comparison.asked(), "training": settings})
            found.add(about["method"])
    assert found == set(comparison.plan.methods) - {"lora-r4"}


@pytest.mark.parametrize("name", ["compare-tiny"])
def test_the_report_of_committed_results_is_the_committed_one(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    kept = ROOT / "evals" / "results" / name
    for part in ("runs", "sweeps"):
        shutil.copytree(kept / part, tmp_path / part)
    config = f"recipes/configs/{name}.yaml"
    assert compare.main(["--config", config, "--report", "--out", str(tmp_path)]) == 0
    for file in ("table.md", "training.md"):
        assert (tmp_path / file).read_text() == (kept / file).read_text()
    # differences of a last bit in an interval are the platform's
    assert json.loads((tmp_path / "scores.json").read_text()) == approx(
        json.loads((kept / "scores.json").read_text())
    )
    assert (kept / "table.md").read_text().splitlines()[2] in capsys.readouterr().out


def approx(found: Any) -> Any:
    """Nested JSON whose numbers are compared with `pytest.approx`."""
    if isinstance(found, dict):
        return {key: approx(value) for key, value in found.items()}
    if isinstance(found, list):
        return [approx(value) for value in found]
    return pytest.approx(found, abs=1e-9) if isinstance(found, float) else found


# width and depth; in all of them the output projection is square
SHAPES = {
    "smollm2-135m-instruct": (576, 30),
    "qwen2.5-coder-1.5b-instruct": (1536, 28),
    "qwen2.5-coder-0.5b-instruct": (896, 24),
    "Qwen/Qwen2.5-Math-7B": (3584, 28),
}


def module_fields(script: str) -> list[str]:
    from dataclasses import fields

    from steer.config import SteeringArguments
    from steer.training.baselines import Baseline
    from steer.training.config import SteeringGRPOConfig
    from steer.training.run import RunConfig

    trained = SteeringArguments if script == "grpo_steer" else Baseline
    parts = (RunConfig, trained, SteeringArguments, SteeringGRPOConfig, SweepArguments)
    return [f.name for part in parts for f in fields(part)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"methodz": {}}, r"unknown \['methodz'\]"),
        ({"methods": {"a": {"learning_rate": 1.0}}}, "method 'a' has no recipe"),
        ({"methods": {"a": {"recipe": "grpo_steer"}}}, "neither learning_rate nor lr_sweep"),
        ({"methods": {"a": {"like": "b"}}}, "method 'a' has no recipe"),
        ({"config": "nowhere.yaml"}, r"no config file 'nowhere\.yaml'"),
    ],
)
def test_mistakes_in_a_plan_are_one_line(plan, tmp_path, capsys, change, expected):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(yaml.safe_load(plan.read_text()) | change))
    assert compare.main(["--config", str(wrong)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    assert re.search(expected, message)


def test_no_plan_at_all(tmp_path, capsys):
    assert compare.main(["--config", str(tmp_path / "none.yaml")]) == 1
    assert "no config file" in capsys.readouterr().err


def test_methods_are_trained_on_the_samples_of_another(plan, calls, no_figures, place, tmp_path, capsys):
    settings = yaml.safe_load(plan.read_text())
    training = yaml.safe_load((place / "train.yaml").read_text())
    # samples of a random model: all that end count as right
    training |= {"max_completion_length": 12, "beta": 0.04, "per_device_train_batch_size": 64}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    answers = {"answers_of": "steering", "learning_rate": 0.01, "per_device_train_batch_size": 4}
    settings |= {
        "config": str(tmp_path / "train.yaml"),
        "seeds": [1],
        "reference": None,
        "examples": 0,
        "prefixes": [],
        "methods": {
            "steering": {"recipe": "grpo_steer", "learning_rate": 0.02},
            "sft": {"recipe": "sft_steer", "min_reward": 0.0, **answers},
            "dpo": {"recipe": "dpo_steer", **answers},
        },
        "output_dir": str(tmp_path / "work"),
        "out": str(tmp_path / "out"),
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    samples = tmp_path / "work" / "steering-1" / "completions"
    samples.mkdir(parents=True)  # as a run that was stopped leaves them
    assert compare.main(["--config", str(path), "--methods", "sft"]) == 1
    assert "steering-1 comes first: it is not finished" in capsys.readouterr().err
    samples.rmdir()
    assert compare.main(["--config", str(path), "--methods", "steering", "sft"]) == 0
    about = {file.stem: read_packed(file)["about"] for file in (tmp_path / "out" / "runs").iterdir()}
    assert about.keys() == {"steering-1", "sft-1"}
    asked = about["sft-1"]["asked"]["training"]
    assert asked["train_data"] == str(tmp_path / "work" / "steering-1") and asked["learning_rate"] == 0.01
    assert not {"num_generations", "rewards", "beta"} & asked.keys() and asked["template"] == "plain"
    assert asked["eval_data"] == training["eval_data"]
    assert about["sft-1"]["results"]["steps"] == 2 and not about["sft-1"]["curve"]["accuracy"]
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert {"steering", "sft"} == {row["method"] for row in rows}
    # samples of other settings are not taken for these
    file = tmp_path / "out" / "runs" / "steering-1.json"
    packed = read_packed(file)
    packed["about"]["hash"] = "other"
    file.write_text(json.dumps(packed))
    comparison = Comparison(read_plan(str(path)))
    with pytest.raises(SteerError, match=r"sft-1\.json was made with other settings .*: samples_of was"):
        comparison.trained("sft", 1)
    with pytest.raises(Failed, match=r"steering-1\.json away to have them drawn again"):
        samples.rename(tmp_path / "elsewhere")
        comparison.trained("dpo", 1)
    dpo, _ = comparison.settings("dpo")
    assert dpo["per_device_train_batch_size"] == 4 and not {"beta", "rewards"} & dpo.keys()


def test_the_rate_of_seeds_trained_together_is_searched_with_another_seed(plan, calls, no_figures, tmp_path):
    settings = yaml.safe_load(plan.read_text()) | {"reference": None, "examples": 0, "prefixes": []}
    settings["methods"] = {"steering": {"recipe": "grpo_steer", "together": True, "lr_sweep": [0.01, 0.03]}}
    settings |= {"output_dir": str(tmp_path / "work"), "out": str(tmp_path / "out")}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert compare.main(["--config", str(path)]) == 0
    scripts = [Path(word).name for words in calls for word in words if word.endswith(".py")]
    assert scripts == ["grpo_steer.py", "layer_sweep.py"]
    searched = json.loads((tmp_path / "out" / "sweeps" / "steering.json").read_text())
    assert searched["asked"]["training"]["seed"] == 2 and searched["chosen"] in (0.01, 0.03)
    for seed in (0, 1):
        about = read_packed(tmp_path / "out" / "runs" / f"steering-{seed}.json")["about"]
        assert about["learning_rate"] == searched["chosen"] and about["seed"] == seed


def test_seeds_trained_together_are_the_runs_of_each(plan, calls, no_figures, tmp_path):
    settings = yaml.safe_load(plan.read_text()) | {"reference": None, "examples": 0, "prefixes": []}
    one = {"recipe": "grpo_steer", "learning_rate": 0.3, "warmup_steps": 0, "max_steps": 3}
    path = tmp_path / "compare.yaml"

    def carry_out(together: bool, name: str) -> None:
        methods = {"steering": one | {"together": together}}
        folders = {"output_dir": str(tmp_path / f"work-{name}"), "out": str(tmp_path / name)}
        path.write_text(yaml.safe_dump(settings | folders | {"methods": methods}, sort_keys=False))
        assert compare.main(["--config", str(path)]) == 0

    carry_out(False, "alone")
    calls.clear()
    carry_out(True, "alone")  # how runs share a process is not a setting of theirs
    assert not calls
    carry_out(True, "shared")
    trained = [words[-1] for words in calls if any(word.endswith("layer_sweep.py") for word in words)]
    assert len(trained) == 1  # both seeds in one process
    for seed in (0, 1):
        job = f"steering-{seed}"
        alone, shared = (
            read_packed(tmp_path / out / "runs" / f"{job}.json")["about"] for out in ("alone", "shared")
        )
        assert shared["hash"] == alone["hash"] and shared["curve"].keys() == alone["curve"].keys(), job
        for key, values in alone["curve"].items():
            assert shared["curve"][key] == pytest.approx(values), (job, key)
        assert shared["results"].keys() == alone["results"].keys() | {"reward", "stopped"}
        assert shared["results"]["training_cpu_seconds"] > 0
        folders = "work-alone/" + job, f"work-shared/steering/members/seed-{seed}"
        got = [artifact.read(tmp_path / folder / "vectors").by_layer() for folder in folders]
        for layer, vector in got[0].items():
            torch.testing.assert_close(got[1][layer], vector, rtol=1e-3, atol=1e-4)
            assert vector.norm() > 0.1
    # what is finished is not trained again, here or elsewhere
    (tmp_path / "shared" / "runs" / "steering-1.json").unlink()
    shutil.rmtree(tmp_path / "work-shared")
    calls.clear()
    carry_out(True, "shared")
    asked = yaml.safe_load((tmp_path / "work-shared" / "configs" / "steering.yaml").read_text())
    assert asked["seeds"] == [1] and len(calls) == 2


def test_what_a_population_does_otherwise_is_refused(plan, calls, tmp_path, capsys, monkeypatch):
    settings = yaml.safe_load(plan.read_text()) | {"out": str(tmp_path / "out"), "launcher": "cpu-2"}
    settings["methods"] = {"steering": {"recipe": "grpo_steer", "learning_rate": 0.3, "together": True}}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings))
    comparison = Comparison(read_plan(str(path)))
    with pytest.raises(Failed, match="cpu-2 has 2: a population would divide the seeds"):
        comparison.trained("steering", 0)
    # a population that fails is started once, not once for each seed
    path.write_text(yaml.safe_dump(settings | {"launcher": "cpu"}))
    comparison, started = Comparison(read_plan(str(path))), []

    def call(words: list[str]) -> None:
        started.append(words)
        raise Failed("exit code 1")

    monkeypatch.setattr(comparison, "call", call)
    for seed in (0, 1):
        with pytest.raises(Failed, match="exit code 1"):
            comparison.trained("steering", seed)
    assert len(started) == 1
    path.write_text(yaml.safe_dump(settings | {"settings": {"together": True}}))
    with pytest.raises(SteerError, match="together is said of a method"):
        read_plan(str(path))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"recipe": "grpo_baseline", "learning_rate": 0.1, "together": True}, "which share one frozen model"),
        ({"like": "full", "learning_rate": 0.1, "together": True}, "which share one frozen model"),
        ({"recipe": "grpo_steer", "learning_rate": 0.1, "together": "false"}, "write true or false"),
        ({"recipe": "sft_steer", "lr_sweep": [0.1, 0.2]}, "lr_sweep is for methods that sample them"),
        ({"recipe": "dpo_steer", "learning_rate": 0.1, "answers_of": "full"}, "give a method before it"),
        (
            {"recipe": "grpo_steer", "learning_rate": 0.1, "answers_of": "steering"},
            "answers_of has no effect",
        ),
    ],
)
def test_a_plan_of_given_answers_that_means_nothing_is_refused(plan, tmp_path, method, expected):
    settings = yaml.safe_load(plan.read_text())
    settings["methods"]["own"] = method
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(SteerError, match=expected):
        read_plan(str(path))

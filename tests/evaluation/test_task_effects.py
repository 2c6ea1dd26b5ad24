"""`steer eval --side-effect-tasks`: verdicts of lm-eval's tasks, paired with the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluating import arguments, make_base, make_run
from helpers.steering import fill
from transformers import AutoModelForCausalLM, AutoTokenizer

import steer
from steer import SteeringConfig
from steer.evaluation import compare, run, task_effects
from steer.evaluation.collect import collect
from steer.evaluation.store import read_settings
from steer.evaluation.variants import Variant

needs_lm_eval = pytest.mark.skipif(
    not find_spec("lm_eval"), reason="lm-eval is not installed: pip install 'lm-eval[hf]==0.4.13'"
)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: {metric}}}]
"""
# choices of one length, so that a random model chooses now this and now that
PROBLEMS = [
    {"question": f"What is {a} + {b}?", "choices": [f" {x}" for x in "1abc2def"[a : a + 3]], "gold": b % 3}
    for a in range(1, 5)
    for b in range(1, 5)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    if not (place / "sums.jsonl").exists():
        make_base(place, build_tiny, tiny_tokenizer)
    return place


def task_file(folder: Path, name: str = "choose", metric: str = "acc") -> Path:
    data = folder / "choose.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, metric=metric))
    return path


@torch.no_grad()
def chosen(model: Any, tokenizer: Any) -> list[float]:
    """Whether the right choice has the highest log-likelihood, text by text."""
    verdicts = []
    for problem in PROBLEMS:
        first = tokenizer(problem["question"])["input_ids"]
        found = []
        for choice in problem["choices"]:
            ids = [*first, *tokenizer(choice, add_special_tokens=False)["input_ids"]]
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            found.append(sum(logp[i - 1, ids[i]].item() for i in range(len(first), len(ids))))
        verdicts.append(float(max(range(3), key=found.__getitem__) == problem["gold"]))
    return verdicts


@needs_lm_eval
def test_tasks_are_answered_by_the_base_and_each_variant(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out, path = tmp_path / "run", task_file(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    known = {"base": chosen(model, tokenizer)}
    steer.load(base / "vectors", model)
    known["s"] = chosen(model, tokenizer)
    steer.detach(model)
    more = ["--vectors", f"s={base / 'vectors'}", "--adapter", f"lora={base / 'lora'}"]
    more += ["--limit", "2", "--samples", "0", "--examples", "0"]
    asked = arguments(base, out, *more, "--side-effect-tasks", str(path))
    assert run.main(asked) == 0
    settings = read_settings(out)
    found = settings["side_effect_tasks"]
    assert found.keys() == {"base", "s", "lora"} == settings["side_effects"].keys()
    assert known["base"] != known["s"]
    assert {name: found[name]["choose"]["values"] for name in known} == known
    printed = capsys.readouterr().out
    assert "Side effects on tasks of lm-eval" in printed and "| choose (16 problems) | acc | s |" in printed
    with monkeypatch.context() as patch:
        patch.setattr(task_effects, "measure", lambda *_: pytest.fail("measured twice"))
        assert run.main(asked) == 0
    assert run.main([*asked, "--side-effect-limit", "4"]) == 0
    entry = read_settings(out)["side_effect_tasks"]["s"]["choose"]
    assert entry["limit"] == 4 and entry["values"] == known["s"][:4]
    capsys.readouterr()
    assert run.main([*asked[:-1], str(task_file(tmp_path, "likely", "brier_score"))]) == 1
    assert "task 'likely' of lm-eval has no accuracy" in capsys.readouterr().err


@needs_lm_eval
@pytest.mark.parametrize(
    ("positions", "tasks", "expected"),
    [
        ("all", ["hellasvag"], "no task 'hellasvag'; did you mean hellaswag?"),
        ("all", ["nothing.yaml"], "'nothing.yaml' is no task of lm-eval"),
        ("completion", ["hellaswag"], "positions=completion"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    base: Path, tmp_path: Path, positions: str, tasks: list[str], expected: str, capsys: Any
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base / "model")
    fill(steer.attach(model, SteeringConfig(positions=positions))).save(tmp_path / "v")
    more = ["--vectors", str(tmp_path / "v"), "--side-effect-tasks", *tasks]
    capsys.readouterr()
    assert run.main(arguments(base, tmp_path / "run", *more)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and expected in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--side-effect-limit", "3"], "--side-effect-limit is for --side-effect-tasks"),
        pytest.param(
            ["--side-effect-tasks", "gsm8k"],
            '--side-effect-tasks needs lm_eval: pip install "steer-rl[lm-eval]"',
            marks=pytest.mark.skipif(bool(find_spec("lm_eval")), reason="lm-eval is installed"),
        ),
    ],
)
def test_what_is_missing_is_told(
    base: Path, tmp_path: Path, more: list[str], expected: str, capsys: Any
) -> None:
    vectors = ["--vectors", str(base / "vectors")]
    assert run.main(arguments(base, tmp_path / "run", *vectors, *more)) == 1
    assert expected in capsys.readouterr().err


def test_a_task_is_answered_again_when_its_file_or_limit_changes(tmp_path: Path) -> None:
    variants, path = [Variant("base", "base"), Variant("v", "vectors", "v")], task_file(tmp_path)
    known = {"limit": 4, "file": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "values": [1.0]}
    named = {"limit": 4, "values": [1.0]}
    settings = {"side_effect_tasks": {"v": {"choose": known, "hellaswag": named}}}
    tasks = [str(path), "hellaswag", str(path)]
    assert task_effects.missing(settings, variants, tasks, 4) == [(variants[0], tasks[:2])]
    assert task_effects.missing(settings, variants, tasks, None)[1] == (variants[1], tasks[:2])
    task_file(tmp_path, metric="exact_match")
    assert task_effects.missing(settings, variants[1:], tasks, 4) == [(variants[1], tasks[:1])]


def test_tasks_of_several_runs_are_joined(tmp_path: Path) -> None:
    folders = []
    for name, task, limit in (("a", "one", None), ("b", "two", None), ("c", "one", 3)):
        folders.append(make_run(tmp_path / name, {"base": [[True]] * 4}))
        file = folders[-1] / "run.json"
        told = {"metric": "acc", "limit": limit, "values": [1.0] * (limit or 4)}
        settings = json.loads(file.read_text()) | {"side_effect_tasks": {"base": {task: told}}}
        file.write_text(json.dumps(settings))
    collection = collect(folders[:2])
    assert [row["task"] for row in task_effects.rows(collection, "base")] == ["one", "two"]
    assert not collection.notes
    collection = collect(folders)
    assert [row["problems"] for row in task_effects.rows(collection, "base")] == [4, 4]
    assert any("task one of lm-eval was answered in several runs" in note for note in collection.notes)


def test_seeds_are_compared_with_the_base(tmp_path: Path) -> None:
    runs = {"base": [[True]] * 4, "v#0": [[True]] * 4, "v#1": [[False]] * 4}
    folder = make_run(tmp_path / "run", runs)
    values = {"base": [1.0, 0.0, 0.0, 0.0], "v#0": [1.0, 1.0, 1.0, 0.0], "v#1": [1.0, 1.0, 0.0, 0.0]}
    file = folder / "run.json"
    settings = json.loads(file.read_text())
    settings["side_effect_tasks"] = {
        name: {"choose": {"metric": "acc", "limit": None, "values": own}} for name, own in values.items()
    }
    file.write_text(json.dumps(settings))
    rows = {row["method"]: row for row in task_effects.rows(collect([folder]), "base")}
    assert rows["base"]["accuracy"]["value"] == 0.25 and "difference" not in rows["base"]
    assert rows["v"]["accuracy"]["value"] == pytest.approx(0.625)
    assert rows["v"]["difference"]["value"] == pytest.approx(0.375)
    lines = task_effects.table([*rows.values()], "base").splitlines()
    assert any(line.startswith("| choose (4 problems) | acc | v | 0.625 (") for line in lines)
    assert compare.main([str(folder), "--out", str(tmp_path / "page")]) == 0
    scores = json.loads((tmp_path / "page" / "scores.json").read_text())
    assert [row["method"] for row in scores["side_effect_tasks"]] == ["base", "v"]
    assert "| choose (4 problems)" in (tmp_path / "page" / "table.md").read_text()
    settings["side_effect_tasks"]["v#1"]["choose"]["values"].pop()
    file.write_text(json.dumps(settings))
    collection = collect([folder])
    assert [row["method"] for row in task_effects.rows(collection, "base")] == ["base"]
    assert any("answered different problems" in note for note in collection.notes)

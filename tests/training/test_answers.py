"""`steer train --method sft` and `--method dpo`: what they train on, their run folder, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.launching import run_folder, run_here
from helpers.paths import ROOT

from steer import SteerError, artifact
from steer.cli import train
from steer.tasks.prompts import format_prompt
from steer.training import answers
from steer.training.recipe import begin
from steer.training.run_settings import RunSettings

PLAIN = ["--template", "plain", "--use_cpu", "true", "--report_to", "none", "--max_completion_length", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    """A model, problems, and `run/`: a run of GRPO that kept samples, of 3 + 4 and of 5 + 5."""
    folder = run_folder(place, build_tiny, tiny_tokenizer, 4)
    run = folder / "run"
    if not run.exists():
        (run / "completions").mkdir(parents=True)
        settings = {
            "run": {"model": str(folder / "model"), "template": "plain", "rewards": ["correct01", "format"]},
            "training": {"max_completion_length": 10, "reward_weights": [1.0, 0.25]},
        }
        (run / "run.json").write_text(json.dumps(settings))
        rows = [
            ("3+4", r"\boxed{7}", 1.0, 1.0),
            ("3+4", r"\boxed{7}", 1.0, 1.0),
            ("3+4", r"\boxed{6}", 0.0, 1.0),
            ("3+4", "no", 0.0, 0.0),
            ("5+5", r"\boxed{10} and so", 1.0, 1.0),  # cut off by its limit
            ("5+5", "7 and no end of it", 0.0, 0.0),  # cut off too
            ("5+5", r"\boxed{0}", 1.0, 0.0),
            ("40+5", r"\boxed{5}", 1.0, 1.0),  # held out
            ("8+1", r"\boxed{9}", 1.0, 1.0),  # never wrong
        ]
        table = {
            "step": [1] * len(rows),
            "prompt": [format_prompt(row[0], tiny_tokenizer, PROMPT) for row in rows],
            "completion": [row[1] for row in rows],
            "correctness": [row[2] for row in rows],
            "format": [row[3] for row in rows],
            "advantage": [0.0] * len(rows),
        }
        pyarrow.parquet.write_table(pyarrow.table(table), run / "completions" / "completions_00001.parquet")
    return folder


PROMPT = RunSettings.parse("grpo_steer", arguments=["--output_dir", "x", *PLAIN]).prompt


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made(base: Path, tokenizer: Any, build_tiny: Callable, *words: str) -> tuple[list[Any], dict[str, Any]]:
    """What the settings make for the trainer, and its origin."""
    where = ["--model", str(base / "model"), "--output_dir", str(base / "out"), *PLAIN]
    settings = train.parse([*where, *words])
    begin(settings)
    problems, held_out = answers.load(settings)
    model = build_tiny("llama", vocab_size=len(tokenizer))
    rows, told = answers.examples(settings, problems, held_out, tokenizer, model)
    return rows.to_list(), told


def texts(rows: list[Any], tokenizer: Any) -> list[tuple[str, ...]]:
    """The prompt and the answers of each row, decoded."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids)

    found: list[tuple[str, ...]] = []
    for row in rows:
        if "labels" in row:
            start = next(i for i, label in enumerate(row["labels"]) if label != -100)
            assert row["labels"][start:] == row["input_ids"][start:]
            found.append((text(row["input_ids"][:start]), text(row["input_ids"][start:])))
        else:
            found.append(tuple(text(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")))
    return found


# ---- what is trained on


def test_solutions_are_answers_that_end(base: Path, tiny_tokenizer: Any, build_tiny: Callable) -> None:
    lines = [
        {"problem": "1+1", "answer": "2", "solution": "One more"},
        {"problem": "2+2", "answer": "4"},
        {"problem": "2+2", "answer": "4"},
    ]
    file = base / "solutions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, told = made(base, tiny_tokenizer, build_tiny, "--method", "sft", "--train_data", str(file))
    assert texts(rows, tiny_tokenizer) == [
        ("1+1\nAnswer:", " One more\nThe answer is $\\boxed{2}$.</s>"),
        ("2+2\nAnswer:", " $\\boxed{4}$</s>"),
    ]
    assert told == {"from": str(file), "examples": 2}


def test_right_answers_of_a_run(base: Path, tiny_tokenizer: Any, build_tiny: Callable, caplog: Any) -> None:
    where = ["--method", "sft", "--eval_data", str(base / "heldout.jsonl")]
    caplog.set_level("INFO", "steer")
    rows, told = made(base, tiny_tokenizer, build_tiny, *where, "--train_data", str(base / "run"))
    assert texts(rows, tiny_tokenizer) == [
        ("3+4\nAnswer:", r"\boxed{7}</s>"),
        ("5+5\nAnswer:", r"\boxed{0}</s>"),
        ("8+1\nAnswer:", r"\boxed{9}</s>"),
    ]
    assert (told["answers"], told["right"], told["examples"]) == (9, 5, 3)
    assert "9 answers, 5 of them right; 1 more are right, but cut off" in caplog.text
    assert "1 examples are answers to held-out problems and were dropped" in caplog.text
    more = ("--train_data", str(base / "run" / "completions"), "--min_reward", "1.25")
    rows, _ = made(base, tiny_tokenizer, build_tiny, *where, *more)
    assert [text[1] for text in texts(rows, tiny_tokenizer)] == [r"\boxed{7}</s>", r"\boxed{9}</s>"]


def test_pairs_of_a_run(base: Path, tiny_tokenizer: Any, build_tiny: Callable) -> None:
    rows, told = made(
        base, tiny_tokenizer, build_tiny, "--method", "dpo", "--train_data", str(base / "run"),
        "--eval_data", "none",
    )  # fmt: skip
    assert texts(rows, tiny_tokenizer) == [
        ("3+4\nAnswer:", r"\boxed{7}</s>", r"\boxed{6}</s>"),
        ("3+4\nAnswer:", r"\boxed{7}</s>", "no</s>"),
        ("5+5\nAnswer:", r"\boxed{0}</s>", "7 and no end of it"),  # it was not ended
    ]
    assert told["pairs"] == 3


def test_pairs_of_a_file(base: Path, tiny_tokenizer: Any, build_tiny: Callable) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    file = base / "pairs.jsonl"
    lines = [
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"prompt": chat, "chosen": "Hello", "rejected": "Go"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, _ = made(base, tiny_tokenizer, build_tiny, "--method", "dpo", "--train_data", str(file))
    hi = format_prompt(chat, tiny_tokenizer)
    assert texts(rows, tiny_tokenizer) == [("1+1=", "2</s>", "3</s>"), (hi, "Hello</s>", "Go</s>")]


# ---- bad input


REFUSED: dict[str, tuple[str, str]] = {
    "method": ("--method sfd", "method='sfd' is unknown; choose one of grpo, sft, dpo"),
    "of grpo": (
        "--method sft --num_generations 4",
        "num_generations is a setting of method=grpo, and has",
    ),
    "of sft": (
        "--max_length 4",
        "max_length is a setting of method=sft and method=dpo",
    ),
    "search": (
        "--method dpo --lr_sweep 1e-3",
        "lr_sweep is a setting of method=grpo, and has",
    ),
    "misspelt": (
        "--method sft --lerning_rate 1",
        "unknown setting lerning_rate; did you mean learning_ra",
    ),
    "rewards": ("--method sft --rewards format", "has no effect: method=sft samples no answers"),
    "trial": ("--method sft --dry_run true", "dry_run=True has no effect: method=sft samples no answers"),
    "levels": ("--method sft --train_data {run} --levels 1", "levels=[1] has no effect: train_data="),
    "recipe": ("--method sft --dataset_text_field x", "dataset_text_field='x' has no effect: a recipe makes"),
    "stage": ("--method sft --train_data {train} --stage after", "stage=after has no effect: train_data="),
    "variant": ("--method sft --train_data {run} --variant x", "variant=x has no effect: {run} is a run of"),
    "no run": ("--method sft --train_data {model}", "no run in {model}"),
    "no stage": ("--method sft --train_data {run} --stage after", "has no answers of stage 'after'"),
    "two stages": (
        "--method sft --train_data {run}/completions --stage after",
        "has the answers of stage 'training', and stage=after",
    ),
    "none right": ("--method sft --train_data {run} --min_reward 9", "none of 9 answers is right with a rew"),
    "prompt": ("--method sft --train_data {run} --prefix To", "the model was asked with template plain, and"),
    "prefix": (
        "--method sft --train_data {train} --prefix To",
        "prefix='To' opens every answer, and the",
    ),
    "short": ("--method sft --train_data {run} --max_length 3", "no example fits max_length=3"),
    "problems": ("--method dpo --train_data {train}", "has no pairs of answers; method=dpo takes the folder"),
    "pairs": ("--method sft --train_data {two}", "has chosen and rejected answers, and method=sft"),
    "pair": ("--method dpo --train_data {two}", "two.jsonl, line 2 has no 'rejected'"),
    "all seen": (
        "--method sft --train_data {run} --min_reward 1.25 --eval_data {same}",
        "every answer to train on is one to a held-out problem",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_work_is_one_line(
    base: Path, tiny_tokenizer: Any, build_tiny: Callable, case: str
) -> None:
    files = {
        "two": [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}],
        "same": [{"problem": p, "answer": "1"} for p in ("3+4", "8+1", "40+5")],
    }
    for name, rows in files.items():
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"run": base / "run", "train": base / "train.jsonl", "model": base / "model"}
    paths |= {name: base / f"{name}.jsonl" for name in files}
    words, expected = (text.format(**paths) for text in REFUSED[case])
    with pytest.raises(SteerError) as error:
        made(base, tiny_tokenizer, build_tiny, *words.split())
    assert expected in str(error.value) and "\n" not in str(error.value)


# ---- whole runs


def test_a_whole_run_says_how_it_was_trained(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(base / "model"), *PLAIN, "--eval_data", str(base / "heldout.jsonl")]
    words += ["--train_data", str(base / "train.jsonl"), "--output_dir", str(base / "sft")]
    words += ["--max_steps", "4", "--learning_rate", "0.1", "--save_steps", "2", "--disable_tqdm", "true"]
    words += ["--validate_every", "4", "--examples", "0"]
    run_here(ROOT / "recipes" / "sft_steer.py", *words)
    folder = base / "sft"
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 4 and {"before", "after", "validation"} <= results.keys()
    saved = artifact.read(folder / "vectors")
    known = saved.config.provenance
    assert known["recipe"] == "sft_steer" and known["method"] == "sft"
    assert known["data"]["from"] == str(base / "train.jsonl") and known["data"]["examples"] > 30
    assert saved.config.prompt == PROMPT and known["results"]["after"] == results["after"]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "run.json").read_text())["answers"]["method"] == "sft"
    assert "steered" in capsys.readouterr().out
    run_here(ROOT / "recipes" / "sft_steer.py", *words)  # finished
    assert torch.equal(
        *(next(iter(artifact.read(folder / name).tensors.values())) for name in ("vectors", "checkpoint-4"))
    )
    with pytest.raises(SystemExit, match="holds another run: "):
        run_here(ROOT / "recipes" / "sft_steer.py", *words, "--loss_type", "dft")


def test_preferences_are_trained_from_a_run(base: Path) -> None:
    words = ["--model", str(base / "model"), *PLAIN, "--eval_data", "none", "--max_steps", "2"]
    words += ["--train_data", str(base / "run"), "--output_dir", str(base / "dpo"), "--beta", "0.2"]
    run_here(ROOT / "recipes" / "dpo_steer.py", *words)
    known = artifact.read(base / "dpo" / "vectors").config.provenance
    assert known["method"] == "dpo" and known["data"]["pairs"] == 3 and known["training"]["beta"] == 0.2


def test_a_printed_config_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--config", "demo-dpo", "--use_cpu", "true", "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    one, two = (
        train.parse(["--config", name, "--use_cpu", "true"])
        for name in (str(tmp_path / "run.yaml"), "demo-dpo")
    )
    assert one.training.method == "dpo" and one.identity() == two.identity()


@pytest.mark.slow
@pytest.mark.real
def test_a_real_model_learns_from_its_own_right_answers(tmp_path: Path) -> None:
    """The untrained SmolLM2 samples; those of its answers that are right teach it to answer in the box."""
    short = ["--eval_limit", "30", "--examples", "0", "--use_cpu", "true", "--model_dtype", "float32"]
    sampled = [*short, "--config", "demo", "--log_completions", "true", "--output_dir", str(tmp_path / "run")]
    run_here(ROOT / "recipes" / "grpo_steer.py", *sampled, "--max_steps", "2", "--learning_rate", "0")
    words = [*short, "--config", "demo-sft", "--train_data", str(tmp_path / "run"), "--max_steps", "12"]
    words += ["--eval_data", "arithmetic", "--output_dir", str(tmp_path / "own")]
    run_here(ROOT / "recipes" / "sft_steer.py", *words, "--per_device_train_batch_size", "8")
    results = json.loads((tmp_path / "own" / "results.json").read_text())
    known = artifact.read(tmp_path / "own" / "vectors").config.provenance
    assert known["data"]["answers"] == 256 and 0 < known["data"]["examples"] <= known["data"]["right"]
    before, after = results["before"], results["after"]
    assert after["answered"] > before["answered"] + 0.3 and after["accuracy"] > before["accuracy"] + 0.1

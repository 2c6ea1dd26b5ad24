"""`steer train --method sft` and `--method dpo`: what they train on, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from accelerate.state import AcceleratorState
from helpers.answers import answers_folder, made, texts, with_tests

import steer
from steer import SteerError
from steer.evaluation import variants
from steer.evaluation.answers import read_answers
from steer.evaluation.benchmarks import Benchmark, parse
from steer.tasks.prompts import format_prompt
from steer.training.answer_tokens import Example, tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    return answers_folder(place, build_tiny, tiny_tokenizer)


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
    assert told.pop("checksum") and told == {"from": str(file), "examples": 2}


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


def test_what_its_limit_cut_off_is_read_or_told_by_the_length(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "completions").mkdir()
    settings = {
        "run": {"template": "plain", "rewards": ["correct"]},
        "training": {"max_completion_length": 10},
    }
    (tmp_path / "run.json").write_text(json.dumps(settings))
    rows: dict[str, Any] = {"prompt": ["3+4"] * 3, "completion": ["7" * n for n in (7, 8, 1)]}
    rows["correctness"] = [1.0] * 3

    def finished() -> list[bool]:
        path = tmp_path / "completions" / "completions_00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
        return [answer.finished for answer in read_answers(tmp_path, tiny_tokenizer, "training").rows]

    assert finished() == [True, False, True], "of an older version"
    rows["cut_off"] = [True, False, True]
    assert finished() == [False, True, False]


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


def test_answers_to_problems_of_a_test_are_told(
    base: Path, tiny_tokenizer: Any, build_tiny: Callable, caplog: Any
) -> None:
    with_tests(base)
    words = ["--method", "sft", "--train_data", str(base / "tested"), "--eval_data"]
    rows, told = made(base, tiny_tokenizer, build_tiny, *words, "none")
    assert len(rows) == 2 and told["scored_on"] == ["sums"]
    assert "warning: these are answers to problems of sums, and" in caplog.text
    (base / "one.jsonl").write_text(json.dumps({"problem": "3+4", "answer": "7"}) + "\n")
    rows, _ = made(base, tiny_tokenizer, build_tiny, *words, str(base / "one.jsonl"))
    assert texts(rows, tiny_tokenizer) == [("8+1\nAnswer:", r"\boxed{9}</s>")]

    vectors = steer.attach(build_tiny("llama"))
    vectors.config.provenance = {"data": told}
    vectors.save(base / "vectors-of-tests")
    assert "trained on answers to problems of `sums`" in (base / "vectors-of-tests" / "README.md").read_text()
    caplog.clear()
    seen = [variants.Variant("v", "vectors", str(base / "vectors-of-tests"))]
    variants.tell_of_trained_on(seen, [Benchmark("others")])
    assert not caplog.text
    variants.tell_of_trained_on(seen, [Benchmark("others"), Benchmark("sums")])
    assert "was trained on answers to problems of sums: its score" in caplog.text

    own = {"train_data": str(base / "one.jsonl"), "train_split": "train"}
    vectors.config.provenance = {"run": own}
    vectors.save(base / "vectors-of-one")
    caplog.clear()
    seen = [variants.Variant("v", "vectors", str(base / "vectors-of-one"))]
    variants.tell_of_trained_on(seen, [parse(str(base / "two.jsonl")), parse("gsm8k")])
    assert not caplog.text
    variants.tell_of_trained_on(seen, [parse(str(base / "one.jsonl"))])
    assert "was trained on answers to problems of one: its score" in caplog.text


def test_a_reward_of_ones_own_tells_what_is_right(
    base: Path, tiny_tokenizer: Any, build_tiny: Callable
) -> None:
    with_tests(base)
    words = ["--method", "dpo", "--train_data", str(base / "scored")]
    rows, _ = made(base, tiny_tokenizer, build_tiny, *words, "--min_reward", "0.5")
    assert texts(rows, tiny_tokenizer) == [("8+1\nAnswer:", "9</s>", "1</s>")]
    with pytest.raises(SteerError, match="does not say which answers are right"):
        made(base, tiny_tokenizer, build_tiny, *words)


def test_pairs_that_ask_held_out_problems_are_dropped(
    base: Path, tiny_tokenizer: Any, build_tiny: Callable
) -> None:
    file = base / "leaks.jsonl"
    asked = ["Well:  40+5?", "140+5", "40+5\nAnswer:", [{"role": "user", "content": "Give 40+5 now"}], "4+4"]
    lines = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in asked]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--method", "dpo", "--train_data", str(file), "--eval_data", str(base / "heldout.jsonl")]
    assert "40+5" in (base / "heldout.jsonl").read_text()
    rows, _ = made(base, tiny_tokenizer, build_tiny, *words)
    assert [text[0] for text in texts(rows, tiny_tokenizer)] == ["140+5", "4+4"]


def test_a_chat_ends_as_chats_do_whatever_the_template(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}"
        "{% endfor %}"
    )
    made = [Example("a", "b"), Example("a", "b", chat=True)]
    ends = [tiny_tokenizer.decode(row["input_ids"][-1]) for row in tokens(made, tiny_tokenizer, "sft")]
    assert ends == ["</s>", "<end>"]


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
    "abbreviated": ("--metho dpo", "method='dpo' was not written as --method; write --method dpo"),
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
    "verdicts": (
        "--method sft --train_data {tested} --min_reward 1 --eval_data none",
        "tested, variant 'base', has verdicts and no rewards",
    ),
    "tested": (
        "--method sft --train_data {tested}",
        "variant 'base', answers the problems that it was scored on (sums), and no eval_data says",
    ),
    "held out": (
        "--method dpo --train_data {scored}/samples_after.json",
        "answers the problems that it was scored on ({base}/sums.jsonl), and no eval_data says",
    ),
    "examples": (
        "--method sft --train_data {tested} --variant shown --eval_data none",
        "training knows no worked examples and no system text: choose another stage or variant",
    ),
    "layout": (
        "--method sft --train_data {teacher}",
        "is laid out for teacher, and this run asks its model with '...\\nAnswer:'",
    ),
    "prefix": (
        "--method sft --train_data {train} --prefix To",
        "prefix='To' opens every answer, and the",
    ),
    "short": ("--method sft --train_data {run} --max_length 3", "no example fits max_length=3"),
    "problems": ("--method dpo --train_data {train}", "has no pairs of answers; method=dpo takes the folder"),
    "pairs": ("--method sft --train_data {two}", "has chosen and rejected answers, and method=sft"),
    "pair": ("--method dpo --train_data {two}", "two.jsonl, line 2 has no 'rejected'"),
    "prefix of pairs": (
        "--method dpo --train_data {two} --prefix To",
        "prefix='To' opens every answer, and the prompts and answers of {two} are used as they are",
    ),
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
    with_tests(base)
    paths = {"base": base, **{name: base / name for name in ("tested", "scored", "teacher")}}
    paths |= {"run": base / "run", "train": base / "train.jsonl", "model": base / "model"}
    paths |= {name: base / f"{name}.jsonl" for name in files}
    words, expected = (text.format(**paths) for text in REFUSED[case])
    with pytest.raises(SteerError) as error:
        made(base, tiny_tokenizer, build_tiny, *words.split())
    assert expected in str(error.value) and "\n" not in str(error.value)

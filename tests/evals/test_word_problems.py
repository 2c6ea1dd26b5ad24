"""The word-problem study: splits by template, the warm start, problems that are sometimes solved."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.training import model_folder, write_problems
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evals.word_problems import select, warm_start
from evals.word_problems.problems import easy, split
from evals.word_problems.templates import names, nearest, place, template
from steer.errors import SteerError
from steer.evaluation.store import Store

TEXT = "Sam had {} apples. He gave {} of them to Mary. How many apples does Sam have?"


def test_a_template_has_no_numbers_and_no_names() -> None:
    texts = [
        TEXT.format(5, "two"),
        "On Monday Mary had $1,200.50 apples. She gave 3/4 of them to Sam. How many apples does Mary have?",
        "sam is no name where it is written small",
    ]
    known = names(texts)
    assert known == {"mary", "monday"}  # sam occurs without a capital, too
    assert template("Mary's 12 apples and seven of hers", known) == "name 0 apples and 0 of his"


def test_names_that_are_words_elsewhere_and_numbers_of_several_words() -> None:
    known = names(["A rose will grow.", "Rose and Will had 25 cards.", "So Rose and Will left."])
    assert not {"rose", "will"} & known
    first = template("Rose has 25 cards. How many does Rose have?", known)
    assert first == template("Will has twenty-five cards. How many does Will have?", known)
    assert first == "name has 0 cards how many does name have"


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["Ann", "Bob"]))
@settings(max_examples=30, deadline=None)
def test_numbers_and_names_do_not_change_a_template(first: int, second: int, name: str) -> None:
    known = frozenset({"sam", "ann", "bob", "mary"})
    made = TEXT.format(first, second).replace("Sam", name)
    assert template(made, known) == template(TEXT.format(1, 2), known)
    assert 0 <= place(made) < 1


def test_nearest_equals_a_plain_count() -> None:
    texts = ["a b c d", "a b c e", "x y", ""]
    others = ["a b c d e", "x y z", "q"]

    def grams(text: str) -> set[tuple[str, ...]]:
        words = ["", "", *text.split(), "", ""]
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    alike, index = nearest(texts, others)
    for i, text in enumerate(texts):
        plain = [
            len(grams(text) & grams(other)) / (len(grams(text)) * len(grams(other))) ** 0.5
            for other in others
        ]
        assert alike[i] == pytest.approx(max(plain)) and plain[index[i]] == max(plain)


def test_no_template_is_on_two_sides() -> None:
    things = ["apples", "cars", "books", "trees", "eggs", "coins", "cards", "shells", "pens", "boats"]
    verbs = ["sells", "paints", "finds", "counts"]
    pairs = [(v, t) for v in verbs for t in things]

    def rows(source: str, some: list[tuple[str, str]]) -> list[dict[str, str]]:
        return [
            {"problem": f"A man {v} {n} {t} for the {v}er of {t}.", "answer": "1", "source": source}
            for v, t in some
            for n in (3, 4)
        ]

    made = split(
        rows("gsm8k", pairs[:20]), rows("gsm8k", pairs[18:22]), {"addsub": rows("addsub", pairs[22:])}, 8
    )
    files = {name: made[name] for name in ("train", "validation", "gsm8k", "addsub")}
    of = {name: {template(row["problem"], frozenset()) for row in found} for name, found in files.items()}
    assert all(of.values())
    for one in of:
        assert all(not of[one] & of[other] for other in of if other != one), one
    assert made["dropped"] >= 4  # the two templates of GSM8K that its test has too
    assert {row["source"] for row in files["train"]} == {"gsm8k", "addsub"}
    assert made["templates"] == {"gsm8k": 22, "addsub": 18}
    assert all(0 <= found["largest"] < 0.8 for found in made["overlap"].values())
    with pytest.raises(SteerError, match="validation: no problems are left of 2 to train on"):
        split(rows("gsm8k", pairs[:1]), rows("gsm8k", pairs[1:2]), {}, 0)


def test_easy_problems_have_solutions_of_few_lines() -> None:
    rows = [{"problem": str(n), "solution": "\n".join(["a step"] * n)} for n in (1, 2, 3)]
    assert easy(rows, 2) == rows[:2] and easy(rows, 1) == rows[:1] and easy(rows, None) == rows
    with pytest.raises(SteerError, match="1 of 4 problems of GSM8K have none; give a file"):
        easy([*rows, {"problem": "4"}], 2)


def test_the_warm_start_is_an_adapter_that_a_base_takes(
    tmp_path: Path,
    build_tiny: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from steer.base_adapter import merged_base
    from steer.models import load_model

    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    model_folder(tmp_path / "model", build_tiny("llama"), tiny_tokenizer)
    rows = [{"problem": f"{n}+1", "answer": str(n + 1), "solution": f"{n}+1={n + 1}"} for n in range(8)]
    rows.append({"problem": "long", "answer": "1", "solution": "1+1=2 " * 60})
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tmp_path / "model"), "--problems", str(file), "--output_dir", str(tmp_path / "a")]
    words += ["--template", "plain", "--learning_rate", "0.05", "--max_steps", "3", "--use_cpu", "true"]
    words += ["--per_device_train_batch_size", "4", "--num_train_epochs", "9"]
    monkeypatch.setattr(sys, "argv", ["warm_start", *words])
    warm_start.main()
    record = json.loads((tmp_path / "a" / "warm-start.json").read_text())
    assert record["trained_on"] == 8 and record["losses"][-1] < record["losses"][0]
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "warm-start.json"}
    plain = load_model(str(tmp_path / "model"))
    merged = load_model(merged_base(str(tmp_path / "model"), str(tmp_path / "a")))
    moved = [
        not np.allclose(a.detach(), b.detach())
        for a, b in zip(plain.parameters(), merged.parameters(), strict=True)
    ]
    assert any(moved)
    monkeypatch.setattr(sys, "argv", ["warm_start", *words, "--most_tokens", "2"])
    with pytest.raises(SteerError, match="has 0 solutions of at most 2 tokens"):
        warm_start.main()


def test_problems_that_are_sometimes_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.jsonl"
    write_problems(file, range(4), modulus=10)
    problems = [json.loads(line) for line in file.read_text().splitlines()]
    store = Store(tmp_path / "run")
    store.open(
        {"model": "m", "revision": None, "engine": "hf", "dtype": "float32", "seed": 0, "temperature": 1.0}
        | {"top_p": 1.0, "variants": {"base": {}}, "benchmarks": {"train": {}}},
        [{"benchmark": "train", "id": str(n), **row} for n, row in enumerate(problems)],
    )
    common = {"variant": "base", "benchmark": "train", "seed": 0, "text": "", "answer": "", "how": ""}
    common |= {"tokens": 3, "prompt_tokens": 3, "seconds": 0.0, "lenient": True, "loop": False}
    store.add(
        [
            {**common, "problem": str(n), "sample": k, "correct": k < n, "truncated": k == 2}
            for n in range(4)
            for k in (-1, 0, 1, 2)
        ]
    )
    store.close()
    monkeypatch.setattr(
        sys,
        "argv",
        ["select", str(tmp_path / "run"), "--problems", str(file), "--out", str(tmp_path / "kept.jsonl")],
    )
    select.main()
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert kept == problems[1:3]  # 1 and 2 of 3 samples are right; the greedy answer does not count
    told = json.loads((tmp_path / "kept.json").read_text())
    assert told["problems by right samples"] == {"0": 1, "1": 1, "2": 1, "3": 1} and told["cut off"] == 0.3333
    with pytest.raises(SteerError, match=r"no samples of variant 'other'; it has \['base'\]"):
        select.pass_rates(tmp_path / "run", "other")

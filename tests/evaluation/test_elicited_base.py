"""The elicited base in evaluations and comparisons: asked, recorded, graded leniently, compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluating import TOKENS, arguments, make_base, make_run, rows
from helpers.training import write_problems

from steer.evaluation import best_base, compare, elicit, pack, run
from steer.evaluation.collect import collect
from steer.evaluation.regrade import regrade
from steer.evaluation.store import read_completions, read_problems, read_settings
from steer.tasks.elicited import choose
from steer.tasks.grading import MathGrader
from steer.tasks.lenient import extract_lenient


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elicited")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    if not (place / "sums.jsonl").exists():
        make_base(place, build_tiny, tiny_tokenizer)
        write_problems(place / "train.jsonl", range(40), modulus=10)
    return place


@pytest.fixture
def whole(base: Path) -> Path:
    """A finished run of the base, the elicited base and vectors."""
    out = base / "whole"
    if not out.exists():
        examples = ["--examples", "2", "--examples-from", str(base / "train.jsonl")]
        assert run.main(arguments(base, out, "--vectors", f"s={base / 'vectors'}", *examples)) == 0
    return out


# ---- steer eval


def test_the_elicited_base_is_a_variant_whose_examples_are_recorded(base, whole):
    settings = read_settings(whole)
    assert list(settings["variants"]) == ["base", "base, 2 examples", "s"]
    training = [json.loads(line) for line in (base / "train.jsonl").read_text().splitlines()]
    held_out = {row["problem"] for row in read_problems(whole)}
    asked = settings["variants"]["base, 2 examples"]["asked"]["sums"]
    assert asked == {
        "max_new_tokens": 4 * TOKENS,
        "examples": [list(pair) for pair in choose(training, 2, held_out)],
    }
    assert not held_out & {problem for problem, _ in asked["examples"]}
    assert "asked" not in settings["variants"]["base"]


def test_a_longer_limit_is_told_beside_the_others(whole):
    notes = collect([whole]).notes
    assert f"sums: max_new_tokens differs: base {TOKENS}, base, 2 examples {4 * TOKENS}, s {TOKENS}" in notes


def test_its_prompts_hold_the_examples_and_its_answers_may_be_longer(whole):
    found = rows(whole)
    settings = read_settings(whole)
    asked = settings["variants"]["base, 2 examples"]["asked"]["sums"]["examples"]
    # a token a character; a boxed digit is one token
    worked = sum(len(f"{problem}\nAnswer: $.$\n\n") for problem, _ in asked)
    longer = []
    for (variant, problem, sample), row in found.items():
        if variant == "base, 2 examples":
            assert row["prompt_tokens"] == found["base", problem, sample]["prompt_tokens"] + worked
            longer.append(row["tokens"] > TOKENS)
            assert row["tokens"] <= 4 * TOKENS
        else:
            assert row["tokens"] <= TOKENS
    assert any(longer)


def test_every_answer_is_graded_leniently_too(whole):
    found = rows(whole)
    golds = {row["id"]: row["answer"] for row in read_problems(whole)}
    with MathGrader() as grader:
        verdicts = grader.check(
            [row["text"] for row in found.values()],
            [golds[problem] for _, problem, _ in found],
            extract_lenient,
        )
    assert [v.correct for v in verdicts] == [row["lenient"] for row in found.values()]
    assert all(row["lenient"] for row in found.values() if row["correct"])


def test_the_same_command_again_changes_nothing(base, whole):
    before = rows(whole)
    examples = ["--examples", "2", "--examples-from", str(base / "train.jsonl")]
    assert run.main(arguments(base, whole, "--vectors", f"s={base / 'vectors'}", *examples)) == 0
    assert rows(whole) == before


def test_a_base_without_known_training_problems_says_what_that_means(base, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "steer")
    assert run.main(arguments(base, tmp_path / "out", "--limit", "2")) == 0
    assert "no training problems are known (--examples-from names some)" in caplog.text
    assert "no base was asked with worked examples" in capsys.readouterr().out
    assert list(read_settings(tmp_path / "out")["variants"]) == ["base"]


def test_examples_that_were_asked_for_and_cannot_be_are_refused(base, tmp_path, capsys):
    assert run.main(arguments(base, tmp_path / "out", "--examples", "2")) == 1
    assert "no training problems are known" in capsys.readouterr().err
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"problem": "What is " + "1 + " * 60 + "1?", "answer": "61"}))
    asked = arguments(base, tmp_path / "out", "--examples", "2", "--examples-from", str(long))
    assert run.main(asked) == 1
    assert "no worked example fits the context of 128 tokens" in capsys.readouterr().err


def test_more_benchmarks_can_be_added_and_those_without_examples_are_not_owed(
    base, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    generated = "arithmetic:digits=1:problems=4:samples=0:template=plain"
    both = f"{generated},{base / 'sums.jsonl'}"
    command = [
        "--model",
        str(base / "model"),
        "--max-new-tokens",
        "4",
        "--samples",
        "0",
        "--template",
        "plain",
    ]
    assert run.main([*command, "--benchmarks", generated, "--out", str(out)]) == 0
    assert run.main([*command, "--benchmarks", both, "--out", str(out)]) == 0
    assert run.main([*command, "--benchmarks", str(base / "sums.jsonl"), "--out", str(out)]) == 0
    kept = read_settings(out)["variants"]
    elicited = next(name for name in kept if name.endswith("examples"))
    assert list(kept[elicited]["asked"]) == ["arithmetic"]
    assert not any("not finished" in note for note in collect([out]).notes)
    # with other examples it is another run
    monkeypatch.setattr(elicit, "choose", lambda *given: tuple(reversed(choose(*given))))
    assert run.main([*command, "--benchmarks", generated, "--out", str(out)]) == 1
    assert f"{elicited}: arithmetic was asked otherwise" in capsys.readouterr().err


def test_examples_come_from_files_with_other_columns(base, tmp_path):
    for name in ("sums", "train"):
        lines = map(json.loads, (base / f"{name}.jsonl").read_text().splitlines())
        asked = [{"question": row["problem"], "answer": row["answer"]} for row in lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    argv = arguments(base, tmp_path / "out", "--samples", "0", "--columns", "problem=question")
    argv[argv.index("--benchmarks") + 1] = str(tmp_path / "sums.jsonl")
    assert run.main([*argv, "--examples", "2", "--examples-from", str(tmp_path / "train.jsonl")]) == 0
    assert list(read_settings(tmp_path / "out")["variants"]) == ["base", "base, 2 examples"]


def test_generated_arithmetic_knows_its_training_problems(base, tmp_path):
    generated = "arithmetic:digits=1:problems=4:samples=0:template=plain"
    command = ["--model", str(base / "model"), "--benchmarks", generated, "--max-new-tokens", "4"]
    assert run.main([*command, "--out", str(tmp_path / "out")]) == 0
    settings = read_settings(tmp_path / "out")
    elicited = next(name for name in settings["variants"] if name.endswith("examples"))
    held_out = {row["problem"] for row in read_problems(tmp_path / "out")}
    for problem, worked in settings["variants"][elicited]["asked"]["arithmetic"]["examples"]:
        assert problem not in held_out and r"\boxed{" in worked
    assert run.main([*command, "--out", str(tmp_path / "none"), "--examples", "0"]) == 0
    assert list(read_settings(tmp_path / "none")["variants"]) == ["base"]


# ---- runs of old, and comparisons


def made(folder: Path, right: dict[str, list[list[bool]]], **texts: str) -> Path:
    """A run from before lenient grades; `texts` are answers without a box."""
    found = make_run(folder, right, texts)
    for part in folder.glob("part-*.parquet"):
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(part)
        assert "lenient" not in table.column_names
        how = [
            "no_answer" if variant in texts else how
            for variant, how in zip(table["variant"].to_pylist(), table["how"].to_pylist(), strict=True)
        ]
        place = table.column_names.index("how")
        pyarrow.parquet.write_table(table.set_column(place, "how", pyarrow.array(how)), part)
    return found


def test_runs_of_old_are_graded_leniently_from_their_texts(tmp_path):
    wrong, right = [[False, False]] * 6, [[True, True]] * 4 + [[False, False]] * 2
    old = made(tmp_path / "old", {"base": wrong, "s": right}, base="I think it is 3.")
    columns = read_completions(old)
    assert set(columns["lenient"]) == {None}
    regrade(columns, read_problems(old))
    lenient = dict(
        zip(zip(columns["variant"], columns["problem"], strict=True), columns["lenient"], strict=True)
    )
    assert [lenient["base", f"p{n}"] for n in range(6)] == [n + 1 == 3 for n in range(6)]
    assert [lenient["s", f"p{n}"] for n in range(6)] == [n < 4 for n in range(6)]
    rows = {(r["method"], r["decoding"]): r for r in compare.score(collect([old]), "base")}
    assert rows["base", "greedy"]["accuracy"]["value"] == 0
    assert rows["base", "greedy"]["lenient"]["value"] == pytest.approx(1 / 6)
    assert rows["s", "greedy"]["elicited_gain"]["difference"]["value"] == pytest.approx(3 / 6)


def test_texts_that_a_packed_run_of_old_lacks_are_not_guessed_at(tmp_path):
    samples = 1 + pack.TEXTS + 2
    right = {"base": [[False] * samples] * 5, "s": [[True] * samples] * 5}
    old = made(tmp_path / "old", right, base="It is 2.")
    packed = tmp_path / "old.json"
    pack.pack(old, packed)
    content = json.loads(packed.read_text())
    assert None not in content["completions"]["lenient"], "packed now, nothing is missing"
    del content["completions"]["lenient"]  # as packed before
    packed.write_text(json.dumps(content))
    collection = collect([packed])
    rows = {(r["method"], r["decoding"]): r for r in compare.score(collection, "base")}
    assert rows["base", "sampled"]["lenient_samples"] == pack.TEXTS
    assert rows["s", "sampled"]["lenient_samples"] == samples - 1
    assert rows["base", "sampled"]["lenient"]["value"] == pytest.approx(1 / 5)
    notes = best_base.notes(collection, list(rows.values()))
    assert any(f"base {pack.TEXTS}, of {samples - 1}" in note for note in notes)


def test_an_empty_answer_of_old_is_wrong(tmp_path):
    old = made(tmp_path / "old", {"base": [[False] * (pack.TEXTS + 2)] * 2}, base="")
    columns = read_completions(old)
    regrade(columns, read_problems(old))
    assert set(columns["lenient"]) == {False}
    packed = tmp_path / "old.json"
    pack.pack(old, packed)
    content = json.loads(packed.read_text())
    del content["completions"]["lenient"]  # as packed before
    packed.write_text(json.dumps(content))
    columns = pack.read_run(packed)[2]
    found = dict(zip(columns["sample"], columns["lenient"], strict=True))
    assert found == {**dict.fromkeys(range(-1, pack.TEXTS), False), pack.TEXTS: None}


def test_the_best_elicited_base_is_what_gains_are_also_measured_against(tmp_path, capsys):
    count = 40
    right = {
        "base": [[False]] * count,
        "base, 8 examples": [[n < 20] for n in range(count)],
        "s": [[n < 30] for n in range(count)],
        "full": [[True]] * count,
    }
    run_folder = make_run(tmp_path / "run", right)
    rows = compare.report([run_folder], "base", "full", tmp_path / "page")
    found = {row["method"]: row for row in rows}
    assert {row["best_base"] for row in rows} == {"base, 8 examples"}
    assert found["s"]["gain"]["difference"]["value"] == 0.75
    assert found["s"]["elicited_gain"]["difference"]["value"] == 0.25
    assert found["s"]["gain_share"]["value"] == 0.75
    assert found["s"]["elicited_share"]["value"] == 0.5
    assert "elicited_gain" not in found["base, 8 examples"]
    table = (tmp_path / "page" / "table.md").read_text()
    assert "greedy, share of gain over elicited base" in table and "the best elicited base" in table
    (constant,) = [line for line in table.splitlines() if "always 1 " in line]
    assert "0.025 (" in constant, "of forty different answers one is 1"
    text = capsys.readouterr().out
    assert "The best elicited base on sums, greedily, is base, 8 examples: 0.500 read leniently" in text
    assert "s on sums, greedy: better than the best elicited base" in text
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Gain over the best elicited base, all read leniently" in page and "always 1" in page
    scores = json.loads((tmp_path / "page" / "scores.json").read_text())
    assert scores["constants"][0]["accuracy"]["value"] == 1 / count


def test_shares_of_a_gain_that_is_not_shown_are_undefined(tmp_path, capsys):
    half = [[n % 2 == 0] for n in range(40)]
    found = {"base": [[False]] * 40, "base, 8 examples": half, "s": half, "full": half}
    rows = compare.report([make_run(tmp_path / "run", found)], "base", "full")
    by_name = {row["method"]: row for row in rows}
    assert by_name["s"]["gain_share"]["value"] == 1 and by_name["s"]["elicited_share"] is None
    assert "shares of its gain over that base are undefined" in capsys.readouterr().out


def test_form_alone_is_no_gain_over_the_elicited_base(tmp_path):
    """A method that only learns to write the box is better than the base, and not than the elicited one."""
    half = [[n % 2 == 0] for n in range(40)]
    found = {"base": [[False]] * 40, "base, 8 examples": half, "s": half}
    rows = {r["method"]: r for r in compare.score(collect([make_run(tmp_path / "r", found)]), "base")}
    assert rows["s"]["gain"]["verdict"] == "better"
    assert rows["s"]["elicited_gain"]["verdict"] == "no difference shown"
    assert rows["s"]["elicited_gain"]["difference"]["value"] == 0

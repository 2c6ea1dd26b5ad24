"""Where texts and directions come from: files, runs, SAEs, tokens; and `steer extract` as a user runs it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluating import make_base
from helpers.launching import ROOT, run_folder, run_here
from helpers.steering import message
from helpers.training import model_folder

import steer
from steer import SteerError
from steer.cli import main
from steer.evaluation import run as evals_run
from steer.extract import read_completions, read_contrast, sae_direction
from steer.files import read_json
from steer.identity import base_checksum
from steer.prompt import PromptSpec
from steer.sae import SAE, SAEConfig, save_sae
from steer.tasks.prompts import format_prompt

PAIRS = [
    {"positive": "good day", "negative": "bad day"},
    {"prompt": "How?", "positive": " well", "negative": " badly"},
    {
        "positive": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "negative": [{"role": "user", "content": "Hi"}],
    },
    {"prompt": [{"role": "user", "content": "Hi"}], "positive": "Hey", "negative": "Go"},
    {"positive": "nice"},
]


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    return path


def test_contrasts_are_read_as_they_are_written(tmp_path: Path, tiny_tokenizer: Any) -> None:
    found = read_contrast(lines(tmp_path / "pairs.jsonl", PAIRS), tiny_tokenizer)
    assert found.pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [len(found.positive), len(found.negative)] == [5, 4]
    hi = format_prompt([{"role": "user", "content": "Hi"}], tiny_tokenizer)

    def text(ids: Any) -> str:
        return tiny_tokenizer.decode(ids)

    told = [(text(row.ids[: row.prompt]), text(row.completion)) for row in found.positive]
    assert told == [("good day", ""), ("How?", " well"), (hi, "Hello!"), (hi, "Hey"), ("nice", "")]
    assert (text(found.negative[2].ids), found.negative[2].completion) == (hi, ())
    assert found.source["from"] == "contrasts in pairs.jsonl"


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "is empty"),
        ([{"postive": "a"}], "line 1 has the key 'postive'; did you mean 'positive'?"),
        ([{"prompt": "a"}], "line 1 has neither 'positive' nor 'negative'"),
        (["a"], "line 1 is a JSON str"),
        ([{"positive": "a"}, {"positive": "b"}], "2 positive texts and no negative one"),
        ([{"negative": "a"}], "1 negative texts and no positive one"),
        ([{"positive": 3, "negative": "a"}], "'positive' is 3; expected a text or a list of messages"),
        ([{"positive": " ", "negative": "a"}], "'positive' is empty"),
        ([{"prompt": 3, "positive": "b", "negative": "a"}], "'prompt' is 3"),
        ([{"prompt": "q", "positive": [USER], "negative": "a"}], "expected a text"),
        ([{"positive": [{"role": "user"}], "negative": "a"}], "has the message {'role': 'user'}"),
        ([{"positive": [], "negative": "a"}], "chat without messages"),
        ([{"positive": [{"role": "assistant", "content": "a"}], "negative": "a"}], "turn of the user"),
    ],
)
def test_files_that_hold_no_contrast(
    tmp_path: Path, tiny_tokenizer: Any, records: list[Any], expected: str
) -> None:
    with pytest.raises(SteerError) as error:
        read_contrast(lines(tmp_path / "pairs.jsonl", records), tiny_tokenizer)
    assert expected in message(error)


def test_variables_of_the_chat_template_need_a_chat(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template += "{% if quiet is defined and quiet %}[quiet]{% endif %}"
    variables = {"quiet": True}
    assert read_contrast(lines(tmp_path / "pairs.jsonl", PAIRS), tiny_tokenizer, variables).pairs
    with pytest.raises(SteerError, match=r"no effect: pairs\.jsonl holds plain texts") as error:
        read_contrast(lines(tmp_path / "pairs.jsonl", PAIRS[:2]), tiny_tokenizer, variables)
    message(error)


# ---- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    """A short run of the recipe that keeps the answers of its updates."""
    base = run_folder(place, build_tiny, tiny_tokenizer, 12, max_steps=2, use_cpu=True, log_completions=True)
    if not (base / "whole" / "results.json").exists():
        run_here(ROOT / "recipes" / "grpo_steer.py", "--config", str(base / "config.yaml"))
        for stage in ("before", "elicited"):  # a random model is seldom right
            path = base / "whole" / f"samples_{stage}.json"
            samples = read_json(path)
            path.write_text(json.dumps([{**s, "correct": i % 3 == 0} for i, s in enumerate(samples)]))
    return base / "whole"


def loaded(folder: Path) -> Any:
    from steer.models import load_tokenizer

    return load_tokenizer(str(folder))


def decoded(tokenizer: Any, rows: list[Any]) -> list[tuple[str, str]]:
    return [(tokenizer.decode(row.ids[: row.prompt]), tokenizer.decode(row.completion)) for row in rows]


def test_answers_of_a_training_run(trained: Path) -> None:
    tokenizer = loaded(trained.parent / "model")
    for stage in ("before", "elicited"):
        spec = PromptSpec("plain")
        if stage == "elicited":
            examples = read_json(trained / "examples.json")
            spec = replace(spec, examples=tuple((p, a) for p, a in examples))
        found = read_completions(trained, tokenizer, stage)
        samples = read_json(trained / f"samples_{stage}.json")
        for rows, verdict in ((found.positive, True), (found.negative, False)):
            expected = [
                (format_prompt(s["problem"], tokenizer, spec), s["completion"])
                for s in samples
                if s["correct"] is verdict
            ]
            assert decoded(tokenizer, rows) == expected
        assert found.prompt == PromptSpec("plain")


def test_answers_of_the_updates(trained: Path) -> None:
    import pyarrow.parquet

    found = read_completions(trained, loaded(trained.parent / "model"), "training")
    tables = [pyarrow.parquet.read_table(p).to_pylist() for p in (trained / "completions").glob("*.parquet")]
    right = [row["correctness"] > 0 for table in tables for row in table]
    assert [len(found.positive), len(found.negative)] == [sum(right), len(right) - sum(right)]
    assert found.pairs, "a group has right and wrong answers to one problem"


@pytest.fixture
def evaluated(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    folder = place / "eval"
    if not folder.exists():
        folder.mkdir()
        make_base(folder, build_tiny, tiny_tokenizer)
        asked = ["--model", str(folder / "model"), "--benchmarks", str(folder / "sums.jsonl")]
        asked += ["--template", "plain", "--max-new-tokens", "6", "--samples", "20", "--prefixes", "To"]
        assert evals_run.main([*asked, "--out", str(folder / "run")]) == 0
    return folder


def test_answers_of_an_evaluation(evaluated: Path) -> None:
    from steer.evaluation.store import read_completions as kept

    tokenizer = loaded(evaluated / "model")
    columns = kept(evaluated / "run")
    problems = {p["id"]: p["problem"] for p in steer.evaluation.store.read_problems(evaluated / "run")}
    for variant, prefix in (("base", ""), ("base + To", "To")):
        found = read_completions(evaluated / "run", tokenizer, variant=variant)
        expected = {True: [], False: []}
        for of, problem, text, correct in zip(
            *(columns[c] for c in ("variant", "problem", "text", "correct")), strict=True
        ):
            if of == variant:
                asked = format_prompt(problems[problem], tokenizer, PromptSpec("plain", prefix))
                expected[correct].append((asked, text))
        assert decoded(tokenizer, found.positive) == expected[True]
        assert decoded(tokenizer, found.negative) == expected[False]
        right, wrong = (decoded(tokenizer, rows) for rows in (found.positive, found.negative))
        assert found.pairs and all(right[i][0] == wrong[j][0] for i, j in found.pairs)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [("nothing", "choose one of before"), ("missing", "it has those of")],
)
def test_stages_that_are_not_there(trained: Path, tmp_path: Path, stage: str, expected: str) -> None:
    folder = trained
    if stage == "missing":
        folder, stage = tmp_path, "after"
        (tmp_path / "run.json").write_text((trained / "run.json").read_text())
    with pytest.raises(SteerError) as error:
        read_completions(folder, loaded(trained.parent / "model"), stage)
    assert expected in message(error)


def test_runs_that_give_no_contrast(trained: Path, evaluated: Path, tmp_path: Path) -> None:
    tokenizer = loaded(trained.parent / "model")
    (tmp_path / "run.json").write_text((trained / "run.json").read_text())
    samples = [{**s, "correct": False} for s in read_json(trained / "samples_before.json")]
    (tmp_path / "samples_after.json").write_text(json.dumps(samples))
    for name, settings in (("cut", {"variants": {}, "benchmarks": {}}), ("other", {"run": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    for folder, options, expected in (
        (tmp_path, {}, "0 answers are right and 12 wrong"),
        (tmp_path, {"stage": "training"}, "no tables of completions"),
        (tmp_path / "nothing", {}, "no run.json"),
        (tmp_path / "cut", {}, "it is not what `steer eval` writes"),
        (tmp_path / "other", {}, "is of no run of `steer train` or `steer eval`"),
        (evaluated / "run", {"variant": "lora"}, "no variant 'lora'; it has base"),
    ):
        with pytest.raises(SteerError) as error:
            read_completions(folder, tokenizer, **options)
        assert expected in message(error)


# ---- SAEs


def make_sae(folder: Path, width: int = 32, **source: Any) -> SAE:
    sae = SAE(SAEConfig(width, 64, 4, source=source or None), seed=3)
    sae.save_pretrained(folder)
    return sae


def test_a_feature_of_an_sae(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    model = str(model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer))
    sae = make_sae(tmp_path / "sae", model=model, layer=1, site="mlp_out")
    asked = ["extract", "sae", str(tmp_path / "sae"), "--feature", "5", "--share", "0.5"]
    assert main([*asked, "--out", str(tmp_path / "v")]) == 0
    made = steer.read(tmp_path / "v")
    assert (made.config.layers, made.config.site) == ("1", "mlp_out")
    vector = made.by_layer()[1]
    torch.testing.assert_close(vector / vector.norm(), sae.W_dec[5].detach(), rtol=1e-5, atol=1e-6)
    # a feature's activation is a length in the stream, which the vector's own length is a share of
    assert made.config.provenance["extract"]["from"].startswith("feature 5 of the SAE")


def test_a_feature_of_an_sae_of_another_tool(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """Its hook says the place; the length of its decoder's rows, here ten times theirs, does not matter."""
    model = str(model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer))
    sae = make_sae(tmp_path / "own", model=model, layer=2, site="resid_pre")
    save_sae(sae, tmp_path / "sae", "saelens")
    with torch.no_grad():
        sae.W_dec.mul_(10)
    save_sae(sae, tmp_path / "long", "saelens")
    made = {}
    for name in ("own", "sae", "long"):
        asked = ["extract", "sae", str(tmp_path / name), "--feature", "5", "--share", "0.5"]
        assert main([*asked, "--out", str(tmp_path / f"{name}-v")]) == 0
        made[name] = steer.read(tmp_path / f"{name}-v")
        assert (made[name].config.layers, made[name].config.site) == ("2", "resid_pre")
        torch.testing.assert_close(made[name].by_layer()[2], made["own"].by_layer()[2])
    told = made["sae"].config.provenance["extract"]["sae"]
    assert (told["tool"], told["hook"]) == ("SAELens", "blocks.2.hook_resid_pre")


def test_an_sae_that_names_its_model_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    sae = make_sae(tmp_path / "own", model="gpt2-small", layer=1)
    save_sae(sae, tmp_path / "sae", "saelens")
    asked = ["extract", "sae", str(tmp_path / "sae"), "--feature", "5", "--out", str(tmp_path / "v")]
    assert main(asked) == 1
    assert "is an SAE of 'gpt2-small', which is no hub id; give --model" in capsys.readouterr().err
    model = str(model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer))
    assert main([*asked, "--model", model, "--layers", "1"]) == 0  # no site was saved, so no hook either


def test_an_sae_is_extracted_for_the_weights_that_it_was_trained_on(
    tmp_path: Path, tiny_llama: Any, build_tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make_sae(tmp_path / "sae", layer=1, base_checksum=base_checksum(tiny_llama))
    with warnings.catch_warnings(action="error"):
        sae_direction(tmp_path / "sae", 5, tiny_llama, sae=sae)
    with pytest.warns(UserWarning, match=r"sae: trained on .*but other weights"):
        sae_direction(tmp_path / "sae", 5, build_tiny("llama", seed=1), sae=sae)

    asked: list[Any] = []

    def source(*arguments: Any) -> Any:
        asked.append(arguments)
        return str(model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)), None

    monkeypatch.setattr("steer.base_adapter.base_source", source)
    make_sae(
        tmp_path / "merged", model=str(tmp_path / "model"), layer=1, base_revision="v2", base_adapter="lora"
    )
    argv = ["extract", "sae", str(tmp_path / "merged"), "--feature", "5", "--out", str(tmp_path / "v")]
    assert main(argv) == 0
    assert asked == [(str(tmp_path / "model"), "lora", "v2", False)]


def test_saes_that_do_not_fit(tmp_path: Path, tiny_llama: Any) -> None:
    tiny_llama.config.name_or_path = "mine"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"model": "other", "layer": 1}, {}, "is an SAE of other, the model is mine"),
        ({"width": 16}, {"layers": [1]}, "width 16, the model's hidden size is 32"),
        ({"layer": 1}, {"feature": 64}, "has features 0 to 63, not 64"),
        ({"layer": 1}, {"layers": [2]}, "is an SAE of layer 1, --layers asks for [2]"),
        ({}, {"layers": [0, 1]}, "is an SAE of one layer, --layers asks for [0, 1]"),
        ({}, {}, "does not say which layer"),
        ({"layer": 1, "site": "mlp_out"}, {"site": "attn_out"}, "is an SAE of site mlp_out"),
    ]
    for number, (made, asked, expected) in enumerate(cases):
        make_sae(tmp_path / str(number), **made)
        with pytest.raises(SteerError) as error:
            sae_direction(tmp_path / str(number), **{"feature": 5, "model": tiny_llama, **asked})
        assert expected in message(error)


# ---- the command


@pytest.fixture
def here(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    lines(tmp_path / "pairs.jsonl", PAIRS)
    lines(tmp_path / "one.jsonl", [{"positive": "a"}])
    (tmp_path / "empty.jsonl").write_text("")
    make_sae(tmp_path / "sae", layer=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_makes_artifacts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["extract", "pairs", "pairs.jsonl", "--model", "model", "--layers", "0,2", "--out", "v"]
    assert main(asked) == 0
    assert "5 positive and 4 negative texts" in capsys.readouterr().out
    assert main([*asked, "--method", "pca", "--tokens", "all"]) == 1
    assert "v exists already" in capsys.readouterr().err
    assert main([*asked, "--method", "pca", "--tokens", "all", "--force"]) == 0
    assert steer.read("v").config.provenance["extract"]["pairs"] == 4
    assert main(["extract", "token", "7", "--model", "model", "--out", "seven"]) == 0
    assert steer.read("seven").config.layers == "2"
    assert main(["extract", "sae", "sae", "--feature", "0", "--model", "model", "--out", "f"]) == 0


def test_a_source_is_not_replaced(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.models.load_model", lambda *args, **options: pytest.fail("work was begun"))
    asked = ["--model", "model", "--force", "--out"]
    assert main(["extract", "sae", "sae", "--feature", "0", *asked, "sae"]) == 1
    assert "sae is what the command reads" in capsys.readouterr().err
    assert main(["extract", "pairs", "pairs.jsonl", *asked, "pairs.jsonl"]) == 1
    assert "pairs.jsonl is what the command reads" in capsys.readouterr().err


def test_answers_of_a_run_need_no_model(trained: Path, tmp_path: Path) -> None:
    asked = ["extract", "answers", str(trained), "--stage", "before", "--tokens", "completion"]
    assert main([*asked, "--out", str(tmp_path / "v")]) == 0
    made = steer.read(tmp_path / "v")
    assert made.config.prompt == PromptSpec("plain")
    assert made.config.base_model_name_or_path == str(trained.parent / "model")


def test_a_choice_of_answers_that_has_no_effect_is_refused(
    trained: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, option, kind, other in (
        (trained, "--variant", "train", "--stage"),
        (evaluated / "run", "--stage", "eval", "--variant"),
    ):
        asked = ["extract", "answers", str(folder), "--out", str(tmp_path / "v")]
        assert main([*asked, option, "after"]) == 1
        error = capsys.readouterr().err
        assert f"{option} 'after' has no effect: {folder} is a run of `steer {kind}`" in error
        assert f"choose its answers by {other}" in error
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pairs nothing.jsonl", "cannot read 'nothing.jsonl'"),
        ("pairs empty.jsonl", "empty.jsonl is empty"),
        ("pairs one.jsonl", "no negative one"),
        ("pairs pairs.jsonl --tokens completion", "prompts alone"),
        ("pairs pairs.jsonl --layers 3", "layer 3 does not exist: the model has layers 0 to 2"),
        ("pairs pairs.jsonl --layers 2-1", "runs backwards"),
        ("pairs pairs.jsonl --share 0", "is not a number above 0"),
        ("token 12", "is 2 tokens (['1', '2']), expected one"),
        ("token ''", "is 0 tokens"),
        ("sae nothing --feature 1", "holds no SAE"),
        ("sae sae --feature 99", "has features 0 to 63, not 99"),
        ("sae sae --feature 1 --layers 0", "is an SAE of layer 1"),
        ("answers model", "there is no run.json"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    import shlex

    asked = [*shlex.split(words), "--out", "out"]
    assert main(["extract", *asked, *([] if words.startswith("answers") else ["--model", "model"])]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not (here / "out").exists()

"""`steer lens` on a tiny model in a folder."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.steering import fill, message
from helpers.training import model_folder

import steer
from steer import SteerError
from steer.artifact import Artifact, write
from steer.cli.lens import add_commands
from steer.lens.findings import RULES
from steer.lens.inputs import read_problems
from steer.lens.jacobian import JacobianLens
from steer.lens.sections import SECTIONS

RUN = {
    "template": "plain",
    "train_data": "arithmetic",
    "operators": "+",
    "digits": 1,
    "terms": 2,
    "heldout": 0.4,
}


def call(*argv: Any) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["lens", *map(str, argv)])
    args.run(args)


@torch.no_grad()
def test_a_control_takes_the_place_of_the_trained_vectors(artifact, capsys) -> None:
    found = {}
    for control in (None, "random", "shuffled", "mean-difference"):
        chosen = ("--control", control) if control else ()
        call("persistence", artifact, *COMMON, "--json", "--seed", "3", *chosen)
        found[control] = json.loads(capsys.readouterr().out)["size"]
    assert len({str(size) for size in found.values()}) == 4


@pytest.fixture
def artifact(tmp_path, tiny_llama, tiny_tokenizer):
    """An artifact that names its model, its data and its prompt format."""
    folder = model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    provenance = {"run": RUN, "training": {"max_completion_length": 4}}
    config = steer.SteeringConfig(layers="0-2", base_model_name_or_path=str(folder), provenance=provenance)
    vectors = steer.attach(tiny_llama, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vectors.parameters():
            parameter.copy_(torch.randn(32, generator=generator))
    return vectors.save(tmp_path / "vectors")


COMMON = ("--problems", "4")


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (("logit", "--top", "3"), "layers"),
        (("logit", "--scripts", "--control", "shuffled"), "promoted"),
        (("shift", *COMMON, "--layers", "last"), "first_share"),
        (("shift", *COMMON, "--opening", "7"), "share"),
        (("patch", *COMMON), "recovered"),
        (("patch", *COMMON, "--layers", "1", "--heads", "-1", "--direction", "remove"), "recovered"),
        (("patch", *COMMON, "--layers", "0", "--heads", "1", "--qkv", "kv"), "recovered"),
        (("patch", *COMMON, "--frozen", "--control", "random"), "recovered"),
        (("attention", *COMMON, "--draws", "2"), "random_heads"),
        (("persistence", *COMMON, "--layers", "0-1"), "diff_diff"),
        (("compose", *COMMON, "--layers", "0,2"), "score"),
        (("compose", *COMMON, "--leave-one-out"), "likelihood"),
        (("sweep", *COMMON, "--scales", "-1", "0", "1"), "accuracy"),
        (("conventions", *COMMON, "--draws", "1", "--layers", "0-1"), "persistence"),
        (("downstream", *COMMON, "--draws", "1", "--top", "3"), "statistics"),
        (("entropy", *COMMON, "--draws", "2", "--layers", "last"), "correlations"),
        (("spectrum", *COMMON, "--draws", "2"), "stable_ranks"),
    ],
)
def test_json_and_text_and_figure(artifact, argv, key, capsys, tmp_path) -> None:
    name, *rest = argv
    call(name, artifact, *rest, "--json", "--plot", tmp_path / "figure.svg")
    assert key in json.loads(capsys.readouterr().out)
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    call(name, artifact, *rest)
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_logit_reads_a_negated_artifact_the_other_way(artifact, tmp_path, capsys) -> None:
    negated = write(tmp_path / "negated", -Artifact.from_pretrained(artifact))
    found = []
    for source in (artifact, negated):
        call("logit", source, "--top", "3", "--json")
        found.append(json.loads(capsys.readouterr().out)["layers"])
    for own, other in zip(*found, strict=True):
        for one, two in zip(own["top"], other["bottom"], strict=True):
            assert (one["id"], one["score"]) == (two["id"], -two["score"])


def test_no_setting_is_ignored(artifact, capsys) -> None:
    call("compose", artifact, *COMMON, "--leave-one-out", "--layers", "1", "--json")
    assert json.loads(capsys.readouterr().out)["layers"] == [1]
    call("logit", artifact, "--scripts", "--top", "7", "--json")
    assert {sum(row) for row in json.loads(capsys.readouterr().out)["promoted"]} == {7}
    for command, *options in (
        ("shift", "--opening", "7", "--temperature", "1"),
        ("compose", "--leave-one-out", "--likelihood"),
        ("compose", "--leave-one-out", "--joint", artifact),
    ):
        with pytest.raises(SteerError, match="has no effect with"):
            call(command, artifact, *COMMON, *options)


def test_the_random_control_is_no_draw_of_its_own_null(artifact, capsys) -> None:
    call("attention", artifact, "--problems", "2", "--control", "random", "--draws", "1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["random"][0] != pytest.approx(found["distance"], rel=1e-3)


def test_directions_reads_artifacts_alone(artifact, capsys) -> None:
    call("directions", artifact, artifact, "--json")
    assert json.loads(capsys.readouterr().out)["to_last"][0][0] == pytest.approx(1)


def test_a_jacobian_lens_is_fitted_and_read(artifact, tmp_path, capsys, monkeypatch) -> None:
    texts, lens = tmp_path / "texts.txt", tmp_path / "lens.safetensors"
    texts.write_text("1+2=3\n12-4=8\n7\n")
    fitted = ("jacobian", tmp_path / "model", "--texts", texts, "--out", lens)
    fitted = (*fitted, "--limit", "2", "--length", "5")
    call(*fitted)
    assert "resid_post, fitted on 8 tokens of 2 texts" in capsys.readouterr().out
    read = {}
    for chosen in ((), ("--jacobian", lens)):
        call("logit", artifact, "--top", "3", "--json", *chosen)
        read[len(chosen)] = json.loads(capsys.readouterr().out)
    ids = [[token["id"] for token in reading["layers"][2]["top"]] for reading in read.values()]
    assert ids[0] == ids[1]  # nothing is above the last layer
    assert read[2]["layers"][0] != read[0]["layers"][0]
    assert read[2]["jacobian"].startswith("Jacobian lens of ") and read[0]["jacobian"] is None
    call(*fitted, "--batch-size", "1")  # nothing is left to do
    stopped, saves = tmp_path / "stopped.safetensors", []
    again = (*fitted[:5], stopped, *fitted[6:], "--batch-size", "1")

    def stop(lens: JacobianLens, path: str) -> None:
        if saves:
            raise KeyboardInterrupt
        saves.append(save(lens, path))

    save = JacobianLens.save
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(JacobianLens, "save", stop)
        call(*again)
    assert JacobianLens.load(stopped).texts == 1
    capsys.readouterr()
    call(*again)
    assert "fitted on 8 tokens of 2 texts" in capsys.readouterr().out
    whole = tmp_path / "whole.safetensors"
    call(*fitted[:5], whole, *fitted[6:], "--batch-size", "1")
    assert stopped.read_bytes() == whole.read_bytes()
    with pytest.raises(SteerError, match="another sample"):
        call(*fitted, "--skip", "0")
    call(*fitted, "--skip", "0", "--force", "--layers", "1")
    with pytest.raises(SteerError, match="fitted for layers 1, the vectors are in layers 0, 2"):
        call("logit", artifact, "--jacobian", lens)
    with pytest.raises(SteerError, match="cannot read a Jacobian lens"):
        call("logit", artifact, "--jacobian", texts)


def test_scales_of_random_readouts_are_on_the_same_texts(artifact, tmp_path, build_tiny, capsys) -> None:
    model = build_tiny("llama")
    config = steer.read(artifact).config
    adaptive = steer.SteeringConfig(
        "adaptive", base_model_name_or_path=config.base_model_name_or_path, provenance=config.provenance
    )
    source = fill(steer.attach(model, adaptive)).save(tmp_path / "adaptive")
    found = {}
    for chosen in (None, "random", "random-readout"):
        control = ("--control", chosen) if chosen else ()
        call("scales", source, *COMMON, "--json", *control)
        found[chosen] = json.loads(capsys.readouterr().out)
    for other in ("random", "random-readout"):
        assert [one["tokens"] for one in found[other]["maps"]] == [
            one["tokens"] for one in found[None]["maps"]
        ]
    first = {name: one["maps"][0]["coefficients"][0] for name, one in found.items()}
    assert first["random"] == pytest.approx(first[None])  # nothing is before the first layer
    assert first["random-readout"] != pytest.approx(first[None])
    call("scales", source, *COMMON)
    assert "answer " in capsys.readouterr().out
    with pytest.raises(SteerError, match="scale maps need adaptive vectors"):
        call("scales", artifact, *COMMON, "--control", "random-readout")


def test_report_writes_a_page(artifact, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("steer.lens.report.SECTIONS", SECTIONS[:2])  # all of them: test_report.py
    where = ("--out", tmp_path / "page.html", "--figures", tmp_path / "lens")
    with pytest.raises(SteerError, match="at least 24 problems, got 4; raise --problems"):
        call("report", artifact, *COMMON, *where)
    call("report", artifact, "--problems", "24", *where)
    table = (tmp_path / "lens" / "findings.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert sum(line.count("|") == 5 for line in rows) == len(RULES) + 2
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert "Only 0 problems were solved, 24 are needed" in table
    assert "untestable" in capsys.readouterr().out


def test_transfer_of_one_model_is_a_mistake(artifact) -> None:
    with pytest.raises(SteerError, match="two models or more"):
        call("transfer", artifact, *COMMON)


def test_compose_with_a_jointly_trained_set(artifact, tmp_path, capsys) -> None:
    summed = tmp_path / "sum"
    write(summed, steer.read(artifact) + steer.read(artifact))
    call("compose", summed, *COMMON, "--layers", "0,2", "--json")
    assert json.loads(capsys.readouterr().out)["joint"] is None
    call("compose", summed, *COMMON, "--layers", "0,2", "--joint", artifact, "--json")
    joint = json.loads(capsys.readouterr().out)["joint"]
    call("compose", artifact, *COMMON, "--layers", "0,2", "--json")
    assert json.loads(capsys.readouterr().out)["joint"] == joint
    call("compose", artifact, *COMMON, "--layers", "0,2", "--control", "random")
    assert "undefined: no jointly trained set was measured" in capsys.readouterr().out
    with pytest.raises(SteerError, match="outcome of arithmetic"):
        call("compose", artifact, *COMMON, "--layers", "0,2", "--joint", summed)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("scales", *COMMON), "scale maps need adaptive vectors"),
        (("patch", *COMMON, "--heads", "3"), "layer 3 does not exist"),
        (("patch", *COMMON, "--qkv", "q"), "give --heads LAYER"),
        (("patch", *COMMON, "--heads", "1", "--qkv", "z"), "give q, k, v"),
        (("baselines", *COMMON), "0 of 4 steered answers are right"),
        (("compose", *COMMON, "--likelihood"), "none of the 4 steered answers is right"),
        (("logit", "--plot", "figure.doc"), "must end in .png, .svg, .pdf"),
        (("logit", "--plot", "."), "names no file to write"),
        (("logit", "--reading", "angle"), "choose one of dot, cosine"),
        (("downstream", *COMMON, "--layers", "7"), "layer"),
    ],
)
def test_mistakes(artifact, argv, expected) -> None:
    with pytest.raises(SteerError, match=expected):
        call(argv[0], artifact, *argv[1:])


def test_help_teaches_and_does_not_import_torch() -> None:
    code = "import sys; from steer.cli import main\ntry: main(['lens', 'patch', '--help'])\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "steer lens patch my-vectors --layers 28 --solve" in done.stdout


UNSET = argparse.Namespace(data=None, problems=2, split=None, columns=None)


def test_a_run_without_held_out_problems_is_read_on_what_else_its_training_data_has() -> None:
    run = {**RUN, "eval_data": "none"}
    assert len(read_problems(UNSET, {"run": run})) == 2


@pytest.mark.parametrize(
    "run",
    [
        {"train_data": "train.jsonl"},
        {"train_data": "math500"},  # has one split
        {"train_data": "runs/demo/completions"},
        {"train_data": "owner/name", "train_split": "test"},
    ],
    ids=str,
)
def test_training_problems_are_not_taken_for_held_out_ones(run) -> None:
    with pytest.raises(SteerError, match="held no problems out; give --data") as error:
        read_problems(
            UNSET, {"run": {"eval_data": "none", "eval_split": "test", "train_split": "train", **run}}
        )
    message(error)


def test_held_out_problems_are_read_as_in_the_run(tmp_path, monkeypatch) -> None:
    source = tmp_path / "sums.jsonl"
    source.write_text('{"question": "1 + 1?", "value": ["2", "two"]}\n')
    columns = "problem=question,answer=value"
    own = {"train_data": "train.jsonl", "eval_data": str(source), "columns": columns}
    given = argparse.Namespace(data=str(source), problems=2, split=None, columns=columns)
    for args, run in (
        (UNSET, own),
        (UNSET, {**own, "columns": "problem=text", "eval_columns": columns}),
        (given, RUN),
    ):
        (problem,) = read_problems(args, {"run": run})
        assert (problem["problem"], problem["golds"]) == ("1 + 1?", ["2", "two"])
    asked: list[tuple[str, str]] = []

    def load(source: str, split: str, **options: Any) -> Any:
        asked.append((source, split))
        return SimpleNamespace(to_list=list)

    monkeypatch.setattr("steer.lens.inputs.load_problems", load)
    run = {"train_data": "gsm8k", "eval_data": "owner/name", "eval_split": "validation"}
    for chosen in ({}, {"split": "test"}, {"data": "math"}):
        read_problems(argparse.Namespace(**{**vars(UNSET), **chosen}), {"run": run})
    assert asked == [("owner/name", "validation"), ("owner/name", "test"), ("math", "test")]


def test_answers_of_a_transfer_are_as_long_as_the_longest_limit(artifact, tmp_path, monkeypatch) -> None:
    longer = steer.read(artifact)
    longer.config.provenance = {"run": RUN, "training": {"max_completion_length": 9}}
    write(tmp_path / "longer", longer)
    limits: list[int] = []

    def stop(*args: Any, max_new_tokens: int, **options: Any) -> None:
        limits.append(max_new_tokens)
        raise SteerError("stopped")

    monkeypatch.setattr("steer.lens.runs.transfer_matrix", stop)
    for sources in ((artifact, tmp_path / "longer"), (tmp_path / "longer", artifact)):
        with pytest.raises(SteerError, match="stopped"):
            call("transfer", *sources, *COMMON)
    assert limits == [9, 9]

"""The `steer` command on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers.training import model_folder

import steer
from steer import artifact
from steer.artifact import CARD_FILE, Artifact
from steer.cli import main


@pytest.fixture
def steered(tmp_path, tiny_llama, tiny_tokenizer):
    """A model folder, and the folder of vectors that change what it says."""
    model = model_folder(tmp_path / "model", tiny_llama, tiny_tokenizer)
    vectors = steer.attach(
        tiny_llama, steer.SteeringConfig(layers="0,2", provenance={"run": {"template": "plain"}})
    )
    vectors.set_tensors(
        {name: torch.full_like(t, i + 1.0) for i, (name, t) in enumerate(vectors.tensors().items())}
    )
    return model, vectors.save(tmp_path / "vectors")


def test_info_shows_layers_and_norms(steered, capsys):
    assert main(["info", str(steered[1])]) == 0
    out = capsys.readouterr().out
    assert "llama, 3 layers, hidden size 32" in out and "constant, 2 layers, 64 numbers" in out
    assert "    0    5.6569" in out and "    2   11.3137" in out and "\n    1" not in out


def test_info_and_card_leave_out_what_played_no_part(steered, capsys):
    made = {
        "run": {"train_data": "mine.jsonl", "train_split": "train", "eval_data": "none", "eval_limit": 200}
        | {"operators": "+-", "digits": 2, "load_in_4bit": False, "rewards": ["correct"], "levels": None},
        "training": {"beta": 0.0, "max_steps": 2, "gradient_checkpointing": False, "seed": None},
        "results": {},
    }
    found = artifact.read(steered[1])
    found.config.provenance = made
    artifact.write(steered[1], found)
    assert main(["info", str(steered[1])]) == 0
    out = capsys.readouterr().out
    assert "run         train_data=mine.jsonl, eval_data=none, rewards=['correct']\n" in out
    assert "training    beta=0.0, max_steps=2, gradient_checkpointing=False\n" in out and "results" not in out
    text = (steered[1] / CARD_FILE).read_text()
    assert "- gradient_checkpointing: False" in text
    assert "`mine.jsonl`, rewarded by `correct`, 2 updates." in text and "No other task" not in text
    assert "- rewards: ['correct']" in text and "digits" not in text and "eval_limit" not in text
    made["run"] |= {"train_data": "arithmetic", "eval_data": None}
    made["results"] = {"after": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "problems": 10}}
    artifact.write(steered[1], found)
    assert main(["info", str(steered[1])]) == 0
    out = capsys.readouterr().out
    assert "eval_limit=200, operators=+-, digits=2" in out and "train_split" not in out
    assert "results     after 0.500 [0.400, 0.600]\n" in out and "measured" not in out


def test_generate_is_side_by_side_and_scale_zero_is_the_base(steered, capsys):
    model, vectors = (str(path) for path in steered)
    common = ["generate", model, "--vectors", vectors, "--prompt", "1+1=", "--max-new-tokens", "8"]
    assert main(common) == 0
    base, other = capsys.readouterr().out.splitlines()
    assert base.removeprefix("base     ") != other.removeprefix("steered  ")
    assert main([*common, "--scale", "0"]) == 0
    base, other = capsys.readouterr().out.splitlines()
    assert base.removeprefix("base     ") == other.removeprefix("steered  ")
    common[3] = f"{vectors}@0.5"
    assert main([*common, "--scale", "2"]) == 1
    assert "--scale 2 and vectors@0.5 both set the scale" in capsys.readouterr().err


def test_generate_knows_no_penalties_of_the_model(steered, capsys):
    model, vectors = (str(path) for path in steered)
    common = ["generate", model, "--vectors", vectors, "--prompt", "1+1=", "--template", "plain"]
    common += ["--max-new-tokens", "24", "--json"]
    assert main(common) == 0
    plain = json.loads(capsys.readouterr().out)
    settings = steered[0] / "generation_config.json"
    penalties = {"repetition_penalty": 1000.0, "no_repeat_ngram_size": 1}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **penalties}))
    assert main(common) == 0
    assert json.loads(capsys.readouterr().out) == plain


def test_generate_adds_sets_up(steered, capsys):
    model, vectors = (str(path) for path in steered)
    common = ["generate", model, "--prompt", "1+1=", "--max-new-tokens", "8", "--json", "--vectors"]

    def told(*words):
        capsys.readouterr()
        assert main([*common, *words]) == 0
        return json.loads(capsys.readouterr().out)

    whole, half = told(vectors), told(f"{vectors}@0.5")
    assert whole["scales"] == {"vectors": 1.0} and half["scales"] == {"vectors": 0.5}
    two = (f"a={vectors}@0.75", f"b={vectors}")
    found = told(*two, "--steering", "a@2+b@-0.5")
    assert found == whole | {"scales": {"a": 1.5, "b": -0.5}}
    assert told(*two)["scales"] == {"a": 0.75, "b": 1.0}
    assert told(*two, "--steering", "b")["steered"] == whole["steered"] != whole["base"]
    for nothing in ("base", "a@0+b@-0"):
        found = told(*two, "--steering", nothing)
        assert found["steered"] == found["base"] == whole["base"] and found["scales"] == {}
    layers = {"sets": [{"name": "b", "layers": "0"}, {"name": "a", "scale": 0}]}
    assert told(*two, "--steering", json.dumps(layers))["scales"] == {"b": 1.0}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steering", "c"], "no vectors named 'c'; there are a, b"),
        (["--steering", "a@"], "the scale '' of 'a' is not a finite number"),
        (["--steering", ""], "names no sets"),
        (["--steering", '{"sets": [{"name": "a", "layer": 1}]}'], "steering.sets[0].layer is not a field"),
        (["--steering", '{"sets": '], "--steering is not JSON"),
        (["--steering", '{"sets": [{"name": "a"}], "prompt": "none"}'], "give --template"),
        (["--scale", "2"], "--scale is for one set alone"),
    ],
)
def test_wrong_steering_is_one_line(steered, capsys, words, told):
    model, vectors = (str(path) for path in steered)
    common = ["generate", model, "--prompt", "1", "--vectors", f"a={vectors}", f"b={vectors}"]
    assert main([*common, *words]) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_export_and_import_as_json(steered, tmp_path, capsys):
    model, folder = (str(path) for path in steered)
    out = str(tmp_path / "vectors.npz")
    assert main(["export", folder, "--to", "npz", "--out", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    size = (tmp_path / "vectors.npz").stat().st_size
    assert told == {"out": out, "format": "npz", "bytes": size, "prompt": None}
    back = str(tmp_path / "back")
    assert main(["import", out, "--model", model, "--out", back, "--json"]) == 1
    assert "does not say which model its vectors are for" in capsys.readouterr().err
    assert main(["import", out, "--model", model, "--out", back, "--confirm-model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": back, "kind": "constant", "layers": "0,2"}


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nothing")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_help_does_not_import_torch():
    code = "import sys; from steer.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_info_and_diff_as_json_agree_with_torch(steered, capsys):
    _model, folder = steered
    twice = artifact.write(folder.parent / "twice", 2.0 * artifact.read(folder).layers(0, 0))
    assert main(["info", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["numbers"] == 64 and shown["config"]["hidden_size"] == 32
    assert shown["norms"] == {"0": pytest.approx(32**0.5), "2": pytest.approx(2 * 32**0.5)}
    assert main(["diff", str(folder), str(twice), "--json"]) == 0
    rows = {row["layer"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    assert rows[0]["cosine"] == pytest.approx(1.0) and rows[0]["norm_b"] == pytest.approx(2 * 32**0.5)
    assert rows[2]["norm_b"] is None and rows[2]["cosine"] is None


def test_diff_of_two_hidden_sizes_is_refused(steered, tmp_path, capsys):
    config = steer.SteeringConfig(layers=0, hidden_size=4, num_hidden_layers=3, model_type="llama")
    small = Artifact(config, {"model.layers.0.steering.vector": torch.ones(4)})
    other = artifact.write(tmp_path / "small", small)
    assert main(["diff", str(steered[1]), str(other)]) == 1
    assert "hidden_size=32" in capsys.readouterr().err


def test_the_card_tells_scores_controls_and_size(steered, tmp_path, capsys):
    score = {"accuracy": 0.92, "low": 0.836, "high": 0.963, "problems": 75}
    found = artifact.read(steered[1])
    found.config.provenance = {"run": {"train_data": "arithmetic"}, "results": {"after": score}}
    folder = artifact.write(steered[1], found)
    control = tmp_path / "control"
    control.mkdir()
    (control / "results.json").write_text(json.dumps({"after": score | {"accuracy": 0.01}}))
    assert main(["card", str(folder), "--control", f"random reward={control}"]) == 0
    text = (folder / CARD_FILE).read_text()
    assert "| with the vectors | 0.920 | 0.836 to 0.963 | 75 |" in text
    assert "| control: random reward | 0.010 |" in text
    assert "64 numbers in float32" in text and "- train_data: arithmetic" in text
    assert "## Trained on\n\n`arithmetic`." in text and "No other task was measured" in text
    assert "## Side effects\n\nNone were recorded" in text
    for tool in ("steer.load", "PeftModel", "vllm serve", "llama-cli", "lm_eval"):
        assert tool in text
    capsys.readouterr()
    assert main(["card", str(folder), "--control", f"x={tmp_path}"]) == 1
    assert "no finished results" in capsys.readouterr().err


def test_a_card_that_someone_rewrote_is_kept(steered):
    page = steered[1] / CARD_FILE
    page.write_text("my own words")
    artifact.write(steered[1], artifact.read(steered[1]))
    assert page.read_text() == "my own words"


@pytest.mark.parametrize("command", [["info"], ["diff", "--json"]])
def test_looking_does_not_import_torch(steered, command):
    arguments = [
        command[0],
        str(steered[1]),
        *([str(steered[1])] if command[0] == "diff" else []),
        *command[1:],
    ]
    code = f"import sys; from steer.cli import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0

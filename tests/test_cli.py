"""The `steer` command on a tiny model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from training import model_folder

import steer
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
    assert "llama, 3 layers of width 32" in out and "vectors     2 x 32, resid_post" in out
    assert "layer   0    5.6569" in out and "layer   2   11.3137" in out and "layer   1" not in out


def test_generate_is_side_by_side_and_scale_zero_is_the_base(steered, capsys):
    model, vectors = (str(path) for path in steered)
    common = ["generate", model, "--vectors", vectors, "--prompt", "1+1=", "--max-new-tokens", "8"]
    assert main(common) == 0
    base, other = capsys.readouterr().out.splitlines()
    assert base.removeprefix("base     ") != other.removeprefix("steered  ")
    assert main([*common, "--scale", "0"]) == 0
    base, other = capsys.readouterr().out.splitlines()
    assert base.removeprefix("base     ") == other.removeprefix("steered  ")


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nothing")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_help_does_not_import_torch():
    code = "import sys; from steer.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0

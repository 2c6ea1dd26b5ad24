"""`--init`: training that starts from an artifact, alone and in a population."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launching import ROOT, run_folder, run_here
from helpers.steering import fill, message
from helpers.training import far, same
from transformers import AutoModelForCausalLM

import steer
from steer import SteerError, SteeringConfig, artifact
from steer.training.init import start

SOLO, SWEEP = ROOT / "recipes" / "grpo_steer.py", ROOT / "recipes" / "layer_sweep.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("init")


@pytest.fixture
def base(place: Path, build_tiny: Callable, tiny_tokenizer: Any) -> Path:
    """`model/`, problems, `config.yaml`, and `given/`: vectors of three layers with a scale of their own."""
    folder = run_folder(
        place, build_tiny, tiny_tokenizer, 6, max_steps=2, learning_rate=0.02, use_cpu=True,
        examples=0, rewards=["random"], reward_weights=[1.0], save_steps=1,
    )  # fmt: skip
    if not (folder / "given").exists():
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        config = SteeringConfig(scale=0.5, provenance={"recipe": "by hand"})
        fill(steer.attach(model, config)).save(folder / "given")
    return folder


def train(base: Path, out: str, *changes: str, script: Path = SOLO) -> str | None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = str(base / "config.yaml")
        run_here(script, "--config", config, "--output_dir", str(base / out), *changes)
    except SystemExit as end:
        return str(end.code)
    finally:
        torch.set_num_threads(threads)
    return None


def given(base: Path) -> dict[str, torch.Tensor]:
    return {name: 0.5 * t for name, t in artifact.read(base / "given").tensors.items()}


@pytest.fixture
def whole(base: Path) -> Path:
    if not (base / "from-given" / "results.json").exists():
        assert train(base, "from-given", "--init", str(base / "given")) is None
    return base / "from-given"


def test_training_starts_there(base: Path, whole: Path) -> None:
    trained = artifact.read(whole / "vectors")
    moved = far(trained.tensors, given(base))
    assert 0 < moved < 0.3, "Adam moves each number by at most the rate at each update"
    assert train(base, "still", "--init", str(base / "given"), "--learning_rate", "1e-12") is None
    assert far(artifact.read(base / "still" / "vectors").tensors, given(base)) < 1e-6
    # the untrained model is the base, whatever the vectors start from
    assert train(base, "plain") is None
    befores = [json.loads((base / n / "results.json").read_text())["before"] for n in ("plain", "from-given")]
    assert befores[0] == befores[1]


def test_the_artifact_says_where_it_started(base: Path, whole: Path) -> None:
    made = artifact.read(whole / "vectors").config
    assert made.scale == 1.0
    assert made.provenance["run"]["init"] == str(base / "given")
    told = made.provenance["init"]
    assert told["recipe"] == "by hand" and len(told["checksum"]) == 16
    assert told["checksum"] in (whole / "vectors" / "README.md").read_text()


def test_a_run_goes_on_without_it(base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "given", tmp_path / "moved")
    source = ("--init", str(tmp_path / "moved"))
    assert train(base, "resumed", *source, "--max_steps", "1") is None
    shutil.rmtree(tmp_path / "moved")
    copy = base / "resumed" / "init"
    assert same(artifact.read(copy).tensors, artifact.read(base / "given").tensors)
    assert train(base, "resumed") is None  # the folder knows
    assert train(base, "resumed", *source) is None  # gone, and the run goes on
    assert same(artifact.read(base / "resumed" / "vectors").tensors, artifact.read(whole / "vectors").tensors)


def test_another_artifact_is_another_run(base: Path, whole: Path, tmp_path: Path) -> None:
    other = artifact.read(base / "given")
    artifact.write(tmp_path / "other", 2.0 * other)
    error = train(base, "from-given", "--init", str(tmp_path / "other"))
    assert error and "holds another run" in error and "\n" not in error
    assert train(base, "plain-first", "--max_steps", "1") is None
    error = train(base, "plain-first", "--init", str(base / "given"))
    assert error and "init was None" in error


def test_members_of_a_population_start_there_too(base: Path, whole: Path) -> None:
    asked = ("--init", str(base / "given"), "--seeds", "42", "--population", "{name: one, layers: 1}")
    assert train(base, "population", *asked, "--winners", "0", script=SWEEP) is None
    members = base / "population" / "members"
    assert (
        far(artifact.read(members / "seed-42" / "vectors").tensors, artifact.read(whole / "vectors").tensors)
        < 1e-4
    )
    one = artifact.read(members / "one" / "vectors")
    assert one.config.provenance["init"]["recipe"] == "by hand"
    name = "model.layers.1.steering.vector"
    assert 0 < far(one.tensors, {name: given(base)[name]}) < 0.3
    assert same(artifact.read(base / "population" / "init").tensors, artifact.read(base / "given").tensors)


def test_a_baseline_takes_none(base: Path) -> None:
    error = train(base, "baseline", "--init", "x", script=ROOT / "recipes" / "grpo_baseline.py")
    assert error and "none are trained here" in error


@pytest.mark.parametrize("kind", ["constant", "adaptive", "shared"])
def test_the_steered_model_is_that_of_the_artifact(tiny_llama: Any, kind: str) -> None:
    ids = torch.arange(3, 15)[None]
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(kind=kind, rank=2, scale=0.5)))
    expected = tiny_llama(ids).logits
    saved = artifact.Artifact(vectors.config, vectors.tensors())
    steer.detach(tiny_llama)
    vectors = steer.attach(tiny_llama, SteeringConfig(kind=kind, rank=2, scale=2.0))
    start(vectors, saved, "it")
    torch.testing.assert_close(tiny_llama(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert vectors.scale == 2.0


@pytest.mark.parametrize(
    ("have", "wanted", "expected"),
    [
        ({}, {"kind": "adaptive"}, "has kind=constant, this run trains kind=adaptive; set kind=constant"),
        ({"site": "mlp_out"}, {}, "set site=mlp_out"),
        ({"positions": "completion"}, {}, "set positions=completion"),
        ({"kind": "shared", "rank": 2}, {"kind": "shared", "rank": 3}, "set rank=2"),
        ({"layers": "0,2"}, {}, "none in layer 1, which this run trains; set layers=0,2"),
        ({}, {"scale": 0}, "scale=0 adds nothing"),
    ],
)
def test_what_does_not_fit(tiny_llama: Any, have: dict, wanted: dict, expected: str) -> None:
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(**have)))
    saved = artifact.Artifact(vectors.config, vectors.tensors())
    steer.detach(tiny_llama)
    with pytest.raises(SteerError) as error:
        start(steer.attach(tiny_llama, SteeringConfig(**wanted)), saved, "it")
    assert expected in message(error) and "init=it" in message(error)


def test_another_model(tiny_llama: Any, build_tiny: Callable) -> None:
    vectors = fill(steer.attach(tiny_llama))
    saved = artifact.Artifact(vectors.config, vectors.tensors())
    with pytest.raises(SteerError) as error:
        start(steer.attach(build_tiny("qwen2")), saved, "it")
    assert "model_type" in message(error)
    with pytest.raises(SteerError) as error:
        start(steer.attach(build_tiny("llama", hidden_size=16)), saved, "it")
    assert "hidden_size=32" in message(error)
    with pytest.warns(UserWarning, match="other weights"):
        start(steer.attach(build_tiny("llama", seed=5)), saved, "it")

"""
Models in shards, launched with the shipped configs: two CPU processes under FSDP2 and DeepSpeed, or one on a
GPU, become what one process without shards becomes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.gpu import DEVICE, needs_cuda
from helpers.launching import LAUNCHERS, ROOT, launcher, run_folder, run_here, started
from helpers.training import far, same
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steer import artifact

STEPS = 4
# A reference policy, vectors that share directions, and a position that prompts decide.
KIND = ("--kind", "shared", "--rank", "2", "--beta", "0.1", "--positions", "completion")
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)
# The launcher, and the share of the model that each of two processes holds.
CASES = [
    pytest.param("fsdp2", 0.5, id="fsdp2"),
    pytest.param("deepspeed-zero2", 1.0, id="zero2", marks=deepspeed),
    pytest.param("deepspeed-zero3", 0.5, id="zero3", marks=deepspeed),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture
def base(
    place: Path, build_tiny: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    settings = {"learning_rate": "2e-2", "max_steps": STEPS, "eval_data": "none"}
    return run_folder(place, build_tiny, tiny_tokenizer, 6, **settings)


def train(
    base: Path,
    folder: Path,
    config: str | None,
    *changes: str,
    processes: int = 2,
    device: str = "cpu",
    recipe: str = "grpo_steer",
) -> str:
    """The recipe in one process, or in `processes` of the launcher `config`; what the processes said."""
    script = ROOT / "recipes" / f"{recipe}.py"
    words = ["--config", str(base / "config.yaml"), "--output_dir", str(folder), *changes]
    if config is None and device == "cpu":
        run_here(script, *words, "--use_cpu", "true")
        return ""
    words = [str(script), *words]
    if config is None:
        done = started([sys.executable, *words], base)
    else:
        launch = launcher(LAUNCHERS / f"{config}.yaml", "--num_processes", str(processes))
        launch += [str(ROOT / "tests" / "helpers" / "sharded_launch.py"), device]
        done = started([*launch, *words, "--per_device_train_batch_size", str(32 // processes)], base)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def sharded(base: Path, config: str) -> tuple[Path, str]:
    """The folder of a run in two processes of the launcher `config`, trained once, and what it said."""
    folder = base / config
    log = base / f"{config}.log"
    if not log.exists():
        log.write_text(train(base, folder, config, *KIND))
    return folder, log.read_text()


@pytest.mark.parametrize(("config", "share"), CASES)
def test_two_processes_become_what_one_becomes(base: Path, config: str, share: float) -> None:
    if not (base / "one").exists():
        train(base, base / "one", None, *KIND)
    folder, said = sharded(base, config)
    assert [f"process {i} holds {share:.2f} of the model" in said for i in (0, 1)] == [True, True]
    got, expected = artifact.read(folder / "vectors"), artifact.read(base / "one" / "vectors")
    assert all(tensor.norm() > 0 for tensor in expected.tensors.values())
    # the gradient is summed in another order; samples and rewards are the same ones
    assert far(got.tensors, expected.tensors) < 1e-4
    assert got.config.base_checksum == expected.config.base_checksum is not None
    results = [json.loads((f / "results.json").read_text()) for f in (folder, base / "one")]
    assert results[0]["trained_numbers"] == results[1]["trained_numbers"] == 2 * 32 + 3 * 2


@pytest.mark.parametrize(("config", "share"), CASES)
def test_a_checkpoint_holds_no_base_and_the_run_goes_on_from_it(
    base: Path, config: str, share: float, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(sharded(base, config)[0], folder)
    whole = artifact.read(folder / "vectors").tensors
    left = folder / f"checkpoint-{STEPS - 2}"
    weights = load_file(base / "model" / "model.safetensors")["model.embed_tokens.weight"]
    first = weights[0].numpy().tobytes()
    assert first in (base / "model" / "model.safetensors").read_bytes()
    assert not [p for p in left.rglob("*") if p.is_file() and first in p.read_bytes()], "the base's weights"
    for name in (f"checkpoint-{STEPS}", "vectors"):
        shutil.rmtree(folder / name)
    (folder / "results.json").unlink()
    said = train(base, folder, config, *KIND)
    assert f"going on from {left}" in said
    assert same(artifact.read(folder / "vectors").tensors, whole)


@pytest.mark.slow
def test_a_full_fine_tune_in_shards_is_saved_and_goes_on(base: Path, tmp_path: Path) -> None:
    folder, rate = tmp_path / "full", ("--method", "full", "--learning_rate", "1e-3")
    said = train(base, folder, "fsdp2", *rate, recipe="grpo_baseline")
    assert [f"process {i} holds 0.50 of the model" in said for i in (0, 1)] == [True, True]
    whole, before = (load_file(f / "model" / "model.safetensors") for f in (folder, base))
    assert far(whole, before) > 1e-4, "nothing was trained"
    for name in (f"checkpoint-{STEPS}", "model"):
        shutil.rmtree(folder / name)
    (folder / "results.json").unlink()
    said = train(base, folder, "fsdp2", *rate, recipe="grpo_baseline")
    assert f"going on from {folder / f'checkpoint-{STEPS - 2}'}" in said
    assert far(load_file(folder / "model" / "model.safetensors"), whole) < 1e-6


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    "config", [pytest.param(case.values[0], id=case.id, marks=case.marks) for case in CASES]
)
def test_a_sharded_model_on_one_gpu(base: Path, config: str) -> None:
    """A reference policy and vectors that share directions, under the launcher and without it."""
    kind = ("--kind", "shared", "--rank", "2", "--beta", "0.1")
    if not (base / "alone").exists():
        train(base, base / "alone", None, *kind, device=DEVICE)
    said = train(base, base / f"{config}-1", config, *kind, processes=1, device=DEVICE)
    held_as = "DTensor" if config == "fsdp2" else "Parameter"
    assert f", as {held_as} on {DEVICE}" in said
    got, expected = artifact.read(base / f"{config}-1" / "vectors"), artifact.read(base / "alone" / "vectors")
    assert all(tensor.norm() > 0 for tensor in expected.tensors.values())
    assert far(got.tensors, expected.tensors) < 1e-3

"""Two runs of one seed on a CPU give the same vectors bit for bit, killed and resumed or not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.launching import LAUNCHERS, ROOT, environment, launcher
from transformers import DynamicCache

from steer.generation import caches

KILLS = 10


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_gradient_of_repeated_prompts_is_the_same_each_time(two_threads) -> None:
    """Rows that several completions share, in groups of unequal size, so that threads meet in one row."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 15, 3, 40, 64)
    rows = torch.randint(0, 15, (123,))
    weights = torch.randn(2, 123, 3, 40, 64)
    expected = [torch.zeros_like(keys, dtype=torch.float64).index_add_(0, rows, w.double()) for w in weights]

    first: list[torch.Tensor] | None = None
    for _ in range(20):
        leaves = [keys.clone().requires_grad_(), values.clone().requires_grad_()]
        cache = DynamicCache()
        cache.update(*leaves, 0)
        layer = caches.select(cache, rows).layers[0]
        torch.autograd.backward([layer.keys, layer.values], list(weights))
        gradients = [leaf.grad for leaf in leaves]
        first = first or gradients
        for gradient, same, right in zip(gradients, first, expected, strict=True):
            assert torch.equal(gradient, same)
            torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)  # float32 sums


def config(folder: Path) -> Path:
    """The demo at an eighth of its size, on the real small model: six updates, each with a checkpoint."""
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "demo.yaml").read_text())
    smaller = {"per_device_train_batch_size": 24, "max_steps": 6, "save_steps": 1, "eval_data": "none"}
    path = folder / "config.yaml"
    # groups of six: a thread's half of the rows ends within a group
    path.write_text(yaml.safe_dump({**settings, **smaller, "num_generations": 6, "learning_rate": 3e-2}))
    return path


def run(folder: Path, name: str, seconds: float | None = None) -> bool:
    """Train into `folder/name`, killed with SIGKILL after `seconds`; whether it came to its end."""
    command = launcher(LAUNCHERS / "cpu.yaml", "--num_cpu_threads_per_process", "2")
    command += [str(ROOT / "recipes" / "grpo_steer.py"), "--config", str(folder / "config.yaml")]
    command += ["--output_dir", str(folder / name)]
    env = {**environment(), "OMP_NUM_THREADS": "2"}
    with (folder / f"{name}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    assert process.returncode == 0, (folder / f"{name}.log").read_text()[-3000:]
    return True


def vectors(folder: Path) -> bytes:
    return (folder / "vectors" / "steering.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.real
def test_one_seed_gives_the_same_vectors_however_often_it_is_killed(tmp_path: Path) -> None:
    config(tmp_path)
    began = time.monotonic()
    run(tmp_path, "first")
    whole = time.monotonic() - began
    run(tmp_path, "second")
    expected = vectors(tmp_path / "first")
    assert vectors(tmp_path / "second") == expected

    moments = random.Random(0)
    kills, names = 0, ["killed-0"]
    while kills < KILLS:
        if run(tmp_path, names[-1], moments.uniform(0.2, 1.0) * whole):
            names.append(f"killed-{len(names)}")
        else:
            kills += 1
    run(tmp_path, names[-1])
    assert all(vectors(tmp_path / name) == expected for name in names)

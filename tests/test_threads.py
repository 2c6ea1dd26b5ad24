"""Every program of the package chooses how OpenMP's threads wait before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from steer import threads
from steer.threads import PASSIVE, busy_cpus, passive_waiting

PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("recipes", "evals")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text() and path.name != "export_readers.py"  # it runs without steer
)
# Runs a program up to its first import of torch and prints what OpenMP would read; BUSY_CPUS is the load.
WATCH = """
import os, runpy, sys
import steer.threads

steer.threads.busy_cpus = lambda: float(os.environ["BUSY_CPUS"])

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
kind, name, *sys.argv[1:] = sys.argv[1:]
(runpy.run_path if kind == "path" else runpy.run_module)(name, run_name="__main__")
"""


def watch(*arguments: str, **environment: str) -> str:
    known = {name: value for name, value in os.environ.items() if name not in PASSIVE}
    command = [sys.executable, "-c", WATCH, *arguments]
    env = {**known, "PYTHONPATH": str(ROOT), "BUSY_CPUS": "1.0", **environment}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_wait_passively(program: str) -> None:
    in_evals = program.startswith("evals")  # these are run as `python -m`
    name = program.removesuffix(".py").replace("/", ".") if in_evals else program
    seen = watch("module" if in_evals else "path", name, "--help")
    assert seen == "torch passive 0\n" or seen.startswith("usage:")  # the second: it loads no torch for that


@pytest.mark.parametrize("program", [("path", "recipes/grpo_steer.py"), ("module", "evals.sae")])
def test_programs_that_load_torch_first(program: tuple[str, str]) -> None:
    assert watch(*program, "--help") == "torch passive 0\n"


def test_command_line() -> None:
    assert watch("module", "steer.cli", "sae", "info", "nothing") == "torch passive 0\n"


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000")])
def test_what_the_user_set_stays(name: str, value: str) -> None:
    assert passive_waiting({name: value}) == {}
    active, spin = (value, None) if name == "OMP_WAIT_POLICY" else (None, value)
    seen = watch("path", "recipes/grpo_steer.py", "--help", **{name: value})
    assert seen == f"torch {active} {spin}\n"


def test_spins_on_idle_cpus() -> None:
    assert watch("path", "recipes/grpo_steer.py", "--help", BUSY_CPUS="0.05") == "torch None None\n"


@pytest.mark.parametrize("busy", [0.5, 2.0, float("inf")])
def test_sleeps_beside_other_work(monkeypatch: pytest.MonkeyPatch, busy: float) -> None:
    monkeypatch.setattr(threads, "busy_cpus", lambda: busy)
    assert passive_waiting({"PATH": "/bin"}) == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def readings(monkeypatch: pytest.MonkeyPatch, *texts: str) -> float:
    """What `busy_cpus` says of CPUs 0 and 2 when /proc/stat reads `texts` one after the other."""
    answers = iter(texts)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(threads.Path, "read_text", lambda _: next(answers))
    return busy_cpus(0.0)


def test_busy_cpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [
        "cpu 9 9 9 9",
        "cpu0 5 0 1 100 2 0 0 0 7 0",
        "cpu1 0 0 0 0 0 0 0 0 0 0",
        "cpu2 1 1 1 1 1 1 1 1 0 0",
    ]
    # CPU 0: four of ten ticks idle or waiting for a disk; CPU 2: all ten stolen by another guest
    after = [
        "cpu 9 9 9 9",
        "cpu0 9 1 2 103 3 0 0 0 9 0",
        "cpu1 99 0 0 0 0 0 0 0 0 0",
        "cpu2 1 1 1 1 1 1 1 11 0 0",
    ]
    assert readings(monkeypatch, "\n".join(before), "\n".join(after)) == pytest.approx(0.6 + 1.0)


@pytest.mark.parametrize("text", ["", "cpu0 0 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0 0 0"])
def test_counters_that_say_nothing(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert readings(monkeypatch, text, text) == float("inf")

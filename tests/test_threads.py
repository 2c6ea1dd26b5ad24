"""Every program of the package asks for passive waiting before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer.threads import PASSIVE, passive_waiting

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("recipes", "evals")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)
# Runs a program up to its first import of torch and prints what OpenMP would read then.
WATCH = """
import os, runpy, sys

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
    env = {**known, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_wait_passively(program: str) -> None:
    in_evals = program.startswith("evals")  # these are run as `python -m`
    name = program.removesuffix(".py").replace("/", ".") if in_evals else program
    seen = watch("module" if in_evals else "path", name, "--help")
    assert seen == "torch passive 0\n" or seen.startswith("usage:")  # the second: it loads no torch for that


@pytest.mark.parametrize("program", ["recipes/grpo_steer.py", "evals/sae.py", "evals/transfer.py"])
def test_scripts_that_load_torch_first(program: str) -> None:
    assert watch("path", program, "--help") == "torch passive 0\n"


def test_command_line() -> None:
    assert watch("module", "steer.cli", "sae", "info", "nothing") == "torch passive 0\n"


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000")])
def test_what_the_user_set_stays(name: str, value: str) -> None:
    assert passive_waiting({name: value}) == {}
    active, spin = (value, None) if name == "OMP_WAIT_POLICY" else (None, value)
    seen = watch("path", "recipes/grpo_steer.py", "--help", **{name: value})
    assert seen == f"torch {active} {spin}\n"


def test_the_default() -> None:
    assert passive_waiting({"PATH": "/bin"}) == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

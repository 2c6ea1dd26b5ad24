"""`evals.gpu_check`: a dry run of every part, and parts that fail, hang or lack a package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

from evals import step_timing
from evals.gpu_check import __main__ as check
from evals.gpu_check import speed, wheels
from evals.gpu_check.parts import FULL, OFFLINE, Part
from evals.gpu_check.table import markdown

QUICK = ["speed-0.5B-trl-lora"]
SLOW = [
    part.name for part in FULL if part.name not in (*QUICK, "sae-kernel", "vllm", "deepspeed", "gsm8k-1.5B")
]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", *words])
    monkeypatch.setattr(check, "install", lambda: None)  # wheels that lie in the checkout
    check.main()


def dry_run(monkeypatch: pytest.MonkeyPatch, out: Path, parts: list[str], level: str = "offline") -> Any:
    run(monkeypatch, level, "--dry-run", "--out", str(out), "--only", *parts)
    record = json.loads((out / f"{level}.json").read_text())
    for name in parts:
        part = record["parts"][name]
        assert part["status"] in ("done", "skipped"), part
        if part["status"] == "skipped":
            assert part["why"].startswith("not installed: ")
    return record


def stub(name: str, code: str, seconds: int = 60, needs: tuple[str, ...] = ()) -> Part:
    """A part that runs `code`."""

    class Stub(Part):
        def command(self, dry_run: bool) -> list[str]:
            return [sys.executable, "-c", code]

    return Stub(name, name, (), (), seconds, needs)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is not asked: that takes an import of torch in a process of its own."""
    where = {"gpu": None, "processor": "a CPU", "python": "3", "versions": {}}
    monkeypatch.setattr(check, "machine", lambda env: where)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match=r"^error: no GPU is there .*--dry-run"):
        run(monkeypatch, "offline", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_of_one_part_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = dry_run(monkeypatch, tmp_path, QUICK)
    result = record["parts"][QUICK[0]]["result"]
    assert result["step s"] > result["update s"] > 0 and result["rollout s"] > 0
    assert "| 2 x 2 x 6 |" in (tmp_path / "offline.md").read_text()
    assert record["machine"]["gpu"] is None and record["machine"]["versions"]["torch"]
    capsys.readouterr()
    assert dry_run(monkeypatch, tmp_path, QUICK) == record
    assert f"{QUICK[0]}: done before" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_dry_run_of_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    part = dry_run(monkeypatch, tmp_path, [name])["parts"][name]
    assert part["status"] == "done" and part["result"]


@pytest.mark.slow
def test_a_dry_run_of_what_needs_other_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["sae-kernel", "vllm", "deepspeed"]
    dry_run(monkeypatch, tmp_path, names, "full")


@pytest.mark.slow
def test_a_dry_run_of_the_run_on_gsm8k(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the package that its part needs, which a dry run of it does not use."""
    from evals.gpu_check import training

    monkeypatch.setattr(sys, "argv", ["training", "--dry-run"])
    training.main()
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(found["updates"]) == 2 and found["seconds an update"] > 0
    assert {"accuracy", "low", "high"} <= set(found["after"])


def test_parts_that_fail_hang_or_say_nothing(
    monkeypatch: pytest.MonkeyPatch, no_torch: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (
        stub("good", "print('{\"a\": 1}')"),
        stub("bad", "import sys; print('a reason'); sys.exit(3)"),
        stub("silent", "print('no JSON')"),
        stub("endless", "import time; print('begun', flush=True); time.sleep(60)", seconds=2),
        stub("missing", "", needs=("no_such_module",)),
        stub("late", "", seconds=100_000),
    )
    monkeypatch.setattr(check, "OFFLINE", parts)
    monkeypatch.setattr(check, "DRY_PATIENCE", 1)
    with pytest.raises(SystemExit, match=r"^error: bad, silent, endless: see `output`"):
        run(monkeypatch, "offline", "--dry-run", "--out", str(tmp_path))
    found = json.loads((tmp_path / "offline.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "good": "done",
        "bad": "failed",
        "silent": "failed",
        "endless": "too slow",
        "missing": "skipped",
        "late": "skipped",
    }
    assert found["good"]["result"] == {"a": 1} and "output" not in found["good"]
    assert found["bad"]["why"] == "exit code 3" and found["bad"]["output"] == "a reason\n"
    assert found["endless"]["output"] == "begun\n" and found["endless"]["seconds"] < 30
    assert found["missing"]["why"] == "not installed: no_such_module"
    assert "s are left, it may take 100000" in found["late"]["why"]
    said = capsys.readouterr().out
    assert all(f"{name}: {part['status']}" in said for name, part in found.items())


def test_a_last_line_that_only_begins_as_json(
    monkeypatch: pytest.MonkeyPatch, no_torch: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "OFFLINE", (stub("cut", "print('{cut off')"), stub("good", "print('{}')")))
    with pytest.raises(SystemExit, match=r"^error: cut: see `output`"):
        run(monkeypatch, "offline", "--dry-run", "--out", str(tmp_path))
    found = json.loads((tmp_path / "offline.json").read_text())["parts"]
    assert found["cut"]["why"] == "no result in its last line" and found["good"]["status"] == "done"


def test_a_failure_is_not_forgotten_where_no_time_is_left(
    monkeypatch: pytest.MonkeyPatch, no_torch: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "OFFLINE", (stub("bad", "import sys; sys.exit(3)"),))
    for more in ([], ["--minutes", "0.001"]):
        with pytest.raises(SystemExit, match=r"^error: bad: see `output`"):
            run(monkeypatch, "offline", "--dry-run", "--out", str(tmp_path), *more)
    assert "bad: skipped: 0 s are left" in capsys.readouterr().out
    found = json.loads((tmp_path / "offline.json").read_text())["parts"]["bad"]
    assert (found["status"], found["why"]) == ("failed", "exit code 3")


def test_a_part_ends_with_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    communicate = subprocess.Popen.communicate

    def stopped(process: Any, *args: Any, **kwargs: Any) -> Any:
        if begun:
            return communicate(process, *args, **kwargs)
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", stopped)
    with pytest.raises(KeyboardInterrupt):
        check.run(stub("endless", "import time; time.sleep(60)"), False, 60.0, dict(os.environ))
    assert begun[0].returncode == -signal.SIGTERM


def test_a_head_that_is_left_out_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is tried for the trainer alone, and on the CPU it is always right."""
    monkeypatch.setattr("steer.generation.trial.Trial._head", lambda trial: "a reason")
    monkeypatch.setattr(step_timing, "matmul_peak", lambda *args: 1.0)
    words = ["--prompts", "2", "--samples", "2", "--tokens", "2", "--rows", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["speed", "tiny", "steer", *words])
    speed.main()
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["plain paths"]["head"] == "a reason" and found["step s"] > 0
    machine = {"gpu": "A GPU", "python": "3.12", "versions": {}}
    parts = {"speed-tiny": {"status": "done", "seconds": 1.0, "result": found}}
    text = markdown({"dry_run": False, "machine": machine, "parts": parts})
    assert text.endswith("\n- speed-tiny: plain path `head`: a reason")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_single_update_is_measured_warm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    seen: list[tuple[Any, int, int]] = []

    def measured(method: str, model: Any, tokenizer: Any, texts: list[str], steps: int, batch: Any) -> dict:
        assert len(texts) == batch.prompts * steps
        seen.append((model, batch.tokens, steps))
        return {}

    monkeypatch.setattr(speed, "measured", measured)
    words = ["--prompts", "2", "--samples", "2", "--tokens", "40", "--rows", "2", "--steps", str(steps)]
    monkeypatch.setattr(sys, "argv", ["speed", "tiny", "trl-full", *words])
    speed.main()
    assert [row[1:] for row in seen] == [(speed.WARM, 1)] * (steps == 1) + [(40, steps)]
    assert len({id(model) for model, *_ in seen}) == len(seen)


def test_tests_are_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In spite of the -q that pyproject.toml has for the tests of this repository."""
    from evals.gpu_check import tests

    given: list[list[str]] = []

    def main(words: list[str], plugins: list[Any]) -> int:
        given.append(words)
        return 0

    monkeypatch.setattr(pytest, "main", main)
    monkeypatch.setattr(sys, "argv", ["tests", "-m", "gpu"])
    with pytest.raises(SystemExit):
        tests.main()
    assert {"-vv", "--durations=10"} <= set(given[0]) and given[0][-2:] == ["-m", "gpu"]


def test_results_of_another_machine_are_kept(
    monkeypatch: pytest.MonkeyPatch, no_torch: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "OFFLINE", (stub("good", "print('{}')"),))
    run(monkeypatch, "offline", "--dry-run", "--out", str(tmp_path))
    file = tmp_path / "offline.json"
    record = json.loads(file.read_text())
    record["machine"]["gpu"] = "another"
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="another machine"):
        run(monkeypatch, "offline", "--dry-run", "--out", str(tmp_path))
    assert json.loads(file.read_text()) == record


def test_parts_have_names_of_their_own_and_fit_the_time() -> None:
    names = [part.name for part in FULL]
    assert len(set(names)) == len(names) and set(OFFLINE) < set(FULL)
    assert OFFLINE[0].seconds < 60 * check.MINUTES["offline"]
    for part in FULL:
        for dry in (False, True):
            module = part.command(dry)[2].rpartition(".")[2]
            assert (ROOT / "evals" / "gpu_check" / f"{module}.py").is_file()
            paths = [word for word in part.command(dry)[3:] if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths)


def test_the_table_has_every_part() -> None:
    record = {
        "dry_run": False,
        "machine": {"gpu": "A GPU", "python": "3.12", "versions": {"torch": "2"}},
        "parts": {
            "tests": {
                "status": "failed",
                "seconds": 3.0,
                "why": "exit code 1",
                "result": {"passed": 2, "failed": {"a": "b"}},
            },
            "late": {"status": "skipped", "why": "no time"},
        },
    }
    text = markdown(record)
    assert text.startswith("A GPU, Python 3.12, torch 2.")
    assert "| tests | failed | 3.0 | exit code 1; 2 passed, 1 failed |" in text
    assert "| late | skipped |  | no time |" in text


def test_wheels_are_of_the_versions_that_are_tested_together() -> None:
    """Those that pip would choose with .ci/constraints.txt."""
    pins = dict(line.split("==") for line in _lines(wheels.LIST))
    constraints = {k.lower(): v for k, v in (x.split("==") for x in _lines(ROOT / ".ci" / "constraints.txt"))}
    both = {name: (pin, constraints[name]) for name, pin in pins.items() if name in constraints}
    assert {"trl", "peft", "datasets", "math-verify"} <= set(both)
    assert all(pin == constraint for pin, constraint in both.values()), both
    assert 1 < wheels.tree_mib() < 30


def test_a_limit_of_what_can_be_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(command: list[str], check: bool) -> None:
        assert "pandas==3.1.1" in command and "--limit-mib" not in command
        (tmp_path / "pandas.whl").write_bytes(bytes(2 * 2**20))

    monkeypatch.setattr(wheels, "WHEELS", tmp_path)
    monkeypatch.setattr(wheels, "tree_mib", lambda: 6.0)
    monkeypatch.setattr(wheels.subprocess, "run", download)
    for limit in ([], ["--limit-mib", "9"]):
        monkeypatch.setattr(sys, "argv", ["wheels", "pandas==3.1.1", *limit])
        wheels.main()
        assert "8.00 MiB  with the 6.00 of the repository" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["wheels", "pandas==3.1.1", "--limit-mib", "7"])
    with pytest.raises(SystemExit, match=r"8\.0 MiB are more than --limit-mib 7"):
        wheels.main()


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]

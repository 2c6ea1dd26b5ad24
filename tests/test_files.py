"""Folders that one process at a time writes to, and files of JSON lines."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steer.errors import SteerError
from steer.files import HOLDER_FILE, held, json_lines

HOLD = """
import sys
from steer.files import held
with held(sys.argv[1], "--out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds `folder` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_process_and_free_when_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "a new" / "folder"
    process = holder(folder)
    try:
        with pytest.raises(SteerError) as caught, held(folder, "--out"):
            pass
    finally:
        process.communicate(timeout=60)
    assert f"{folder} is in use: process {process.pid} on {platform.node()} writes to it" in str(caught.value)
    assert "give another --out" in str(caught.value) and "\n" not in str(caught.value)
    with held(folder, "--out"):
        assert (folder / HOLDER_FILE).read_text() == f"process {os.getpid()} on {platform.node()}"
    assert not (folder / HOLDER_FILE).exists()


def test_the_hold_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / HOLDER_FILE).read_text().startswith(f"process {process.pid} ")
    with held(tmp_path, "--out"):
        pass


def test_the_hold_ends_with_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path, "--out"):
        raise ZeroDivisionError
    with held(tmp_path, "--out"):
        pass


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SteerError, match=r"cannot write to .*file: .*; give another --out"),
        held(tmp_path / "file", "--out"),
    ):
        pass


def test_json_lines_are_read_one_by_one_and_name_the_wrong_one(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": "2024-05-01"}\n{"a": 070}\n{"a": 2}', encoding="utf-8")
    lines = json_lines(path)
    assert [next(lines), next(lines), next(lines)] == [{"a": 1}, None, {"a": "2024-05-01"}]
    with pytest.raises(SteerError, match=r"some\.jsonl, line 4 is not JSON"):
        next(lines)
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": 1}\n"\xff"\n')
    with pytest.raises(SteerError, match=r"cannot read '.*latin\.jsonl'"):
        list(json_lines(tmp_path / "latin.jsonl"))

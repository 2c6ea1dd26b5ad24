"""Freed memory is kept and returned, with glibc and with tcmalloc in its place, and the log says which."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch

from steer.generation import allocator, cpu
from steer.training.memory import total_memory

TCMALLOC = find_library("tcmalloc_minimal") or find_library("tcmalloc")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept_and_returned() -> None:
    tensors = [torch.ones(2_000_000) for _ in range(25)]  # 200 MB
    full = resident()
    del tensors
    kept = resident()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with patch.object(allocator, "machine_memory", lambda: 1.1 * kept / allocator.KEPT):
        allocator.limit_kept_memory(cpu)
    assert full - resident() < 50e6, "it is not much yet"
    with patch.object(allocator, "machine_memory", lambda: 0.9 * kept / allocator.KEPT):
        allocator.limit_kept_memory(gpu)
        assert full - resident() < 50e6, "what is allocated here is not the GPU's"
        allocator.limit_kept_memory(cpu)
    assert kept - resident() > 150e6


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or bool(os.environ.get("LD_PRELOAD")), reason="another allocator"
)
def test_glibc_keeps_freed_memory_and_returns_it() -> None:
    assert allocator.is_glibc() and allocator.keep_freed_memory()
    kept_and_returned()


@pytest.mark.skipif(TCMALLOC is None, reason="tcmalloc is not installed")
def test_so_does_tcmalloc() -> None:
    code = (
        "from steer.generation import allocator; import test_allocator as t;"
        "assert not allocator.is_glibc() and not allocator.keep_freed_memory(); t.kept_and_returned()"
    )
    environment = os.environ | {"LD_PRELOAD": str(TCMALLOC)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent)


@pytest.mark.parametrize("glibc", [True, False])
def test_the_log_says_what_was_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, glibc: bool
) -> None:
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: glibc)
    monkeypatch.setattr(cpu, "compat", MagicMock())
    with caplog.at_level(logging.INFO):
        cpu.prepare()
    assert ("glibc keeps freed memory" in caplog.text) is glibc
    assert ("the allocator is not glibc's" in caplog.text) is not glibc


def test_no_glibc_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str | None) -> None:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(allocator.ctypes, "CDLL", no_library)
    assert not allocator.is_glibc() and not allocator.keep_freed_memory()


def test_the_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(allocator, "_LIMITS", (str(tmp_path / "missing"), str(tmp_path / "none")))
    assert allocator.machine_memory() > 1e8
    monkeypatch.setattr(allocator, "_LIMITS", (str(tmp_path / "limit"),))
    assert allocator.machine_memory() == total_memory(torch.device("cpu")) == 1e6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert allocator.machine_memory() == 250_000
    assert total_memory(torch.device("meta")) == float("inf")

"""`evals.contention`: its neighbours keep CPUs busy and end with the measurement."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from evals import contention


def test_neighbours_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args: started.append(start(*args)) or started[-1])
    with pytest.raises(ValueError, match="measurement"), contention.neighbours(2):
        assert [process.poll() for process in started] == [None, None]
        raise ValueError("measurement")
    assert all(process.poll() is not None for process in started)

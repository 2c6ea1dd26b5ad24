"""What a population is refused before anything is made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.steering import message
from helpers.training import config

from steer import SteerError
from steer.training.sweep import run


class Passed(Exception):
    """The members were taken."""


@pytest.mark.parametrize(
    ("device", "processes", "use_vllm", "refused"),
    [
        ("cuda:1", 2, True, True),
        ("cuda:0", 1, True, False),
        ("cuda:1", 2, False, False),
        ("cpu", 2, True, False),
    ],
)
def test_one_engine_on_a_gpu_is_for_one_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    processes: int,
    use_vllm: bool,
    refused: bool,
) -> None:
    class Study:
        folder = tmp_path

        @property
        def asked(self) -> Any:
            raise Passed  # the check of processes is before it

    state = SimpleNamespace(num_processes=processes, process_index=0, device=torch.device(device))
    monkeypatch.setattr(run, "PartialState", lambda: state)
    members: Any = [SimpleNamespace(training=config(tmp_path, use_vllm=use_vllm)) for _ in range(2)]
    with pytest.raises(SteerError if refused else Passed) as error:
        run.train_members(Study(), members)  # type: ignore[arg-type]
    if refused:
        assert "use_vllm=true in 2 processes" in message(error)

"""How the engine of a population is started; vLLM itself is stood in for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.training import config

from steer.engine import sweep_sampler
from steer.engine.compat import CHECKED

WHOLE = {"enable_chunked_prefill": False}


@pytest.mark.parametrize(
    ("on_cpu", "length", "expected"),
    [
        (True, 64, {**WHOLE, "max_num_batched_tokens": 4096}),
        (True, 5000, {**WHOLE, "max_num_batched_tokens": 5000}),
        (True, None, WHOLE),
        (False, 5000, {}),
    ],
)
def test_on_a_cpu_prompts_are_read_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: bool,
    length: int | None,
    expected: dict[str, Any],
) -> None:
    """More prompt tokens than a pass takes would be read in pieces, which fails for requests with seeds."""
    started: dict[str, Any] = {}
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.LLM = lambda **settings: started.update(settings)  # type: ignore[attr-defined]
    vllm.__version__ = f"{CHECKED}.0"  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: on_cpu)  # type: ignore[attr-defined]
    args = config(tmp_path, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=length)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(sweep_sampler, "require", lambda purpose, extra: None)
    sweep_sampler.EngineSampler("org/model", args, torch.float32, 2, [2])
    assert started["max_model_len"] == length
    chosen = ("enable_chunked_prefill", "max_num_batched_tokens")
    assert {name: started[name] for name in chosen if name in started} == expected

"""How the engine of an evaluation is started; vLLM itself is stood in for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from steer.evaluation.engines import VllmEngine


@pytest.mark.parametrize(("given", "expected"), [(None, True), (False, False), (True, True)])
def test_engine_args_decide_whether_vllm_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: bool | None, expected: bool
) -> None:
    started: dict[str, Any] = {}
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.LLM = lambda **settings: started.update(settings)  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    asked = {} if given is None else {"enforce_eager": given}
    with caplog.at_level("INFO", "steer"):
        VllmEngine("model", None, "float32", 64, [], asked, tokens=10)
    assert started["enforce_eager"] is expected
    assert ("starts without compiling" in caplog.text) == (given is None)

"""Whether an engine compiles: as asked, else by the number of tokens that it will sample."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.training import config

from steer.engine.eager import COMPILING_PAYS, enforce_eager, say_whether_it_pays

platforms = pytest.importorskip("vllm.platforms", reason="vLLM is not installed")


def test_short_work_on_a_cpu_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_cpu in (True, False):
        monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda self, on_cpu=on_cpu: on_cpu)
        assert enforce_eager(COMPILING_PAYS - 1) is on_cpu
        assert enforce_eager(COMPILING_PAYS) is enforce_eager(None) is False
        for asked in (True, False):
            assert enforce_eager(1, asked) is enforce_eager(10**9, asked) is asked


def test_a_run_for_which_an_engine_does_not_pay_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="steer")
    silent = [(False, 1000, 64, True), (True, None, 64, True), (True, 1000, 257, True)]
    silent += [(True, 60_000, 256, True), (True, 200_000, 256, False)]
    for on_cpu, tokens, length, eager in silent:
        monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda self, on_cpu=on_cpu: on_cpu)
        say_whether_it_pays(tokens, length, eager)
    assert not caplog.messages
    say_whether_it_pays(100_000, 16, True)
    say_whether_it_pays(100_000, 64, False)
    say_whether_it_pays(20_000, 256, True)
    eager_short, compiled, eager_long = caplog.messages
    assert "at most 16: SmolLM2-135M with 64 rows takes about 89 s" in eager_short
    assert all("other models were not measured" in message for message in caplog.messages)
    assert "takes about 108 s" in compiled and "76 s of them to start" in compiled
    assert "takes about 4 s" in eager_long


def test_what_a_run_samples(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=5, max_completion_length=7, gradient_accumulation_steps=2)
    assert args.sampled_tokens() == 5 * args.per_device_train_batch_size * 2 * 7
    args.max_steps = -1  # num_train_epochs decides
    assert args.sampled_tokens() is None

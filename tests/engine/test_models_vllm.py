"""What `python -m evals.models_vllm` finds of models that vLLM serves, refuses and does not have."""

from __future__ import annotations

import os

import pytest

from evals.models_vllm import check_all
from evals.vllm_engine import ENVIRONMENT

pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")
# LFM2's queries are turned head by head, Mamba2 has no attention, DeepSeek's is latent.
FOUND = {
    "lfm2": "works",
    "mamba2": "works",
    "deepseek_v3": "works",
    "gemma3n_text": "refused",
    "codegen": "not run",
}


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        if name not in os.environ:
            monkeypatch.setenv(name, value)
    rows = dict(check_all(list(FOUND)))
    assert {name: row["state"] for name, row in rows.items()} == FOUND, rows
    assert all(row["steered"] < 1e-4 for row in rows.values() if row["state"] == "works")

"""What the plugin relies on in vLLM is as it was: a failure names what a release changed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import import_utils

from steer.compat import Api, changed
from steer.engine.compat import APIS, CHECKED, warn_version

vllm = pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_vllm_is_as_it_was(api: Api) -> None:
    assert changed(api) is None


def test_trl_warns_once_and_of_other_versions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import steer.training, trl.generation.vllm_generation"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TRL currently supports" not in done.stderr
    monkeypatch.setattr(import_utils, "_is_package_available", lambda *_, **__: (True, "0.99.0"))
    for version, warned in ((f"{CHECKED}.7", 0), ("0.99.0", 1)):
        monkeypatch.setattr(vllm, "__version__", version)
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("ignore", "TRL currently supports vLLM versions")
            warn_version()
        assert len(caught) == warned


def test_all_data_parallel_engines_are_heard() -> None:
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    from steer.engine import plugin

    plugin.register()

    class Client:
        async def call_utility_all_async(self, method: str, *args: Any) -> list[list[str]]:
            return [
                [f"{args[0]} in worker {worker} of engine {engine}" for worker in (0, 1)] for engine in (0, 1)
            ]

    def answers(method: str) -> list[str]:
        return asyncio.run(DPLBAsyncMPClient.call_utility_async(Client(), "collective_rpc", method))

    assert (
        len(answers("steer_push")) == 4 and answers("steer_push")[3] == "steer_push in worker 1 of engine 1"
    )
    assert len(answers("reset")) == 2  # vLLM's own way: those of the first engine


@pytest.mark.parametrize("is_neox_style", [True, False])
def test_heads_are_rotated_as_rows_are(is_neox_style: bool) -> None:
    from vllm import _custom_ops
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from steer.engine import plugin

    plugin.register()
    query, key, cache = torch.randn(5, 4 * 32), torch.randn(5, 2 * 32), torch.randn(64, 32)
    rotary = SimpleNamespace(
        head_size=32, is_neox_style=is_neox_style, _match_cos_sin_cache_dtype=lambda query: cache
    )

    def rotated(query: torch.Tensor, key: torch.Tensor | None) -> Any:
        return RotaryEmbedding.forward_cpu(rotary, torch.arange(5), query, key)

    rows = rotated(query.clone(), key.clone())
    heads = rotated(query.clone().view(5, 4, 32), key.clone().view(5, 2, 32))
    assert [tuple(part.shape) for part in heads] == [(5, 4, 32), (5, 2, 32)]
    assert all(torch.equal(a, b.flatten(1)) for a, b in zip(rows, heads, strict=True))
    parts = torch.cat([torch.zeros(5, 4, 16), query.view(5, 4, 32)], dim=-1)[..., 16:]
    assert torch.equal(rotated(parts, None)[0].flatten(1), rows[0])
    # where this fails, the kernel is right and `rotate_heads_on_cpus` can go
    plain = query.clone().view(5, 4, 32)
    _custom_ops.rotary_embedding(torch.arange(5), plain, key.clone().view(5, 2, 32), 32, cache, is_neox_style)
    assert not torch.equal(plain.flatten(1), rows[0])

"""The workers of an engine without vLLM: what `steer.engine.client` talks to, with faults to order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from steer.engine import plugin
from steer.engine.bank import Bank

WIDTH, DEPTH, TOKENS = 6, 3, 64


class Block(nn.Module):
    """A decoder layer of vLLM's kind: it returns what it adds, and the stream it is added to."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:
        return hidden, "residual"


def vectors(seed: int, layers: Any = range(DEPTH)) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(WIDTH, generator=generator) for layer in layers}


class Engine:
    """Two workers that hold half of the layers each (`stages`), or all, called as vLLM does it."""

    def __init__(self, stages: Any = ([0], [1, 2]), width: int = WIDTH) -> None:
        self.stages = [
            Bank({i: Block() for i in layers}, DEPTH, width, 4, TOKENS, "cpu") for layers in stages
        ]
        self.blind: list[int] = []  # workers that pushes do not reach
        self.busy: list[int] = []  # workers of engines that still use what is to be removed

    def collective_rpc(self, method: str, args: tuple = ()) -> list[dict[str, Any]]:
        config = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode="raw_logprobs"))
        workers = [
            SimpleNamespace(steering=stage, steering_error=None, vllm_config=config) for stage in self.stages
        ]
        blind = self.blind if method == "steer_push" else []
        busy = self.busy if method in ("steer_remove", "steer_unused") else []
        return [
            {"error": f"{args[0]!r} is used"}
            if number in busy
            else plugin.steer_held(worker, args[0])
            if number in blind
            else getattr(plugin, method)(worker, *args)
            for number, worker in enumerate(workers)
        ]

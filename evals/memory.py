"""
What one update keeps for its backward pass, by kind, on a model with random weights.

    python -m evals.memory 0.5B --depth 2 --rows 16 --tokens 320      # two of its layers: bytes per layer
    python -m evals.memory 135M --prompts 1 --samples 64 --rows 32 --tokens 320 --json

Completions are random tokens, so that nothing is sampled. Tensors that autograd saves are counted once for
each storage; weights are left out. The rest of the peak is what runs at the time, and the allocator's.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from trl import GRPOTrainer

from evals.gpu_check.speed import METHODS, SHAPES, prompts, random_model, words
from evals.step_timing import Batch, measured
from steer.hooks import hooked

MB = 1e6


class Saved:
    """The bytes that autograd saves inside `watching`, by the module that saves them and by kind."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = {module: re.sub(r"\.\d+", ".*", name) for name, module in model.named_modules()}
        self.running: list[str] = []
        self.bytes: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a forward pass of the model is counted. `bytes` has the largest of several."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found: dict[str, int] = defaultdict(int)
        held: dict[int, torch.Tensor] = {}  # so that no address is given to another tensor

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and storage.data_ptr() not in held:
                found[self.kind(tensor)] += storage.nbytes()
                held[storage.data_ptr()] = tensor.detach()
            return tensor.detach()

        handles = [m.register_forward_pre_hook(self._enter, prepend=True) for m in self.names]
        handles += [m.register_forward_hook(self._leave, always_call=True) for m in self.names]
        with hooked(*handles), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        if sum(found.values()) > sum(self.bytes.values()):
            self.bytes = dict(found)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(self.names[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def kind(self, tensor: torch.Tensor) -> str:
        """Where a tensor is saved; of attention also whether it grows with the square of the length."""
        place = self.running[-1] if self.running else "loss"
        if "attn" in place and "norm" not in place and tensor.dim() >= 4:
            size = self.model.config.hidden_size // self.model.config.num_attention_heads  # type: ignore
            if tensor.shape[-1] != size:
                place += " masks" if tensor.shape[1] == 1 else " scores"  # masks are one for all heads
        return place


def profile(shape: str, method: str, batch: Batch, dtype: str, depth: int | None, **options: Any) -> dict:
    """`measured` for one update, with the bytes that it saves by kind."""
    model = random_model(shape, method, dtype, depth)
    tokenizer = words(model.config.vocab_size)
    texts = prompts(batch.prompts, model.config.vocab_size)
    saved: Saved | None = None
    original = GRPOTrainer._compute_loss

    def watched(self: Any, policy: nn.Module, inputs: dict[str, Any]) -> Any:
        nonlocal saved
        saved = saved or Saved(self.model)
        with saved.watching():
            return original(self, policy, inputs)

    with patch.object(GRPOTrainer, "_compute_loss", watched):
        found: dict[str, Any] = measured(method, model, tokenizer, texts, 1, batch, rollout=False, **options)
    assert saved is not None
    return {**found, "saved MB": {name: size / MB for name, size in saved.bytes.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES, help="shape of the model")
    parser.add_argument("--method", choices=METHODS, default="steer", help="what is trained (default: steer)")
    parser.add_argument("--depth", type=int, help="layers (default: all of the shape)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of the update (default: 1)")
    parser.add_argument("--samples", type=int, default=16, help="samples of a prompt (default: 16)")
    parser.add_argument("--tokens", type=int, default=320, help="tokens of a sample (default: 320)")
    parser.add_argument("--rows", type=int, default=0, help="rows of one pass (default: all of the update)")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    args = parser.parse_args()
    batch = Batch(args.prompts, args.samples, args.tokens, args.rows)
    found = profile(args.shape, args.method, batch, args.dtype, args.depth)
    if args.json:
        print(json.dumps(found))
        return
    total = sum(found["saved MB"].values())
    print(f"update {found['update s']:.2f} s, peak {found['memory MB']:,.0f} MB beyond the base\n")
    print("| saved by | MB | share |\n|---|---|---|")
    for name, size in sorted(found["saved MB"].items(), key=lambda item: -item[1]):
        print(f"| {name} | {size:,.1f} | {size / total:.1%} |")
    print(f"| all | {total:,.1f} | |")


if __name__ == "__main__":
    main()

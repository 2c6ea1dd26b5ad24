"""
The Triton kernel of HierarchicalTopK against the same loss in PyTorch: values and gradients against float64
on the CPU, milliseconds of a forward and a backward pass, and the memory that they add at their peak. Without
a GPU it needs Triton's interpreter (TRITON_INTERPRET=1), and its times say nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from steer.sae import SAE, SAEConfig
from steer.sae.losses import hierarchical_loss
from steer.sae.model import Active
from steer.sae.sparse import Selection

ON_GPU = torch.cuda.is_available()
CHECKED = 256  # tokens of the comparison of values
TOLERANCE = 1e-4  # relative; float32 sums in another order give 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, required=True, help="hidden size")
    parser.add_argument("--features", type=int, required=True, help="of the dictionary")
    parser.add_argument("--tokens", type=int, required=True, help="of a batch")
    parser.add_argument("--k", type=int, nargs="+", required=True, help="active features of a token")
    parser.add_argument("--rounds", type=int, default=10, help="timed passes (default: %(default)s)")
    args = parser.parse_args()
    rows = [row(args, k) for k in args.k]
    wrong = [found["k"] for found in rows if not found["triton"]["relative_error"] < TOLERANCE]  # NaN too
    if wrong:
        print(f"error: the kernel is further than {TOLERANCE} from float64 at k = {wrong}")
    print(json.dumps({"settings": vars(args), "rows": rows}))
    sys.exit(bool(wrong))


def row(args: argparse.Namespace, k: int) -> dict[str, Any]:
    sae = SAE(SAEConfig(args.width, args.features, k)).to("cuda" if ON_GPU else "cpu")
    batch = torch.randn(args.tokens, args.width, device=sae.W_dec.device)
    checked = batch[:CHECKED]
    with torch.no_grad():
        active = sae.active(checked)
    # The same features are active on both sides: which of two equally strong ones is chosen does not matter.
    exact = copy.deepcopy(sae).double().cpu()
    where = Selection(active.indices.cpu(), args.features)
    expected = gradients(exact, checked.double().cpu(), Active(active.values.double().cpu(), where), "plain")
    found: dict[str, Any] = {"k": k}
    for name in ("plain", "chunked", "triton"):
        got = gradients(sae, checked, active, name)
        pairs = zip(got, expected, strict=True)
        worst = max(float((g.double().cpu() - e).norm() / e.norm()) for g, e in pairs)
        found[name] = {"relative_error": worst, **cost(sae, batch, name, args.rounds)}
    found["ratio_to_chunked"] = found["chunked"]["milliseconds"] / found["triton"]["milliseconds"]
    return found


def gradients(sae: SAE, batch: torch.Tensor, active: Active, implementation: str) -> list[torch.Tensor]:
    """The loss, and its gradients to the values of the active features, the decoder and its bias."""
    values = active.values.clone().requires_grad_()
    loss = hierarchical_loss(sae, batch, Active(values, active.where), None, implementation)
    return [loss.detach(), *torch.autograd.grad(loss, [values, sae.W_dec, sae.b_dec])]


def cost(sae: SAE, batch: torch.Tensor, implementation: str, rounds: int) -> dict[str, float]:
    with torch.no_grad():
        active = sae.active(batch)

    def passes() -> None:
        gradients(sae, batch, active, implementation)

    passes()  # compiles
    found = {"milliseconds": median_ms(passes, rounds)}
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes()
        found["added_MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return found


def median_ms(run: Callable[[], None], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        if ON_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


if __name__ == "__main__":
    main()

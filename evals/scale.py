"""
How large a run is, by calculation: memory of a GPU, bytes sent a step, tokens a second that a day allows.

    python -m evals.scale                        # the table of docs/distributed.md
    python -m evals.scale --gpus 1 16 --tokens 2000 --hours 48
    python -m evals.scale --check                # the same formulas against what is measured on this machine

One step is that of the published runs: 128 prompts x 16 samples (arXiv 2509.06608), 314 of them. The base is
frozen in bfloat16, so there are no gradients or optimizer states but those of the vectors, and the backward
pass computes gradients of activations alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from steer.compat import cache_in
from steer.training.estimate import STATE, Shape

PROMPTS, SAMPLES, STEPS = 128, 16, 314
GB = 1e9
# Of a GPU with 80 GB: what is left for a run after CUDA's context, buffers and fragmentation.
USABLE = 72 * GB

SMOLLM2 = Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True)
MODELS = {
    "1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, tied=True, qkv_bias=True),  # Qwen2.5-1.5B
    "7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),  # Qwen2.5-7B
    "14B": Shape(48, 5120, 13824, 40, 8, 128, 152064, qkv_bias=True),  # Qwen2.5-14B
    "70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),  # Llama-3.1-70B
}


def row(name: str, shape: Shape, gpus: int, tokens: int, hours: float) -> dict[str, Any]:
    """
    One model on `gpus` devices, completions of `tokens` on average, the published number of steps in `hours`.
    """
    weights = 2 * shape.parameters
    state = STATE * shape.vectors
    whole = weights + state < USABLE
    held = weights if whole else weights / gpus
    free = USABLE - held - state
    sampled = PROMPTS * SAMPLES * tokens
    seconds = hours * 3600 / STEPS
    # forward of the sampler, forward and backward of the update; two operations a number of a matrix
    work = 3 * 2 * shape.matrices * sampled
    ring = 2 * (gpus - 1) / gpus
    gathered = 2 * weights * (gpus - 1) / gpus  # forward and backward of one micro-batch
    return {
        "model": name,
        "gpus": gpus,
        "layout": "whole copy" if whole else "sharded (FSDP2)" if free > 0 else "does not fit",
        "weights_bytes": held,
        "vector_state_bytes": state,
        "rows_sampled_at_once": int(free // (shape.cache() * tokens)) if free > 0 else 0,
        "tokens_in_a_graph": int(free // shape.graph()) if free > 0 else 0,
        "gradient_bytes": ring * 4 * shape.vectors,
        "shard_bytes": 0 if whole else gathered,
        "engine_bytes": 4 * shape.vectors,
        "full_push_bytes": weights,
        "tokens_per_second": sampled / seconds,
        "tokens_per_second_a_gpu": sampled / seconds / gpus,
        "flops_a_gpu": work / seconds / gpus,
    }


def table(gpus: list[int], tokens: int, hours: float) -> str:
    head = [
        "model",
        "GPUs",
        "base on each",
        "GB",
        "vectors, gradient, Adam",
        "rows sampled at once",
        "tokens in one graph",
        "sent a step: gradients",
        "shards, a micro-batch",
        "to an engine (all weights)",
        "tokens/s in all, a GPU",
        "TFLOP/s a GPU",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, shape in MODELS.items():
        for count in gpus:
            r = row(name, shape, count, tokens, hours)
            cells = [
                name,
                str(count),
                r["layout"],
                f"{r['weights_bytes'] / GB:.1f}",
                size(r["vector_state_bytes"]),
                f"{r['rows_sampled_at_once']:,}",
                f"{r['tokens_in_a_graph']:,}",
                size(r["gradient_bytes"]),
                size(r["shard_bytes"]),
                f"{size(r['engine_bytes'])} ({size(r['full_push_bytes'])})",
                f"{r['tokens_per_second']:,.0f}, {r['tokens_per_second_a_gpu']:,.0f}",
                f"{r['flops_a_gpu'] / 1e12:,.0f}",
            ]
            if r["layout"] == "does not fit":
                cells[5:] = ["-"] * len(cells[5:])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def size(count: float) -> str:
    for unit, letters in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            return f"{count / unit:.1f} {letters}"
    return f"{count:.0f}"


# ---- measured


def check(model_name: str) -> list[dict[str, Any]]:
    """What the formulas say of the bundled model, and what is counted when it runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import steer
    from steer.models import load_model

    model = load_model(model_name, dtype="bfloat16", attn_implementation="sdpa")
    shape = SMOLLM2
    found: list[dict[str, Any]] = []

    def note(what: str, calculated: float, measured: float) -> None:
        found.append({"what": what, "calculated": calculated, "measured": measured})

    note("parameters", shape.parameters, sum(p.numel() for p in model.parameters()))
    note("bytes of the base", 2 * shape.parameters, sum(p.nbytes for p in model.parameters()))
    vectors = steer.attach(model)
    optimizer = torch.optim.AdamW(vectors.parameters())
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # weights are there anyway, and rotations and masks are one for all layers
        if storage.data_ptr() not in frozen and tensor.dim() > 1 and tensor.shape[-1] > 1:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # or its address may be given to another
        return tensor

    held: list[Any] = []
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden)
        hidden.float().pow(2).mean().backward(retain_graph=True)
        forward_and_backward = counter.get_total_flops()
    del logits
    optimizer.step()
    states = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    gradients = sum(p.grad.nbytes for p in vectors.parameters() if p.grad is not None)
    own = sum(p.nbytes for p in vectors.parameters())
    note("bytes of vectors, gradients, Adam", STATE * shape.vectors, own + gradients + states)
    note("bytes kept for the backward pass, a token", shape.graph(), sum(kept.values()) / TOKENS)
    head = shape.vocabulary * shape.width
    layers = shape.matrices - head
    # the LM head's own backward pass is not counted here: it runs in tiles inside one function
    note(
        "operations of a token, forward and backward",
        2 * (layers + layers * (shape.layers - 1) // shape.layers + head),
        (forward_and_backward - _attention_flops(counter)) / TOKENS,
    )
    cache = cache_in(model(input_ids=ids, use_cache=True))
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    note("bytes of the KV cache, a token", shape.cache(), stored / TOKENS)
    from steer.engine.bank import pack

    sent = pack(dict(vectors.effective()))
    note("bytes pushed to an engine, before base64", 4 * shape.vectors, len(sent) * 3 / 4)
    return found


TOKENS = 64


def _attention_flops(counter: Any) -> int:
    """Operations of attention itself, which grow with the length and are left out of the formulas."""
    total = counter.get_flop_counts().get("Global", {})
    return sum(count for op, count in total.items() if "attention" in str(op))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of GPUs of 80 GB")
    parser.add_argument("--tokens", type=int, default=1000, help="mean length of an answer (default: 1000)")
    parser.add_argument("--hours", type=float, default=24.0, help="that a run may take (default: 24)")
    parser.add_argument("--check", action="store_true", help="calculate and measure SmolLM2-135M instead")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    args = parser.parse_args()
    if min(args.gpus) < 1 or args.tokens < 1 or args.hours <= 0:
        sys.exit("error: --gpus, --tokens and --hours must be above zero")
    if args.check:
        found = check("smollm2-135m-instruct")
        if args.json:
            print(json.dumps(found, indent=1))
            return
        print("| SmolLM2-135M in bfloat16 | calculated | measured | ratio |\n|---|---|---|---|")
        for r in found:
            ratio = r["measured"] / r["calculated"]
            print(f"| {r['what']} | {r['calculated']:,.0f} | {r['measured']:,.0f} | {ratio:.3f} |")
        return
    if args.json:
        rows = [row(n, s, g, args.tokens, args.hours) for n, s in MODELS.items() for g in args.gpus]
        print(json.dumps(rows, indent=1))
        return
    print(table(args.gpus, args.tokens, args.hours))


if __name__ == "__main__":
    main()

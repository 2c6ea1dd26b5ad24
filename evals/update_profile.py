"""
Where does the time of an update go, and how close is it to the processor's peak?

    python -m evals.update_profile --out evals/results/speed/update-profile.json

One update of the demo's shape, 16 prompts x 8 samples x 16 random tokens, every row with a gradient. The
profile is of the last update. The share of the peak is of the updates before it: FLOPs per second of
processor time, against those of a large matrix product in the same process, so that other work on the machine
changes it little. Attention is not counted in the FLOPs (`evals.speed_workers.update_flops`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from evals.speed import _processor
from evals.speed_workers import Batch, measured, problems, prompt_tokens, update_flops
from steer.arguments import count
from steer.models import cpu_dtype, load_model, load_tokenizer
from steer.versions import versions

LAYERS, HEAD, ATTENTION = "matrix products of the layers", "LM head and loss", "attention"
ELEMENTWISE, COPIES, OTHER = "norms, rotary, elementwise", "conversions and copies", "other"
KINDS = (LAYERS, HEAD, ATTENTION, ELEMENTWISE, COPIES, OTHER)
_OPERATIONS = {
    LAYERS: ("mm", "addmm"),
    ATTENTION: ("bmm", "baddbmm", "softmax", "attention"),
    COPIES: ("copy_", "_to_copy", "to", "clone", "contiguous", "cat"),
    ELEMENTWISE: (
        *("mul", "add", "sub", "div", "neg", "pow", "mean", "rsqrt", "sqrt", "silu", "sigmoid", "sum", "exp"),
        *("where", "masked_fill", "fill_", "zero_", "silu_backward"),
    ),
}


def kind(name: str, shapes: Iterable[Any], vocabulary: int) -> str:
    """
    What an operation belongs to.

    Args:
        name: torch's, such as `aten::mm`.
        shapes: of its inputs.
        vocabulary: size; only the LM head and the loss have tensors with that many columns.
    """
    if any(vocabulary in shape for shape in shapes if isinstance(shape, (list, tuple))):
        return HEAD
    operation = name.removeprefix("aten::")
    for found, names in _OPERATIONS.items():
        if operation in names or operation.rstrip("_") in names:
            return found
    return ATTENTION if "attention" in operation or "softmax" in operation else OTHER


def shares(profiler: Any, vocabulary: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of the time of all operations: the share of each kind, and that of the 20 largest operations."""
    kinds = dict.fromkeys(KINDS, 0.0)
    operations: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        of = kind(event.key, event.input_shapes, vocabulary)
        kinds[of] += event.self_cpu_time_total
        name = f"{event.key} ({of})"
        operations[name] = operations.get(name, 0.0) + event.self_cpu_time_total
    total = sum(kinds.values())
    largest = sorted(operations.items(), key=lambda item: -item[1])[:20]
    return {n: t / total for n, t in kinds.items()}, {n: t / total for n, t in largest}


def peak(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOPs per second of processor time of a large square matrix product, best of ten."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(11):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best


def profile(model_name: str, dtype: str, batch: Batch, steps: int) -> dict[str, Any]:
    """The figures of an update, in this process."""
    tokenizer = load_tokenizer(model_name)
    texts = _prompts(tokenizer, batch.prompts * steps)
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})
    tokenizer.chat_template = None
    model = load_model(model_name, dtype=dtype)
    peaks = [peak(model.dtype)]
    timed = measured("steer", model, tokenizer, texts, steps, batch, rollout=False)
    peaks.append(peak(model.dtype))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[: batch.prompts]]
    made = batch.prompts * batch.samples * batch.tokens
    read = prompt_tokens(ids)
    flops, head = update_flops(model, read, made), 4.0 * made * model.get_output_embeddings().weight.numel()

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    again = load_model(model_name, dtype=dtype)
    measured("steer", again, tokenizer, texts, 2, batch, rollout=False, profiler=profiler)
    kinds, operations = shares(profiler, model.config.vocab_size)
    best = max(peaks)
    return {
        "prompt tokens": read,
        "completion tokens": made,
        "cpu seconds": timed["cpu s"],
        "GFLOP": flops / 1e9,
        "peak GFLOP/s": [value / 1e9 for value in peaks],
        "share of peak": flops / timed["cpu s"] / best,
        "ideal share": {LAYERS: (flops - head) / best / timed["cpu s"], HEAD: head / best / timed["cpu s"]},
        "kinds": kinds,
        "operations": operations,
    }


def _prompts(tokenizer: Any, number: int) -> list[str]:
    from steer.tasks.prompts import format_prompt

    return [format_prompt(text, tokenizer) for text in problems(number)]


def markdown(found: dict[str, Any]) -> str:
    """The share of each kind, and what it would be if its products ran at the peak."""
    lines = ["| part | share of the update | at the peak |", "|---|---|---|"]
    for name, share in found["kinds"].items():
        ideal = found["ideal share"].get(name)
        lines.append(f"| {name} | {share:.1%} | {f'{ideal:.1%}' if ideal is not None else ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=cpu_dtype(), help="(default: this CPU's fastest)"
    )
    parser.add_argument("--prompts", type=count, default=16, help="prompts of an update (default: 16)")
    parser.add_argument("--samples", type=count, default=8, help="samples of a prompt (default: 8)")
    parser.add_argument("--tokens", type=count, default=16, help="tokens of a sample (default: 16)")
    parser.add_argument(
        "--steps", type=count, default=4, help="updates; of several the first is left out (default: 4)"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the result; the table is written beside it")
    args = parser.parse_args()
    batch = Batch(args.prompts, args.samples, args.tokens)
    found = profile(args.model, args.dtype, batch, args.steps)
    record = {name: getattr(args, name) for name in ("model", "dtype", "prompts", "samples", "tokens")}
    record |= {"threads": torch.get_num_threads(), "processor": _processor()}
    record |= {"versions": versions("torch", "transformers", "trl")} | found
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(record) + "\n")
    print(markdown(record))
    print(f"\n{found['share of peak']:.1%} of the peak, {found['cpu seconds']:.1f} CPU seconds an update")


if __name__ == "__main__":
    main()

"""
Where does the time of an update go, and how close is it to the processor's peak?

    python -m evals.update_profile --out evals/results/speed/update-profile.json

One update of the demo's shape, 16 prompts x 8 samples x 16 random tokens, every row with a gradient. The
profile is of the last update. The share of the peak is of the updates before it: FLOPs per second of
processor time, against those of a large matrix product in the same process, so that other work on the machine
changes it little. Attention is not counted in the FLOPs (`evals.step_timing.update_flops`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evals.speed import _processor
from evals.speed_workers import problems
from evals.step_timing import Batch, measured, prompt_tokens, update_flops
from steer.arguments import count
from steer.models import cpu_dtype, load_model, load_tokenizer
from steer.versions import versions

LAYERS, HEAD, ATTENTION = "matrix products of the layers", "LM head and loss", "attention"
ELEMENTWISE, COPIES = "norms, rotary, elementwise", "conversions and copies"
OTHER = "other operations, Python and autograd"
KINDS = (LAYERS, HEAD, ATTENTION, ELEMENTWISE, COPIES, OTHER)
_OPERATIONS = {
    LAYERS: ("mm", "addmm"),
    ATTENTION: ("bmm", "baddbmm"),
    COPIES: ("copy", "_to_copy", "clone", "cat"),
    ELEMENTWISE: (
        *("mul", "add", "sub", "div", "neg", "pow", "mean", "rsqrt", "sqrt", "silu", "sigmoid", "sum"),
        *("exp", "where", "masked_fill", "fill", "zero", "silu_backward"),
    ),
}


class Timer(TorchDispatchMode):
    """
    Processor time of every operation between `start` and `stop`, with what it belongs to. Unlike times on the
    clock, it does not grow while other programs have the processor.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.operations: dict[tuple[str, str], float] = {}

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        spent = time.process_time() - start
        name = func.overloadpacket.__name__
        shapes = [value.shape for value in (*args, result) if isinstance(value, torch.Tensor)]
        key = name, kind(name, shapes, self.vocabulary)
        self.operations[key] = self.operations.get(key, 0.0) + spent
        return result

    def shares(self, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
        """
        Of an update that takes `seconds` without this timer: the share of each kind, what is between the
        operations among the others; and that of the 20 largest operations.
        """
        kinds = dict.fromkeys(KINDS, 0.0)
        for (_, of), spent in self.operations.items():
            kinds[of] += spent / seconds
        kinds[OTHER] += 1 - sum(kinds.values())
        largest = sorted(self.operations.items(), key=lambda item: -item[1])[:20]
        return kinds, {f"{name} ({of})": spent / seconds for (name, of), spent in largest}


def kind(name: str, shapes: Iterable[Sequence[int]], vocabulary: int) -> str:
    """
    What an operation belongs to.

    Args:
        name: of torch's operation, such as `mm`.
        shapes: of its tensors.
        vocabulary: size; beside the embedding only the LM head and the loss have tensors of that size.
    """
    if any(vocabulary in shape for shape in shapes) and name != "embedding":
        return HEAD
    if "attention" in name or "softmax" in name:
        return ATTENTION
    plain = name.removesuffix("_")
    return next((found for found, names in _OPERATIONS.items() if plain in names), OTHER)


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

    timer = Timer(model.config.vocab_size)
    again = load_model(model_name, dtype=dtype)
    measured("steer", again, tokenizer, texts, 2, batch, rollout=False, profiler=timer)
    kinds, operations = timer.shares(timed["cpu s"])
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

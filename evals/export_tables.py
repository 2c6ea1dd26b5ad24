"""
How exact the exports are in other tools: evals/results/exports/TOOL.json, and docs/exports.md made of them.

    make exports                                  # all of it; installs the tools as `make interop` does
    python -m evals.export_tables                 # with the tools that are installed
    python -m evals.export_tables --tools peft    # one tool
    python -m evals.export_tables --tools         # the page alone, from the files

Each tool loads the exports in a process of its own, without steer, and computes logits or log-likelihoods of
the same tokens in float32. They are compared with those of the model with steer's vectors attached. The same
difference without any vectors is measured beside it: that much the tool differs by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evals" / "results" / "exports"
TEMPLATE = Path(__file__).parent / "export_tables.md.jinja"
READERS = Path(__file__).parent / "export_readers.py"
INTEROP = ROOT / ".venv-interop"
SECONDS = 1800  # a tool that takes longer hangs


@dataclass(frozen=True)
class Tool:
    """A tool, and where it is: an interpreter, and packages that come before its own."""

    title: str
    reader: str
    measure: str
    formats: tuple[str, ...]
    python: Path = Path(sys.executable)
    packages: Path | None = None


TOOLS = {
    "transformers-5": Tool("transformers 5", "transformers", "logits", ("checkpoint", "npy")),
    "transformers-4": Tool(
        "transformers 4", "transformers", "logits", ("checkpoint", "npy"), packages=INTEROP / "transformers-4"
    ),
    "peft": Tool("PEFT", "peft", "logits", ("peft",)),
    "peft-transformers-4": Tool(
        "PEFT with transformers 4", "peft", "logits", ("peft",), packages=INTEROP / "transformers-4"
    ),
    "lm-eval": Tool(
        "lm-eval", "lm_eval", "half", ("lm-eval", "checkpoint"), python=INTEROP / "lm-eval" / "bin" / "python"
    ),
    "vllm": Tool("vLLM", "vllm", "tokens", ("checkpoint", "peft"), INTEROP / "vllm" / "bin" / "python"),
    "llama-cpp": Tool("llama.cpp in xllamacpp", "llama_cpp", "logits", ("gguf", "gguf-model")),
}
# The package whose version is that of the tool.
PACKAGES = {
    **{"transformers-5": "transformers", "transformers-4": "transformers", "lm-eval": "lm_eval"},
    **{"peft": "peft", "peft-transformers-4": "peft", "vllm": "vllm", "llama-cpp": "xllamacpp"},
}
COMPARED = {"logits": "logits", "tokens": "log p of a token", "half": "log p of half a text"}
# By model: its title, and the kinds of vectors that are exported.
MODELS = {
    "tiny": "a random Llama of 3 layers, RoPE base 5000",
    "tiny-scaled": "a random Qwen2 of 3 layers, RoPE scaled as in Llama 3",
    "smollm2": "SmolLM2-135M-Instruct with the demo's vectors",
}
FORMATS = ("peft", "checkpoint", "lm-eval", "npy", "gguf", "gguf-model")
ADAPTIVE = ("peft", "checkpoint")
# Cells that cannot be measured, by tool or model, format and vectors.
IMPOSSIBLE = {
    ("tiny-scaled", "gguf"): "the tiny model's GGUF file has no RoPE scaling",
    ("tiny-scaled", "gguf-model"): "the tiny model's GGUF file has no RoPE scaling",
    ("vllm", "peft", "constant"): "vLLM serves LoRA, not BEFT",
}
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "What is 7 * 8? Let us work it out step by step: 7 * 8 = 56, so the answer is 56.",
    "Steering vectors are added to the residual stream of a language model.",
)


# ---- what is exported


def make_model(name: str, work: Path) -> Path:
    """The folder of the base model in float32, with its GGUF file beside it where it has one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from steer.export.transformers4 import add_names
    from steer.weights import gguf_path, model_path

    if name == "smollm2":
        (work / "base.gguf").symlink_to(gguf_path("smollm2-135m-instruct"))
        (work / "base").mkdir()
        for file in model_path("smollm2-135m-instruct").iterdir():
            if file.suffix == ".json":
                shutil.copy(file, work / "base")
            else:
                (work / "base" / file.name).symlink_to(file)
        add_names(work / "base")
        return work / "base"
    letters = ["<pad>", "<s>", "</s>", *string.printable]
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"rope_type": "llama3", "original_max_position_embeddings": 16}  # type: ignore[dict-item]
    plain = {"rope_type": "default"}
    # heads of 32, the least that vLLM's attention takes on CPUs; large weights, so that logits are not flat
    shape: dict[str, Any] = {
        **{"vocab_size": len(letters), "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
        **{"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "rope_parameters": {**(scaled if name == "tiny-scaled" else plain), "rope_theta": 5000.0},
    }
    torch.manual_seed(0)
    model: Any = (
        Qwen2ForCausalLM(Qwen2Config(**shape))
        if name == "tiny-scaled"
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    words = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(letters)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    add_names(work / "base")  # as bases on the hub have them: transformers 4 reads others than 5 writes
    if name == "tiny":
        runpy.run_path(str(ROOT / "tests" / "helpers" / "gguf_models.py"))["write_gguf"](
            model, work / "base.gguf"
        )
    return work / "base"


def prepare(name: str, work: Path) -> dict[str, Any]:
    """Write every export of a model; where they are, and what steer computes by kind of vectors."""
    import torch

    import steer
    from steer import SteeringConfig, artifact
    from steer.artifact import Artifact
    from steer.export import arrays, checkpoint, gguf, gguf_model, lm_eval, peft
    from steer.models import load_model, load_tokenizer

    work.mkdir()
    base = make_model(name, work)
    tokenizer = load_tokenizer(str(base))
    limit = 48
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:limit] for text in TEXTS]

    def computed(model: Any) -> list[np.ndarray]:
        with torch.no_grad():
            return [model(torch.tensor([one])).logits[0].numpy() for one in ids]

    model = load_model(str(base), dtype="float32")
    logits = {"": computed(model)}
    exports: dict[tuple[str, str], str] = {}
    for kind in ("constant", "adaptive"):
        if name == "smollm2" and kind == "constant":
            made = artifact.read(ROOT / "evals" / "results" / "demo" / "vectors")
            steer.load(made, model)
        else:
            vectors = steer.attach(model, SteeringConfig(kind=kind))
            generator = torch.Generator().manual_seed(1)
            size = 0.02 if name == "smollm2" else 0.3
            random = {
                key: size * torch.randn(tensor.shape, generator=generator)
                for key, tensor in vectors.tensors().items()
            }
            vectors.set_tensors(random)
            made = Artifact(vectors.config, random)
        logits[kind] = computed(model)
        steer.detach(model)
        folder = work / kind
        folder.mkdir()
        peft.write(made, folder / "adapter")
        checkpoint.write(made, str(base), folder / "checkpoint")
        exports |= {("peft", kind): str(folder / "adapter"), ("checkpoint", kind): str(folder / "checkpoint")}
        if kind == "adaptive":
            continue
        exports["lm-eval", kind] = str(lm_eval.write(made, folder / "vectors.pt"))
        exports["npy", kind] = str(arrays.write(made, folder / "vectors.npy"))
        if (work / "base.gguf").exists():
            exports["gguf-model", kind] = str(
                gguf_model.write(made, work / "base.gguf", folder / "model.gguf")
            )
            exports["gguf", kind] = str(gguf.write(made, folder / "vectors.gguf", block_0="drop"))
            steer.load(made.layers(1, made.num_hidden_layers - 1), model)
            logits["without block 0"] = computed(model)
            steer.detach(model)
    return {
        "ids": ids,
        "base": str(base),
        "gguf": str(work / "base.gguf"),
        "logits": logits,
        "exports": exports,
    }


# ---- what others compute


def jobs(name: str, model: str, made: dict[str, Any], work: Path) -> Iterator[dict[str, Any]]:
    """What a tool computes of one model: the base, and each export that it reads."""
    tool = TOOLS[name]
    common = {"base": made["base"], "base_gguf": made["gguf"], "ids": made["ids"], "model": model}
    common |= {"tool": name, "reader": tool.reader}
    exports = [
        (format, kind, export)
        for (format, kind), export in made["exports"].items()
        if format in tool.formats and (tool.reader, format, kind) not in IMPOSSIBLE
    ]
    for format, kind, export in [(tool.formats[0], "", None), *exports] if exports else ():
        out = str(work / f"{name}-{model}-{format}-{kind}.npz")
        yield {**common, "format": format, "vectors": kind, "export": export, "out": out}


def read(python: Path, packages: Path | None, wanted: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    """Let the tools of one environment do the jobs: `versions` by reader, and why jobs `failed`, by file."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(packages or "")}
    file, told = work / "jobs.json", work / "told.json"
    file.write_text(json.dumps(wanted))
    told.unlink(missing_ok=True)
    reason = "the process died"
    try:
        subprocess.run(
            [str(python), str(READERS), str(file), str(told)],
            env=environment,
            cwd=work,
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        reason = f"took longer than {SECONDS} s"
    if not told.exists():
        return {"versions": {}, "failed": {job["out"]: reason for job in wanted}}
    return json.loads(told.read_text())


def measured(logits: np.ndarray, ids: list[int], measure: str) -> np.ndarray:
    """What a tool gives, from logits (tokens, vocabulary)."""
    if measure == "logits":
        return logits
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    scores = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    chosen = scores[np.arange(len(ids) - 1), ids[1:]]
    return chosen if measure == "tokens" else chosen[len(ids) // 2 - 1 :].sum(keepdims=True)


def difference(file: str, logits: list[np.ndarray], ids: list[list[int]], measure: str) -> float:
    """The largest difference between what a tool computed and what follows from `logits`."""
    with np.load(file) as theirs:
        return max(
            float(np.abs(theirs[f"values{n}"] - measured(ours, one, measure)).max())
            for n, (ours, one) in enumerate(zip(logits, ids, strict=True))
        )


def cells(
    name: str, wanted: list[dict[str, Any]], models: dict[str, dict[str, Any]], failed: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The measurements of one tool, as its JSON file holds them."""
    measure = TOOLS[name].measure
    bases = {job["model"]: job["out"] for job in wanted if not job["vectors"]}
    for job in (job for job in wanted if job["vectors"]):
        made = models[job["model"]]
        logits, ids = made["logits"], made["ids"]
        cell = {key: job[key] for key in ("model", "format", "vectors")}
        if reason := failed.get(job["out"]) or failed.get(bases[job["model"]]):
            yield {**cell, "why": reason}
            continue
        steered = logits["without block 0" if job["format"] == "gguf" else job["vectors"]]
        alone = difference(bases[job["model"]], logits[""], ids, measure)
        moved = max(
            float(np.abs(measured(a, one, measure) - measured(b, one, measure)).max())
            for a, b, one in zip(steered, logits[""], ids, strict=True)
        )
        found = difference(job["out"], steered, ids, measure)
        yield {**cell, "difference": found, "without_vectors": alone, "moved": moved}
        print(f"{name:20} {job['model']:12} {job['format']:11} {job['vectors']:9} {found:.1e} ({alone:.1e})")


def measure(tools: dict[str, Tool], models: dict[str, dict[str, Any]], work: Path) -> None:
    """Write the files of the tools that are installed, one environment after the other."""
    groups: dict[tuple[Path, Path | None], list[str]] = {}
    for name, tool in tools.items():
        if tool.python.exists() and (tool.packages is None or tool.packages.exists()):
            groups.setdefault((tool.python, tool.packages), []).append(name)
        else:
            print(f"{tool.title} is not installed: `make exports` does that", file=sys.stderr)
    for (python, packages), names in groups.items():
        wanted = [job for n in names for m, made in models.items() for job in jobs(n, m, made, work)]
        told = read(python, packages, wanted, work)
        for name in names:
            file = RESULTS / f"{name}.json"
            kept = json.loads(file.read_text())["cells"] if file.exists() else []
            found = list(cells(name, [j for j in wanted if j["tool"] == name], models, told["failed"]))
            found += [cell for cell in kept if cell["model"] not in models]
            versions = told["versions"].get(tools[name].reader, {})
            file.write_text(json.dumps({"versions": versions, "cells": found}, indent=1) + "\n")


# ---- the page


def render(results: Path = RESULTS) -> str:
    """docs/exports.md from the files in `results`."""
    found = {
        name: json.loads(file.read_text())
        if (file := results / f"{name}.json").exists()
        else {"versions": {}, "cells": []}
        for name in TOOLS
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
    tables = {name: table(name, found) for name in MODELS}
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(models=MODELS, tables=tables, tools=found) + "\n"


def table(model: str, found: dict[str, Any]) -> str:
    """The differences of one model: a row for each export and tool."""
    lines = ["| export | vectors | tool | compared | with the vectors | without | the vectors change |"]
    lines.append("|---|---|---|---|---|---|---|")
    for format in FORMATS:
        for kind in ("constant", "adaptive")[: 2 if format in ADAPTIVE else 1]:
            for name, tool in TOOLS.items():
                if format in tool.formats:
                    start = f"| `{format}` | {kind} | {label(name, found[name])} | {COMPARED[tool.measure]} |"
                    lines.append(f"{start} {_cell(model, format, kind, name, found[name]['cells'])}")
    return "\n".join(lines)


def label(name: str, found: dict[str, Any]) -> str:
    """A tool with its version, where it was measured."""
    versions = found["versions"]
    number = versions.get(PACKAGES[name], "")
    beside = f", transformers {versions['transformers']}" if versions and name.startswith("peft") else ""
    title = TOOLS[name].title.partition(" with ")[0] if versions else TOOLS[name].title
    title = "transformers" if versions and name.startswith("transformers") else title
    return f"{title} {number}".strip() + beside


def _cell(model: str, format: str, kind: str, name: str, cells: list[dict[str, Any]]) -> str:
    chosen = [c for c in cells if (c["model"], c["format"], c["vectors"]) == (model, format, kind)]
    if chosen and "difference" in chosen[0]:
        values = (chosen[0][key] for key in ("difference", "without_vectors", "moved"))
        return " | ".join(f"{value:.1e}" for value in values) + " |"
    reasons = [IMPOSSIBLE.get((TOOLS[name].reader, format, kind)), IMPOSSIBLE.get((model, format))]
    reasons += [chosen[0]["why"]] if chosen else []
    why = next((reason for reason in reasons if reason), "not measured yet: `make exports` does")
    return f"{why.replace('|', '/')} | | |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evals.export_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS), help="(default: all)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter that has vLLM")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "exports.md", help="the page")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    tools = {name: TOOLS[name] for name in args.tools}
    if args.vllm and "vllm" in tools:
        tools["vllm"] = replace(tools["vllm"], python=args.vllm)
    work = Path(tempfile.mkdtemp(prefix="steer-exports-"))
    try:
        models = {name: prepare(name, work / name) for name in args.models} if tools else {}
        measure(tools, models, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    args.out.write_text(render())


if __name__ == "__main__":
    main()

"""
One measurement a process: `python -m evals.speed_workers NAME@DTYPE MODEL STEPS` prints a line of JSON.
See `evals.speed`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from typing import Any, cast

import torch
from torch import nn

from evals.step_timing import Batch, clock, measured, shares

PROMPTS, SAMPLES, TOKENS = 16, 8, 24  # of a GRPO step
BATCH, LENGTH = 64, 128  # of a rollout


def fast() -> str:
    """The precision in which this machine multiplies matrices fastest."""
    from steer.models import fast_dtype

    return fast_dtype()


def device() -> str:
    """Where models are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def plan(only: str | None = None) -> list[str]:
    """
    The variants, as name@dtype; of those that share a name the best counts. Everybody gets the machine's
    fastest dtype, and where that is bfloat16 on a CPU float32 too: not all of torch is faster in bfloat16
    there. (Without instructions for bfloat16 a CPU takes some hundred times as long in it.)
    """
    dtypes = [fast()] if fast() == "float32" or torch.cuda.is_available() else ["float32", "bfloat16"]
    caches = ["generate", "generate-static"]
    rollouts = [f"{name}@{d}" for name in caches for d in dtypes]
    rollouts += [f"{name}@{fast()}" for name in ("vllm-plain", "vllm-steered")]
    steps = [f"{name}@{d}" for name in ("steer", "trl-lora") for d in dtypes] + ["trl-full@float32"]
    return [*(rollouts if only != "step" else []), *(steps if only != "rollout" else [])]


def problems(count: int) -> list[str]:
    from steer.tasks.arithmetic import Arithmetic
    from steer.tasks.data import load_problems

    found = load_problems("arithmetic", "train", arithmetic=Arithmetic(problems=count))["problem"]
    return list(found)[:count]


# ---- a GRPO step


def step(method: str, dtype: str, model_name: str, steps: int) -> dict[str, float]:
    """
    `measured` for a model by its name and problems of arithmetic. For the method `profile` the share of each
    kind of operation in the last update.
    """
    from steer.models import load_model, load_tokenizer
    from steer.tasks.prompts import format_prompt

    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, dtype=dtype)
    cast(nn.Module, model).to(device())
    texts = [format_prompt(p, tokenizer) for p in problems(PROMPTS * steps)]
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})
    tokenizer.chat_template = None
    batch = Batch(PROMPTS, SAMPLES, TOKENS)
    if method != "profile":
        return measured(method, model, tokenizer, texts, steps, batch)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    measured("steer", model, tokenizer, texts, steps, batch, profiler=profiler)
    return shares(profiler)


# ---- rollouts


def generate(cache: str | None, dtype: str, model_name: str) -> dict[str, float]:
    """Tokens a second of transformers' `generate`, with its dynamic cache or the static one."""
    from steer.models import load_model, load_tokenizer
    from steer.tasks.prompts import format_prompt

    tokenizer, model = load_tokenizer(model_name), load_model(model_name, dtype=dtype)
    cast(nn.Module, model).to(device())
    texts = [format_prompt(p, tokenizer) for p in problems(BATCH)]
    inputs = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True).to(model.device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "cache_implementation": cache}

    def run(tokens: int) -> None:
        model.generate(  # type: ignore[operator]  # a mixin of the model's class
            **inputs, **options, min_new_tokens=tokens, max_new_tokens=tokens
        )

    run(LENGTH if cache else 4)  # on a GPU code is compiled for the length of a static cache
    start = clock()
    run(LENGTH)
    return {"tokens/s": BATCH * LENGTH / (clock() - start)}


def vllm(method: str, dtype: str, model_name: str) -> dict[str, float]:
    """
    Tokens a second of a compiled engine, and what a sync of the vectors takes. For the method `vllm-profile`
    the share of each kind of operation in a rollout of the steered engine.
    """
    steered = method != "vllm-plain"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    if not steered:
        os.environ["VLLM_PLUGINS"] = "none"
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    from steer import artifact, engine
    from steer.models import load_tokenizer
    from steer.tasks.prompts import format_prompt
    from steer.weights import model_path

    tokenizer = load_tokenizer(model_name)
    texts = [format_prompt(p, tokenizer) for p in problems(BATCH)]
    prompts: Any = [{"prompt_token_ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in texts]
    # On a GPU it leaves room for two copies of the weights (`_sync`); these rollouts need a small cache.
    options: Any = {"gpu_memory_utilization": 0.6} if torch.cuda.is_available() else {}
    llm: Any = LLM(str(model_path(model_name)), dtype=dtype, max_model_len=1024, seed=0, **options)
    with torch.device("meta"):
        shape: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path(model_name)))
    layers, hidden_size = shape.config.num_hidden_layers, shape.config.hidden_size
    vectors = artifact.from_vectors({i: torch.full((hidden_size,), 1e-3) for i in range(layers)}, shape)
    if steered:
        engine.push(llm, vectors)

    def run(tokens: int) -> float:
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
        start = clock()
        llm.generate(prompts, params, use_tqdm=False)
        return clock() - start

    run(16)
    if method == "vllm-profile":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run(LENGTH // 4)
        return shares(profiler)
    result = {"tokens/s": BATCH * LENGTH / statistics.median(run(LENGTH) for _ in range(2))}
    return result | _sync(llm, vectors, dtype, model_name) if steered else result


def _sync(llm: Any, vectors: Any, dtype: str, model_name: str) -> dict[str, float]:
    """
    Seconds of a push of `vectors` (an artifact) into the running engine. Beside it, what a full push cannot
    do without: copying every weight once. (The CPU build of vLLM cannot take weights again at all.)
    """
    from steer import engine
    from steer.models import load_model

    model = load_model(model_name, dtype=dtype)
    weights = list(cast(nn.Module, model).to(device()).parameters())
    places = [torch.empty_like(weight) for weight in weights]
    engine.push(llm, vectors)
    times: dict[str, list[float]] = {"vector": [], "full": []}
    sent = 0
    for _ in range(5):
        start = clock()
        for place, weight in zip(places, weights, strict=True):
            place.copy_(weight.detach())
        times["full"].append(clock() - start)
        start = clock()
        sent = engine.push(llm, vectors).bytes
        times["vector"].append(clock() - start)
    return {
        "sync s": statistics.median(times["vector"]),
        "full s": statistics.median(times["full"]),
        "sync MB": sent / 1e6,
        "full MB": sum(p.numel() * p.element_size() for p in weights) / 1e6,
    }


def main() -> None:
    (name, dtype), model, steps = sys.argv[1].split("@"), sys.argv[2], int(sys.argv[3])
    if name.startswith("generate"):
        result = generate("static" if name.endswith("static") else None, dtype, model)
    elif name.startswith("vllm"):
        result = vllm(name, dtype, model)
    else:
        result = step(name, dtype, model, steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

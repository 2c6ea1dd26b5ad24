"""Tiny models in a vLLM engine, and whether what it samples has the log-probabilities of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.steering import tokens
from transformers import PreTrainedModel

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up: all models here are local folders
vllm = pytest.importorskip("vllm", reason="vLLM is not installed (`make vllm` installs its CPU build)")

# Both sides compute in float32 with other kernels. Log-probabilities differed by up to 2e-6 where the vectors
# change them by 0.1 and more; ten times that is still far below any error of placement or scale.
TOLERANCE = 2e-5
# Attention kernels of vLLM begin at heads of 32. Large weights make distributions that vectors change a lot.
SHAPES: dict[str, dict[str, Any]] = {
    kind: {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}
    for kind in ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "mixtral", "qwen3_moe")
}
SHAPES |= {kind: {"hidden_size": 128, "initializer_range": 0.1} for kind in ("qwen2", "phi3")}
SHAPES |= {"gpt2": {"n_embd": 128, "initializer_range": 0.1}}
LENGTH = 40


def start(folder: Path | str, **settings: Any) -> Any:
    """vLLM in float32; a prompt takes two passes, and prefixes are cached in blocks of 32 tokens."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
        "max_logprobs": 100,
        "block_size": 32,
        "kv_cache_memory_bytes": 8 << 20,
    }
    return vllm.LLM(str(folder), **{**defaults, **settings})


class Sampled(NamedTuple):
    """A sequence of prompt and completion, and the log-probability of every token from the second on."""

    ids: list[int]
    prompt: int
    logps: torch.Tensor
    cached: int


def run(llm: Any, prompts: list[list[int]], asked: list[Any], scored: bool = True) -> list[Sampled]:
    """
    Greedy completions of 6 tokens; `asked` is each request's extra_args. Prompts that are `scored` too are
    never read from the cache.
    """
    settings = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=6,
            min_tokens=6,
            logprobs=0,
            prompt_logprobs=0 if scored else None,
            detokenize=False,
            extra_args=extra,
        )
        for extra in asked
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    found = []
    for out in outputs:
        made = out.outputs[0]
        steps = [*(out.prompt_logprobs[1:] if scored else []), *made.logprobs]
        ids = [*out.prompt_token_ids, *made.token_ids]
        values = [step[token].logprob for step, token in zip(steps, ids[-len(steps) :], strict=True)]
        cached = out.num_cached_tokens or 0
        found.append(Sampled(ids, len(out.prompt_token_ids), torch.tensor(values), cached))
    return found


@torch.no_grad()
def expected(model: PreTrainedModel, sampled: Sampled) -> torch.Tensor:
    """What transformers gives the same tokens, vectors and all."""
    ids = torch.tensor([sampled.ids])
    vectors = model.__dict__.get("steering_vectors")
    if vectors is None:
        logits = model(input_ids=ids).logits
    else:
        with vectors.prompt_length(sampled.prompt):
            logits = model(input_ids=ids).logits
    every = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return every[-len(sampled.logps) :]


def same(model: PreTrainedModel, sampled: Sampled) -> bool:
    return bool((expected(model, sampled) - sampled.logps).abs().max() < TOLERANCE)


def prompt(length: int = LENGTH, seed: int = 3) -> list[int]:
    return tokens(1, length, seed)[0].tolist()

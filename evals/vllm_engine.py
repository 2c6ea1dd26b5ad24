"""Tiny models in a vLLM engine, and the log-probabilities that transformers gives what it samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

# Set before vLLM is loaded, where the user has not. Nothing is looked up: all models here are local folders.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def start(folder: Path | str, **settings: Any) -> Any:
    """vLLM in float32; a prompt takes two passes, and prefixes are cached in blocks of 32 tokens."""
    import vllm

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
    from vllm import SamplingParams

    settings = [
        SamplingParams(
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

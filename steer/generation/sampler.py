"""
Sampling completions from a Hugging Face model for a group-based policy gradient, faster than `generate()`.

What makes it cheaper: a prompt shared by a group is read once; rows that have ended leave the batch; one
random number a token. Each row draws from a stream of its own, keyed by (seed, step, row), so a sample
depends neither on the number of processes nor on what else is in the batch. A model whose cache cannot do
this (`steer.generation.verify`) reads every row again for each token: the same samples, slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steer.generation.completion import Completion
from steer.generation.cpu import cached_rows
from steer.generation.decoding import WORTH_A_PASS, CachedRows, PlainRows, Rows, window
from steer.generation.verify import fast_attention, fast_paths
from steer.sites import input_device
from steer.vector_sets import Owners

# Below this share of unfinished rows the batch is compacted; each compaction copies what remains of the KV
# cache.
COMPACT_AT = 0.8


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` None are off."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None

    def warpers(self) -> LogitsProcessorList:
        warpers = LogitsProcessorList()
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


def uniforms(rows: Sequence[int], tokens: int, seed: int, step: int) -> torch.Tensor:
    """
    (rows, tokens) float32 numbers in [0, 1): row r of step s always gets the same ones, from Philox (seed, s,
    r).
    """
    streams = (np.random.Philox(key=[seed, step], counter=[0, 0, 0, row]) for row in rows)
    drawn = [np.random.Generator(stream).random(tokens, dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(drawn))


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    noise: torch.Tensor | None = None,
    any_process: Callable[[bool], bool] | None = None,
    owners: Owners | None = None,
    share_beginning: bool = False,
) -> list[Completion]:
    """
    One completion for each row of `prompts` (token ids; equal rows are read once).

    `noise`: (rows, max_new_tokens) uniform numbers, one per row and token, as `uniforms` makes them; not
    needed when the temperature is 0. `any_process(open)` says whether any process still has open rows; it is
    needed when the model is sharded, since then every process must run every forward pass. `owners` tells
    which of several sets of vectors steers each row. With `share_beginning` what all prompts begin with, such
    as worked examples, is read once; rounding then depends on the other prompts, and so may a sample. Rows
    come back in order.
    """
    if owners:
        with owners.prompt_length(0):
            owners.tell(owners.of[:0])  # no set steers while the model is tried
            fast_paths(model)
    whole = nullcontext() if any_process else _weights_cast_once(model.device.type)
    with fast_attention(model), whole:
        return _rollout(model, prompts, sampling, noise, any_process, owners, share_beginning)


def _weights_cast_once(device: str) -> AbstractContextManager:
    """
    Inside, mixed precision keeps the weights that it has cast. It forgets them at the end of the outermost
    autocast region, which without this one is each forward pass: a pass over all weights for each token. Not
    for sharded models, of which every process would keep all weights.
    """
    outer = torch.is_autocast_enabled(device)
    return nullcontext() if outer else torch.autocast(device, enabled=False)


def _rollout(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    noise: torch.Tensor | None,
    any_process: Callable[[bool], bool] | None,
    owners: Owners | None,
    share_beginning: bool,
) -> list[Completion]:
    device = input_device(model)
    whose = owners.of.tolist() if owners else [0] * len(prompts)
    keys = [(*prompt, owner) for prompt, owner in zip(prompts, whose, strict=True)]
    unique = list(dict.fromkeys(keys))
    index = {key: i for i, key in enumerate(unique)}
    group = torch.tensor([index[key] for key in keys], device=device)  # (rows,) which unique prompt
    width = max(map(len, prompts)) + sampling.max_new_tokens
    reader = _reader(model, owners, width if share_beginning else None)
    if owners:
        owners.tell(torch.tensor([key[-1] for key in unique]))
    logits = reader.read([key[:-1] for key in unique])[group]
    reader.select(group)
    if owners:
        owners.tell(owners.of)

    rows = torch.arange(len(prompts), device=device)  # which of the caller's rows are still in the batch
    noise = noise.to(device) if noise is not None else None
    eos = torch.tensor(sampling.eos_token_ids, dtype=torch.long, device=device)
    warpers = sampling.warpers()
    tokens = torch.zeros(len(prompts), sampling.max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(tokens.shape, device=device)
    length = torch.full((len(prompts),), sampling.max_new_tokens, device=device)
    open_ = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for t in range(sampling.max_new_tokens):
        numbers = noise[rows, t] if noise is not None else None
        token, logp = draw_token(logits, sampling.temperature, warpers, numbers)
        tokens[rows, t], logps[rows, t] = token, logp
        ended = torch.isin(token, eos) & open_[rows]
        length[rows[ended]] = t + 1
        open_[rows[ended]] = False
        alive = open_[rows]
        is_open = bool(alive.any())
        if t + 1 == sampling.max_new_tokens or not (any_process(is_open) if any_process else is_open):
            break
        if is_open and alive.float().mean() < COMPACT_AT:
            keep = alive.nonzero().squeeze(1)
            reader.select(keep)
            rows, token = rows[keep], token[keep]
            if owners:
                owners.choose(rows)
        logits = reader.step(token)
    ends = zip(tokens.tolist(), logps.tolist(), length.tolist(), open_.tolist(), strict=True)
    return [Completion(ids[:n], not unfinished, logps[:n]) for ids, logps, n, unfinished in ends]


def _reader(model: PreTrainedModel, owners: Owners | None, width: int | None) -> Rows:
    """
    How `model` reads rows: with a cache where that was found right. Of rows of up to `width` tokens, what all
    begin with is read once, unless vectors must know where a prompt ends; None for never.
    """
    vectors = model.__dict__.get("steering_vectors") or model.__dict__.get("steering_population")
    if not fast_paths(model).sampler:
        once = not owners and not fast_paths(model).common
        if once and vectors is not None:  # the end of the prompt is not told in a pass over its beginning
            once = not vectors.reads_prompt
        # Padding between the tokens of a prompt would shorten a window.
        fits = width is not None and window(model.config.get_text_config()) > width
        return CachedRows(model, WORTH_A_PASS if once and fits else None)
    told = owners or vectors
    return PlainRows(model, told.prompt_length if told else lambda columns: nullcontext())


def draw_token(
    logits: torch.Tensor, temperature: float, warpers: LogitsProcessorList, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One token and its log-probability per row of `logits` (rows, vocabulary), by inversion of the
    distribution: with `noise`, (rows,) uniform numbers, where the temperature is not 0.
    """
    # On a CPU a few rows at a time, which stay in its cache.
    size = cached_rows(logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    drawn = [
        _draw(logits[i : i + size], temperature, warpers, None if noise is None else noise[i : i + size])
        for i in range(0, len(logits), size)
    ]
    tokens, logps = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(logps)


def _draw(
    logits: torch.Tensor, temperature: float, warpers: LogitsProcessorList, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float()
    if temperature == 0:
        token = scores.argmax(-1)
        return token, torch.log_softmax(scores, -1).gather(1, token[:, None]).squeeze(1)
    assert noise is not None, "sampling needs noise"
    if temperature != 1:
        scores = scores / temperature
    scores = warpers(None, scores)  # type: ignore[arg-type]  # these read no token ids
    probs = torch.softmax(scores, -1)
    edges = probs.cumsum(-1)
    # right=True skips tokens of probability zero; scaling by the last edge absorbs the rounding of the sum
    token = torch.searchsorted(edges, (noise[:, None] * edges[:, -1:]).contiguous(), right=True).clamp(
        max=edges.shape[1] - 1
    )
    return token.squeeze(1), probs.gather(1, token).log().squeeze(1)

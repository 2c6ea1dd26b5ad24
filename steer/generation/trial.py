"""
`Trial`: each fast path of sampling and scoring beside plain passes, on two short rows of tokens of one model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steer.compat import cache_in
from steer.errors import SteerError
from steer.generation import cpu
from steer.generation.caches import has_states, no_cache, other_cache
from steer.generation.decoding import CachedRows, inputs, pad_left, window
from steer.generation.scoring import Scored, shared_scores
from steer.hooks import hooked
from steer.sites import input_device

# Settings of attention that is chosen by column, and so changes where padding or a cache moves columns. In
# real models it sets in after thousands of tokens, too far for a trial.
_BY_COLUMN = {
    "index_block_size": "attends to blocks of columns",
    "compress_rates": "compresses blocks of columns",
}
# Lengths of the two prompts that are tried, and how many tokens follow: longer than the windows of tests.
_PROMPTS, _MORE = (3, 8), 2
# Largest relative distance of logits, per token. In float32 rounding leaves 1e-5 after tens of layers; what
# is wrong (a mask, a position, a lost state) moves them by 0.05 to 1.
EXACT = 1e-3
# Where a cache holds states: Zamba2's step of decoding is off by 1e-4 of its logits, all others by 1e-6.
EXACT_STATES = 5e-5
# The LM head alone, of hidden states this much larger: logits as large as a trained model's or larger, where
# a cap on them shows that trl does not know of.
EXACT_HEAD = 1e-4
_LOUDER = 16
# In half precision (and quantised), the mean over a row's tokens: rounding moves logits by some per cent, and
# an expert that is chosen otherwise by more, at single tokens.
ROUNDED = 0.1
# The same of one attention module's gradients, whose inputs are not rounded before: 0.003 to 0.017 in
# bfloat16 on Qwen2.5-0.5B, and 0.2 where its scores were rounded too.
ROUNDED_ATTENTION = 0.05


class Trial:
    """The comparisons for one model, over two rows of tokens and variations of them."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.config = model.config.get_text_config()
        self.device = input_device(model)
        rounded = model.dtype.itemsize < 4 or getattr(model, "is_quantized", False)
        fast = self.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest"
        self.exact = not (rounded or fast)
        self.limit = EXACT
        longest = sum(_PROMPTS) + 2 * _MORE
        special = _special(self.config.to_dict())
        vocabulary = self.config.vocab_size
        ids = [i for i in range(3, vocabulary, max(1, vocabulary // (2 * longest))) if i not in special]
        # The rows begin alike, so that there is a common beginning to read once.
        self.rows = [ids[: n + _MORE] for n in _PROMPTS]
        self.rows[0] = self.rows[0][:2] + ids[-_PROMPTS[0] - _MORE + 2 :]
        self.prompts = [row[:n] for row, n in zip(self.rows, _PROMPTS, strict=True)]

    def reasons(self, scores: bool) -> dict[str, str | None]:
        """By the name of a fast path (`steer.generation.verify.FastPaths`) why it is left out, or None."""
        cacheless = no_cache(self.model)
        rounded: list[bool] = []
        head = self.model.get_output_embeddings()
        with hooked(_rounds(head, rounded)) if head is not None else nullcontext():
            one, two = self._truth(use_cache=not cacheless)
        self.exact &= not any(rounded)
        self.truth = [one.logits[0].float(), two.logits[0].float()]
        cacheless = cacheless or other_cache(self.model, cache_in(two))
        if not cacheless and has_states(self.model):
            self.limit = EXACT_STATES
        columns = self._by_column()
        self._check_causal()
        padded = self._padded()
        attention = self._attention(padded)
        with nullcontext() if attention else cpu.grouped(self.model):
            sampler = columns or cacheless or self._sampler()
            common = columns or cacheless or self._scorer(1) or (None if sampler else self._sampler(1))
            return {
                "attention": attention,
                "padding": columns or self._padding(padded),
                "sampler": sampler,
                # A pass over what is common is followed by those over prompts.
                "scorer": columns or cacheless or (self._scorer(None) if common else None),
                "common": common,
                "head": self._head() if scores else None,
            }

    # ---- what names say

    def _by_column(self) -> str | None:
        names = [name for name in _BY_COLUMN if getattr(self.config, name, None)]
        return f"it {_BY_COLUMN[names[0]]} ({names[0]}), which padding moves" if names else None

    # ---- what is computed

    def _truth(self, use_cache: bool) -> tuple[Any, Any]:
        """Each row alone: no padding, nothing before it."""
        one, two = (torch.tensor([row], device=self.device) for row in self.rows)
        return self.model(one, use_cache=False), self.model(two, use_cache=use_cache)

    def _check_causal(self) -> None:
        """The plain way: both rows padded on the right, and one of them with another last token."""
        other = [*self.rows[1][:-1], self.rows[0][0]]
        rows = [*self.rows, other]
        longest = len(other)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        got = self.model(**inputs(self.model, ids, mask), use_cache=False).logits.float()
        pairs = [(actual[: len(truth)], truth) for actual, truth in zip(got, self.truth, strict=False)]
        if off := self._off([*pairs, (got[2, :-1], self.truth[1][:-1])]):
            raise SteerError(
                f"{type(self.model).__name__}: a token's logits change with later tokens or with other rows "
                f"of the batch ({off}); sampling and scoring need a causal language model, load another"
            )

    def _attention(self, padded: torch.Tensor) -> str | None:
        if self.device.type != "cpu":
            return None
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for fused_from in (None, 1):  # rows as short as these, and as long ones are computed
            with cpu.grouped(self.model, fused_from):
                seen.append((self._padded(), padded))
        if off := self._off(seen):
            return f"grouped attention differs ({off})"
        off = self._off(self._attention_gradients(), ROUNDED_ATTENTION)
        return f"gradients of grouped attention differ ({off})" if off else None

    def _attention_gradients(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Gradients of query, key and value in every attention module of the model: both grouped forms and
        transformers' own.
        """
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def watched(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **kwargs: Any,
        ) -> Any:
            def gradient(function: Callable) -> torch.Tensor:
                with torch.inference_mode(False), torch.enable_grad():
                    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
                    out = function(module, *leaves, attention_mask, **kwargs)[0].float()
                    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
                    found = torch.autograd.grad((out * weights).sum(), leaves)
                return torch.cat([one.float().flatten() for one in found])[None]

            expected = gradient(plain)
            for fused_from in (None, 1):
                pairs.append((gradient(partial(cpu.grouped_attention, fused_from=fused_from)), expected))
            return plain(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register("sdpa", watched)
        try:
            self._padded()
        finally:
            AttentionInterface.register("sdpa", plain)
        return pairs

    def _padding(self, padded: torch.Tensor) -> str | None:
        pairs = zip(padded, self.truth, strict=True)
        off = self._off([(actual[-len(truth) :], truth) for actual, truth in pairs])
        return f"padding on the left changes its logits ({off})" if off else None

    def _padded(self) -> torch.Tensor:
        """Logits of both rows, padded on the left, and zero at the padding."""
        ids, mask = pad_left(self.rows, self.device)
        logits = self.model(**inputs(self.model, ids, mask), use_cache=False).logits.float()
        return logits.masked_fill(mask[..., None] == 0, 0)

    def _sampler(self, worth: int | None = None) -> str | None:
        """Prompts read once, their rows repeated and put in another order, then token by token."""
        if worth and window(self.config) <= max(_PROMPTS) + _MORE:
            return None  # there a beginning is never read for all
        pairs = []
        for order in ([1, 0, 1], [1, 1]):  # with padding, and without, where attention gets no mask
            prompts = sorted(set(order))
            which = torch.tensor([prompts.index(j) for j in order], device=self.device)
            rows = CachedRows(self.model, worth)
            steps = [rows.read([self.prompts[j] for j in prompts])[which]]
            rows.select(which)
            for i in range(_MORE):
                following = [self.rows[j][_PROMPTS[j] + i] for j in order]
                steps.append(rows.step(torch.tensor(following, device=self.device)))
            got = torch.stack(steps, 1).float()  # (rows, tokens, vocabulary)
            pairs += [(one, self.truth[j][_PROMPTS[j] - 1 :]) for one, j in zip(got, order, strict=True)]
        off = self._off(pairs)
        return f"logits with a cache differ from those without ({off})" if off else None

    def _scorer(self, worth: int | None) -> str | None:
        """A group's completions behind prompts that are read once: their logits, and what they depend on."""
        order = [1, 0, 1]
        ids = torch.tensor([self.rows[j][-_MORE:] for j in order], device=self.device)
        prompt_ids, prompt_mask = pad_left([self.prompts[j] for j in order], self.device)

        def shared() -> list[torch.Tensor]:
            seen: list[torch.Tensor] = []

            def head(labels: torch.Tensor, **inputs: Any) -> Scored:
                seen.append(self.model(**inputs, use_cache=False).logits.float())
                return Scored(torch.zeros_like(labels).float(), torch.zeros_like(labels).float())

            shared_scores(self.model, head, worth, prompt_ids, prompt_mask, ids, torch.ones_like(ids))
            return list(seen[0])

        expected = [self.truth[j][-_MORE - 1 : -1] for j in order]
        if off := self._off(list(zip(shared(), expected, strict=True))):
            return f"logits behind a prompt that is shared differ ({off})"
        if not has_states(self.model):
            return None  # keys and values are differentiated as ever

        def alone() -> list[torch.Tensor]:
            rows = [torch.tensor([self.rows[j]], device=self.device) for j in order]
            return [self.model(row, use_cache=False).logits.float()[0, -_MORE - 1 : -1] for row in rows]

        try:
            pairs = [(self._gradient(shared), self._gradient(alone))]
        except RuntimeError as error:  # a kernel without a backward pass
            return f"its recurrent states take no gradient ({str(error).splitlines()[0]})"
        off = self._off(pairs)
        return f"gradients through a prompt that is shared differ ({off})" if off else None

    def _gradient(self, run: Callable[[], list[torch.Tensor]]) -> torch.Tensor:
        """How the logits that `run` returns, weighted at random, move with all embeddings, (1, width)."""
        embeddings = cast(nn.Embedding, self.model.get_input_embeddings())
        moved = torch.zeros(embeddings.weight.shape[1], device=self.device)
        with torch.inference_mode(False), torch.enable_grad():
            moved.requires_grad_()
            handle = embeddings.register_forward_hook(lambda module, args, out: out + moved.to(out.dtype))
            with hooked(handle):
                logits = torch.stack(run())
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
            real = logits > -1e8
            return torch.autograd.grad((logits.where(real, 0.0) * weights).sum(), moved)[0][None]

    def _head(self) -> str | None:
        """trl's head against the log-probabilities of the model's own logits."""
        head, backbone = self.model.get_output_embeddings(), cast(PreTrainedModel, self.model.base_model)
        if backbone is self.model or backbone.get_output_embeddings() is not None:
            return "its backbone is not where trl's LM head looks for it (base_model)"
        if getattr(head, "weight", None) is None:
            return "it has no single matrix as LM head"
        prompts = [prompt[: min(_PROMPTS)] for prompt in self.prompts]
        prompt_ids, prompt_mask = pad_left(prompts, self.device)
        ids = torch.tensor([row[-_MORE:] for row in self.rows], device=self.device)
        batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        batch |= {"completion_ids": ids, "completion_mask": torch.ones_like(ids)}
        # Where each way takes the hidden states from: OPT's logits come from inside of its backbone.
        with hooked(backbone.register_forward_hook(_louder)):
            got = self.model(score_group=True, share=False, fused=True, **batch).log_probs
        with hooked(head.register_forward_pre_hook(lambda module, args: (_LOUDER * args[0], *args[1:]))):
            own = self.model(score_group=True, share=False, fused=False, **batch).log_probs
        off = float((got - own).norm() / own.norm())
        if not off <= (EXACT_HEAD if self.exact else ROUNDED):
            return f"trl's LM head differs from the model's own logits ({off:.1g} of log-probabilities)"
        return None

    def _off(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], rounded: float = ROUNDED) -> str | None:
        """
        How far logits (tokens, vocabulary) are from what they should be, where that is too far; `rounded` is
        what is allowed in half precision.
        """
        worst = 0.0
        for got, expected in pairs:
            real = expected > -1e8  # words that a model rules out
            got, expected = (x.where(real, 0.0) for x in (got, expected))
            scale = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
            distance = (got - expected).norm(dim=-1) / scale.clamp(min=1e-30)
            worst = max(
                worst, float((distance.max() if self.exact else distance.mean()).nan_to_num(torch.inf))
            )
        limit = self.limit if self.exact else rounded
        return f"{worst:.1g} of their size, {limit} allowed" if worst > limit else None


def _special(config: dict[str, Any]) -> set[int | None]:
    """The special tokens that a configuration names. Several tokens may end a text (Llama 3, Gemma 3)."""
    named = [value for key, value in config.items() if key.endswith("token_id")]
    return {token for value in named for token in (value if isinstance(value, (list, tuple)) else [value])}


def _rounds(head: nn.Module, seen: list[bool]) -> RemovableHandle:
    """Whether `head` computes in half precision, as in accelerate's forward of mixed precision."""
    return head.register_forward_hook(lambda module, args, out: seen.append(out.dtype.itemsize < 4))


def _louder(backbone: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook that multiplies the hidden states which the backbone returns by `_LOUDER`."""
    hidden = _LOUDER * output[0]
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output

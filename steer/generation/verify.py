"""
Which fast paths of sampling and scoring compute what the model computes, found on the model itself.

`fast_paths(model)` compares, once per model and in about twenty short forward passes, each fast path with
plain passes over single rows without padding or cache. What differs is left out with one log line, as is what
a named property of the model rules out: a cache of another kind, a forward that takes none, a decoder that is
not where trl looks for it. Sampling, scoring, the recipes' evaluation and `steer eval` all ask
here. A model for which plain passes are wrong too, since its logits depend on later tokens, is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from steer.generation import cpu
from steer.generation.scoring import SCORERS
from steer.generation.trial import Trial
from steer.sites import input_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastPaths:
    """
    Of each fast path None, where it is right on the model, or the reason why the plain one is taken.

    Attributes:
        attention: Grouped attention on the CPU (`steer.generation.cpu`); else the model's own.
        padding: Prompts of unequal length padded on the left, as `generate()` and trl expect them. Neither
            sampling nor scoring needs it.
        sampler: A KV cache whose rows are repeated and dropped; else rows are read again for each token.
        scorer: A prompt is read once for its group; else every row is read whole.
        common: What all prompts begin with is read once; else by each of them.
        head: trl's fused LM head; else the model's own logits.
    """

    attention: str | None = None
    padding: str | None = None
    sampler: str | None = None
    scorer: str | None = None
    common: str | None = None
    head: str | None = None

    def scoring(self) -> dict[str, bool]:
        """Arguments of `model(score_group=True)`."""
        return {"share": not self.scorer, "common": not self.common, "fused": not self.head}


_PLAIN = {
    "attention": "attention stays as it is",
    "padding": "prompts are not padded on the left",
    "sampler": "sampling reads every row again for each token, which is slow",
    "scorer": "scoring reads a prompt for each of its samples",
    "common": "what prompts begin with in common is read for each",
    "head": "log-probabilities come from the model's own logits",
}

# By model, and by whether scoring had been added to it, since only then there is a head to try.
_found: WeakKeyDictionary[PreTrainedModel, dict[bool, FastPaths]] = WeakKeyDictionary()

_routed: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@contextmanager
def fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model on the CPU uses grouped attention (`steer.generation.cpu`) where it was found right."""
    with nullcontext() if fast_paths(model).attention else cpu.grouped(model):
        yield


@torch.no_grad()
def fast_paths(model: PreTrainedModel) -> FastPaths:
    """
    Which fast paths are right on `model`; found on the first call for a model, outside of its forward pass.

    Vectors attached to the model are off meanwhile, its modules in eval mode. No random numbers are drawn.
    Where the model is sharded every process must call it. The head is tried where
    `steer.generation.scoring.add_group_scoring` has been called.

    Raises:
        SteerError: If a token's logits depend on later tokens or on other rows of the batch, so that no
            completion has a probability that could be computed in one pass.
    """
    scores = model in SCORERS
    known = _found.setdefault(model, {})
    if scores not in known:
        with _quiet(model):
            verified = FastPaths(**Trial(model).reasons(scores))
        told = {reason for paths in known.values() for reason in vars(paths).values()}
        for name, reason in vars(verified).items():
            if reason and reason not in told and not (name == "common" and verified.scorer):
                log.warning("%s: %s; %s", type(model).__name__, reason, _PLAIN[name])
        known[scores] = verified
    return known[scores]


@torch.no_grad()
def no_router_loss(model: PreTrainedModel) -> str | None:
    """Why trl cannot compute the load-balancing loss of this mixture of experts; None where it can."""
    config = model.config.get_text_config()
    for name in ("num_experts", "num_experts_per_tok"):
        if getattr(config, name, None) is None:
            return f"trl's loss of the router reads {name}, which {type(config).__name__} lacks"
    if model not in _routed:
        ids = torch.tensor([[3, 4]], device=input_device(model))
        with _quiet(model):
            out = model.base_model(ids, output_router_logits=True, use_cache=False)
        _routed[model] = bool(getattr(out, "router_logits", None))
    return None if _routed[model] else "it gives no router logits"


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    vectors = model.__dict__.get("steering_vectors")
    model.eval()
    try:
        with (
            vectors.disabled() if vectors else nullcontext(),
            torch.autocast(model.device.type, enabled=False),
        ):
            yield
    finally:
        for module in training:
            module.training = True

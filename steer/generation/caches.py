"""
Caches of transformers whose rows are selected and repeated: which those are, and how a gradient flows through
them. Attention keeps keys and values; linear attention, state spaces and convolutions keep states.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from steer.compat import cache_name, takes

# Layers of a cache whose rows can be selected and repeated.
SELECTABLE = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DynamicIndexedLayer,
    LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
    *[getattr(cache_utils, name) for name in ("DummyLayer",) if hasattr(cache_utils, name)],  # since 5.24
)
# What makes a mask with a window. Moshi's cache has one and its masks have none, after thousands of tokens.
_WINDOW_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")


def no_cache(model: PreTrainedModel) -> str | None:
    """Why `model` cannot take transformers' `DynamicCache`; None where it may."""
    if cache_name(model) is None:
        own = next((name for name in ("state", "mems") if takes(model, name)), None)
        return "its forward takes no cache" + (f" ({own} instead)" if own else "")
    config = model.config.get_text_config()
    if getattr(config, "num_hidden_layers", None) is None:
        return "its config has no num_hidden_layers, which a cache is made by"
    try:
        DynamicCache(config=config)
    except KeyError as unknown:
        return f"transformers knows no cache for its layers of type {unknown.args[0]}"
    return None


def other_cache(model: PreTrainedModel, made: Any) -> str | None:
    """Why the cache that `model` made is none of `SELECTABLE` layers; None where it is."""
    if type(made) is not DynamicCache:
        return f"it keeps {'no cache' if made is None else f'a {type(made).__name__}'}"
    fresh = DynamicCache(config=model.config.get_text_config())
    if bound := vars(made).keys() - vars(fresh).keys():
        return f"it binds {', '.join(sorted(bound))} to its cache, for rows as they were"
    kinds, ours = ({type(layer) for layer in cache.layers} for cache in (made, fresh))
    if kinds != ours:
        return f"its cache has {_names(kinds)} where its config says {_names(ours)}"
    if not kinds <= set(SELECTABLE):
        return f"its cache has {_names(kinds - set(SELECTABLE))}, whose rows may not be selectable"
    code = sys.modules[type(model.base_model).__module__]
    if any(made.is_sliding) and not any(hasattr(code, name) for name in _WINDOW_MASKS):
        return "its cache forgets what lies before its sliding_window, and its masks do not"
    return None


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def has_states(model: PreTrainedModel) -> bool:
    """Whether the cache of `model` holds states of layers that are not attention."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return any(isinstance(layer, LinearAttentionLayer) for layer in layers)


class _Replaced(LinearAttentionLayer):
    """
    Mixed into a layer of transformers' cache, it keeps a new state in a new tensor: autograd may still need
    the one before, over which transformers writes.
    """

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        if (before := self.recurrent_states[state_idx]) is not None:
            self.recurrent_states[state_idx] = torch.empty_like(before)
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if (before := self.conv_states[state_idx]) is not None:
            self.conv_states[state_idx] = before.clone()
        return super().update_conv_state(conv_states, state_idx, *args, **kwargs)


@functools.cache
def _replacing(kind: Any) -> type[LinearAttentionLayer]:
    return type(f"_Replaced{kind.__name__}", (_Replaced, kind), {})


def differentiable(cache: DynamicCache) -> DynamicCache:
    """`cache`, still empty, so that gradients flow through the recurrent states that it will hold."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            kind: Any = type(layer)
            layer.__class__ = _replacing(kind)
    return cache


def select(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """
    The cache of some rows, repeated as asked, still part of the autograd graph; `cache` itself stays as it
    is.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        # Not `keys[rows]`: on a CPU its backward pass adds rows with atomic operations, in the order in which
        # the threads come. That of index_select adds them one after the other, and takes a fifth of the time.
        if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0:
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = (x.index_select(0, rows) for x in (layer.keys, layer.values))
        if isinstance(layer, LinearAttentionLayer):
            for name, value in list(vars(layer).items()):
                if isinstance(value, dict):  # by the number of the state, of which a layer may have several
                    setattr(layer, name, {key: _of(state, rows) for key, state in value.items()})
        if isinstance(layer, DynamicIndexedLayer):
            layer.indexer_keys = _of(layer.indexer_keys, rows)
            if (position := getattr(layer, "indexer_position_ids", None)) is not None:  # transformers 5.24
                vars(layer)["indexer_position_ids"] = position.index_select(1, rows)
    return chosen


def _of(state: Any, rows: torch.Tensor) -> Any:
    return state.index_select(0, rows) if isinstance(state, torch.Tensor) else state

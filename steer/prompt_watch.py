"""
Which tokens of a forward pass the vectors steer, where `positions` is not 'all' or there is a condition: told
before each pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from steer.compat import cache_in
from steer.errors import SteerError
from steer.hooks import Site, watch
from steer.kinds import SteeringState
from steer.sites import find_decoder


class PromptWatch:
    """
    Lets the vectors of `state` know which tokens they steer: before each forward pass of `model`, and during
    its `generate()` where the prompt ends; during one, the states at `asked`, where a condition is read.
    `remove()` ends it; of several, the last one first.
    """

    def __init__(self, model: nn.Module, state: SteeringState, asked: Site | None = None):
        self.model = model
        decoder = find_decoder(model)
        self.handles = [
            decoder.backbone.register_forward_pre_hook(partial(_place, state), prepend=True, with_kwargs=True)
        ]
        if asked is not None:
            self.handles.append(watch(state.decide, asked, decoder.hidden_size))
        # Assisted decoding and prefilling in chunks do not begin with a pass over the prompt alone.
        self.before = model.__dict__.get("generate")
        if hasattr(model, "generate"):
            model.__dict__["generate"] = partial(_generate, state, model, model.generate)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.model.__dict__.pop("generate", None)
        if self.before is not None:
            self.model.__dict__["generate"] = self.before


def _generate(state: SteeringState, model: nn.Module, generate: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` with the prompt's length told, unless a caller tells."""
    configs = [kwargs.get("generation_config"), *args[1:2], getattr(model, "generation_config", None)]
    guidance = [
        kwargs.get("guidance_scale"),
        *(getattr(config, "guidance_scale", None) for config in configs),
    ]
    if next((scale for scale in guidance if scale is not None), 1) != 1:
        raise SteerError(
            f"{state.what} cannot be told under guidance_scale: the negative prompt has a length of its own; "
            "generate without it, or use vectors with positions='all' and no condition"
        )
    given = [kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    prompt = next((tensor for tensor in given if tensor is not None), None)
    length = 1 if prompt is None else prompt.shape[1]  # without a prompt, BOS
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", 0) == 2:
        # of all tokens, also where the new ones alone go on with a cache
        length = max(length, mask.shape[1])
    before = state.prompt_length
    if before is None:
        state.prompt_length = length
    try:
        return generate(*args, **kwargs)
    finally:
        state.prompt_length = before


def _place(state: SteeringState, backbone: nn.Module, args: tuple, kwargs: dict) -> None:
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    others = (kwargs[name] for name in ("state", "mems") if kwargs.get(name) is not None)
    past = cache_in(kwargs)
    if past is None:
        past = next(others, None)
    if state.enabled:
        state.place(tokens.shape[1], past, tokens.device, len(tokens))
    else:  # the base model needs no prompt length
        state.count(tokens.shape[1], past)

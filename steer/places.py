"""
The activations of a site, read and changed. No module returns the stream between attention and MLP: it
is what the layer is given, plus what the module at `resid_mid` adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from steer.hooks import Site, hook, hooked, one_stream, watch
from steer.probe import verify
from steer.sites import find_decoder, find_sites, probing

# Largest difference, relative to the stream, at which a layer counts as the sum of its parts.
ROUNDING = 1e-2


@dataclass(frozen=True)
class Place:
    """
    Where the activations of a site are, in one layer.

    Args:
        site: the module whose input or output they are.
        hidden_size: their width; a pass raises SteerError where they are not one stream of it.
        before: at resid_mid, where the stream is to which that output is added.
    """

    site: Site
    hidden_size: int
    before: Site | None = None

    def watch(self, seen: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Call `seen` with the activations (batch, tokens, hidden_size), as steering leaves them."""
        if self.before is None:
            return [watch(seen, self.site, self.hidden_size)]
        given: list[Tensor] = []
        return [
            watch(given.append, self.before, self.hidden_size),
            watch(lambda added: seen(given.pop() + added), self.site, self.hidden_size),
        ]

    def change(self, change: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
        """Replace the activations by what `change` makes of them, after steering."""
        if self.before is None:

            def change_one(hidden: Tensor) -> Tensor:
                return change(one_stream(hidden, self.site.module, self.hidden_size))

            return [hook(change_one, self.site, first=False)]
        given: list[Tensor] = []

        def changed(added: Tensor) -> Tensor:
            stream = given.pop() + added
            return added + (change(stream) - stream)

        before = watch(given.append, self.before, self.hidden_size)
        return [before, hook(changed, self.site, first=False)]


def find_places(model: Any, layers: Sequence[int], site: str) -> list[Place]:
    """
    The activations at `site` in each of `layers`.

    Raises:
        SteerError: the architecture has no such place; at resid_mid also where the layer does not add the
            module's output to the stream as it is (Granite scales it).
    """
    decoder = find_decoder(model)
    vectors = model.__dict__.get("steering_vectors")  # off, they need not know where a prompt ends
    with vectors.disabled() if vectors is not None else nullcontext():
        sites = find_sites(decoder, list(layers), site)
        if site != "resid_mid":
            return [Place(place, decoder.hidden_size) for place in sites]
        verify(decoder, layers, "constant", site, sites)
    before = find_sites(decoder, list(layers), "resid_pre")
    pairs = zip(sites, before, strict=True)
    return [Place(place, decoder.hidden_size, stream) for place, stream in pairs]


def adds_as_is(model: Any, layer: int) -> bool:
    """
    Whether a layer adds what its attention and its MLP return to the stream as it is; some architectures put
    it through a norm or a factor first. One pass without vectors tells.

    Raises:
        SteerError: the architecture has no such places.
    """
    decoder = find_decoder(model)
    sites = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    places = {site: find_places(model, [layer], site)[0] for site in sites}
    vectors = model.__dict__.get("steering_vectors")
    off = nullcontext() if vectors is None else vectors.disabled()
    seen: dict[str, Tensor] = {}
    with off, hooked() as handles, probing(decoder.backbone) as ids:
        for site, place in places.items():
            handles += place.watch(partial(seen.__setitem__, site))
        decoder.backbone(ids, use_cache=False)
    seen = {site: value.float() for site, value in seen.items()}
    added = seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"]
    error = torch.linalg.vector_norm(added - seen["resid_post"]) / torch.linalg.vector_norm(added)
    return bool(error < ROUNDING)

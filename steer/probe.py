"""
Does a vector at a site change the residual stream by what `steer.config.SITES` says? Measured on the model
itself: in one short forward pass of two equal rows the second is steered at every layer in turn, and compared
with the first.

resid_pre, resid_post   what the layer is given, or gives to the next one, moves by exactly the vector
resid_mid               what the layer's next module reads after the attention moves by exactly the vector
attn_out, mlp_out       the module is called once, with hidden states, and its output reaches the stream
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from steer.config import SITES
from steer.errors import SteerError
from steer.hooks import hidden_in, hidden_out, hook, hooked, replace_in
from steer.sites import Decoder, Site, find_steered, out_of_reach, probing

logger = logging.getLogger(__name__)

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")


def verify(decoder: Decoder, layers: Sequence[int], kind: str, site: str, places: Sequence[Site]) -> None:
    """
    Raise SteerError unless vectors at `places`, one for each of `layers`, do what `site` says.

    Where the weights are not at hand (on the meta device, or sharded over processes), nothing is measured,
    and the log says so.

    Args:
        kind: a key of `steer.config.KINDS`; adaptive vectors are at the down-projection whatever `site` is.
        site: a key of `steer.config.SITES`.
    """
    if not layers:
        return
    if out_of_reach(decoder.backbone):
        logger.warning(
            "the weights are not at hand (meta device or sharded): site %s is not checked on this model", site
        )
        return
    named = "down-projection" if kind == "adaptive" else site
    probe = _Probe(decoder, layers, named, places)
    faults = probe.faults()
    if probe.overflowed:
        logger.warning(
            "the model's own hidden states are not finite in %s: site %s is not checked in layers %s; load "
            "it in bfloat16 or float32",
            next(decoder.layers.parameters()).dtype,
            site,
            probe.overflowed,
        )
    if not faults:
        return
    layer = min(faults)
    if kind == "adaptive":
        raise SteerError(f"kind='adaptive' does not work on this model: {faults[layer]}; use kind='constant'")
    works = [other for other in SITES if other != site and _works(decoder, layer, other)]
    rest = sorted(set(layers) - set(faults))
    fix = (
        f"sites that work in this layer: {', '.join(works)}" if works else "no other site works in this layer"
    )
    if rest:
        fix += f"; layers of this model that work: {', '.join(map(str, rest))}"
    raise SteerError(f"site={site!r} does not work on this model: {faults[layer]}; {fix}")


def _works(decoder: Decoder, layer: int, site: str) -> bool:
    try:
        return not _Probe(decoder, [layer], site, find_steered(decoder, [layer], site)).faults()
    except SteerError:
        return False


class _Probe:
    """
    One pass over two equal rows of three tokens. Before each layer the second row is made equal to the first
    again, so that what differs after it is what this layer's vector did.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[int], site: str, places: Sequence[Site]):
        self.decoder, self.site = decoder, site
        self.places = dict(zip(layers, places, strict=True))
        self.running: int | None = None  # the layer that the pass is in
        self.previous: int | None = (
            None  # the one before: a model of images leaves layers out where there are none
        )
        self.size = 1.0  # of the stream that this layer was given, root mean square
        self.added: dict[int, torch.Tensor] = {}  # (hidden_size,)
        self.calls: dict[int, int] = {}  # how often each vector was added: once to each residual stream
        # (2, tokens, hidden_size): the rows where the change is measured
        self.moved: dict[int, torch.Tensor] = {}
        self.given: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}
        self.reasons: dict[int, str] = {}
        self.overflowed: list[int] = []  # layers whose own hidden states are not finite

    def faults(self) -> dict[int, str]:
        """Why the vector of a layer does not do what its site says, by layer; empty where all do."""
        with hooked() as handles:
            for layer, place in self.places.items():
                handles.append(hook(partial(self._steer, layer), place))
            for layer, block in enumerate(self.decoder.layers):
                # First, before the vector of `resid_pre`; and last, after that of `resid_post`.
                handles.append(
                    block.register_forward_pre_hook(
                        partial(self._enter, layer), prepend=True, with_kwargs=True
                    )
                )
                handles.append(block.register_forward_pre_hook(partial(self._read, layer), with_kwargs=True))
                handles.append(block.register_forward_hook(partial(self._leave, layer)))
                if self.site == "resid_mid":
                    for child in block.children():
                        handles.append(
                            child.register_forward_pre_hook(partial(self._child, layer), with_kwargs=True)
                        )
            with probing(self.decoder.backbone) as ids:
                self.decoder.backbone(ids.repeat(2, 1), use_cache=False)
        for layer in self.places:
            if layer not in self.reasons and (fault := self._judge(layer)):
                self.reasons[layer] = fault
        return self.reasons

    # ---- the pass

    def _enter(self, layer: int, block: nn.Module, args: tuple, kwargs: dict) -> Any:
        hidden = hidden_in(args, kwargs)
        if self.previous in self.places and self.site == "resid_post":
            self.moved[self.previous] = hidden
        self.running = layer
        rows = _rows(hidden)
        if rows is None:
            return None
        self.size = _size(hidden.select(rows, 0))
        equal = hidden.index_select(rows, torch.zeros(2, dtype=torch.long, device=hidden.device))
        return replace_in(args, kwargs, equal)

    def _read(self, layer: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.site == "resid_pre":
            self.moved[layer] = hidden_in(args, kwargs)

    def _steer(self, layer: int, hidden: Any, *read: torch.Tensor) -> Any:
        name = f"layer {layer}'s {type(self.places[layer].module).__name__}"
        streams = self.places[layer].streams
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if self.running != layer or self.calls[layer] > (streams.count if streams else 1):
            self.reasons[layer] = f"{name} runs more than once in a pass: the vector would be added each time"
            return hidden
        shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        if shape != (2, 3, self.decoder.hidden_size):
            self.reasons[layer] = (
                f"at {name} the hidden states of 2 rows of 3 tokens have the shape {shape}, expected "
                f"{(2, 3, self.decoder.hidden_size)}"
            )
            return hidden
        if layer not in self.added:
            size = max(self.size, _size(hidden[0]))
            # Signs at random: no norm that centres takes them out.
            generator = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, (self.decoder.hidden_size,), generator=generator) * 2 - 1
            self.added[layer] = (size * signs).to(hidden.device, hidden.dtype)
        return torch.stack([hidden[0], hidden[1] + self.added[layer]])

    def _child(self, layer: int, child: nn.Module, args: tuple, kwargs: dict) -> None:
        given = hidden_in(args, kwargs)
        if layer not in self.added or layer in self.moved or isinstance(child, nn.Dropout):
            return
        if isinstance(given, torch.Tensor) and given.shape == (2, 3, self.decoder.hidden_size):
            self.moved[layer] = given

    def _leave(self, layer: int, block: nn.Module, args: tuple, output: Any) -> None:
        self.running, self.previous = None, layer
        if layer in self.places:
            self.made[layer] = hidden_out(output)
            if self.site == "resid_post":  # until another layer reads it
                self.moved[layer] = self.made[layer]

    # ---- what it showed

    def _judge(self, layer: int) -> str | None:
        """What is wrong with the vector of `layer`, if anything."""
        place = self.places[layer].module
        name = f"layer {layer}'s {type(place).__name__}"
        if layer not in self.added:
            return f"{name} is never called in a forward pass over text, so that a vector there has no effect"
        made = self.made[layer]
        rows = _rows(made)
        if rows is not None and not made.select(rows, 0).isfinite().all():
            self.overflowed.append(layer)
            return None
        if rows is not None and torch.equal(made.select(rows, 1), made.select(rows, 0)):
            return f"a vector at {name} does not change what the layer returns"
        if self.site not in RESIDUAL:
            return None
        moved = self.moved.get(layer)
        if moved is None:
            return f"no module of layer {layer} reads the stream after {type(place).__name__}"
        # On the CPU, since GPUs of Apple have no float64.
        added, streams = self.added[layer].cpu().double(), self.places[layer].streams
        parts = streams.split(moved) if streams else (moved,)
        change = torch.stack([part[1] - part[0] for part in parts]).cpu()
        change = torch.where(change.isfinite(), change.double(), added)  # the probe was too much for float16
        error = ((change - added).norm(dim=-1) / added.norm()).max().item()
        # Rounding of a stream about as large as the probe: at most 0.009 in bfloat16 and 2e-7 in float32 on
        # models of 135M and 270M parameters.
        if error <= (1e-3 if moved.dtype in (torch.float32, torch.float64) else 0.05):
            return None
        factor = ((change @ added) / (added @ added)).mean().item()
        return (
            f"a vector s in layer {layer} moves {SITES[self.site].partition(' (')[0]} by {factor:.3g} s, "
            f"{error:.2g} |s| from the s that is expected"
        )


def _rows(hidden: Any) -> int | None:
    """The dimension of the two rows, which that of the three tokens follows; None without."""
    if isinstance(hidden, torch.Tensor):
        for dim in range(hidden.dim() - 1):
            if tuple(hidden.shape[dim : dim + 2]) == (2, 3):
                return dim
    return None


def _size(hidden: torch.Tensor) -> float:
    """Root mean square; 1 for zeros."""
    return hidden.cpu().double().square().mean().sqrt().item() or 1.0

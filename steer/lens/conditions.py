"""
Conditions: several settings of one model as blocks of one batch, and paths: which parts of the model
a change may pass on its way to the output.

A batch of `conditions * rows` sequences holds every row once a condition, condition by condition. A condition
says which layers' vectors are on in it. With a path, it also says which components let the change
through: all others give exactly what they give in the condition's reference condition, which runs beside it
on the same tokens. So nothing is stored, and it works in generation too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from steer import hooks
from steer.errors import SteerError
from steer.hooks import Site, hidden_out, hooked, replace_out
from steer.lens.attention_inputs import Projection, dead, projections
from steer.lens.subject import Subject
from steer.sites import Decoder, find_sites, last_writer

RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class EffectPath:
    """
    Where a change of the residual stream may pass. `attention` and `mlp` are the layers whose module passes
    it on (None: all of them), `heads` the query heads of those attentions that do, `residual` whether the
    change itself is in the stream that the final norm reads. `q`, `k` and `v`: the heads of those attentions
    whose queries, keys and values are computed from the input with the change (None: all of them); query
    heads for `q`, key-value heads for `k` and `v`.
    """

    residual: bool = True
    attention: frozenset[int] | None = None
    mlp: frozenset[int] | None = None
    heads: frozenset[int] | None = None
    q: frozenset[int] | None = None
    k: frozenset[int] | None = None
    v: frozenset[int] | None = None

    @property
    def splits_input(self) -> bool:
        """Whether some queries, keys or values do not get the change."""
        return (self.q, self.k, self.v) != (None, None, None)

    def passes(self, kind: str, layer: int) -> bool:
        allowed: frozenset[int] | None = getattr(self, kind)
        return allowed is None or layer in allowed


NONE: frozenset[int] = frozenset()
EVERYTHING, NOTHING = EffectPath(), EffectPath(False, NONE, NONE)


@dataclass(frozen=True)
class Condition:
    """
    The layers whose vectors are on; with a path, relative to condition number `reference`.

    directions: (hidden_size,) by layer, what is added in place of the layers' own vectors (of an adaptive
    vector, in place of its direction: the read-out stays). Layers that it does not name keep their own.
    """

    layers: frozenset[int] = NONE
    effect_path: EffectPath | None = None
    reference: int = 0
    directions: Mapping[int, torch.Tensor] | None = field(default=None, compare=False, repr=False)

    def differing(self, other: Condition) -> frozenset[int]:
        """The layers at which this condition and another one add different vectors."""
        same = self.directions is other.directions
        return self.layers ^ other.layers if same else self.layers | other.layers


BASE = Condition()


def steered(subject: Subject) -> Condition:
    """The condition in which every vector is on."""
    return Condition(frozenset(subject.layers))


@contextmanager
def open_lanes(subject: Subject, conditions: Sequence[Condition]) -> Iterator[None]:
    """Inside, a batch of len(conditions) equal blocks of rows runs each block in its condition."""
    vectors, decoder = subject.vectors, subject.decoder
    for condition in conditions:
        if condition.effect_path is not None and conditions[condition.reference].effect_path is not None:
            raise SteerError(
                f"condition {condition.reference} is a reference and has a path itself; give it none"
            )
        if missing := sorted(condition.layers - set(vectors.layers)):
            raise SteerError(f"layers {missing} have no vector; the artifact steers {vectors.config.layers}")
    modules: dict[int, Any] = {layer: decoder.layers[layer].steering for layer in vectors.layers}
    state = next(iter(modules.values())).state
    before, state.enabled = state.enabled, True
    try:
        with hooked() as handles:
            for layer, module in modules.items():
                on = torch.tensor([layer in condition.layers for condition in conditions])
                drawn = {
                    i: condition.directions[layer]
                    for i, condition in enumerate(conditions)
                    if condition.directions is not None and on[i] and layer in condition.directions
                }
                if drawn or not on.all():
                    # First in line, so that whoever watches the vector sees what the conditions get.
                    handles.append(module.register_forward_hook(partial(_choose, on, drawn), prepend=True))
            if any(condition.effect_path for condition in conditions):
                _Routes(subject, decoder, conditions).hook(handles)
            yield
    finally:
        state.enabled = before


def _choose(
    on: torch.Tensor, drawn: Mapping[int, torch.Tensor], module: Any, args: tuple, output: torch.Tensor
) -> torch.Tensor:
    """The vector's output where it is on, another direction's in the conditions `drawn`, else its input."""
    hidden, rows = args[0], len(output) // len(on)
    if drawn:
        size = output.shape[-1]
        change = torch.zeros(len(on), size, device=output.device, dtype=output.dtype)
        for i, direction in drawn.items():
            change[i] = module.state.scale * direction.to(output.device)
        change = change.repeat_interleave(rows, 0)[:, None]
        if len(args) > 1:
            change = module.coefficient(args[1])[..., None] * change
        other = torch.tensor([i in drawn for i in range(len(on))], device=output.device)
        output = torch.where(
            other.repeat_interleave(rows)[:, None, None], module.state.add(hidden, change), output
        )
    return torch.where(on.to(output.device).repeat_interleave(rows)[:, None, None], output, hidden)


class _Routes:
    """
    The hooks that hold components at the reference condition's output, and take the change out of the stream.
    """

    def __init__(self, subject: Subject, decoder: Decoder, conditions: Sequence[Condition]):
        self.decoder, self.conditions = decoder, conditions
        self.injected = torch.empty(
            0
        )  # what the vectors have added so far, (conditions, rows, tokens, hidden_size)
        self.routed = {
            i: condition.effect_path
            for i, condition in enumerate(conditions)
            if condition.effect_path is not None
        }
        self.site = subject.vectors.config.site
        self.direct = subject.vectors.config.kind != "adaptive" and self.site in RESIDUAL_SITES
        self.sources: set[int] = set()  # the layers whose vectors are on in one of two conditions alone
        for i in self.routed:
            self.sources |= conditions[i].differing(conditions[conditions[i].reference])
        if len(self.sources) > 1 and not self.direct:
            where = subject.vectors.config.kind if self.site in RESIDUAL_SITES else self.site
            raise SteerError(
                f"routes of several {where} vectors at once are not defined: a vector inside a module has no "
                "stream of its own to follow; take one layer at a time"
            )
        paths = self.routed.values()
        split = any(effect_path.splits_input for effect_path in paths)
        self.heads = heads(subject) if split or any(effect_path.heads for effect_path in paths) else 0
        self.groups = groups(subject) if split else 0

    def hook(self, handles: list[Any]) -> None:
        """Adds its hooks to `handles`, as they come: SteerError where a layer has no module to hold."""
        num_hidden_layers = self.decoder.num_hidden_layers
        if not self.sources:
            return
        first = min(self.sources)
        starts = {  # the first layer whose module reads the change
            "attention": first + (not (self.direct and self.site == "resid_pre")),
            "mlp": first + (not (self.direct and self.site in ("resid_pre", "resid_mid"))),
        }
        for kind, site in (("attention", "attn_out"), ("mlp", "mlp_out")):
            for layer in range(starts[kind], num_hidden_layers):
                (place,) = find_sites(self.decoder, [layer], site)
                if held := [
                    i for i, effect_path in self.routed.items() if not effect_path.passes(kind, layer)
                ]:
                    # First in line: a vector on this module's output is added after it.
                    handles.append(
                        place.module.register_forward_hook(partial(self._hold, held), prepend=True)
                    )
                some = {
                    i: r.heads
                    for i, r in self.routed.items()
                    if r.heads is not None and r.passes(kind, layer)
                }
                if kind == "attention" and some:
                    projection = output_projection(place.module, self.heads, self.decoder.hidden_size)
                    handles.append(projection.register_forward_pre_hook(partial(self._hold_heads, some)))
                split = {i: r for i, r in self.routed.items() if r.splits_input and r.passes(kind, layer)}
                if kind == "attention" and split:
                    for part, where in projections(place.module, self.heads, self.groups).items():
                        live = {i: getattr(r, part) for i, r in split.items() if getattr(r, part) is not None}
                        hold = partial(self._hold_inputs, live, where)
                        handles.append(where.module.register_forward_hook(hold))
        if closed := [i for i, effect_path in self.routed.items() if not effect_path.residual]:
            for layer in self.sources:
                block = self.decoder.layers[layer]
                if self.direct:
                    vector = block.get_submodule("steering")
                    handles.append(vector.register_forward_hook(partial(self._note_vector, layer)))
                else:
                    handles.append(block.register_forward_hook(self._note_stream))
            handles.append(self.decoder.layers[-1].register_forward_hook(partial(self._take_out, closed)))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(self.conditions), -1, *x.shape[1:])

    def _hold(self, held: list[int], module: nn.Module, args: tuple, output: Any) -> Any:
        made = hidden_out(output)
        blocks = self._split(made).clone()
        for i in held:
            blocks[i] = blocks[self.conditions[i].reference]
        return replace_out(output, blocks.reshape(made.shape))

    def _hold_heads(self, some: Mapping[int, frozenset[int]], module: nn.Module, args: tuple) -> tuple:
        z = args[0]
        blocks = self._split(z).unflatten(-1, (self.heads, -1)).clone()
        for i, live in some.items():
            held = dead(live, self.heads)
            blocks[i, ..., held, :] = blocks[self.conditions[i].reference][..., held, :]
        return (blocks.reshape(z.shape), *args[1:])

    def _hold_inputs(
        self,
        some: Mapping[int, frozenset[int]],
        where: Projection,
        module: nn.Module,
        args: tuple,
        output: torch.Tensor,
    ) -> torch.Tensor:
        made = output.clone(memory_format=torch.contiguous_format)
        blocks = self._split(made)  # a view, as is what `where` makes of it
        for i, live in some.items():
            held = dead(live, where.heads)
            reference = blocks[self.conditions[i].reference]
            where.split(blocks[i])[..., held, :] = where.split(reference)[..., held, :]
        return made

    def _note_vector(self, layer: int, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        added = self._split(output - args[0])
        first = layer == min(self.sources)
        self.injected = added if first else self.injected.to(added.device) + added

    def _note_stream(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.injected = self._split(hidden_out(output))

    def _take_out(self, closed: list[int], module: nn.Module, args: tuple, output: Any) -> Any:
        made = hidden_out(output)
        blocks = self._split(made).clone()
        for i in closed:
            blocks[i] -= (self.injected[i] - self.injected[self.conditions[i].reference]).to(blocks.device)
        return replace_out(output, blocks.reshape(made.shape))


def heads(subject: Subject) -> int:
    """Query heads of an attention; SteerError for a model whose config does not say."""
    config = subject.model.config.get_text_config()
    if (count := getattr(config, "num_attention_heads", None)) is None:
        raise SteerError(f"the config of {type(subject.model).__name__} does not say how many heads it has")
    return int(count)


def groups(subject: Subject) -> int:
    """Key-value heads of an attention: as many as query heads where the config names no other number."""
    config = subject.model.config.get_text_config()
    return int(getattr(config, "num_key_value_heads", None) or heads(subject))


def output_projection(attention: nn.Module, heads: int, hidden_size: int) -> nn.Module:
    """
    The matrix that writes an attention's heads, side by side, into the stream: its input is (batch, tokens,
    heads * head size). SteerError where there is no such matrix.
    """
    writer = last_writer(attention, hidden_size)
    if writer is None or writer[1] % heads:
        raise SteerError(
            f"{type(attention).__name__} has no matrix that writes {heads} heads into the stream"
        )
    return writer[0]


@contextmanager
def watch(
    subject: Subject, seen: Callable[[int, torch.Tensor], None], layers: Sequence[int]
) -> Iterator[None]:
    """
    Inside, `seen(layer, stream)` gets the residual stream after each of `layers`, (batch, tokens,
    hidden_size), the layer's vector included: own hooks, which always run after those of the vectors.
    """

    blocks, size = subject.decoder.layers, subject.decoder.hidden_size
    with hooked(*(hooks.watch(partial(seen, layer), Site(blocks[layer]), size) for layer in layers)):
        yield

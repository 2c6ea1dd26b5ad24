"""
Paths through the queries, keys and values of single heads (the authors of arXiv 2509.06608 swap those of the
steered and the plain run in each direction), and the check that they are where they are looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from steer.errors import SteerError
from steer.hooks import hooked
from steer.lens.attention_inputs import PARTS, dead
from steer.lens.conditions import NONE, Condition, EffectPath, groups, heads, output_projection
from steer.lens.passes import passes
from steer.lens.subject import Row, Subject
from steer.sites import find_sites


def heads_of(subject: Subject, group: int) -> frozenset[int]:
    """The query heads that read one key-value head."""
    size = heads(subject) // groups(subject)
    return frozenset(range(group * size, (group + 1) * size))


def input_routes(subject: Subject, layer: int, parts: str) -> dict[str, EffectPath]:
    """
    Through queries, keys or values of the attention of `layer`, and through no other component: those of
    single heads are computed from the input with the change, all others from the input without it.

    Args:
        subject: the model with vectors.
        layer: of the attention.
        parts: letters of `PARTS`. With "q" alone there is a path for each query head, else for each key-value
            head, to which the queries of all heads that read it belong.

    Returns:
        The whole attention, the parts of all heads, and those of each.
    """
    if not parts or set(parts) - set(PARTS) or len(set(parts)) < len(parts):
        raise SteerError(f"{parts!r} names no inputs of an attention; give q, k, v or several, such as kv")
    only = frozenset([layer])

    def path(live: dict[str, frozenset[int]]) -> EffectPath:
        return EffectPath(False, only, NONE, **{part: live.get(part, NONE) for part in PARTS})

    queries = {head: frozenset([head]) for head in range(heads(subject))}
    if parts != "q":
        queries = {group: heads_of(subject, group) for group in range(groups(subject))}
    unit, told = "head" if parts == "q" else "group", "".join(part for part in PARTS if part in parts)
    every = {"q": frozenset(range(heads(subject))), **dict.fromkeys("kv", frozenset(range(groups(subject))))}
    return {
        "attention": EffectPath(False, only, NONE),
        f"{told}, all {unit}s": path({part: every[part] for part in parts}),
        **{
            f"{told}, {unit} {n}": path({part: some if part == "q" else frozenset([n]) for part in parts})
            for n, some in queries.items()
        },
    }


def check_inputs(subject: Subject, row: Row, layer: int, ends: Sequence[Condition], reference: int) -> None:
    """
    SteerError unless queries, keys and values of the attention of `layer` are where `projections` says: with
    those of all heads from the changed input the attention gives what it gives for that input as a whole,
    with none what it gives in the reference run, and those of one head change the output of no other.

    Args:
        subject: the model with vectors.
        row: the text to try it on.
        layer: of the attention.
        ends: the base and the steered run.
        reference: which of them the change is added to, or taken out of.
    """
    on, only = ends[1 - reference].layers, frozenset([layer])
    every = {"q": heads(subject), "k": groups(subject), "v": groups(subject)}
    whole = {part: frozenset(range(count)) for part, count in every.items()}
    paths = [EffectPath(False, only, NONE), EffectPath(False, only, NONE, **whole)]
    paths.append(EffectPath(False, only, NONE, **dict.fromkeys(PARTS, NONE)))
    own = []  # the heads that each of the following paths may change
    for part, count in every.items():
        for n in range(count):
            live = {**dict.fromkeys(PARTS, NONE), part: frozenset([n])}
            paths.append(EffectPath(False, only, NONE, **live))
            own.append(frozenset([n]) if part == "q" else heads_of(subject, n))
    conditions = [*ends, *(Condition(on, effect_path, reference) for effect_path in paths)]
    (place,) = find_sites(subject.decoder, [layer], "attn_out")
    projection = output_projection(place.module, heads(subject), subject.decoder.hidden_size)
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        z = args[0].unflatten(0, (len(conditions), -1)).unflatten(-1, (heads(subject), -1))
        seen.append(z.float().movedim(-2, 1).flatten(2))  # (conditions, heads, numbers)

    with hooked(projection.register_forward_pre_hook(keep)):
        list(passes(replace(subject, batch_size=len(conditions)), [row], conditions))
    (z,) = seen
    changes = (z - z[reference]).abs().amax(-1)  # (conditions, heads)
    rounding = 1e-4 if subject.model.dtype in (torch.float32, torch.float64) else 0.05
    allowed = 0.01 * changes[2].max() + rounding * z[reference].std()
    others = [changes[5 + n, dead(some, heads(subject))] for n, some in enumerate(own)]
    wrong = {
        "those of all heads together are not the attention": (z[3] - z[2]).abs().amax(),
        "the attention reads its input elsewhere too": changes[4].max(),
        "those of one head change other heads": torch.cat(others).max() if heads(subject) > 1 else 0,
    }
    for what, error in wrong.items():
        if not error <= allowed:
            raise SteerError(
                f"queries, keys and values of {type(place.module).__name__} are not where steer looks for "
                f"them: {what}; patch its heads as a whole (--heads without --qkv)"
            )

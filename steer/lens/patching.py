"""
Path patching: through which part of the model the vectors' effect reaches the output (arXiv 2509.06608, the
penultimate layer). A path (`conditions.EffectPath`) lets the change pass some components and holds all
others at what they give without it, in both directions: added to the base run, and removed from the steered
run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import SteerError
from steer.lens.conditions import (
    BASE,
    EVERYTHING,
    NONE,
    NOTHING,
    Condition,
    EffectPath,
    groups,
    heads,
)
from steer.lens.input_routes import check_inputs, heads_of
from steer.lens.passes import passes
from steer.lens.results import Result, plain, spread
from steer.lens.sampling import complete, graded
from steer.lens.subject import Row, Subject
from steer.tasks.grading import MathGrader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = {
    "add": "the change is added to the base run along the path",
    "remove": "the change is taken out of the steered run along the path",
}
ROUTES = {
    "everything": EVERYTHING,
    "residual only": EffectPath(True, NONE, NONE),
    "attention only": EffectPath(False, None, NONE),
    "MLP only": EffectPath(False, NONE, None),
    "all but residual": EffectPath(False, None, None),
    "all but attention": EffectPath(True, NONE, None),
    "all but MLP": EffectPath(True, None, NONE),
    "nothing": NOTHING,
}


def later_frozen(layer: int) -> EffectPath:
    """Through the layers up to `layer` and the residual stream: all later layers are held."""
    live = frozenset(range(layer + 1))
    return EffectPath(True, live, live)


def frozen_routes(subject: Subject, first: int, count: int = 10) -> dict[str, EffectPath]:
    """`later_frozen` from layer `first` on, evenly at no more than `count` layers, the last one included."""
    return {
        f"frozen after {i}": later_frozen(i)
        for i in spread(range(first, subject.decoder.num_hidden_layers), count)
    }


def head_routes(subject: Subject, layer: int) -> dict[str, EffectPath]:
    """Through one query head of the attention of `layer`, and through no other component: a path each."""
    only = frozenset([layer])
    return {f"head {h}": EffectPath(False, only, NONE, frozenset([h])) for h in range(heads(subject))}


def group_routes(subject: Subject, layer: int) -> dict[str, EffectPath]:
    """The same for each key-value group: all query heads that read one key-value head."""
    only = frozenset([layer])
    return {f"group {g}": EffectPath(False, only, NONE, heads_of(subject, g)) for g in range(groups(subject))}


@dataclass
class Patching(Result):
    """
    One number per path. `logit_difference`: the logit of the token that the vectors lift most minus
    that of the one they lower most, at each position, averaged over positions. `kl`: KL(steered ||
    path) in nats, averaged. `agreement`: share of positions where the most likely token is the steered
    run's. `accuracy`: share of problems solved when the model writes greedily along the path, where
    problems were given. The same for `base` and `steered` themselves, in this order.
    """

    layers: list[int]
    direction: str
    names: list[str]
    logit_difference: torch.Tensor
    kl: torch.Tensor
    agreement: torch.Tensor
    accuracy: torch.Tensor | None
    base: dict[str, float]
    steered: dict[str, float]
    positions: int

    def recovered(self, score: str = "logit_difference") -> torch.Tensor:
        """
        Each path's share of the way from base (0) to steered (1) by `score`; in the direction "remove", of
        the way from steered (0) to base (1). NaN where the two do not differ.
        """
        value: torch.Tensor = getattr(self, score)
        start, end = self.base[score], self.steered[score]
        if self.direction == "remove":
            start, end = end, start
        return (value - start) / (end - start) if end != start else torch.full_like(value, torch.nan)

    def __getitem__(self, name: str) -> float:
        """The share of the logit difference that the path `name` recovers."""
        return self.recovered()[self.names.index(name)].item()

    def to_dict(self) -> dict[str, Any]:
        shares = {"logit_difference": self.recovered(), "kl": self.recovered("kl")}
        return {**super().to_dict(), "recovered": plain(shares)}

    def figure(self) -> Figure:
        """Bars of the recovered share by logit difference and by KL."""
        from steer.lens import plots

        done = "added to the base run" if self.direction == "add" else "removed from the steered run"
        one = len(self.layers) == 1
        what = f"the vector of layer {self.layers[0]}" if one else f"the vectors of {len(self.layers)} layers"
        return plots.grouped_bars(
            self.names,
            {"logit difference": self.recovered(), "KL": self.recovered("kl")},
            ylabel="share of the effect",
            title=f"Path patching: {what}, {done}",
        )


def patch(
    subject: Subject,
    rows: Sequence[Row],
    effect_paths: Mapping[str, EffectPath] | None = None,
    *,
    layers: Collection[int] | None = None,
    directions: Mapping[int, torch.Tensor] | None = None,
    others: bool = False,
    direction: str = "add",
    problems: Sequence[dict[str, Any]] | None = None,
    grader: MathGrader | None = None,
    label: str | None = None,
) -> Patching:
    """
    Score `effect_paths` (`ROUTES` by default) for the vectors of `layers` (all by default), along `rows`.

    rows: prompts, scored at the token that comes next, or with completions, scored at each of their tokens.
    directions: (hidden_size,) by layer, scored in place of the layers' own vectors. others: whether the
    remaining layers' vectors are on, in all runs alike. direction: a key of `DIRECTIONS`.
    problems, grader: those of `rows`, to solve along each path as well. Raises SteerError for layers
    without a vector, for several vectors that are inside modules, for heads of an attention that has no
    output matrix, and for a model in which a change passes although no path is open.
    """
    if direction not in DIRECTIONS:
        raise SteerError(f"direction={direction!r} is unknown; choose one of {', '.join(DIRECTIONS)}")
    if (problems is None) != (grader is None):
        raise SteerError("accuracy needs both the problems and a checker; give both or neither")
    effect_paths = ROUTES if effect_paths is None else effect_paths
    chosen = frozenset(subject.layers if layers is None else layers)
    rest = frozenset(subject.layers) - chosen if others else NONE
    ends = [Condition(rest), Condition(rest | chosen, directions=directions)]  # base, steered
    reference = 0 if direction == "add" else 1
    _check_closed(subject, rows[0], ends, reference)
    split = [effect_path for effect_path in effect_paths.values() if effect_path.splits_input]
    for layer in sorted(frozenset().union(*(effect_path.attention or NONE for effect_path in split))):
        check_inputs(subject, rows[0], layer, ends, reference)
    conditions = [
        *ends,
        *(
            replace(ends[1 - reference], effect_path=effect_path, reference=reference)
            for effect_path in effect_paths.values()
        ),
    ]
    lifted, kl, agree = (torch.zeros(len(conditions), dtype=torch.float64) for _ in range(3))
    positions = 0
    for done in passes(subject, rows, conditions, share=True, label=label):
        for index in range(len(done.rows)):
            logits = done.next_token(index)  # (conditions, positions, vocabulary)
            logs = logits.log_softmax(-1)
            lifted += _lifted(logits)
            kl += (logs[1].exp() * (logs[1] - logs)).sum(-1).cpu().double().sum(1)
            agree += (logits.argmax(-1) == logits[1].argmax(-1)).cpu().double().sum(1)
            positions += logits.shape[1]
    scores = {"logit_difference": lifted / positions, "kl": kl / positions, "agreement": agree / positions}
    if problems is not None and grader is not None:
        scores["accuracy"] = _accuracy(subject, problems, grader, conditions, label)
    routed = {name: value[2:] for name, value in scores.items()}
    return Patching(
        sorted(chosen),
        direction,
        list(effect_paths),
        routed["logit_difference"],
        routed["kl"],
        routed["agreement"],
        routed.get("accuracy"),
        base={name: value[0].item() for name, value in scores.items()},
        steered={name: value[1].item() for name, value in scores.items()},
        positions=positions,
    )


def kept(
    subject: Subject,
    rows: Sequence[Row],
    effect_path: EffectPath,
    ends: Sequence[Condition],
    label: str | None = None,
) -> list[float]:
    """
    For each of `ends`, the share of its effect on the logit difference that passes along `effect_path`, as in
    `patch`: many changes and one path, in one pass.
    """
    pairs = [one for end in ends for one in (end, replace(end, effect_path=effect_path, reference=0))]
    _check_closed(subject, rows[0], [BASE, ends[0]], 0)
    lifted = torch.zeros(len(ends), 3, dtype=torch.float64)  # base, end, along the path
    for done in passes(subject, rows, [BASE, *pairs], share=True, label=label):
        for index in range(len(done.rows)):
            base, *others = done.next_token(index)
            for n in range(len(ends)):
                lifted[n] += _lifted(torch.stack([base, others[2 * n], others[2 * n + 1]]))
    start, end, along = lifted.unbind(1)
    return ((along - start) / (end - start)).tolist()


def _lifted(logits: torch.Tensor) -> torch.Tensor:
    """
    The logit difference of each condition, summed over positions: (conditions,). logits: (conditions,
    positions, vocabulary); the first two conditions are base and steered, and say which two tokens.
    """
    base, steered = logits[:2].softmax(-1)
    moved = steered - base
    pair = torch.stack([moved.argmax(-1), moved.argmin(-1)], -1)
    up, down = logits.gather(-1, pair.expand(len(logits), -1, -1)).unbind(-1)
    return (up - down).cpu().double().sum(1)


def _check_closed(subject: Subject, row: Row, ends: list[Condition], reference: int) -> None:
    """
    SteerError unless a change that may pass nothing leaves the reference run as it is. It does where a model
    writes to the stream outside attention and MLP, adds the stream inside them or scales it.
    """
    conditions = [*ends, replace(ends[1 - reference], effect_path=NOTHING, reference=reference)]
    (done,) = passes(subject, [row], conditions)
    logits = done.next_token(0)
    wanted, actual = logits[reference], logits[2]
    error = ((actual - wanted).abs().max() / wanted.std()).item()
    # Tiny models of 109 architectures: at most 1e-6 in float32 and 0.04 in bfloat16, which rounds the change
    # when it is taken out; 0.066 and more on those that have other paths.
    if not error <= (1e-3 if done.logits.dtype in (torch.float32, torch.float64) else 0.05):
        run = "steered" if reference else "base"
        raise SteerError(
            f"path patching does not work on {type(subject.model).__name__} in {done.logits.dtype}: with "
            f"every path closed the logits differ from the {run} run's by up to {error:.2g} of their "
            "standard deviation, so the change passes outside attention, MLP and residual stream; where half "
            "precision does it, load the model in float32"
        )


def _accuracy(
    subject: Subject,
    problems: Sequence[dict[str, Any]],
    grader: MathGrader,
    conditions: list[Condition],
    label: str | None,
) -> torch.Tensor:
    """
    Accuracy of each condition; those with a path get a reference condition of their own, which writes
    what they write.
    """
    own = [*conditions[:2]]
    for condition in conditions[2:]:
        own += [conditions[condition.reference], replace(condition, reference=len(own))]
    written = complete(subject, subject.rows(problems), own, label=label and f"{label}, writing")
    kept = [0, 1, *range(3, len(own), 2)]
    return torch.stack([graded(subject, written[i], problems, grader).double().mean() for i in kept])


def by_layer(
    subject: Subject,
    rows: Sequence[Row],
    layers: Sequence[int] | None = None,
    *,
    effect_paths: Mapping[str, EffectPath] | None = None,
    label: str | None = None,
) -> list[Patching]:
    """`patch` for the vector of each layer by itself, added to the base run."""
    layers = subject.layers if layers is None else layers
    results = []
    for n, layer in enumerate(layers, 1):
        text = label and f"{label}, layer {layer} ({n} of {len(layers)})"
        results.append(patch(subject, rows, effect_paths, layers=[layer], label=text))
    return results

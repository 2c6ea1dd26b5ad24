"""
Path patching: through which part of the model the vectors' effect reaches the output (arXiv 2509.06608, the
penultimate layer). A route (`lanes.Route`) lets the change pass some components and holds all others at what
they give without it, in both directions: added to the base run, and removed from the steered run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer.errors import SteerError
from steer.lens.lanes import EVERYTHING, NONE, NOTHING, Lane, Route, heads
from steer.lens.passes import passes
from steer.lens.results import Result, spread
from steer.lens.sampling import complete, graded
from steer.lens.subject import Row, Subject
from steer.tasks.grading import Checker

DIRECTIONS = {
    "add": "the change is added to the base run along the route",
    "remove": "the change is taken out of the steered run along the route",
}
ROUTES = {
    "everything": EVERYTHING,
    "residual only": Route(True, NONE, NONE),
    "attention only": Route(False, None, NONE),
    "MLP only": Route(False, NONE, None),
    "all but residual": Route(False, None, None),
    "all but attention": Route(True, NONE, None),
    "all but MLP": Route(True, None, NONE),
    "nothing": NOTHING,
}


def later_frozen(layer: int) -> Route:
    """Through the layers up to `layer` and the residual stream: all later layers are held."""
    live = frozenset(range(layer + 1))
    return Route(True, live, live)


def frozen_routes(subject: Subject, first: int, count: int = 10) -> dict[str, Route]:
    """`later_frozen` from layer `first` on, evenly at no more than `count` layers, the last one included."""
    return {f"frozen after {i}": later_frozen(i) for i in spread(range(first, subject.decoder.depth), count)}


def head_routes(subject: Subject, layer: int) -> dict[str, Route]:
    """Through one query head of the attention of `layer`, and through no other component: a route each."""
    only = frozenset([layer])
    return {f"head {h}": Route(False, only, NONE, frozenset([h])) for h in range(heads(subject))}


def group_routes(subject: Subject, layer: int) -> dict[str, Route]:
    """The same for each key-value group: all query heads that read one key-value head."""
    config = subject.model.config.get_text_config()
    groups = int(getattr(config, "num_key_value_heads", None) or heads(subject))
    size, only = heads(subject) // groups, frozenset([layer])
    return {
        f"group {g}": Route(False, only, NONE, frozenset(range(g * size, (g + 1) * size)))
        for g in range(groups)
    }


@dataclass
class Patching(Result):
    """
    One number per route. `logit_difference`: the logit of the token that the vectors lift most minus that of
    the one they lower most, at each position, averaged over positions. `kl`: KL(steered || route) in nats,
    averaged. `agreement`: share of positions where the most likely token is the steered run's. `accuracy`:
    share of problems solved when the model writes greedily along the route, where problems were given. The
    same for `base` and `steered` themselves, in this order.
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
        Each route's share of the way from base (0) to steered (1) by `score`; in the direction "remove", of
        the way from steered (0) to base (1). NaN where the two do not differ.
        """
        value: torch.Tensor = getattr(self, score)
        start, end = self.base[score], self.steered[score]
        if self.direction == "remove":
            start, end = end, start
        return (value - start) / (end - start) if end != start else torch.full_like(value, torch.nan)

    def __getitem__(self, name: str) -> float:
        """The share of the logit difference that the route `name` recovers."""
        return self.recovered()[self.names.index(name)].item()

    def to_dict(self) -> dict[str, Any]:
        shares = {"logit_difference": self.recovered(), "kl": self.recovered("kl")}
        return {**super().to_dict(), "recovered": {k: v.tolist() for k, v in shares.items()}}

    def figure(self) -> Any:
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
    routes: Mapping[str, Route] | None = None,
    *,
    layers: Collection[int] | None = None,
    others: bool = False,
    direction: str = "add",
    problems: Sequence[dict[str, Any]] | None = None,
    checker: Checker | None = None,
    label: str | None = None,
) -> Patching:
    """
    Score `routes` (`ROUTES` by default) for the vectors of `layers` (all by default), along `rows`.

    rows: prompts, scored at the token that comes next, or with completions, scored at each of their tokens.
    others: whether the remaining layers' vectors are on, in all runs alike. direction: a key of `DIRECTIONS`.
    problems, checker: those of `rows`, to solve along each route as well. Raises SteerError for layers
    without a vector, for several vectors that stand inside modules, for heads of an attention that has no
    output matrix, and for a model in which a change passes although no route is open.
    """
    if direction not in DIRECTIONS:
        raise SteerError(f"direction={direction!r} is unknown; choose one of {', '.join(DIRECTIONS)}")
    if (problems is None) != (checker is None):
        raise SteerError("accuracy needs both the problems and a checker; give both or neither")
    routes = ROUTES if routes is None else routes
    chosen = frozenset(subject.layers if layers is None else layers)
    rest = frozenset(subject.layers) - chosen if others else NONE
    ends = [Lane(rest), Lane(rest | chosen)]  # base, steered
    reference = 0 if direction == "add" else 1
    _check_closed(subject, rows[0], ends, reference)
    lanes = [*ends, *(Lane(ends[1 - reference].layers, route, reference) for route in routes.values())]
    lifted, kl, agree = (torch.zeros(len(lanes), dtype=torch.float64) for _ in range(3))
    positions = 0
    for done in passes(subject, rows, lanes, label=label):
        for index in range(len(done.rows)):
            logits = done.next_token(index)  # (lanes, positions, vocabulary)
            logs = logits.log_softmax(-1)
            moved = logs[1].exp() - logs[0].exp()
            pair = torch.stack([moved.argmax(-1), moved.argmin(-1)], -1)
            up, down = logits.gather(-1, pair.expand(len(lanes), -1, -1)).unbind(-1)
            lifted += (up - down).double().sum(1).cpu()
            kl += (logs[1].exp() * (logs[1] - logs)).sum(-1).double().sum(1).cpu()
            agree += (logits.argmax(-1) == logits[1].argmax(-1)).double().sum(1).cpu()
            positions += logits.shape[1]
    scores = {"logit_difference": lifted / positions, "kl": kl / positions, "agreement": agree / positions}
    if problems is not None and checker is not None:
        scores["accuracy"] = _accuracy(subject, problems, checker, lanes, label)
    routed = {name: value[2:] for name, value in scores.items()}
    return Patching(
        sorted(chosen),
        direction,
        list(routes),
        routed["logit_difference"],
        routed["kl"],
        routed["agreement"],
        routed.get("accuracy"),
        base={name: value[0].item() for name, value in scores.items()},
        steered={name: value[1].item() for name, value in scores.items()},
        positions=positions,
    )


def _check_closed(subject: Subject, row: Row, ends: list[Lane], reference: int) -> None:
    """
    SteerError unless a change that may pass nothing leaves the reference run as it is. It does where a model
    writes to the stream outside attention and MLP, adds the stream inside them or scales it.
    """
    lanes = [*ends, Lane(ends[1 - reference].layers, NOTHING, reference)]
    (done,) = passes(subject, [row], lanes)
    logits = done.next_token(0)
    wanted, found = logits[reference], logits[2]
    error = ((found - wanted).abs().max() / wanted.std()).item()
    # Tiny models of 109 architectures: at most 1e-6 in float32 and 0.04 in bfloat16, which rounds the change
    # when it is taken out; 0.066 and more on those that have other paths.
    if not error <= (1e-3 if done.logits.dtype in (torch.float32, torch.float64) else 0.05):
        run = "steered" if reference else "base"
        raise SteerError(
            f"path patching does not work on {type(subject.model).__name__} in {done.logits.dtype}: with "
            f"every route closed the logits differ from the {run} run's by up to {error:.2g} of their "
            "standard deviation, so the change passes outside attention, MLP and residual stream; where half "
            "precision does it, load the model in float32"
        )


def _accuracy(
    subject: Subject,
    problems: Sequence[dict[str, Any]],
    checker: Checker,
    lanes: list[Lane],
    label: str | None,
) -> torch.Tensor:
    """
    Accuracy of each lane; those with a route get a reference lane of their own, which writes what they write.
    """
    own = [*lanes[:2]]
    for lane in lanes[2:]:
        own += [lanes[lane.reference], Lane(lane.layers, lane.route, len(own))]
    written = complete(subject, subject.rows(problems), own, label=label and f"{label}, writing")
    kept = [0, 1, *range(3, len(own), 2)]
    return torch.stack([graded(subject, written[i], problems, checker).double().mean() for i in kept])


def by_layer(
    subject: Subject,
    rows: Sequence[Row],
    layers: Sequence[int] | None = None,
    *,
    others: bool = False,
    routes: Mapping[str, Route] | None = None,
    label: str | None = None,
) -> list[Patching]:
    """`patch` for the vector of each layer by itself, added to the base run."""
    layers = subject.layers if layers is None else layers
    found = []
    for n, layer in enumerate(layers, 1):
        text = label and f"{label}, layer {layer} ({n} of {len(layers)})"
        found.append(patch(subject, rows, routes, layers=[layer], others=others, label=text))
    return found

"""
Composition: what single layers' vectors do alone, in pairs and all together, what is lost when one layer is
left out, and what the scale does (arXiv 2509.06608, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.lens.conditions import BASE, Condition, steered
from steer.lens.passes import passes
from steer.lens.results import Result, share
from steer.lens.sampling import accuracies, complete, graded
from steer.lens.subject import Row, Subject, chunks
from steer.stats import wilson
from steer.tasks.grading import MathGrader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steer.lens.pair_correlation import PairCorrelations


@dataclass
class Composition(Result):
    """
    Accuracies, or mean log-probabilities of right answers in nats a token, as `measure` says. `alone`
    (layers,): one layer's vector; `pairs` (layers, layers): two of them, `alone` on the diagonal; `together`:
    the vectors of all `layers`; `whole`: every vector of the artifact; `joint`: the vectors of all layers
    that were trained together, None where no such set was measured.

    `score` (layers, layers) is the published one, (pair - best of the two) / (joint - best of the two). It is
    undefined, NaN, on the diagonal, where the jointly trained set is not better than the best of the two,
    since there is then no gain to have a share of, and everywhere without a jointly trained set.
    `correlations` are those of `steer.lens.pair_correlation`, None where they were not measured.
    """

    layers: list[int]
    alone: torch.Tensor
    pairs: torch.Tensor
    together: float
    whole: float
    base: float
    problems: int
    measure: str = "accuracy"
    joint: float | None = None
    correlations: PairCorrelations | None = None

    @property
    def score(self) -> torch.Tensor:
        best = torch.maximum(self.alone[:, None], self.alone[None, :])
        joint = torch.nan if self.joint is None else self.joint
        return share(self.pairs - best, joint - best).fill_diagonal_(torch.nan)

    def told(self, i: int, j: int) -> str:
        """The score of the pair at these places in `layers`, or that it is undefined and why."""
        value = self.score[i, j].item()
        if not math.isnan(value):
            return f"{value:.3f}"
        if self.joint is None:
            return "undefined: no jointly trained set was measured"
        best = max(self.alone[i].item(), self.alone[j].item())
        return f"undefined: the jointly trained set has {self.joint:.3f}, the best of the two {best:.3f}"

    def to_dict(self) -> dict[str, Any]:
        from steer.lens.results import plain

        return {**super().to_dict(), "score": plain(self.score)}

    def figure(self) -> Figure:
        """The matrix of what pairs reach, single layers on the diagonal."""
        from steer.lens import plots

        names = [str(layer) for layer in self.layers]
        title = f"{self.measure}, two layers (none: {self.base:.2f}, all: {self.whole:.2f})"
        return plots.matrix(self.pairs, names, xlabel="layer", ylabel="layer", title=title)


def as_trained(config: SteeringConfig) -> bool:
    """Whether vectors are as one run of training left them, not the outcome of arithmetic with artifacts."""
    return not (config.provenance or {}).get("derived")


def compose(
    subject: Subject,
    problems: Sequence[dict[str, Any]],
    grader: MathGrader | None,
    layers: Sequence[int] | None = None,
    rows: Sequence[Row] = (),
    label: str | None = None,
) -> Composition:
    """
    Greedy accuracy on `problems` with the vectors of `layers` (all by default) alone, in pairs, and together;
    without a grader, the likelihood of `rows`, right answers, which tells sets apart that solve nothing yet.

    For vectors that were trained alone, one artifact a layer, add the artifacts first: `steer.artifact`. The
    result then has no `joint`, since a sum was not trained: set it to the same measure of a jointly trained
    set. Vectors as they were trained are that set themselves.
    """
    layers = subject.layers if layers is None else sorted(layers)
    if len(layers) < 2:
        raise SteerError(f"composition needs two layers or more, got {layers}")
    sets = [*([i] for i in layers), *map(list, combinations(layers, 2)), layers]
    conditions = [BASE, steered(subject), *(Condition(frozenset(chosen)) for chosen in sets)]
    if grader is None:
        base, whole, *scores = likelihoods(subject, rows, conditions, label).tolist()
    else:
        base, whole, *scores = accuracies(subject, problems, conditions, grader, label).tolist()
    n = len(layers)
    alone = torch.tensor(scores[:n], dtype=torch.float64)
    pairs = torch.diag(alone)
    for (i, j), value in zip(combinations(range(n), 2), scores[n:-1], strict=True):
        pairs[i, j] = pairs[j, i] = value
    count, measure = (len(rows), "nats a token") if grader is None else (len(problems), "accuracy")
    joint = whole if as_trained(subject.vectors.config) else None
    return Composition(list(layers), alone, pairs, scores[-1], whole, base, count, measure, joint)


@dataclass
class LeaveOneOut(Result):
    """
    `accuracy` (layers,) with every vector but that layer's; `whole` with all, `base` with none. `likelihood`
    (layers,) is the mean log-probability, in nats a token, of the answers that the whole set writes, and
    `whole_likelihood`, `base_likelihood` the same: a finer measure than right or wrong.
    """

    layers: list[int]
    accuracy: torch.Tensor
    likelihood: torch.Tensor
    whole: float
    base: float
    whole_likelihood: float
    base_likelihood: float
    problems: int

    def figure(self) -> Figure:
        """What each layer's absence costs, in nats a token, with the accuracy above it."""
        from steer.lens import plots

        measured = not self.accuracy.isnan().all()
        figure, grid = plots.panels(
            6.4, 4.4 if measured else 2.8, 2 if measured else 1, 1, sharex=True, squeeze=False
        )
        axes = grid[:, 0]
        if measured:
            axes[0].bar(self.layers, plots.as_array(self.accuracy), color=plots.COLOURS[0])
            axes[0].axhline(self.whole, color="black", linestyle="--", linewidth=1)
            plots.finish(
                axes[0], "Without one layer's vector (dashed: with all)", "", f"accuracy ({self.problems})"
            )
        lost = plots.as_array(self.likelihood) - self.whole_likelihood
        axes[-1].bar(self.layers, lost, color=plots.COLOURS[1])
        plots.finish(
            axes[-1], "" if measured else "Without one layer's vector", "layer left out", "nats a token"
        )
        figure.tight_layout()
        return figure


def leave_one_out(
    subject: Subject,
    problems: Sequence[dict[str, Any]],
    grader: MathGrader | None,
    rows: Sequence[Row] | None = None,
    label: str | None = None,
    layers: Sequence[int] | None = None,
) -> LeaveOneOut:
    """
    Leave the vector of each of `layers` (all by default) out in turn. rows: completions whose likelihood is
    measured; by default the greedy ones of the whole set. Without a grader only the likelihood is measured,
    and accuracies are NaN. SteerError for a layer without a vector.
    """
    all_layers, layers = frozenset(subject.layers), subject.layers if layers is None else list(layers)
    if missing := sorted(set(layers) - all_layers):
        raise SteerError(f"layers {missing} have no vector to leave out; the artifact has {subject.layers}")
    conditions = [steered(subject), BASE, *(Condition(all_layers - {layer}) for layer in layers)]
    if rows is None:
        (rows,) = complete(subject, subject.rows(problems), [steered(subject)], label=label)
    likely = likelihoods(subject, rows, conditions, label)
    accuracy = torch.full((len(conditions),), torch.nan, dtype=torch.float64)
    if grader is not None:
        accuracy = accuracies(subject, problems, conditions, grader, label)
    return LeaveOneOut(
        layers,
        accuracy[2:],
        likely[2:],
        accuracy[0].item(),
        accuracy[1].item(),
        likely[0].item(),
        likely[1].item(),
        len(problems),
    )


def likelihoods(
    subject: Subject, rows: Sequence[Row], conditions: Sequence[Condition], label: str | None = None
) -> torch.Tensor:
    """Mean log-probability of the completions' tokens in each condition, in nats a token: (conditions,)."""
    if not all(row.completion for row in rows):
        raise SteerError("a likelihood needs completions, some of these rows are prompts alone")
    scores = torch.zeros(len(conditions), dtype=torch.float64)
    lowest = [min(condition.layers, default=-1) for condition in conditions]
    for first in sorted(set(lowest)):  # those with the same first layer share what is below it
        group = [i for i, layer in enumerate(lowest) if layer == first]
        for _, indices in chunks(group, max(1, subject.batch_size - 1)):
            some = (
                [BASE, *(conditions[i] for i in indices)] if first > 0 else [conditions[i] for i in indices]
            )
            total = torch.zeros(len(some), dtype=torch.float64)
            for done in passes(subject, rows, some, share=first > 0, label=label):
                for index, row in enumerate(done.rows):
                    logs = done.next_token(index).log_softmax(-1)
                    tokens = torch.tensor(row.completion, device=logs.device).expand(len(some), -1)
                    total += logs.gather(-1, tokens[..., None]).cpu().double().sum((1, 2))
            scores[list(indices)] = total[len(some) - len(indices) :]
    return scores / sum(len(row.completion) for row in rows)


@dataclass
class ScaleSweep(Result):
    """`accuracy` and mean completion length in `tokens`, (scales,) each."""

    scales: list[float]
    accuracy: torch.Tensor
    tokens: torch.Tensor
    problems: int

    def figure(self) -> Figure:
        """Accuracy over the scale, with 95 % Wilson intervals."""
        from steer.lens import plots

        intervals = [wilson(value * self.problems, self.problems) for value in self.accuracy.tolist()]
        return plots.lines(
            {"accuracy": self.accuracy},
            x=self.scales,
            bands={"accuracy": intervals},
            xlabel="factor of the vectors' scale",
            ylabel=f"accuracy on {self.problems} problems",
            title="Scale sweep",
        )


SCALES = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def scale_sweep(
    subject: Subject,
    problems: Sequence[dict[str, Any]],
    grader: MathGrader,
    scales: Sequence[float] = SCALES,
    label: str | None = None,
) -> ScaleSweep:
    """Greedy accuracy with all vectors multiplied with each scale. The subject's own scale is put back."""
    if not scales:
        raise SteerError("no scales were given, such as 0.5")
    before, measured, lengths = subject.vectors.scale, [], []
    try:
        for scale in scales:
            subject.vectors.scale = scale * before
            (rows,) = complete(
                subject, subject.rows(problems), [steered(subject)], label=label and f"{label} {scale}"
            )
            measured.append(graded(subject, rows, problems, grader).double().mean())
            lengths.append(torch.tensor([float(len(row.completion)) for row in rows]).mean())
    finally:
        subject.vectors.scale = before
    return ScaleSweep(list(scales), torch.stack(measured), torch.stack(lengths), len(problems))

"""
Directions from activations alone beside the trained vectors, as long as suits them: mean differences and
normals of linear support vector machines (the baselines of arXiv 2509.06608), the length tuned
layer by layer.

One part of the problems makes the directions, another chooses each one's length, and the rest measures. The
trained vectors keep their length. The right answers are the steered model's own, which the trained vectors
make likely; no direction from activations wrote any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from steer.errors import SteerError
from steer.extract.activations import read_activations
from steer.extract.directions import mean_difference, support_vector
from steer.lens.composition import likelihoods
from steer.lens.conditions import BASE, Condition
from steer.lens.results import Result
from steer.lens.subject import Row, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Lengths that are tried, in units of the trained vector's at the layer.
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
DRAWS = 3
METHODS = {
    "mean difference": "mean activation of the steered answers minus that of the base model's",
    "linear SVM": "normal of the plane that a linear support vector machine puts between the two",
}
Directions = dict[int, torch.Tensor]  # (hidden_size,) of length 1, by layer


@dataclass
class Baselines(Result):
    """
    What single directions add to the log-probability of right answers, in nats a token, on problems that took
    no part in making them or choosing their length. The trained vectors keep their length. Rows of a tensor
    are `layers`, and last all of them together, where one factor of the trained lengths is chosen for all.

    Args:
        layers: the layers.
        trained: (layers + 1,), of the trained vectors.
        gain: by method, at the chosen length: (layers + 1,).
        untuned: by method, at the trained vector's length: (layers + 1,).
        length: by method, the chosen length in units of the trained vector's: (layers + 1,); 0 where no
            length helps the problems that choose.
        random: (draws, layers + 1), random directions, their length chosen likewise.
        lengths: those that were tried.
        texts: how many answers made the directions ("fit", of either side), chose ("choose") and measured
            ("measure").
    """

    layers: list[int]
    trained: torch.Tensor
    gain: dict[str, torch.Tensor]
    untuned: dict[str, torch.Tensor]
    length: dict[str, torch.Tensor]
    random: torch.Tensor
    lengths: list[float]
    texts: dict[str, int]

    @property
    def names(self) -> list[str]:
        """Of the rows."""
        return [*(f"layer {layer}" for layer in self.layers), "these together"]

    def figure(self) -> Figure:
        """Gains over the layers, with a band from the lowest to the highest of the random draws."""
        from steer.lens import plots

        shown: dict[str, Any] = {"trained": self.trained[:-1]}
        shown |= {f"{name}, length tuned": values[:-1] for name, values in self.gain.items()}
        random, bands = plots.draws_line(self.random[:, :-1], "length tuned")
        return plots.lines(
            shown | random,
            x=self.layers,
            xlabel="layer of the vector",
            ylabel="nats a token",
            title="One vector alone: likelihood of right answers",
            level=("nothing", 0.0),
            bands=bands,
        )

    def lines(self) -> Iterator[str]:
        """A table with a line for each layer, and one for these layers together."""
        yield (
            "gain in log-probability of the steered model's right answers, nats a token; directions from "
            f"{self.texts['fit']} answers of either side, lengths from {self.texts['choose']}, measured on "
            f"{self.texts['measure']} others"
        )
        head = f"{'':14}{'trained':>9}"
        for name in self.gain:
            head += f"{name:>17}{'(untuned)':>11}{'length':>8}"
        yield head + (f"{'random (highest)':>20}" if len(self.random) else "")
        for n, row in enumerate(self.names):
            line = f"{row:14}{self.trained[n].item():9.3f}"
            for name, gain in self.gain.items():
                length = f"{self.length[name][n].item():g}x"
                line += f"{gain[n].item():17.3f}{self.untuned[name][n].item():11.3f}{length:>8}"
            if len(self.random):
                draws = self.random[:, n]
                line += f"{draws.mean().item():10.3f} ({draws.max().item():.3f})"
            yield line
        top = max(self.lengths)
        if at := sorted({self.names[n] for values in self.length.values()
                         for n, length in enumerate(values.tolist()) if length == top}):  # fmt: skip
            yield f"the longest length that was tried, {top:g}x, is chosen at {', '.join(at)}"


def tuned_baselines(
    subject: Subject,
    base: Sequence[Row],
    answers: Sequence[Row],
    right: Sequence[bool],
    *,
    layers: Sequence[int] | None = None,
    lengths: Sequence[float] = LENGTHS,
    draws: int = DRAWS,
    seed: int = 0,
    label: str | None = None,
) -> Baselines:
    """
    Measure mean-difference and SVM directions of tuned length beside the trained vectors.

    Of every four problems the first and the third make the directions, the second chooses the lengths, and
    the fourth measures.

    Args:
        subject: the model with vectors.
        base: the base model's answers to some problems.
        answers: the steered model's, in the same order.
        right: whether each of those is right; the likelihood is that of right ones.
        layers: that get a direction; all that have a vector by default.
        lengths: to choose from, in units of the trained vector's length at the layer.
        draws: random directions beside them.
        seed: of the first draw.
        label: of the progress bar; None for none.

    Raises:
        SteerError: vectors that are not constant, or are zero; too few right answers; answers that do not
            differ; a length that is not above 0.
    """
    config, own = subject.vectors.config, subject.vectors.effective()
    if config.kind != "constant":
        raise SteerError(f"tuned baselines need constant vectors, these are {config.kind}")
    if not lengths or min(lengths) <= 0:
        raise SteerError(f"lengths={list(lengths)} are not numbers above 0; give such as 0.5 1 2 4")
    chosen = sorted(subject.layers if layers is None else layers)
    if missing := [layer for layer in chosen if layer not in own]:
        raise SteerError(f"layers {missing} have no vector; the artifact steers {config.layers}")
    if zero := [layer for layer in chosen if not own[layer].any()]:
        raise SteerError(f"the vectors of layers {zero} are zero: they have no length to compare with")
    fit = [n for n in range(len(answers)) if n % 2 == 0]
    choose, measure = (
        [answers[n] for n in range(len(answers)) if n % 4 == part and right[n]] for part in (1, 3)
    )
    if not choose or not measure:
        raise SteerError(
            f"{sum(right)} of {len(answers)} steered answers are right, {len(choose)} of those that choose "
            f"the length and {len(measure)} of those that measure; both need one: give more problems"
        )
    sign = math.copysign(1.0, subject.vectors.scale)  # a condition multiplies its directions with the scale
    size = {layer: sign * own[layer].norm() for layer in chosen}
    made = _directions(subject, [answers[n] for n in fit], [base[n] for n in fit], chosen, label)
    for n in range(draws):
        generator = torch.Generator().manual_seed(seed + n)
        drawn = torch.randn(len(chosen), subject.decoder.hidden_size, generator=generator)
        made[f"random {n}"] = dict(zip(chosen, normalize(drawn, dim=1), strict=True))
    sets = [*([layer] for layer in chosen), chosen]
    results: dict[str, list[torch.Tensor]] = {name: [] for name in made}
    trained = []
    for n, some in enumerate(sets):
        told = label and f"{label}, {'all layers' if n == len(chosen) else f'layer {some[0]}'}"
        tried = [_condition(some, made[name], size, length) for name in made for length in lengths]
        scores = likelihoods(subject, choose, [BASE, *tried], told)
        gains = (scores[1:] - scores[0]).unflatten(0, (len(made), len(lengths)))
        best = [lengths[int(row.argmax())] if row.max() > 0 else 0.0 for row in gains]
        kept = [_condition(some, one, size, length) for one, length in zip(made.values(), best, strict=True)]
        plain = [_condition(some, one, size, 1.0) for one in made.values()]
        scores = likelihoods(subject, measure, [BASE, Condition(frozenset(some)), *kept, *plain], told)
        gains = scores[1:] - scores[0]
        trained.append(gains[0])
        for i, name in enumerate(made):
            tuned = gains[1 + i] if best[i] else torch.zeros((), dtype=gains.dtype)
            results[name].append(torch.stack([tuned, gains[1 + len(made) + i], gains.new_tensor(best[i])]))
    tables = {name: torch.stack(rows) for name, rows in results.items()}  # (layers + 1, 3)
    random = [tables[f"random {n}"][:, 0] for n in range(draws)]
    return Baselines(
        layers=list(chosen),
        trained=torch.stack(trained),
        gain={name: tables[name][:, 0] for name in METHODS},
        untuned={name: tables[name][:, 1] for name in METHODS},
        length={name: tables[name][:, 2] for name in METHODS},
        random=torch.stack(random) if random else torch.zeros(0, len(sets), dtype=torch.float64),
        lengths=list(lengths),
        texts={"fit": len(fit), "choose": len(choose), "measure": len(measure)},
    )


def _directions(
    subject: Subject,
    wanted: Sequence[Row],
    unwanted: Sequence[Row],
    layers: Sequence[int],
    label: str | None,
) -> dict[str, Directions]:
    """The unit directions of each of `METHODS`, from the base model's activations on the answers."""
    positive, negative = (
        read_activations(
            subject.model,
            rows,
            layers,
            site=subject.vectors.config.site,
            tokens="completion",
            batch_size=subject.batch_size,
            keep_texts=True,
            label=label and f"{label}, activations",
        )
        for rows in (wanted, unwanted)
    )
    made = dict(
        zip(METHODS, (mean_difference(positive, negative), support_vector(positive, negative)), strict=True)
    )
    for some in made.values():
        for place, layer in enumerate(layers):
            if some[layer].norm() < 1e-6 * positive.norm[place]:
                raise SteerError(
                    f"layer {layer}: the activations on steered and base answers are the same; give other or "
                    "more problems"
                )
    return {
        name: {n: normalize(one, dim=0).float() for n, one in some.items()} for name, some in made.items()
    }


def _condition(
    layers: Sequence[int], directions: Directions, size: Mapping[int, torch.Tensor], length: float
) -> Condition:
    """The condition in which `layers` add `directions` at `length` times `size`, their vector's length."""
    added = {layer: directions[layer] * length * size[layer] for layer in layers}
    return Condition(frozenset(layers), directions=added)

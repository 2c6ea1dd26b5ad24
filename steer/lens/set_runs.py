"""
What the commands of `steer lens` do that have random sets beside: `conventions`, `downstream`, `entropy` and
`spectrum`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steer.lens.conventions import (
    LensConventions,
    PersistenceConventions,
    lens_conventions,
    persistence_conventions,
)
from steer.lens.downstream import STATISTICS
from steer.lens.downstream import downstream as read_downstream
from steer.lens.entropy import SHIFTS, entropy_shift
from steer.lens.inputs import chosen_layers, read_both, write_answers
from steer.lens.results import Result, spread
from steer.lens.show import show
from steer.lens.spectrum import set_spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCES = 6  # single layers that both conventions of Diff-Diff are measured for


@dataclass
class Conventions(Result):
    """Both analyses by their conventions."""

    lens: LensConventions
    persistence: PersistenceConventions

    def figure(self) -> Figure:
        """The overlap of the logit lenses."""
        return self.lens.figure()


def conventions(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    layers = chosen_layers(args, subject) or spread(subject.layers, SOURCES)
    rows = write_answers(subject, problems)
    options = {"draws": args.draws, "seed": args.seed}
    result = Conventions(
        lens_conventions(subject, **options),
        persistence_conventions(subject, rows, layers, label="persistence", **options),
    )

    def lines() -> Iterator[str]:
        yield "Logit lens: the tokens each convention puts first, layer by layer"
        for n, name in enumerate(result.lens.names):
            yield f"  {name}"
            for layer, tokens in zip(result.lens.layers, result.lens.tokens[n], strict=True):
                yield f"    layer {layer:3}  {' '.join(map(repr, tokens))}"
        yield f"Share of the {result.lens.top} most promoted tokens in common with the first convention"
        for name, own, mean, least, most in result.lens.rows()[1:]:
            yield f"  {name:50} {own:.3f}  random {mean:.3f} ({least:.3f} to {most:.3f})"
        yield f"Single vectors of layers {', '.join(map(str, layers))}, averaged over the layers above each"
        for name, pairs in result.persistence.rows():
            yield f"  {name}"
            for measure, (trained, random) in zip(("Diff-Diff", "Diff-Vector"), pairs, strict=True):
                yield f"    {measure:11} {_number(trained)}  random vectors {_number(random)}"

    show(args, result, lines())


def downstream(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    rows = write_answers(subject, problems)
    layers = chosen_layers(args, subject)
    options = {"top": args.top, "draws": args.draws, "seed": args.seed}
    result = read_downstream(subject, rows, layers, label="last layer's state", **options)

    def lines() -> Iterator[str]:
        yield f"mean over {result.tokens} tokens; in brackets the mean of {args.draws} random sets"
        for n, (layer, tokens, pairs) in enumerate(result.rows()):
            told = [f"{k} {a:.2f} ({b:.2f})" for k, (a, b) in zip(STATISTICS, pairs, strict=True)]
            yield f"layer {layer:3}  {'  '.join(told)}"
            yield f"{'':9}  + {' '.join(map(repr, tokens[:8]))}"
            yield f"{'':9}  - {' '.join(map(repr, result.lens.bottom_tokens[n][:8]))}"

    show(args, result, lines())


def entropy(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    rows = write_answers(subject, problems, args.temperature, args.seed)
    layers = chosen_layers(args, subject)
    options = {"draws": args.draws, "seed": args.seed}
    result = entropy_shift(subject, rows, layers=layers, label="entropy", **options)

    def lines() -> Iterator[str]:
        yield f"{len(result.entropy)} generated tokens of {result.texts} texts"
        yield "Spearman's correlation of the base model's entropy with the shift of the distribution"
        for name, rho, mean, least, most, p in result.correlations():
            random = f"{_number(mean)} ({_number(least)} to {_number(most)})"
            yield f"  {SHIFTS[name]:28} {_number(rho)}  {args.draws} random sets {random}  p {_number(p)}"
        yield "Quarters of the tokens, the surest first: nats, total variation, of random vectors"
        for base, own, random_mean, change in result.quarters():
            yield f"  {base:6.3f}  {own:6.3f}  {random_mean:6.3f}  entropy {change:+.3f}"

    show(args, result, lines())


def spectrum(args: argparse.Namespace) -> None:
    subject, problems = read_both(args)
    rows = write_answers(subject, problems)
    result = set_spectrum(subject, rows, draws=args.draws, seed=args.seed)

    def lines() -> Iterator[str]:
        for name, own, mean, least, most, p in result.rows():
            random = f"{args.draws} random sets {mean:.2f} ({least:.2f} to {most:.2f}), p {p:.3g}"
            yield f"stable rank, {name:6}  {own:.2f} of {len(result.layers)}  {random}"
        for name, values in (("raw", result.raw), ("scaled", result.scaled)):
            yield f"singular values, {name}: {' '.join(f'{value:.3g}' for value in values.tolist())}"
        yield f"residual norms: {' '.join(f'{value:.3g}' for value in result.residual.tolist())}"

    show(args, result, lines())


def _number(value: float | None) -> str:
    return "undefined" if value is None or value != value else f"{value:.3f}"

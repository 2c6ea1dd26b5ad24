"""
Two analyses by the conventions of the code that was published with "Small Vectors, Big Effects" (arXiv
2509.06608), beside those of this package, on the same vectors: how much of a finding is the convention.

The logit lens: the published code leaves the final norm's gain out. Diff-Diff and Diff-Vector: it samples
answers with each vector alone, takes the first token in and the last two out, and compares each token's
change with the mean change of its own text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity

from steer.lens.conditions import BASE, Condition
from steer.lens.logit_lens import lens_scores
from steer.lens.passes import streams
from steer.lens.persistence import persistence
from steer.lens.random_sets import TWO_SIDED_DRAWS, with_random_sets
from steer.lens.results import Result
from steer.lens.sampling import complete
from steer.lens.subject import Row, Subject
from steer.lens.words import known_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENSES: dict[str, dict[str, Any]] = {
    "steer: with the final norm's gain, dot product": {"reading": "dot", "final_norm": True},
    "published code: without it, dot product": {"reading": "dot", "final_norm": False},
    "published code: without it, cosine": {"reading": "cosine", "final_norm": False},
}
MEANS = {
    "steer": "steer: one mean over all texts, first token left out, answers with all vectors",
    "published": "published code: each text's own mean, first token included, answers with that vector alone",
}
MEASURES = ("diff_diff", "diff_vector")


@dataclass
class LensConventions(Result):
    """
    `names` of the conventions of `LENSES`. `tokens` (conventions, layers): the most promoted tokens of each
    layer, as text. `overlap` (conventions, layers): share of the `top` most promoted tokens that the first
    convention has too; `random_overlap` (draws, conventions, layers) for random vectors.
    """

    layers: list[int]
    names: list[str]
    top: int
    tokens: list[list[list[str]]]
    overlap: torch.Tensor
    random_overlap: torch.Tensor

    def rows(self) -> list[tuple[str, float, float, float, float]]:
        """By convention: name, mean overlap over the layers, and the random sets' mean, least, largest."""
        null = self.random_overlap.double().mean(2)
        return [
            (name, self.overlap[n].double().mean().item(), *(f(null[:, n]).item() for f in _ENDS))  # type: ignore[misc]
            for n, name in enumerate(self.names)
        ]

    def figure(self) -> Figure:
        """The overlap by layer, with the random vectors' mean."""
        from steer.lens import plots

        lines = {}
        for n, name in enumerate(self.names[1:], 1):
            short = name.split(", ")[-1]
            lines[f"without the gain, {short}"] = self.overlap[n]
            lines[f"{short}, random vectors"] = self.random_overlap[:, n].double().mean(0)
        return plots.lines(
            lines,
            x=self.layers,
            xlabel="layer",
            ylabel="share in common",
            title=f"{self.top} most promoted tokens: in common with those through the gain",
        )


_ENDS = (torch.mean, torch.amin, torch.amax)


@torch.no_grad()
def lens_conventions(
    subject: Subject, *, top: int = 50, shown: int = 5, draws: int = TWO_SIDED_DRAWS, seed: int = 0
) -> LensConventions:
    """
    The logit lens of the subject's vectors by each convention of `LENSES`.

    Args:
        top: Most promoted tokens that are compared.
        shown: Those of them that are kept as text.
        draws: Random sets whose overlap is measured beside.
    """
    layers = subject.layers

    def best() -> list[list[list[int]]]:
        own = subject.vectors.added()
        found = []
        for options in LENSES.values():
            scores = lens_scores(subject.model, own, **options)
            known = min(len(subject.tokenizer), scores.shape[1])
            found.append(scores[:, :known].topk(min(top, known)).indices.tolist())
        return found

    ids = best()
    null = [_overlap(one) for one in with_random_sets(subject.vectors, best, draws, seed)]
    tokens = [[subject.tokens(row[:shown]) for row in convention] for convention in ids]
    return LensConventions(
        list(layers), list(LENSES), len(ids[0][0]), tokens, _overlap(ids), torch.stack(null)
    )


def _overlap(ids: list[list[list[int]]]) -> torch.Tensor:
    pairs = [zip(convention, ids[0], strict=True) for convention in ids]
    return torch.tensor([[len(set(a) & set(b)) / len(a) for a, b in both] for both in pairs])


@dataclass
class PersistenceConventions(Result):
    """
    `diff_diff` and `diff_vector` (conventions, sources, num_hidden_layers), in the order of `MEANS`; NaN
    below the source and where the layer has no vector. `random_diff_diff` and `random_diff_vector` have the
    draws in front.
    """

    sources: list[int]
    diff_diff: torch.Tensor
    diff_vector: torch.Tensor
    random_diff_diff: torch.Tensor
    random_diff_vector: torch.Tensor

    def rows(self) -> list[tuple[str, list[tuple[float | None, float | None]]]]:
        """
        By convention: its name, and Diff-Diff and Diff-Vector averaged over the layers above the sources,
        each beside that of the random vectors. None where nothing is known.
        """
        depth = self.diff_diff.shape[-1]
        above = torch.arange(depth)[None, :] > torch.tensor(self.sources)[:, None]
        found = []
        for n, name in enumerate(MEANS.values()):
            pairs = []
            for measure in MEASURES:
                own, random = getattr(self, measure)[n], getattr(self, f"random_{measure}")[:, n]
                pairs.append((known_mean(own[above]), known_mean(random[:, above])))
            found.append((name, pairs))
        return found

    def figure(self) -> Figure:
        """Diff-Diff by both conventions, sources by layers."""
        from steer.lens import plots

        maps = {f"Diff-Diff, {name}": self.diff_diff[n] for n, name in enumerate(MEANS)}
        return plots.heatmaps(
            maps, xlabel="after layer", ylabel="vector on", rows=list(map(str, self.sources))
        )


def persistence_conventions(
    subject: Subject,
    rows: Sequence[Row],
    sources: Sequence[int],
    *,
    draws: int = 1,
    seed: int = 0,
    label: str | None = None,
) -> PersistenceConventions:
    """
    Diff-Diff and Diff-Vector of single layers' vectors by both conventions of `MEANS`.

    Args:
        rows: Prompts with answers of the steered model: those are read by the first convention; the second
            writes its own to the prompts, at temperature 1.
        sources: Layers whose vector is on, one at a time.
        draws: Random sets measured beside; each writes answers of its own for the second convention.
    """

    def measure() -> tuple[torch.Tensor, torch.Tensor]:
        own = persistence(subject, rows, {str(layer): [layer] for layer in sources}, label=label)
        other = published_persistence(
            subject, [row.question for row in rows], sources, seed=seed, label=label
        )
        return torch.stack([own.diff_diff, other[0]]), torch.stack([own.diff_vector, other[1]])

    own = measure()
    null = with_random_sets(subject.vectors, measure, draws, seed)
    return PersistenceConventions(
        list(sources), *own, *(torch.stack(part) for part in zip(*null, strict=True))
    )


@torch.no_grad()
def published_persistence(
    subject: Subject,
    prompts: Sequence[Row],
    sources: Sequence[int],
    *,
    seed: int = 0,
    label: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Diff-Diff and Diff-Vector as the published code has them: mean over tokens of the cosine of a token's
    change with the mean change of its text, and with the vector of that layer.

    Args:
        prompts: Each vector writes one answer to each, alone, at temperature 1.
        sources: Layers whose vector is on, one at a time.

    Returns:
        Two tensors (sources, num_hidden_layers): NaN in the layers below the source, and for the second also
        where the layer has no vector.
    """
    compared = subject.vectors.added()
    shape = (len(sources), subject.decoder.num_hidden_layers)
    found = torch.zeros(2, *shape, dtype=torch.float64)
    alone = [Condition(frozenset([layer])) for layer in sources]
    written = complete(subject, prompts, alone, temperature=1.0, seed=seed, label=label)
    for n, (layer, rows) in enumerate(zip(sources, written, strict=True)):
        found[:, n] = own_means(subject, rows, [layer], compared, label)
    return found[0].float(), found[1].float()


def own_means(
    subject: Subject,
    rows: Sequence[Row],
    layers: Collection[int],
    compared: Mapping[int, torch.Tensor],
    label: str | None = None,
) -> torch.Tensor:
    """
    Both cosines along `rows` with the vectors of `layers` on: (2, num_hidden_layers). All tokens count but
    the last two of each text, as the published code leaves those out; one that has not changed counts as 0.
    """
    depth = subject.decoder.num_hidden_layers
    total = torch.zeros(2, depth, dtype=torch.float64)

    def seen(layer: int, stream: torch.Tensor, batch: Sequence[Row], starts: list[int]) -> None:
        for i, row in enumerate(batch):
            states = stream[:, i, starts[i] : starts[i] + len(row.ids) - 2].double().cpu()
            if not states.shape[1]:
                continue
            change = states[1] - states[0]
            rounding = change.norm(dim=-1) <= 1e-6 * states[0].norm(dim=-1)
            change[rounding] = 0
            total[0, layer] += cosine_similarity(change, change.mean(0, keepdim=True)).sum()
            if layer in compared:
                other = compared[layer].double().cpu()[None]
                total[1, layer] += cosine_similarity(change, other).sum()

    streams(subject, rows, [BASE, Condition(frozenset(layers))], seen, label=label)
    mean = total / max(1, sum(max(0, len(row.ids) - 2) for row in rows))
    mean[:, : min(layers)] = torch.nan
    mean[1, [layer not in compared for layer in range(depth)]] = torch.nan
    return mean

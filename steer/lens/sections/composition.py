"""What two layers do together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch

from steer.lens.composition import accuracies, compose, likelihoods
from steer.lens.conditions import Condition
from steer.lens.results import share, spread
from steer.lens.sections.base import Section
from steer.lens.sections.layers import pair_layers
from steer.lens.study import Report, Study
from steer.lens.words import joined, known_mean, null_range, percent


def compare_pairs(study: Study, layers: Sequence[int], joint: float) -> None:
    """
    The mean pair score of `layers` by the likelihood of right answers, that of random vectors in their place,
    and the mean gain in accuracy. joint: the likelihood of the jointly trained set, which random vectors are
    held against too.
    """
    pairs = [*combinations(layers, 2)]
    conditions = [Condition(frozenset(pair)) for pair in pairs]
    every = [one for pair in pairs for one in (Condition(frozenset(pair)), *study.random_conditions(pair))]
    together = likelihoods(study.subject, study.right, every, "pairs, random").unflatten(0, (len(pairs), -1))
    best = torch.stack([torch.maximum(study.alone[i], study.alone[j]) for i, j in pairs])
    own, *drawn = [known_mean(one) for one in share(together - best, joint - best).T]
    if own is not None:
        study.compare("pair_gain", own, (one for one in drawn if one is not None))
    single = [Condition(frozenset([layer])) for layer in layers]
    solved = accuracies(study.subject, study.half, [*single, *conditions], study.grader, "pairs")
    alone = dict(zip(layers, solved.tolist(), strict=False))
    gains = [
        pair - max(alone[i], alone[j])
        for (i, j), pair in zip(pairs, solved[len(layers) :].tolist(), strict=True)
    ]
    study.note(pair_accuracy=sum(gains) / len(gains))


class Composition(Section):
    step = "composition"
    heading = "Together, and at other scales"
    captions: ClassVar[dict[str, str]] = {
        "composition": "Log-probability of right answers with one layer’s vector (diagonal) and with two.",
    }

    def measure(self, study: Study) -> None:
        subject, rows = study.subject, study.right
        if len(subject.layers) < 2 or not rows:
            return
        result = compose(subject, [], None, spread(subject.layers, 6), rows, "pairs of layers")
        study.report.results["composition"] = result
        if result.joint is not None:
            compare_pairs(study, pair_layers(subject.layers), result.joint)

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results.get("composition")
        if result is None:
            return []
        pairs = list(combinations(range(len(result.layers)), 2))
        missing = [result.told(i, j) for i, j in pairs if result.told(i, j).startswith("undefined")]
        told = [f"The pair score is {missing[0]} ({len(missing)} of {len(pairs)} pairs)."] if missing else []
        score, gain = report.numbers.get("pair_gain"), report.numbers.get("pair_accuracy")
        if score is not None and gain is not None:
            tried = joined([*map(str, pair_layers(report.subject.layers))])
            told.append(
                f"In the pairs of layers {tried}, adding the second "
                f"layer to the better one covers {percent(score)} of the way to the jointly trained set on "
                f"average (random vectors: {null_range(report, 'pair_gain', percent)}); accuracy rises by "
                f"{gain:.3f}."
            )
        return told

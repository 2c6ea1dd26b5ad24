"""
Transfer matrix: what the vectors of each of several models do in each of the others (arXiv 2509.06608,
transfer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import steer
from steer.artifact import Artifact
from steer.errors import SteerError
from steer.lens.conditions import BASE, steered
from steer.lens.controls import random_vectors, values
from steer.lens.results import Result, share
from steer.lens.sampling import accuracies
from steer.lens.subject import Subject
from steer.prompt import PromptSpec
from steer.tasks.grading import MathGrader
from steer.tasks.prompts import DEFAULT_PROMPT
from steer.transfer import transfer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Entry:
    """One model of the matrix with the vectors that were trained in it. The model has no vectors attached."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    artifact: Artifact
    prompt: PromptSpec = DEFAULT_PROMPT


@dataclass
class TransferMatrix(Result):
    """
    `accuracy` (donors, recipients) with each donor's vectors in each recipient, its own on the diagonal;
    `base` and `random` (recipients,) without any, and with random ones as long as the recipient's own.
    `score` is the published one, (donor's - base) / (own - base), `random_score` the same for random vectors;
    NaN where the own vectors gain nothing or lose. A transfer that was refused is NaN, its reason in
    `refused`.
    """

    names: list[str]
    accuracy: torch.Tensor
    base: torch.Tensor
    random: torch.Tensor
    refused: dict[str, str]
    problems: int

    @property
    def score(self) -> torch.Tensor:
        return share(self.accuracy - self.base, self.accuracy.diagonal() - self.base)

    @property
    def random_score(self) -> torch.Tensor:
        return share(self.random - self.base, self.accuracy.diagonal() - self.base)

    def to_dict(self) -> dict[str, Any]:
        from steer.lens.results import plain

        return {
            **super().to_dict(),
            "score": plain(self.score),
            "random_score": plain(self.random_score),
        }

    def figure(self) -> Figure:
        """The matrix of scores."""
        from steer.lens import plots

        return plots.matrix(
            self.score,
            self.names,
            xlabel="recipient",
            ylabel="donor",
            title="Share of the recipient's own gain",
        )


def transfer_matrix(
    entries: Sequence[Entry],
    problems: Sequence[dict[str, Any]],
    grader: MathGrader,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    seed: int = 0,
    label: str | None = None,
    **options: Any,
) -> TransferMatrix:
    """
    Carry every entry's vectors into every other model with `steer.transfer.move` (which takes `options`,
    such as `method` or `force`), and solve `problems` greedily. The models are left without vectors.
    """
    if len(entries) < 2:
        raise SteerError("a transfer matrix needs two models or more")
    n = len(entries)
    accuracy = torch.full((n, n), torch.nan, dtype=torch.float64)
    base, random = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    refused: dict[str, str] = {}
    for j, to in enumerate(entries):
        for i, of in enumerate(entries):
            try:
                carried = of.artifact if i == j else _carry(of, to, options)
            except SteerError as error:
                refused[f"{of.name} -> {to.name}"] = str(error)
                continue
            vectors = steer.load(carried, to.model)
            try:
                subject = Subject(vectors, to.tokenizer, to.prompt, max_new_tokens, batch_size)
                text = label and f"{label}: {of.name} in {to.name}"
                conditions = [steered(subject), *([BASE] if i == j else [])]
                shares = accuracies(subject, problems, conditions, grader, text)
                if i == j:
                    base[j] = shares[1]
                    with values(vectors, random_vectors(vectors, seed)):
                        (random[j],) = accuracies(subject, problems, conditions[:1], grader, text)
            finally:
                steer.detach(to.model)
            accuracy[i, j] = shares[0]
    names = [entry.name for entry in entries]
    return TransferMatrix(names, accuracy, base, random, refused, len(problems))


def _carry(of: Entry, to: Entry, options: dict[str, Any]) -> Artifact:
    return transfer(
        of.artifact,
        of.model,
        to.model,
        donor_tokenizer=of.tokenizer,
        recipient_tokenizer=to.tokenizer,
        **options,
    ).artifact

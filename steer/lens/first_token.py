"""How far many conditions move the first generated token, in one pass: the numbers without the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer.lens.conditions import BASE, Condition
from steer.lens.passes import passes
from steer.lens.subject import Row, Subject

POSITIONS = 64  # generated tokens of a row that count, as in `token_shift.token_shift`


@dataclass
class FirstToken:
    """
    By condition: `share` of the summed total variation along the completions that sits on the first token,
    `concentration`, the share of the probability gained there that goes to the token that gains most, and
    `gained`, that token. As in `token_shift.TokenShift`.
    """

    share: torch.Tensor
    concentration: torch.Tensor
    gained: list[int]


def first_token(
    subject: Subject,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    *,
    label: str | None = None,
) -> FirstToken:
    """Each of `conditions` against the base model along `rows`, up to the 64th generated token."""
    rows = [Row(row.ids[: row.prompt + POSITIONS], row.prompt) for row in rows]
    first, whole = (torch.zeros(len(conditions), dtype=torch.float64) for _ in range(2))
    size = len(subject.model.get_output_embeddings().weight)
    change = torch.zeros(len(conditions), size, dtype=torch.float64)
    for done in passes(subject, rows, [BASE, *conditions], share=True, label=label):
        for index in range(len(done.rows)):
            base, *steered = done.next_token(index).softmax(-1).cpu()
            for n, one in enumerate(steered):
                moved = one - base
                distance = moved.abs().sum(-1).double() / 2
                first[n] += distance[0]
                whole[n] += distance.sum()
                change[n] += moved[0].double()
    gain, token = change.max(1)
    return FirstToken(first / whole.clamp(min=1e-30), gain / first.clamp(min=1e-30), token.tolist())


def likely_openings(subject: Subject, rows: Sequence[Row], count: int) -> list[int]:
    """The `count` tokens that the base model finds likeliest after the prompts of `rows`, on average."""
    mean = torch.zeros(len(subject.model.get_output_embeddings().weight), dtype=torch.float64)
    for done in passes(subject, [row.question for row in rows], [BASE]):
        for index in range(len(done.rows)):
            mean += done.next_token(index)[0, 0].softmax(-1).cpu().double()
    return mean.topk(min(count, len(mean))).indices.tolist()

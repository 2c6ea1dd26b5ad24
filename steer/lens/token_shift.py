"""
Token shift: how the vectors change the probability of each next token, dP_i = P(V_i | x_<t; theta, s) - P(V_i
| x_<t; theta) (arXiv 2509.06608, the last layer), and prefix substitution: how much of the gain a forced
opening gives without any vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steer.errors import SteerError
from steer.lens.conditions import BASE, Condition
from steer.lens.passes import passes
from steer.lens.results import Result, plain, share
from steer.lens.sampling import accuracies, complete, graded
from steer.lens.subject import Row, Subject
from steer.stats import wilson
from steer.tasks.grading import MathGrader

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class TextShift:
    """One text: its tokens, the change of each token's own probability, and the total variation before it."""

    tokens: list[str]
    prompt: int
    change: torch.Tensor  # (tokens,); 0 for the first, which nothing predicts
    variation: torch.Tensor  # (tokens,)


@dataclass
class TokenShift(Result):
    """
    Steered against base, averaged over texts. `variation` and `kl` (positions,): mean total variation
    distance and KL(steered || base) in nats of the distributions of the n-th generated token; `count`
    (positions,) the texts that are so long. `gained` and `lost` (vocabulary,): mean change of probability at
    the first generated token where positive and negative, `top` and `bottom` its largest: token, its id and
    the change. `overall_top` and `overall_bottom` are the same for the mean change over all generated tokens.
    `before` (positions,): the variation at the last tokens of the prompt, the one before the first generated
    token last.
    """

    layers: list[int]
    variation: torch.Tensor
    kl: torch.Tensor
    count: torch.Tensor
    before: torch.Tensor
    top: list[tuple[str, int, float]]
    bottom: list[tuple[str, int, float]]
    overall_top: list[tuple[str, int, float]]
    overall_bottom: list[tuple[str, int, float]]
    texts: list[TextShift]

    @property
    def first_share(self) -> float:
        """Share of the summed total variation that sits on the first generated token."""
        mass = self.variation * self.count
        return (mass[0] / mass.sum().clamp(min=1e-30)).item()

    @property
    def concentration(self) -> float:
        """
        Share of the probability gained at the first generated token that goes to one token, the top one.
        """
        return self.top[0][2] / max(self.variation[0].item(), 1e-30)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "first_share": self.first_share, "concentration": self.concentration}

    def figure(self) -> Figure:
        """
        Bars of the variation over the generated tokens, with the first token's largest changes beside them.
        """
        from steer.lens import plots

        figure, (left, right) = plots.panels(8.6, 3.4, 1, 2, width_ratios=[3, 2])
        before, after = self.before.tolist(), self.variation.tolist()
        before = before[-min(len(before), max(12, len(after))) :]
        left.bar(range(-len(before), 0), before, color=plots.COLOURS[5], label="in the prompt")
        left.bar(range(len(after)), after, color=plots.COLOURS[0], label="generated")
        plots.finish(
            left, "Total variation, steered against base", "token (0: the first generated)", "distance"
        )
        left.legend(frameon=False, fontsize=8)
        named = [*self.top[:6], *reversed(self.bottom[:6])]
        at = range(len(named))[::-1]
        right.barh(
            at, [value for *_, value in named], color=[plots.COLOURS[0 if v > 0 else 1] for *_, v in named]
        )
        right.set_yticks(at, [plots.text(token) for token, *_ in named], fontsize=8)
        right.axvline(0, color="black", linewidth=0.8)
        plots.finish(right, "First generated token", "change of probability", "")
        figure.tight_layout()
        return figure


def token_shift(
    subject: Subject,
    rows: Sequence[Row],
    *,
    layers: Collection[int] | None = None,
    positions: int = 64,
    texts: int = 4,
    top: int = 20,
    label: str | None = None,
) -> TokenShift:
    """
    How the vectors of `layers` (all by default) change the next-token distributions along `rows`: prompts, or
    prompts with completions that `sampling.complete` wrote. Each completion counts up to its `positions`-th
    token. The first `texts` rows are kept token by token.
    """
    condition = Condition(frozenset(subject.layers if layers is None else layers))
    rows = [Row(row.ids[: row.prompt + positions], row.prompt) for row in rows]
    longest = max(max(1, len(row.completion)) for row in rows)
    variation, kl, count = (torch.zeros(longest, dtype=torch.float64) for _ in range(3))
    before = torch.zeros(min(positions, max(row.prompt for row in rows)), dtype=torch.float64)
    before_count = torch.zeros_like(before)
    size = len(subject.model.get_output_embeddings().weight)
    first_change, change = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
    kept: list[TextShift] = []
    for done in passes(subject, rows, [BASE, condition], whole=True, label=label):
        for index, row in enumerate(done.rows):
            logs = done.next_token(index, whole=True).log_softmax(-1).cpu()
            base, steered = logs.exp()
            moved = steered - base  # (positions, vocabulary); position t predicts token t + 1
            distance = moved.abs().sum(-1).double() / 2
            divergence = (steered * (logs[1] - logs[0])).sum(-1).double()
            begin = row.prompt - 1
            generated = len(distance) - begin
            variation[:generated] += distance[begin:]
            kl[:generated] += divergence[begin:]
            count[:generated] += 1
            first_change += moved[begin].double()
            change += moved[begin:].double().sum(0)
            near = min(begin, len(before))
            before[len(before) - near :] += distance[begin - near : begin]
            before_count[len(before) - near :] += 1
            if len(kept) < texts:
                own = moved[: len(row.ids) - 1].gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
                zero = torch.zeros(1)
                kept.append(
                    TextShift(
                        subject.tokens(row.ids),
                        row.prompt,
                        torch.cat([zero, own]),
                        torch.cat([zero, distance[: len(row.ids) - 1].float()]),
                    )
                )
    first_change /= len(rows)
    change /= count.sum()

    def extremes(values: torch.Tensor, sign: int) -> list[tuple[str, int, float]]:
        ids = (sign * values).topk(min(top, len(values))).indices.tolist()
        return [(subject.token(i), i, values[i].item()) for i in ids]

    return TokenShift(
        layers=sorted(condition.layers),
        variation=variation / count.clamp(min=1),
        kl=kl / count.clamp(min=1),
        count=count,
        before=before / before_count.clamp(min=1),
        top=extremes(first_change, 1),
        bottom=extremes(first_change, -1),
        overall_top=extremes(change, 1),
        overall_bottom=extremes(change, -1),
        texts=kept,
    )


@dataclass
class PrefixSubstitution(Result):
    """
    Accuracy of the base model with each opening forced upon it, beside the base and the steered model
    without. `share` (openings,) is the part of the vectors' gain that the opening gives: (forced - base) /
    (steered - base), NaN where the vectors gain nothing or lose.
    """

    openings: list[str]
    accuracy: torch.Tensor
    base: float
    steered: float
    problems: int

    @property
    def share(self) -> torch.Tensor:
        return share(self.accuracy - self.base, self.steered - self.base)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "share": plain(self.share)}

    def figure(self) -> Figure:
        """Bars with 95 % Wilson intervals."""
        from steer.lens import plots

        names = ["base", *(f"base + {opening!r}" for opening in self.openings), "steered"]
        values = [self.base, *self.accuracy.tolist(), self.steered]
        return plots.bars(
            names,
            values,
            intervals=[wilson(value * self.problems, self.problems) for value in values],
            ylabel=f"accuracy on {self.problems} problems",
            title="What a forced opening gives without any vector",
        )


def prefix_substitution(
    subject: Subject,
    problems: Sequence[dict[str, Any]],
    openings: Sequence[str | Sequence[int]],
    grader: MathGrader,
    *,
    layers: Collection[int] | None = None,
    ends: tuple[float, float] | None = None,
    label: str | None = None,
) -> PrefixSubstitution:
    """
    Train nothing: put each of `openings` (such as the top promoted token, "To") at the head of the base
    model's answer, let it go on greedily, and grade. An opening is a text or token ids, since the text of a
    token need not be read as that token. The steered model writes with the vectors of `layers` (all by
    default) and nothing forced. ends: the accuracies without and with vectors, where they are known.
    """
    if not openings:
        raise SteerError("prefix substitution needs an opening to force, such as 'To'")
    if ends is None:
        condition = Condition(frozenset(subject.layers if layers is None else layers))
        free = accuracies(subject, problems, [BASE, condition], grader, label)
        ends = free[0].item(), free[1].item()
    forced = []
    for opening in openings:
        (rows,) = complete(subject, subject.rows(problems, forced=opening), [BASE], label=label)
        forced.append(graded(subject, rows, problems, grader).double().mean())
    names = [one if isinstance(one, str) else _text(subject, one) for one in openings]
    return PrefixSubstitution(names, torch.stack(forced), *ends, len(problems))


def _text(subject: Subject, ids: Sequence[int]) -> str:
    return subject.token(ids[0]) if len(ids) == 1 else str(subject.tokenizer.decode([*ids]))


def common_opening(rows: Sequence[Row], share: float = 0.9) -> tuple[int, ...]:
    """The longest opening, as token ids, that at least `share` of the completions have."""
    opening: tuple[int, ...] = ()
    while True:
        n = len(opening)
        alike = [row.completion for row in rows if row.completion[:n] == opening and len(row.completion) > n]
        following = Counter(completion[n] for completion in alike).most_common(1)
        if not following or following[0][1] < share * len(rows):
            return opening
        opening = (*opening, following[0][0])

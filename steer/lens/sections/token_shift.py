"""How far the vectors move the next-token distributions, and at which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from steer.lens.conditions import Condition, steered
from steer.lens.first_token import first_token
from steer.lens.logit_lens import logit_lens
from steer.lens.results import Result
from steer.lens.sampling import complete
from steer.lens.sections.base import Block, Note, Section, Strip
from steer.lens.study import Report, Study
from steer.lens.subject import Row
from steer.lens.token_shift import TokenShift, token_shift
from steer.lens.words import null_range, percent, quoted


class TokenShifts(Section):
    step = "token shift"
    heading = "Which tokens they move, and where"
    in_abstract = True
    captions: ClassVar[dict[str, str]] = {
        "token shift": (
            "How far the next-token distributions of the steered and the base model lie apart, along answers "
            "sampled from the steered model at temperature 1, and the largest changes at the first generated "
            "token."
        ),
        "token shift, last layer": "The same with the last layer’s vector alone.",
    }

    def measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        half = subject.rows(study.half)
        (sampled,) = complete(
            subject, half, [steered(subject)], temperature=1.0, seed=study.seed, label="sampling"
        )
        results["token shift"] = token_shift(subject, sampled, label="token shift")
        if study.last not in subject.layers:
            return
        last = token_shift(subject, sampled, layers=[study.last], texts=0, label="last layer")
        results["token shift, last layer"] = last
        compare_last(study, sampled)

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "token shift":
            return []
        shift: Any = report.results["token shift"]
        told = [
            f"At the first generated token the vectors move {percent(shift.variation[0].item())} of the "
            f"probability: {percent(shift.top[0][2])} to {quoted([shift.top[0][0]])}, most of it from "
            f"{quoted([token for token, *_ in shift.bottom[:2]])}; {percent(shift.first_share)} of the whole "
            "change along the answer sits on that first token."
        ]
        last: Any = report.results.get("token shift, last layer")
        if last is not None:
            told.append(
                f"The last layer’s vector alone moves {last.variation[0].item():.1%} there, and "
                f"{percent(last.first_share)} of what it changes is on the first token (random vectors of "
                f"its length: {null_range(report, 'last_first_share', percent)})."
            )
        return told

    def below(self, name: str, result: Result) -> list[Block]:
        """Each text with its tokens shaded by how far the distributions that predict them lie apart."""
        if not isinstance(result, TokenShift) or not result.texts:
            return []
        blocks: list[Block] = []
        for text in result.texts[:3]:
            pairs = list(zip(text.variation.tolist(), text.change.tolist(), strict=True))
            hints = [f"distance {distance:.2f}, own probability {change:+.2f}" for distance, change in pairs]
            blocks.append(Strip(text.tokens, text.prompt, [distance for distance, _ in pairs], hints))
        return [
            *blocks,
            Note(
                "Shade: how far the steered distribution that predicts the token lies from the base one "
                "(total variation). A bar marks the first generated token."
            ),
        ]


def compare_last(study: Study, rows: Sequence[Row]) -> None:
    """The last layer's vector and random ones along `rows`: is it one token, and does the lens name it?"""
    subject, last = study.subject, study.last
    conditions = [Condition(frozenset([last])), *study.random_conditions([last])]
    made = first_token(subject, rows, conditions, label="last layer, random")
    own, *drawn = made.share.tolist()
    study.compare("last_first_share", own, drawn)
    own, *drawn = made.concentration.tolist()
    study.compare("last_concentration", own, drawn)
    scale = subject.vectors.scale
    vectors = [subject.vectors.added()[last], *(scale * drawn[last] for drawn in study.directions)]
    lens = logit_lens(subject.model, subject.tokenizer, dict(enumerate(vectors)), top=1)
    # how many tokens the lens of a vector ranks above the one that this vector makes gain most
    ranks = [
        float((scores > scores[token]).sum()) for scores, token in zip(lens.scores, made.gained, strict=True)
    ]
    study.compare("last_lens_rank", ranks[0], ranks[1:], larger=False)

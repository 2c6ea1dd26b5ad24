"""How far the vectors move the next-token distributions, and at which tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from steer.lens.conditions import steered
from steer.lens.controls import values
from steer.lens.logit_lens import logit_lens
from steer.lens.results import Result
from steer.lens.sampling import complete
from steer.lens.sections.base import Block, Note, Section, Strip
from steer.lens.study import Report, Study
from steer.lens.token_shift import TokenShift, token_shift
from steer.lens.words import number, percent, quoted


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
        half = subject.rows(study.problems[: len(study.problems) // 2])
        (sampled,) = complete(
            subject, half, [steered(subject)], temperature=1.0, seed=study.seed, label="sampling"
        )
        results["token shift"] = token_shift(subject, sampled, label="token shift")
        if study.last not in subject.layers:
            return
        last = token_shift(subject, sampled, layers=[study.last], texts=0, label="last layer")
        results["token shift, last layer"] = last
        with values(subject.vectors, study.random):
            control = token_shift(subject, sampled, layers=[study.last], texts=0, label="last layer, random")
            random_lens = _last_lens(study)
        study.note(last_first_share=last.first_share, last_concentration=last.concentration)
        study.note(
            random_last_first_share=control.first_share, random_last_concentration=control.concentration
        )
        gained = last.top[0][1]
        study.note(last_lens_rank=_rank(_last_lens(study), gained))
        study.note(random_last_lens_rank=_rank(random_lens, gained))

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
                f"{percent(last.first_share)} of what it changes is on the first token (a random vector of "
                f"its length: {percent(number(report, 'random_last_first_share'))})."
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


def _last_lens(study: Study) -> torch.Tensor:
    subject = study.subject
    vector = {study.last: subject.vectors.effective()[study.last]}
    return logit_lens(subject.model, subject.tokenizer, vector).scores[0]


def _rank(scores: torch.Tensor, token: int) -> int:
    """How many tokens score higher."""
    return int((scores > scores[token]).sum())

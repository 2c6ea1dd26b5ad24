"""What an opening forced upon the base model gives of the gain."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from steer.lens.sections.base import Section
from steer.lens.study import Report, Study
from steer.lens.token_shift import common_opening, prefix_substitution
from steer.lens.words import joined, percent, quoted


class Prefix(Section):
    step = "prefix substitution"
    in_abstract = True
    captions: ClassVar[dict[str, str]] = {
        "prefix substitution": "The base model, untouched, with an opening forced upon its answer.",
    }

    def measure(self, study: Study) -> None:
        subject, shift = study.subject, study.report.results["token shift"]
        top: str = shift.top[0][0]  # type: ignore[attr-defined]
        usual = common_opening(study.base, share=0.01)[:1]
        opening = str(subject.tokenizer.decode([*common_opening(study.rows)]))
        control = str(subject.tokenizer.decode([*usual]))
        openings = list(dict.fromkeys([top, control, opening]))
        openings = [text for text in openings if text]
        ends = study.report.accuracy["base"][0], study.report.accuracy["steered"][0]
        result = prefix_substitution(
            subject, study.problems, openings, study.grader, ends=ends, label="forced openings"
        )
        study.report.results["prefix substitution"] = result
        share = dict(zip(openings, result.share.tolist(), strict=True))
        if result.steered > result.base and len(share) > 1:
            study.note(forced_share=share[top], control_forced_share=share.get(control))

    def sentences(self, name: str, report: Report) -> list[str]:
        result: Any = report.results["prefix substitution"]
        shares = [
            f"{quoted([opening])} gives {percent(share)}"
            for opening, share in zip(result.openings, result.share.tolist(), strict=True)
            if not math.isnan(share)
        ]
        if not shares:
            return ["The vectors gain nothing, so a forced opening cannot give a share of it."]
        return [f"Forced upon the base model as the answer’s opening, of the vectors’ gain {joined(shares)}."]

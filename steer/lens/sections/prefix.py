"""What an opening forced upon the base model gives of the gain."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from tqdm.auto import tqdm

from steer.lens.composition import likelihoods
from steer.lens.conditions import BASE
from steer.lens.first_token import likely_openings
from steer.lens.random_sets import ONE_SIDED_DRAWS
from steer.lens.sections.base import Section
from steer.lens.study import TEXTS, Report, Study
from steer.lens.subject import Row
from steer.lens.token_shift import common_opening, prefix_substitution
from steer.lens.words import joined, percent, quoted


def compare_openings(study: Study, token: int) -> None:
    """
    How likely the base model finds the rest of right answers once `token` is put in the place of their first,
    and once other first tokens are that it likes best.
    """
    rows = [row for row in study.right if len(row.completion) > 1]
    if len(rows) < TEXTS:
        reason = f"Only {len(rows)} right answers have two tokens or more, {TEXTS} are needed."
        if study.right:
            study.lack(reason, "forced_likelihood")
        return
    usual = likely_openings(study.subject, rows, ONE_SIDED_DRAWS + 1)
    tokens = [token, *[one for one in usual if one != token][:ONE_SIDED_DRAWS]]
    own, *others = (
        likelihoods(
            study.subject,
            [Row((*row.ids[: row.prompt], first, *row.completion[1:]), row.prompt + 1) for row in rows],
            [BASE],
        ).item()
        for first in tqdm(tokens, desc="other openings", leave=False)
    )
    study.compare("forced_likelihood", own, others)


class Prefix(Section):
    step = "prefix substitution"
    in_abstract = True
    captions: ClassVar[dict[str, str]] = {
        "prefix substitution": "The base model, untouched, with an opening forced upon its answer.",
    }

    def measure(self, study: Study) -> None:
        subject, shift = study.subject, study.report.results["token shift"]
        top: int = shift.top[0][1]  # type: ignore[attr-defined]
        usual = common_opening(study.base, share=0.01)[:1]
        openings = [ids for ids in dict.fromkeys([(top,), usual, common_opening(study.rows)]) if ids]
        ends = study.report.accuracy["base"][0], study.report.accuracy["steered"][0]
        result = prefix_substitution(
            subject, study.problems, openings, study.grader, ends=ends, label="forced openings"
        )
        study.report.results["prefix substitution"] = result
        share = dict(zip(openings, result.share.tolist(), strict=True))
        if result.steered > result.base:
            study.note(forced_share=share[top,], usual_opening_share=share.get(usual))
            compare_openings(study, top)

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

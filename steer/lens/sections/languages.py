"""The languages of the tokens that the vectors promote and suppress, by a classifier."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.errors import SteerError
from steer.lens.controls import values
from steer.lens.languages import Languages as Counts
from steer.lens.languages import classifier, languages
from steer.lens.logit_lens import logit_lens
from steer.lens.results import Result
from steer.lens.sections.base import Block, Section, Table
from steer.lens.study import Report, Study
from steer.lens.words import known_mean, percent


class Languages(Section):
    step = "languages"
    captions: ClassVar[dict[str, str]] = {
        "languages": (
            "Share of tokens in a language other than English by a classifier of languages, of those it is "
            "sure of, among the 50 most promoted and most suppressed of each layer."
        ),
        "languages, random": "The same for random vectors of equal length.",
    }

    def measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        try:
            classify = classifier()
        except SteerError as error:
            study.report.notes.append(f"Languages of tokens left out: {error}.")
            return
        with values(subject.vectors, study.random):
            control = logit_lens(subject.model, subject.tokenizer, subject.vectors.added())
        own: Any = results["logit lens"]
        found = languages(own, subject.tokenizer, classify, seed=study.seed)
        if not found.tables["vocabulary"].any():
            study.report.notes.append("Languages of tokens left out: the classifier is sure of no token.")
            return
        results["languages"] = found
        results["languages, random"] = languages(control, subject.tokenizer, classify, seed=study.seed)

    def sentences(self, name: str, report: Report) -> list[str]:
        own, control = (report.results[key] for key in self.captions)
        assert isinstance(own, Counts) and isinstance(control, Counts)
        shares = [known_mean(one.foreign()) for one in (own, control)]
        if name != "languages" or None in shares:
            return []
        told = [percent(share or 0.0) for share in (*shares, own.foreign_base)]
        return [
            f"By a classifier of languages, {told[0]} of the suppressed tokens are not English (random "
            f"vectors: {told[1]}; the vocabulary: {told[2]}). Single tokens are hard to classify."
        ]

    def below(self, name: str, result: Result) -> list[Block]:
        assert isinstance(result, Counts)
        head = ("tokens", "decided", "script and language agree", "Cohen’s kappa", "not English")
        rows = [
            (kind, str(decided), *("–" if x != x else f"{x:.2f}" for x in rest))
            for kind, decided, *rest in result.rows()
        ]
        return [Table(head, rows)]

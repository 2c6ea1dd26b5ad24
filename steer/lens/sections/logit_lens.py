"""Which tokens the vectors promote by themselves, and in which scripts."""

from __future__ import annotations

from typing import Any, ClassVar

from steer.lens.logit_lens import logit_lens
from steer.lens.scripts import count_scripts
from steer.lens.sections.base import Section
from steer.lens.study import Report, Study
from steer.lens.words import null_range, number, quoted


class LogitLens(Section):
    step = "logit lens"
    captions: ClassVar[dict[str, str]] = {
        "logit lens": (
            "The tokens that each vector promotes most by itself: unembedding times vector, through the "
            "final norm’s scale. The layers between it and the output are skipped, so early layers’ readings "
            "say little."
        ),
        "scripts": (
            "Share of tokens in scripts other than plain Latin among the 50 most promoted and most "
            "suppressed of each layer, against the whole vocabulary."
        ),
    }

    def measure(self, study: Study) -> None:
        subject, results = study.subject, study.report.results
        read = lambda vectors: logit_lens(subject.model, subject.tokenizer, vectors)  # noqa: E731
        own = read(subject.vectors.added())
        results["logit lens"] = own
        results["scripts"] = counts = count_scripts(own, subject.tokenizer)
        middle = [n for n, i in enumerate(own.layers) if study.last / 3 <= i <= 2 * study.last / 3]
        if middle and counts.foreign_base >= 0.01:
            study.note(vocabulary_foreign=counts.foreign_base)
            layers = [own.layers[n] for n in middle]
            scale = subject.vectors.scale
            vectors = [scale * drawn[layer] for drawn in study.directions for layer in layers]
            control = count_scripts(read(dict(enumerate(vectors))), subject.tokenizer)
            drawn = control.foreign().unflatten(0, (-1, len(layers))).mean(1)
            study.compare("middle_foreign", counts.foreign()[middle].mean().item(), drawn.tolist())

    def sentences(self, name: str, report: Report) -> list[str]:
        if name != "logit lens":
            return []
        lens: Any = report.results["logit lens"]
        counts: Any = report.results["scripts"]
        told = [
            f"By itself, the vector of layer {lens.layers[-1]} promotes {quoted(lens.top_tokens[-1][:3])} "
            f"and suppresses {quoted(lens.bottom_tokens[-1][:3])}. The lens skips the layers between a "
            "vector and the output, so early layers’ readings say little."
        ]
        if "middle_foreign" in report.numbers:
            told.append(
                f"Among the 50 bottom tokens of the middle third, {number(report, 'middle_foreign'):.1%} are "
                "in a script other than plain Latin, of the vocabulary "
                f"{number(report, 'vocabulary_foreign'):.1%}, for random vectors "
                f"{null_range(report, 'middle_foreign', '{:.1%}'.format)}."
            )
        else:
            told.append(f"Of the vocabulary {counts.foreign_base:.1%} is in a script other than plain Latin.")
        return told

"""A report as one HTML page: readable without scripts, nothing fetched, all text of models escaped."""

from __future__ import annotations

from typing import Any

from steer.lens import plots, prose
from steer.lens.findings import NOT_SEEN, NOT_SPECIFIC, SEEN, told_null, words
from steer.lens.random_sets import ONE_SIDED_DRAWS
from steer.lens.sections import SECTIONS
from steer.lens.study import TEXTS, Report
from steer.lens.words import percent
from steer.pages import asset, render_page


def render(report: Report) -> str:
    """The page, as text."""
    vectors = report.subject.vectors
    return render_page(
        "lens",
        style=asset("lens.css"),
        report=report,
        config=vectors.config,
        parameters=f"{sum(parameter.numel() for parameter in vectors.parameters()):,}",
        layers=len(report.subject.layers),
        abstract=prose.abstract(report),
        trained=prose.trained(report),
        provenance=_provenance(report),
        figures=_figures(report),
        texts=TEXTS,
        draws=ONE_SIDED_DRAWS,
        classes={SEEN: "seen", NOT_SPECIFIC: "unspecific", NOT_SEEN: "not"},
        told_null=told_null,
        percent=percent,
        words=words,
    )


def _figures(report: Report) -> list[dict[str, Any]]:
    """Each result with what its section says of it; the first of a section is under its heading."""
    figures = []
    for section in SECTIONS:
        heading = section.heading
        for name in section.captions:
            if name not in report.results:
                continue
            result = report.results[name]
            figures.append(
                {
                    "heading": heading,
                    "name": name,
                    "told": " ".join(section.sentences(name, report)),
                    "image": plots.data_uri(result.figure()),
                    "caption": section.caption(name, report),
                    "below": section.below(name, result),
                }
            )
            heading = ""
    return figures


def _provenance(report: Report) -> list[tuple[str, str]]:
    """Everything the artifact says of its making but its scores."""
    made = report.subject.vectors.config.provenance or {}
    return [(part, _told(values)) for part, values in made.items() if part != "results"]


def _told(values: Any) -> str:
    if not isinstance(values, dict):
        return _short(values)
    return ", ".join(f"{k} {_short(v)}" for k, v in values.items() if v not in (None, "", [], {}))


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""A section of the report: one class that measures, says what it found, and shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from steer.lens.results import Result
from steer.lens.study import Report, Study


@dataclass(frozen=True)
class Table:
    """A table below a figure; the first column is text, the others are numbers."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Strip:
    """A text with its tokens shaded from 0 to 1, a hint at each; the first `prompt` are the prompt."""

    kind: ClassVar[str] = "strip"
    tokens: Sequence[str]
    prompt: int
    shades: Sequence[float]
    hints: Sequence[str]

    def shown(self) -> list[tuple[str, str, str]]:
        """Each token as it is shown, its opacity and its hint."""
        opacities = [f"{shade * 0.75:.2f}" for shade in self.shades]
        shown = [token.replace("\n", "↵") for token in self.tokens]
        return list(zip(shown, opacities, self.hints, strict=True))


@dataclass(frozen=True)
class Note:
    """Small print."""

    kind: ClassVar[str] = "note"
    text: str


Block = Table | Strip | Note


class Section:
    """
    One part of the report. A subclass leaves its results in `study.report.results` by the names of
    `captions`, and its numbers with `study.note`.

    `step`: what the progress bar calls it. `heading`: is above its first figure, "" for a section that
    goes on under the heading before it. `captions`: what each figure shows, by the result's name.
    `in_abstract`: whether the first sentence of its first result is in the abstract.
    """

    step: ClassVar[str]
    heading: ClassVar[str] = ""
    captions: ClassVar[dict[str, str]]
    in_abstract: ClassVar[bool] = False

    def measure(self, study: Study) -> None:
        """Measure, and leave results, numbers, and notes of what was left out."""
        raise NotImplementedError

    def sentences(self, name: str, report: Report) -> list[str]:
        """What the result `name` shows, in words shown before its figure; none where it shows itself."""
        return []

    def caption(self, name: str, report: Report) -> str:
        """The caption of the figure of the result `name`."""
        return self.captions[name]

    def below(self, name: str, result: Result) -> list[Block]:
        """What is shown below the figure."""
        return []

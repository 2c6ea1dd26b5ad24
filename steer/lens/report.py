"""
Every analysis of one artifact, with its controls, and the paper's findings judged by the numbers.

`study` measures, `page.render` writes the result as one HTML page, `save_figures` as image files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from steer.errors import SteerError
from steer.files import replace_file
from steer.lens import findings
from steer.lens.sections import SECTIONS
from steer.lens.study import TEXTS, Record, Report, Study
from steer.lens.subject import Subject
from steer.tasks.grading import MathGrader


def study(
    subject: Subject,
    problems: Sequence[Record],
    grader: MathGrader,
    *,
    checkpoints: Sequence[str | os.PathLike[str]] = (),
    seed: int = 0,
) -> Report:
    """
    Run everything on `problems`: accuracies on all of them, sampled answers and scales on the first half
    (at least `TEXTS`), all else on `TEXTS` answers, with `ONE_SIDED_DRAWS` sets of random vectors. Shows its
    progress. checkpoints: artifacts of the same run, the earliest first.
    """
    if len(problems) < TEXTS:
        raise SteerError(f"a report needs at least {TEXTS} problems, got {len(problems)}; raise --problems")
    made = Study(subject, problems, grader, checkpoints, seed)
    steps: list[tuple[str, Callable[[], None]]] = [("accuracy and controls", made.answer)]
    steps += [(section.step, partial(section.measure, made)) for section in SECTIONS]
    with tqdm(steps, unit="step", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]") as bar:
        for name, step in bar:
            bar.set_description(name)
            step()
        bar.set_description("report")
    made.report.findings = findings.judge(made.report.numbers, made.report.nulls, made.report.missing)
    return made.report


def save_figures(report: Report, folder: str | os.PathLike[str]) -> Path:
    """One PNG a section and `findings.json` into `folder`, which is made where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in report.results.items():
        result.plot(folder / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"
    replace_file(folder / "findings.json", text.encode())
    return folder

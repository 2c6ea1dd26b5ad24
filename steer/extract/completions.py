"""The right and wrong answers of a run (`steer.evaluation.answers`), as a contrast."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.evaluation.answers import Answer, pairs, read_answers
from steer.extract.contrast import Contrast
from steer.extract.rows import Row
from steer.tasks.prompts import prompt_ids


def read_completions(
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    stage: str = "after",
    variant: str = "base",
) -> Contrast:
    """
    The right answers of a run as positive texts, the wrong ones as negative ones, each after its prompt.

    A right and a wrong answer to one problem are a pair: the first right one with the first wrong one, and so
    on.

    Args:
        folder: of a run of `steer train`, of a member of `steer sweep`, or of `steer eval`.
        tokenizer: of the run's model.
        stage: of a run of `steer train`: a key of `STAGES`, whose answers were kept. "training" are those of
            the updates themselves, which `log_completions` keeps.
        variant: of a run of `steer eval`: whose answers.

    Raises:
        SteerError: no such run, stage or variant; answers that are all right or all wrong.
    """
    path = Path(folder)
    answers, what, prompt, _ = read_answers(path, tokenizer, stage, variant)
    counts = {kind: sum(a.correct is kind for a in answers) for kind in (True, False)}
    if not all(counts.values()):
        raise SteerError(
            f"{path}, {what}: {counts[True]} answers are right and {counts[False]} wrong; a direction needs "
            "both: choose another --stage or --variant, or a run with both"
        )
    rows = {kind: [_row(a, tokenizer) for a in answers if a.correct is kind] for kind in (True, False)}
    source = {"from": f"right and wrong answers of the run {path}, {what}"}
    return Contrast(rows[True], rows[False], pairs(answers), source, prompt)


def _row(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> Row:
    first = prompt_ids(tokenizer, [answer.prompt])[0]
    after = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    return Row((*first, *after), len(first))

"""
Validation during training: greedy accuracy on problems that are split off the training set, every few
updates. The best state can be kept, and training can stop when it no longer improves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from steer.errors import SteerError
from steer.evaluation.heldout import Answered, answer, score
from steer.files import read_json, replace_file
from steer.tasks.grading import MathGrader
from steer.training.tool_calls import answer_with_tools

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from steer.training.problems import Problems

log = logging.getLogger("steer")

VALIDATION_FILE = "validation.json"
# Share of the training problems that a run validates on where nothing is said.
SHARE = 0.1

# One entry for each validation: `step` and the fields of `steer.evaluation.heldout.Score` that are plotted.
History = list[dict[str, Any]]


def split(problems: Dataset, size: float) -> tuple[Dataset, list[dict[str, Any]]]:
    """
    Problems to train and to validate on. A hash of the problem's words, whatever their order, decides, so
    that 3 + 4 and 4 + 3 stay together.

    Args:
        problems: the training problems.
        size: the share of them to validate on, or their number from 1 (a few more where some stay together).

    Raises:
        SteerError: no problem is left on one of the sides.
    """
    places = [_place(text) for text in problems["problem"]]
    limit = size
    if size >= 1:
        last = sorted(places)[min(int(size), len(places)) - 1]
        limit = min((place for place in places if place > last), default=1.0)
    chosen = [place < limit for place in places]
    validation = problems.select([i for i, yes in enumerate(chosen) if yes])
    rest = problems.select([i for i, yes in enumerate(chosen) if not yes])
    if not len(validation) or not len(rest):
        raise SteerError(
            f"validation={size} leaves {len(rest)} problems to train and {len(validation)} to validate on, "
            f"of {len(problems)}; give a share between 0 and 1 or a number that leaves both, or more problems"
        )
    return rest, validation.to_list()


def _place(text: str) -> float:
    words = sorted(re.findall(r"\w+|[^\w\s]", text))
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big") / 2**64


def best(history: History) -> dict[str, Any] | None:
    """The entry with the highest accuracy after an update, of equals the first; None where there is none."""
    return max((row for row in history if row["step"]), key=lambda row: row["accuracy"], default=None)


def stalled(history: History, patience: int | None) -> bool:
    """Whether the last `patience` validations were not better than the best before them."""
    top = best(history)
    return bool(patience and top and sum(row["step"] > top["step"] for row in history) >= patience)


def history_entry(step: int, answered: Sequence[Answered]) -> dict[str, Any]:
    """What a history keeps of a validation."""
    scored = score(answered)
    names = ("accuracy", "low", "high", "lenient", "finished", "mean_tokens")
    return {"step": step, **{name: getattr(scored, name) for name in names}}


def summary(history: History, problems: int, kept: str, stopped: str | None = None) -> dict[str, Any]:
    """What a run's results hold of its validation; `kept` says which state the artifact is: best or last."""
    return {"problems": problems, "best": best(history), "kept": kept, "stopped": stopped, "history": history}


def answer_together(
    trainer: Any,
    rows: Problems,
    format_problem: Callable[[Any], Any],
    grader: MathGrader,
    limit: int,
    label: str,
    temperature: float = 0.0,
    leave: bool = True,
) -> list[Answered]:
    """
    Answers to `rows` by the model in training, which all processes share: each is given all of them.

    Args:
        trainer: its model answers.
        rows: problems in the record form; each process answers some.
        format_problem: makes the prompt of a problem; of a trainer with tools its turns.
        grader: judges the answers.
        limit: tokens of the longest answer.
        label: names the progress bar, which stays when it is full if `leave` is set.
        temperature: 0 is greedy.
    """
    state = PartialState()
    numbers = range(state.process_index, len(rows), state.num_processes)
    own = [rows[i] for i in numbers]
    with trainer.accelerator.autocast():  # before training the model's own forward pass has none yet
        if getattr(trainer, "tools", None):
            mine = answer_with_tools(trainer, own, format_problem, grader, label, temperature, leave)
        else:
            model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
            mine = answer(
                model,
                trainer._tokenizer,
                own,
                format_problem,
                grader,
                limit,
                trainer.eos_token_ids,
                label=label,
                temperature=temperature,
                numbers=numbers,
                leave=leave,
            )
    return [a for turn in zip_longest(*gather_object([mine])) for a in turn if a is not None]


class Validation(TrainerCallback):
    """
    Measures greedy accuracy every `every` updates and after the last one: `validation/accuracy` in the log
    of that update, and `validation.json` in the output folder. A run that is stopped and resumed validates
    at the same updates. Add it to a trainer with `trainer.add_callback`.

    Args:
        trainer: what is validated.
        problems: problems with `problem` and `answer` that are not trained on.
        format_problem: makes the prompt of a problem (or of its chat); of a trainer with tools its turns.
        grader: judges the answers.
        every: updates between validations.
        keep_best: keep the state of the best validation, for `finish`.
        patience: stop after this many validations without a better one.
    """

    def __init__(
        self,
        trainer: Any,
        problems: Problems,
        format_problem: Callable[[Any], Any],
        grader: MathGrader,
        every: int,
        keep_best: bool = False,
        patience: int | None = None,
    ):
        if trainer.sharded:
            raise SteerError(
                "a sharded model is not validated in training; leave validate_every out, score it later"
            )
        self.trainer, self.problems, self.grader = trainer, problems, grader
        self.format_problem, self.every = format_problem, every
        self.keep_best, self.patience = keep_best, patience
        self.folder = Path(trainer.args.output_dir)
        self.history: History = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        path = self.folder / VALIDATION_FILE
        known: History = read_json(path) if path.exists() else []
        # Later updates will come again; the one after the last update of a shorter run was out of turn.
        self.history = [
            row
            for row in known
            if row["step"] <= state.global_step
            and (row["step"] % self.every == 0 or row["step"] == state.max_steps)
        ]
        PartialState().wait_for_everyone()  # all have read before one writes
        if state.is_world_process_zero:
            for step, place in self._places().items():
                if step > state.global_step:
                    shutil.rmtree(place, ignore_errors=True)
        if not self.history and state.global_step == 0:
            self._validate(0)
        if stalled(self.history, self.patience):
            control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        accuracy = self._validate(step)["accuracy"]
        self.trainer._metrics["train"]["validation/accuracy"].append(accuracy)
        if stalled(self.history, self.patience):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Only now does a checkpoint know of the best: a run that resumes earlier needs the one before. One
        # that is made longer forgets a validation out of turn, and needs the best of the others.
        in_turn = [row for row in self.history if row["step"] % self.every == 0]
        needed = {top["step"] for rows in (self.history, in_turn) if (top := best(rows))}
        if state.is_world_process_zero and needed:
            for step, place in self._places().items():
                if step not in needed:
                    shutil.rmtree(place, ignore_errors=True)

    def finish(self) -> dict[str, Any]:
        """
        After training: with `keep_best`, put the trained part of the model in its best state.

        Returns:
            What the results of the run hold of it (`summary`).
        """
        top, kept = best(self.history), "last"
        if self.keep_best and top:
            place = self._place(top["step"])
            if place.is_dir():
                self.trainer._load_from_checkpoint(str(place))
                kept = "best"
            else:  # of a run that an older version began, and that was made longer
                log.warning("%s, the best state, is gone: the last one is kept", place)
        stopped = None
        if stalled(self.history, self.patience) and top:
            stopped = f"no better validation in {self.patience} after update {top['step']}"
        return summary(self.history, len(self.problems), kept, stopped)

    def _validate(self, step: int) -> dict[str, Any]:
        limit = self.trainer.args.max_completion_length
        label = f"validation, update {step}"
        answered = answer_together(
            self.trainer, self.problems, self.format_problem, self.grader, limit, label, leave=False
        )
        entry = history_entry(step, answered)
        self.history.append(entry)
        if self.keep_best and best(self.history) is entry:
            self.trainer.save_model(str(self._place(step)), _internal_call=True)
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / VALIDATION_FILE, (json.dumps(self.history, indent=1) + "\n").encode())
        PartialState().wait_for_everyone()
        return entry

    def _place(self, step: int) -> Path:
        """The folder of the state after an update, if it is kept."""
        return self.folder / f"best-{step}"

    def _places(self) -> dict[int, Path]:
        """The folders of states that were kept, by update."""
        return {
            int(place.name[5:]): place for place in self.folder.glob("best-*") if place.name[5:].isdecimal()
        }

"""
`Study`: what all members of a population share, and how their answers to validation problems are measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.evaluation.heldout import Answered, answer
from steer.prompt import PromptSpec
from steer.tasks.prompts import formatter, question
from steer.tasks.rewards import MathGrader
from steer.training.arguments import PopulationArguments
from steer.training.problems import fitting, problems
from steer.training.run import RunConfig
from steer.training.run_settings import RunSettings
from steer.training.sweep.member import Member
from steer.training.sweep.trainer import PopulationTrainer
from steer.training.validation import SHARE, best, history_entry, split, stalled

Problems = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """What all members share."""

    folder: Path
    run: RunConfig
    asked: PopulationArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSpec
    grader: MathGrader
    train: Dataset  # with a column `prompt`
    held_out: Problems | None
    validation: Problems = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, settings: RunSettings, grader: MathGrader) -> Study:
        """The study that `settings` describe, in `folder`: model and problems are loaded."""
        run, training, asked = settings.run, settings.training, settings.population
        assert asked is not None
        model, tokenizer = run.load(run.model_dtype, training.trust_remote_code)
        if not getattr(model, "is_quantized", False):  # bitsandbytes has put those where they are
            cast(nn.Module, model).to(training.device)
        train, held_out = problems(run)
        prompts = settings.prompt
        format_problem = formatter(prompts, tokenizer)
        train = train.map(lambda row: {"prompt": format_problem(question(row))}, desc="formatting prompts")
        train = fitting(train, held_out, format_problem, tokenizer, model, training.max_completion_length)
        validation: Problems = []
        if run.validate_every:
            train, validation = split(train, run.validation or SHARE)
        return cls(folder, run, asked, model, tokenizer, prompts, grader, train, held_out, validation)

    def validate(self, trainer: PopulationTrainer, member: Member) -> None:
        """Measure a member's greedy accuracy where one is due after its last update; stop it as asked."""
        run, step = self.run, member.step
        if not run.validate_every or (step % run.validate_every and step != member.steps):
            return
        with trainer.population.only(member.name):
            answered = self.answer(trainer, self.validation, f"validating {member.name}, update {step}")
        # the one after the last update of a shorter run was out of turn
        member.history = [row for row in member.history if row["step"] % run.validate_every == 0]
        member.history.append(entry := history_entry(step, answered))
        member.log[-1]["validation/accuracy"] = entry["accuracy"]
        # the last update may be out of turn: its vectors are there, and a longer run needs the best before
        in_turn = step % run.validate_every == 0
        if run.keep_best and in_turn and best(member.history) is entry:
            member.best = {name: tensor.clone() for name, tensor in member.vectors.tensors().items()}
        if stalled(member.history, run.patience) and member.stopped is None:
            member.stopped = f"no better validation in {run.patience}"

    def validate_untrained(self, trainer: PopulationTrainer) -> None:
        """Measure it before the first update, as a run alone does; once for all that begin as the base."""
        known: list[Answered] | None = None
        for member in trainer.members if self.run.validate_every else []:
            if member.step or member.history:
                continue
            steers = any(member.vectors.norms().values())
            if steers or known is None:
                with trainer.population.only(member.name):
                    answered = self.answer(trainer, self.validation, f"validating {member.name}, untrained")
                known = known if steers else answered
            member.history.append(history_entry(0, answered if steers else known or []))

    def answer(
        self,
        trainer: PopulationTrainer,
        problems: Problems,
        label: str,
        way: tuple[PromptSpec, int] | None = None,
    ) -> list[Answered]:
        """Answers to `problems`, asked as in training or in another `way`: prompts and limit in tokens."""
        prompts, limit = way or (self.prompts, trainer.args.max_completion_length)
        return answer(
            self.model,
            self.tokenizer,
            problems,
            formatter(prompts, self.tokenizer),
            self.grader,
            limit,
            trainer.eos_token_ids,
            label=label,
        )

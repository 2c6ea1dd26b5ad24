"""
A population's run on disk: which members it has, how far each is, which go on, and what each left behind.

    run.json            what all members share             state-0.pt       the state of process 0's members
    population.json     what each member changes           halving.json     who was stopped where, and why
    results.json        the untrained model's score        members/NAME/    vectors, results.json, log.json,
                                                                            samples_after.json

Several processes divide the members among them, each on a copy of the base: nothing is exchanged but scores.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer import artifact
from steer.errors import SteerError
from steer.evaluation.heldout import Answered, answer, constant, score, ways
from steer.files import read_json, replace_file
from steer.models import context_length
from steer.prompt import PromptSpec
from steer.tasks.elicited import STAGES, UNTRAINED, choose
from steer.tasks.prompts import formatter, question
from steer.tasks.reward_loading import load_rewards
from steer.tasks.rewards import MathGrader
from steer.training import init
from steer.training import run as runs
from steer.training.arguments import PopulationArguments
from steer.training.neutral import differences
from steer.training.problems import fitting, problems
from steer.training.run import RunConfig
from steer.training.run_settings import RunSettings
from steer.training.sweep.grid import own
from steer.training.sweep.member import OWN, Member, read_states
from steer.training.sweep.trainer import PopulationTrainer
from steer.training.validation import SHARE, best, history_entry, split, stalled, summary
from steer.versions import versions

log = logging.getLogger("steer")

POPULATION_FILE, HALVING_FILE, MEMBERS = "population.json", "halving.json", "members"
# Updates whose mean reward ranks a member.
LAST = 5

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
        if run.keep_best and best(member.history) is entry:
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


def claim_sweep_dir(
    folder: Path, settings: RunSettings, members: Sequence[RunSettings], now: set[str]
) -> None:
    """
    Make `folder` the home of a population, or add members to the one that is there.

    Args:
        folder: made where it is missing.
        settings: what all members share.
        members: all members that the command line asks for.
        now: the names of those that are trained now.

    Raises:
        SteerError: the folder holds a population that shares other settings, or one of the members to train
            `now` with others.
    """
    runs.claim_output_dir(folder, _shared(settings.identity()), _shared(settings.defaults()))
    path = folder / POPULATION_FILE
    have = read_json(path) if path.exists() else {}
    wanted = json.loads(json.dumps({m.member: own(m) for m in members}))
    default = _parts(json.loads(json.dumps(own(settings.unset()))))
    for name in sorted(now & set(have)):
        changed = differences(_parts(have[name]), _parts(wanted[name]), default)
        if changed:
            raise SteerError(
                f"{folder} holds another member {name}: {'; '.join(changed[:3])}; give this one a `name` of "
                "its own, or remove the folder"
            )
    replace_file(path, (json.dumps({**have, **wanted}, indent=2) + "\n").encode())


def _shared(identity: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The part of a run's settings that the members of a population share."""
    # with more processes there are more rows at once, but not more rows of a member
    skipped = OWN | {"generation_batch_size"}
    return {
        "run": {**identity["run"], "rewards": []},
        "recipe": {"name": "layer_sweep"},
        "training": {k: v for k, v in identity["training"].items() if k not in skipped},
    }


def _parts(own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A member's own settings by part and name."""
    return {part: v if isinstance(v, dict) else {part: v} for part, v in own.items()}


def train_members(study: Study, members: Sequence[RunSettings]) -> None:
    """
    Train `members` in the study's folder, or what is missing of it, and leave there what each became.
    """
    state, folder = PartialState(), study.folder
    for launcher in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{launcher}", "false").lower() == "true":
            raise SteerError(
                f"a population has a whole copy of the base in each process; {launcher} would not shard it: "
                "launch with recipes/accelerate/ddp.yaml, or train single members with `steer train`"
            )
    if len(members) < state.num_processes:
        raise SteerError(
            f"{len(members)} members cannot be divided among {state.num_processes} processes; start no more "
            "processes than members"
        )
    by_reward = study.asked.halve_at and study.asked.halve_on == "reward"
    if by_reward and any(member.training.pass_rate_floor < 1 for member in members):
        raise SteerError(
            "halve_on=reward compares rewards on the same problems, and with pass_rate_floor each member "
            "chooses its own; set halve_on=validation, or leave pass_rate_floor out"
        )
    mine = list(members)[state.process_index :: state.num_processes]
    columns = set(study.train.column_names) - {"prompt"}
    source = study.run.init
    start = (source, init.read(source, str(folder))) if source else None
    trainer = PopulationTrainer(
        study.model,
        [
            Member(
                m.member,
                load_rewards(m.run.rewards, study.grader, columns),
                m.training,
                m.steering_config(),
                init=start,
            )
            for m in mine
        ],
        study.train,
        study.tokenizer,
        folder / f"state-{state.process_index}.pt",
    )
    if trainer.args.use_vllm:
        from steer.engine.sweep_sampler import EngineSampler

        trainer.engine = EngineSampler(
            str(study.model.name_or_path),
            trainer.args,
            study.model.dtype,
            len(mine),
            trainer.eos_token_ids,
            revision=getattr(study.model.config, "_commit_hash", None),
        )
    if source and state.is_main_process:
        init.keep(source, str(folder))
    states = read_states(folder)
    trainer.load(states)
    trainer.validate = partial(study.validate, trainer)
    if states:
        furthest = max((states[m.member]["step"] for m in mine if m.member in states), default=0)
        log.info("going on from update %d", furthest)
    state.wait_for_everyone()  # all have read before one writes
    _score_untrained(study, trainer)
    study.validate_untrained(trainer)
    for rung in study.asked.halve_at or []:
        trainer.train(until=rung)
        _halve(study, trainer, rung)
    trainer.train()
    settings = {m.member: m for m in mine}
    for member in trainer.members:
        _finish(study, trainer, member, settings[member.name])
    trainer.population.remove_all()
    state.wait_for_everyone()


# ---- who goes on


def _halve(study: Study, trainer: PopulationTrainer, rung: int) -> None:
    """Stop the members that are not among the best at `rung`; who was kept or stopped before stays so."""
    state, path = PartialState(), study.folder / HALVING_FILE
    decided: dict[str, Any] = read_json(path) if path.exists() else {}
    record = decided.get(str(rung), {})
    new = [m for m in trainer.members if m.step >= rung and m.stopped is None and m.name not in record]
    mine = [(m.name, _rank_by(study, trainer, m, rung), _league(study, trainer, m)) for m in new]
    for name, value, league in sorted(gather_object(mine)):
        record[name] = {"score": value, "among": league}
    for entry in record.values():
        rivals = [e["score"] for e in record.values() if e["among"] == entry["among"]]
        places = ceil(study.asked.keep * len(rivals))
        better = sum(value > entry["score"] for value in rivals)
        entry.setdefault("kept", better < places)
        entry.setdefault("of", len(rivals))
    for member in trainer.members:
        entry = record.get(member.name)
        if entry and not entry["kept"] and member.stopped is None:
            member.stopped = (
                f"halved at update {rung}: {study.asked.halve_on} {entry['score']:.3f}, not among the best "
                f"{ceil(study.asked.keep * entry['of'])} of {entry['of']}"
            )
    state.wait_for_everyone()
    if state.is_main_process:
        replace_file(path, (json.dumps({**decided, str(rung): record}, indent=2) + "\n").encode())
        kept = sum(entry["kept"] for entry in record.values())
        log.info("update %d: %d of %d members go on", rung, kept, len(record))
    trainer.save()
    state.wait_for_everyone()


def _rank_by(study: Study, trainer: PopulationTrainer, member: Member, rung: int) -> float:
    if study.asked.halve_on == "reward":
        return mean_reward(member.log[:rung])
    problems = study.validation
    if not problems:
        count = min(study.asked.validation_problems, len(study.train))
        problems = study.train.select(range(count)).to_list()
    with trainer.population.only(member.name):
        return score(study.answer(trainer, problems, f"validating {member.name}")).accuracy


def _league(study: Study, trainer: PopulationTrainer, member: Member) -> list[str]:
    """What members that are compared have in common."""
    common = [str(getattr(f, "__name__", f)) for f in member.reward_funcs]
    common += map(str, member.args.reward_weights or [])
    if study.asked.halve_among == "layers":
        common += [f"layer {i}" for i in member.steering.resolve_layers(trainer.population.num_hidden_layers)]
    return common


def mean_reward(log: Sequence[dict[str, Any]]) -> float:
    """Mean training reward of the last `LAST` updates; what has none is last of all."""
    rewards = [reward for row in log[-LAST:] if (reward := reward_of(row)) is not None]
    return sum(rewards) / len(rewards) if rewards else -sys.float_info.max


def reward_of(row: dict[str, Any]) -> float | None:
    """The mean reward of an update before dynamic sampling, which keeps neither what is solved nor failed."""
    return row.get("dynamic_sampling/reward", row["reward"])


# ---- what is left behind


def _score_untrained(study: Study, trainer: PopulationTrainer) -> None:
    if study.held_out is None:
        return
    state = PartialState()
    examples = choose(study.train, study.run.examples, [row["problem"] for row in study.held_out])
    context = context_length(study.model.config)
    limit = trainer.args.max_completion_length
    asked = ways(study.prompts, limit, examples, study.held_out, study.tokenizer, context)
    for stage in UNTRAINED:
        results = runs.read_results(study.folder)
        state.wait_for_everyone()  # all have read before one writes
        if stage in results or stage not in asked:
            continue
        share = study.held_out[state.process_index :: state.num_processes]
        mine = study.answer(trainer, share, f"held-out problems, {stage}", asked[stage])
        answered = [a for turn in zip_longest(*gather_object([mine])) for a in turn if a is not None]
        if state.is_main_process:
            _write_answers(study.folder / f"samples_{stage}.json", answered)
            runs.write_results(study.folder, {**results, stage: _scored(answered, *asked[stage])})
        state.wait_for_everyone()
    if state.is_main_process and study.run.examples:
        always = constant(study.held_out, study.grader)
        runs.write_results(study.folder, {**runs.read_results(study.folder), "constant": always})
    state.wait_for_everyone()


def _scored(answered: Sequence[Answered], prompts: PromptSpec, limit: int) -> dict[str, Any]:
    return {**asdict(score(answered)), "max_new_tokens": limit, "examples": len(prompts.examples)}


def _finish(study: Study, trainer: PopulationTrainer, member: Member, settings: RunSettings) -> None:
    """The folder of a member that is trained or stopped: its artifact, log, answers and results."""
    folder = study.folder / MEMBERS / member.name
    results = runs.read_results(folder)
    if results.get("steps") == member.step and (study.held_out is None or "after" in results):
        return
    folder.mkdir(parents=True, exist_ok=True)
    shared = runs.read_results(study.folder)
    base = {stage: shared[stage] for stage in (*UNTRAINED, "constant") if stage in shared}
    results = {
        "asked": [member.args.max_steps, member.args.num_train_epochs],
        "steps": member.step,
        "stopped": member.stopped,
        "training_seconds": round(sum(row["step_time"] for row in member.log), 3),
        "training_cpu_seconds": round(sum(row.get("seconds/cpu", 0) for row in member.log), 3),
        "trained_numbers": sum(p.numel() for p in member.vectors.parameters()),
        "reward": mean_reward(member.log),
        "versions": versions("steer", "torch", "transformers", "trl"),
        **base,
    }
    if member.history:
        if member.best is not None:
            member.vectors.set_tensors(member.best)
        kept = "last" if member.best is None else "best"
        results["validation"] = summary(member.history, len(study.validation), kept, member.stopped)
    if study.held_out is not None:
        with trainer.population.only(member.name):
            answered = study.answer(trainer, study.held_out, f"held-out problems, {member.name}")
        _write_answers(folder / "samples_after.json", answered)
        results["after"] = _scored(answered, study.prompts, trainer.args.max_completion_length)
    replace_file(folder / "log.json", json.dumps(member.log).encode())
    scores = {stage: results[stage] for stage in STAGES if stage in results}
    made = {**settings.provenance(), "stopped": member.stopped, **({"results": scores} if scores else {})}
    config = replace(member.vectors.config, provenance=made)
    artifact.write(folder / "vectors", artifact.Artifact(config, member.vectors.tensors()))
    runs.write_results(folder, results)  # last: it says that all is there


def _write_answers(path: Path, answered: Sequence[Answered]) -> None:
    replace_file(path, json.dumps([asdict(a) for a in answered], indent=1).encode())

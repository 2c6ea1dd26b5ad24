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
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from steer import artifact
from steer.errors import SteerError
from steer.evaluation.heldout import Answered, constant, score, ways
from steer.files import read_json, replace_file
from steer.models import context_length, loaded_revision
from steer.prompt import PromptSpec
from steer.tasks.elicited import STAGES, UNTRAINED, choose
from steer.tasks.reward_loading import load_rewards
from steer.threads import machine
from steer.training import init
from steer.training import run as runs
from steer.training.run_settings import RunSettings
from steer.training.same_result import differences
from steer.training.sweep.grid import own
from steer.training.sweep.halving import halve, mean_reward
from steer.training.sweep.member import OWN, Member, read_states
from steer.training.sweep.study import Study
from steer.training.sweep.trainer import PopulationTrainer
from steer.training.validation import best, summary
from steer.versions import versions

log = logging.getLogger("steer")

POPULATION_FILE, MEMBERS = "population.json", "members"


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
    lengths = {m.member: [m.training.max_steps, m.training.num_train_epochs] for m in members}
    for name in sorted(now & set(have)):
        trained = runs.is_trained(runs.read_results(folder / MEMBERS / name), lengths[name])
        also = runs.may_differ(trained)
        changed = differences(_parts(have[name]), _parts(wanted[name]), default, also)
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
    alone = state.num_processes == 1 or state.device.type == "cpu"
    if not alone and any(member.training.use_vllm for member in members):
        raise SteerError(
            f"use_vllm=true in {state.num_processes} processes on GPUs: the engine of each would start on "
            "the first GPU; start one process, or one run for each GPU, with CUDA_VISIBLE_DEVICES, members "
            "and an output_dir of its own, or set use_vllm=false"
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
            revision=loaded_revision(study.model),
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
        halve(study, trainer, rung)
    trainer.train()
    settings = {m.member: m for m in mine}
    for member in trainer.members:
        _finish(study, trainer, member, settings[member.name])
    trainer.population.remove_all()
    state.wait_for_everyone()


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
        "machine": machine(),
        **base,
    }
    updates = member.step
    if member.history:
        every = study.run.validate_every or 1
        member.history = [r for r in member.history if r["step"] % every == 0 or r["step"] == member.step]
        top = best(member.history) if study.run.keep_best else None
        if member.best is not None and top and top["step"] != member.step:
            member.vectors.set_tensors(member.best)
            updates = top["step"]
        kept = "best" if top else "last"
        results["validation"] = summary(member.history, len(study.validation), kept, member.stopped)
    if study.held_out is not None:
        with trainer.population.only(member.name):
            answered = study.answer(trainer, study.held_out, f"held-out problems, {member.name}")
        _write_answers(folder / "samples_after.json", answered)
        results["after"] = _scored(answered, study.prompts, trainer.args.max_completion_length)
    replace_file(folder / "log.json", json.dumps(member.log).encode())
    scores = {stage: results[stage] for stage in STAGES if stage in results}
    made = {**settings.provenance(), "stopped": member.stopped, "updates": updates}
    made |= {"results": scores} if scores else {}
    config = replace(member.vectors.config, provenance=made)
    artifact.write(folder / "vectors", artifact.Artifact(config, member.vectors.tensors()))
    runs.write_results(folder, results)  # last: it says that all is there


def _write_answers(path: Path, answered: Sequence[Answered]) -> None:
    replace_file(path, json.dumps([asdict(a) for a in answered], indent=1).encode())

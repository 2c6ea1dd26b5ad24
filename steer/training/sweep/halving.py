"""
Successive halving: at given updates the members that are not among the best of their rivals stop.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from math import ceil
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from steer.evaluation.heldout import score
from steer.files import read_json, replace_file
from steer.training.sweep.member import Member
from steer.training.sweep.study import Study
from steer.training.sweep.trainer import PopulationTrainer

log = logging.getLogger("steer")

HALVING_FILE = "halving.json"
# Updates whose mean reward ranks a member.
LAST = 5


def halve(study: Study, trainer: PopulationTrainer, rung: int) -> None:
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

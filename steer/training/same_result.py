"""
The settings that do not change what a run computes, and how two runs differ in the others. This is the only
such list: run folders, comparisons, populations and provenance all read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.config import SteeringGRPOConfig

# By the beginning of their names: settings of logs, checkpoints, the hub, evaluation by trl (which no recipe
# uses), loading of data and processes. What is not here of data loaders and accelerate decides which given
# answers a batch has.
_WATCHING = (
    *("logging_", "log_", "report_to", "run_name", "project", "trackio_", "num_completions_to_print"),
    *("disable_tqdm", "save_", "output_dir", "overwrite_", "resume_", "push_to_hub", "hub_", "eval_"),
    *("per_device_eval_batch_size", "local_rank", "ddp_timeout", "vllm_mismatch_"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
)

# They never change a result.
WATCHING: frozenset[str] = frozenset(
    {
        f.name
        for kind in (SteeringGRPOConfig, SteeringSFTConfig, SteeringDPOConfig)
        for f in fields(kind)
        if f.name.startswith(_WATCHING)
    }
    | {"samples_shown", "dry_run", "recompute_mlps"}
)

# Without effect where no update is left.
SCHEDULE: frozenset[str] = frozenset({"lr_scheduler_type", "lr_scheduler_kwargs"})

# They may change when a run goes on, since what was computed stays as it was: its length, the schedule of the
# learning rate, and how the untrained model is measured beside it.
CONTINUED: frozenset[str] = SCHEDULE | {"max_steps", "examples"}

# In files of version 0.1, where they decided nothing.
_FORMER = frozenset({"format_version"})

Settings = Mapping[str, Mapping[str, Any]]


def differences(
    have: Settings, wanted: Settings, defaults: Settings, also: frozenset[str] = CONTINUED
) -> list[str]:
    """
    The settings in which two runs differ, in words.

    Args:
        have: the settings in a `run.json`, by part and name. Another version may have written it.
        wanted: those of the present run.
        defaults: those of a run in which nothing was set: what a setting was that `have` does not know.
        also: settings that may differ, beside those that never change a result.

    Returns:
        One phrase for each difference that changes results; empty for the same run.
    """
    lines = []
    for part in dict.fromkeys((*wanted, *have)):
        new = wanted.get(part, {})
        old = {**defaults.get(part, {}), **have[part]} if part in have else {}
        for name in sorted({*old, *new} - WATCHING - also - _FORMER):
            if old.get(name) != new.get(name):
                now = f"now {new[name]!r}" if name in new else "and is not a setting of this run"
                lines.append(f"{name} was {old.get(name)!r}, {now}")
    return lines

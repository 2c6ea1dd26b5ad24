"""
Trainers that resume after a stop at any moment as if there had been none: with the same problems in the same
order, the samples that were still to be used, and no step too many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from trl import GRPOTrainer

from steer.errors import SteerError
from steer.training.config import SteeringGRPOConfig

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin: it comes before a trainer of trl

ROLLOUT_FILE = "rollouts.pt"


class ResumableMixin(Trainer):
    """
    What every trainer of a run has, whichever of trl's it is: whole checkpoints, written in an order that
    tells which are whole, and a resumed run that ends where the unbroken one does.
    """

    @property
    def sharded(self) -> bool:
        """Whether the model is in shards: every process must run as many forward passes as the others."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        done = super()._init_training_state(max_steps, *args, **kwargs)
        # a checkpoint's state brings the save_steps and logging_steps that it was written with
        self.state.compute_steps(self.args, max_steps)
        return done

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # it had been stopped after its last update, or a callback knows that it had ended early
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_pending(self, folder: Path) -> None:
        """Write what the coming updates depend on beside the optimizer; `folder` is the checkpoint's."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # What is pending is written first: the last file, trainer_state.json, marks a checkpoint whole.
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_pending(folder)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            # torch's archive writer reports a full disk as a RuntimeError of its own
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or "the disk did not take it all"
            raise SteerError(
                f"cannot write {folder}: {reason}; make room and start again, the run goes on from the "
                "checkpoint before"
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json comes next and marks the checkpoint whole, for every process
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Nothing: trl's card tells its reader to load a whole model, which is not there."""


class _Shuffle(Sampler):
    """
    trl's sampler with an order that the epoch decides. trl's own depends on the epochs this process has seen,
    so that a run resumed in its second epoch would meet the problems in the order of the first.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]):
        self.sampler = sampler
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        return iter(self.sampler)


class ResumableGRPOTrainer(ResumableMixin, GRPOTrainer):
    """trl's GRPOTrainer, with checkpoints that hold the samples that are still to be used."""

    args: SteeringGRPOConfig
    _buffered_inputs: list[dict[str, Any]] | None  # type: ignore[assignment]  # trl's is inferred from None

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return _Shuffle(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _save_pending(self, folder: Path) -> None:
        torch.save(self._rollout_state(), folder / f"{self.accelerator.process_index}-{ROLLOUT_FILE}")

    def _rollout_state(self) -> dict[str, Any]:
        """What the coming rollouts depend on, in types that `torch.load` reads without executing any."""
        # samples are still to be used when a generation feeds more than one update
        cycle = self.args.steps_per_generation * self.num_iterations
        buffer = self._buffered_inputs if self._step % cycle else None
        # trl writes these two after trainer_state.json, which marks a checkpoint whole
        entropy = (self.entropy_coef, self._last_world_entropy)
        return {"step": self._step, "buffer": buffer, "entropy": entropy}

    def _set_rollout_state(self, state: dict[str, Any]) -> None:
        self._step, self._buffered_inputs = state["step"], state["buffer"]
        if self.use_adaptive_entropy and "entropy" in state:
            self.entropy_coef, self._last_world_entropy = state["entropy"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"{self.accelerator.process_index}-{ROLLOUT_FILE}"
        if path.exists():
            device = self.accelerator.device.type  # torch.load does not know the cpu:0 of several processes
            self._set_rollout_state(torch.load(path, map_location=device, weights_only=True))


def newest_checkpoint(folder: str | os.PathLike[str], read: Callable[[Path], object]) -> Path | None:
    """
    The newest whole checkpoint in a run folder: one whose trainer state, written last, is readable, and that
    `read` takes without an OSError or ValueError.
    """
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal()]
    for path in sorted(checkpoints, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            read(path)
        except (OSError, ValueError):
            continue
        return path
    return None


def log_history(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What a finished run logged, by update."""
    states = [Path(folder) / "trainer_state.json"]
    if not states[0].exists():  # a run of an older version
        states = list(Path(folder).glob("checkpoint-*/trainer_state.json"))
        states.sort(key=lambda path: int(path.parent.name[11:]))
    return json.loads(states[-1].read_text())["log_history"] if states else []

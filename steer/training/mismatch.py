"""
How far the log-probabilities of an engine are from the trainer's, and when that is too far.

Both score the same tokens with the same model, in other kernels and often in another precision. A small
difference is rounding, and importance weights make up for it. A large one means that the engine samples from
another model than the one that is trained, and no weight makes up for that.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steer.errors import SteerError
from steer.training.config import SteeringGRPOConfig

log = logging.getLogger("steer")


def mismatch(trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """
    How far the trainer's log-probabilities of sampled tokens are from those they were sampled with.

    Args:
        trainer: (rows, tokens).
        engine: (rows, tokens); NaN where it gave none, which is left out.
        mask: (rows, tokens), 1 at the tokens that count.

    Returns:
        `mean` and `max` of the absolute difference, in nats per token, and `kl`, the estimate
        mean(exp(d) - 1 - d), d = trainer - engine, of KL(engine || trainer) (Schulman's k3).
    """
    difference = _differences(trainer, engine, mask)
    if not difference.numel():
        return {"mean": 0.0, "max": 0.0, "kl": 0.0}
    kl = torch.expm1(difference) - difference
    return {
        "mean": difference.abs().mean().item(),
        "max": difference.abs().max().item(),
        "kl": kl.mean().item(),
    }


def distance(trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> tuple[float, int]:
    """
    The sum of the absolute differences, in nats, and the number of tokens that it is of.

    Args and tokens that are left out are those of `mismatch`. The sum is NaN where the trainer's are.
    """
    difference = _differences(trainer, engine, mask).abs()
    return difference.sum().item(), difference.numel()


def _differences(trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(tokens,): those that count and that the engine gave a log-probability for."""
    return (trainer - engine)[mask.bool() & ~engine.isnan()].float()


def check_mismatch(mean: float, update: int, args: SteeringGRPOConfig, member: str = "") -> None:
    """
    Warn above `vllm_mismatch_warn`, and raise SteerError above `vllm_mismatch_stop`.

    Args:
        mean: absolute difference of the log-probabilities, in nats per token, over an update's tokens.
        update: its number, from 1.
        args: read for the two bounds; None is no bound.
        member: of a population.
    """
    who = f"{member}, update {update}" if member else f"update {update}"
    apart = f"{who}: the engine's log-probabilities are {mean:.3g} from the trainer's, mean of the tokens"
    stop, warn = args.vllm_mismatch_stop, args.vllm_mismatch_warn
    if stop is not None and not mean <= stop:  # NaN too
        raise SteerError(
            f"{apart}; vllm_mismatch_stop is {stop:g}. The engine samples from another model than the "
            "one that is trained: give both the same base and precision (model_dtype, a server's --dtype and "
            "--quantization), or raise vllm_mismatch_stop; the run goes on from its last checkpoint"
        )
    if warn is not None and mean > warn:
        log.warning("%s; vllm_mismatch_warn is %g, see engine/mean in the log", apart, warn)


class MismatchCheck(TrainerCallback):
    """Adds up the differences of an update, of all processes, and checks them before the optimizer's step."""

    def __init__(self, args: SteeringGRPOConfig, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.total, self.tokens = 0.0, 0.0

    def add(self, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
        """`mismatch` of a part of the update, which counts for the check."""
        total, tokens = distance(trainer, engine, mask)
        self.total += total
        self.tokens += tokens
        return mismatch(trainer, engine, mask)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        mine = torch.tensor([self.total, self.tokens], device=self.accelerator.device)
        self.total, self.tokens = 0.0, 0.0
        total, tokens = self.accelerator.reduce(mine).tolist()  # so that all processes stop, or none
        check_mismatch(total / max(tokens, 1.0), state.global_step + 1, self.args)

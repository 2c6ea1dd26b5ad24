"""
How many rows of an update are held at once, by what their tokens leave for the backward pass.

The bytes of a token are measured on the model itself, in three forward passes over some tokens. They are
compared with a part of the machine's whole memory and not of what is free, so that a run that is started
again has the same parts: another order of sums would round differently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil

import torch
from torch import nn

from steer.errors import SteerError
from steer.generation import allocator
from steer.generation.recompute import mlps, recomputed
from steer.generation.scoring import length_batches, pass_tokens
from steer.training.config import SteeringGRPOConfig

log = logging.getLogger(__name__)
GB = 1e9
# Of the memory of a machine or GPU, where `update_memory` is not set.
SHARE = 0.25
# Tokens of the longest pass that is measured.
TOKENS = 256


def total_memory(device: torch.device) -> float:
    """
    Bytes of memory that a process has at most: of its GPU, or its part of the machine's (or container's).
    Infinity for devices that do not say.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return allocator.machine_memory() if device.type == "cpu" else float("inf")


def memory_limit(device: torch.device, update_memory: float | None) -> float:
    """Bytes that a part of an update may keep, by the setting `update_memory` in GB."""
    if update_memory is None:
        return SHARE * total_memory(device)
    return update_memory * GB or float("inf")


def check_settings(args: SteeringGRPOConfig, sharding: str | None) -> None:
    """
    SteerError for settings of this module that would have no effect.

    Args:
        args: the settings.
        sharding: what shards the model, where something does.
    """
    if not (other := "gradient_checkpointing=true" if args.gradient_checkpointing else sharding):
        return
    if args.recompute_mlps:
        raise SteerError(
            f"recompute_mlps=true does not go with {other}; use gradient_checkpointing=true alone, which "
            "computes whole layers again"
        )
    if args.update_memory:
        rows = "update_rows" if other != sharding else "per_device_train_batch_size"
        raise SteerError(
            f"update_memory={args.update_memory:g} has no effect with {other}; leave it out, and limit what "
            f"an update holds with {rows}"
        )


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """
    Inside, filled with the bytes of each storage that autograd saves, by its address; without parameters and
    buffers of `model`.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held = []  # so that no address is given to another tensor

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(tensor.detach())
        return held[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@dataclass(frozen=True)
class Cost:
    """
    Bytes that a forward pass leaves for the backward pass.

    Attributes:
        token: of each token.
        pair: of each pair of a token and one that it attends to, where scores are kept.
        fixed: of the pass, however long: the weights in half precision that mixed precision makes.
        pass_tokens: padding that a further batch of completions must save (`length_batches`).
    """

    token: float
    pair: float
    fixed: float = 0.0
    pass_tokens: int = 0

    @classmethod
    def measured(cls, model: nn.Module, score: Callable[[int], object], tokens: int) -> Cost:
        """
        Args:
            model: what is scored.
            score: runs a forward pass over so many tokens, with a graph.
            tokens: of the longest of the three passes, at least 3.
        """
        sizes, unit = [], tokens // 3
        for count in (unit, 2 * unit, 3 * unit):
            device = next(model.parameters()).device
            devices = [device] if device.type == "cuda" else []  # by default of all GPUs of the machine
            with saved_bytes(model) as found, torch.random.fork_rng(devices):
                kept = score(count)  # its graph lives until all is counted
                sizes.append(sum(found.values()))
                del kept
        # fixed + token * n + pair * n^2, through the three sizes
        short, middle, long = sizes
        pair = max(0.0, (long - 2 * middle + short) / (2 * unit**2))
        token = (long - short) / (2 * unit) - 4 * unit * pair
        fixed = max(0.0, short - token * unit - pair * unit**2)
        return cls(token, pair, fixed, pass_tokens(model))

    def of(self, rows: torch.Tensor) -> float:
        """
        Bytes of these rows in one forward pass.

        Args:
            rows: (rows, 3): tokens of the completion, tokens of the prompt, and 1 where the prompt is read
                for this row, 0 where the row shares that of the row before.
        """
        read = rows[:, 2].clone()
        read[0] = 1
        tokens = int((read * rows[:, 1]).sum())
        pairs = int((read * rows[:, 1] ** 2).sum())
        for chosen, length in length_batches(rows[:, 0], self.pass_tokens):
            tokens += len(chosen) * length
            pairs += length * int((length + rows[chosen, 1]).sum())
        return self.fixed + self.token * tokens + self.pair * pairs


def row_sizes(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_mask: torch.Tensor, share: bool
) -> torch.Tensor:
    """What `Cost.of` reads of rows whose prompts are (`share`) read once for rows that follow each other."""
    read = torch.ones(len(prompt_ids), dtype=torch.long)
    if share:
        read[1:] = (prompt_ids[1:] != prompt_ids[:-1]).any(1).cpu()
    return torch.stack([completion_mask.sum(1).cpu(), prompt_mask.sum(1).cpu(), read], 1)


class UpdateMemory:
    """
    Cuts updates into parts that stay below a limit.

    Args:
        model: the model, with what is trained.
        score: as of `Cost.measured`.
        longest: the most tokens of a completion.
        limit: bytes of a part (`memory_limit`).
        recompute: whether MLPs are computed again in the backward pass; None is for parts above the limit.
    """

    def __init__(
        self,
        model: nn.Module,
        score: Callable[[int], object],
        longest: int,
        limit: float,
        recompute: bool | None = None,
    ):
        self.limit = limit
        self.recompute = recompute
        self.mlps = [] if recompute is False else mlps(model)
        with recomputed(self.mlps if recompute else []):
            self.cost = Cost.measured(model, score, min(TOKENS, max(3, longest)))
        self._told = False
        most = "no limit" if limit == float("inf") else f"at most {limit / GB:.1f} GB at once"
        if self.cost.token and limit < float("inf"):
            most += f": {max(0.0, limit - self.cost.fixed) / self.cost.token:,.0f} tokens"
        log.info(
            "an update keeps %.2f MB a token for its backward pass (measured); update_memory is %s",
            self.cost.token / 1e6,
            most,
        )

    def parts(self, rows: torch.Tensor, most: int) -> list[slice]:
        """`rows` (as of `Cost.of`) in parts of about equal size, of `most` rows or fewer, below the limit."""
        count = len(rows)
        fewest = min(count, max(ceil(count / most), ceil(self.cost.of(rows) / self.limit)))
        parts: list[slice] = []
        for number in range(fewest, count + 1):
            size = ceil(count / number)
            parts = [slice(i, i + size) for i in range(0, count, size)]
            if all(self.cost.of(rows[part]) <= self.limit for part in parts):
                break
        return parts

    def recomputing(self, rows: torch.Tensor) -> AbstractContextManager:
        """Around the forward pass of a part with these rows: MLPs keep nothing, where that is wanted."""
        needed = self.cost.of(rows)
        if not (self.recompute or (self.recompute is None and needed > self.limit)) or not self.mlps:
            return nullcontext()
        if not self._told:
            self._told = True
            log.info(
                "%d MLPs are computed again in the backward pass: %d rows of up to %d tokens %s "
                "%.1f GB (recompute_mlps)",
                len(self.mlps),
                len(rows),
                int(rows[:, 0].max()),
                "keep" if self.recompute else "would keep",
                needed / GB,
            )
        return recomputed(self.mlps)

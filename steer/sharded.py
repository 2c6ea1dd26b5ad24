"""
Parameters that a launcher keeps in shards, FSDP2 or DeepSpeed ZeRO-3: read and written whole. Every process
must take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or all of it where it is a shard of FSDP2's."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Inside, what ZeRO-3 has partitioned is whole; with `write`, as process 0 leaves it."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def fill(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Copy `value`, the same in every process, into `parameter`, which is whole, `gathered` or FSDP2's."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        shard = cast(DTensor, parameter)
        value = distribute_tensor(value.to(shard.device, shard.dtype), shard.device_mesh, shard.placements)
    with torch.no_grad():
        parameter.copy_(value)

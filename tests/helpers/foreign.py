"""Shared by the tests of other tools' formats: artifacts of random vectors, and damaged copies of files."""

from __future__ import annotations

import random
from typing import Any

import torch
from helpers.steering import fill
from transformers import PreTrainedModel

import steer
from steer import SteeringConfig
from steer.artifact import Artifact

WIDTH, DEPTH = 32, 3  # of the tiny models


def made(model: PreTrainedModel, **fields: Any) -> Artifact:
    """Random vectors for `model`, at rest."""
    vectors = fill(steer.attach(model, SteeringConfig(**fields)))
    steer.detach(model)
    return Artifact(vectors.config, vectors.tensors())


def same(one: Artifact, other: Artifact) -> bool:
    """The same layers get the same vectors, bit for bit."""
    left, right = one.by_layer(), other.by_layer()
    return left.keys() == right.keys() and all(torch.equal(left[i], right[i]) for i in left)


def rows(count: int = DEPTH, width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def damaged(content: bytes, random_: random.Random) -> bytes:
    """`content` with a few bytes changed, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(changed) + 1)
        size = random_.choice((1, 1, 4, 8, 64))
        kind = random_.choice(("bit", "bytes", "cut", "end", "double", "put"))
        if kind == "bit" and at < len(changed):
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == "bytes":
            changed[at : at + size] = random_.choice((b"\xff", b"\0", random_.randbytes(1))) * size
        elif kind == "cut":
            del changed[at : at + size]
        elif kind == "end":
            del changed[at:]
        elif kind == "double":
            changed[at:at] = changed[at : at + size]
        else:
            changed[at:at] = random_.randbytes(size)
    return bytes(changed)

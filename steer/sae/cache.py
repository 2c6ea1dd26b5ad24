"""Activations on disk: written once, in half precision, then read in random order as often as needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from steer.errors import SteerError
from steer.files import read_json, replace_file
from steer.sae.activations import ActivationStream, Window, read_all

META_FILE, DATA_FILE = "cache.json", "activations.f16"
# What caches and checkpoints of 0.1.0 do not say of their source.
UNRECORDED = ("model_dtype", "texts_sha256", "added")


def write_cache(
    stream: ActivationStream,
    folder: str | Path,
    tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> CachedActivations:
    """
    Write the activations of `stream` (at most `tokens` of them) into `folder` and open them.

    They are stored in float16, multiplied by one factor that gives them a mean norm of sqrt(width). A run
    that is stopped goes on at the block where it was, with blocks of the same size. A finished cache of the
    same source is opened as it is; SteerError when the folder holds another. `progress` is called with the
    number of tokens so far.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, Any] = {"source": stream.describe(), "width": stream.width, "window": stream.length}
    wanted |= {"asked": tokens, "skip": stream.skip}
    fresh = {**wanted, "block": stream.block, "tokens": 0, "blocks": 0, "done": False}
    # caches of 0.1.0 do not say what was skipped: the default, most likely
    meta = {"skip": 1, **_read_meta(path)} if (path / META_FILE).exists() else fresh
    if not meta["done"] and "block" in meta:  # it goes on at a block; a finished one has no order
        wanted["block"] = stream.block
    if changed := difference({name: meta.get(name) for name in wanted}, wanted):
        raise SteerError(f"{path} holds other activations: {changed}; give another folder or remove it")
    if meta["done"]:
        return CachedActivations(path)
    row = 2 * stream.width
    with (path / DATA_FILE).open("r+b" if meta["tokens"] else "wb") as file:
        file.truncate(meta["tokens"] * row)  # what a kill left of a block
        file.seek(0, 2)
        for number, (gathered, _) in enumerate(stream.blocks()):
            if number < meta["blocks"]:
                continue
            activations = read_all(stream.reader, gathered)
            if "factor" not in meta:
                meta["factor"] = (stream.width**0.5 / activations.norm(dim=1).mean()).item()
            if tokens is not None:
                activations = activations[: tokens - meta["tokens"]]
            half = (activations * meta["factor"]).to("cpu", torch.float16)
            if not torch.isfinite(half).all():
                raise SteerError(
                    f"activations {activations.abs().max():.0f} times as large as usual do not fit float16; "
                    "leave more first tokens out (skip) or train without a cache"
                )
            file.write(half.numpy().tobytes())
            file.flush()
            meta.update(tokens=meta["tokens"] + len(half), blocks=number + 1)
            replace_file(path / META_FILE, json.dumps(meta, indent=2).encode())
            if progress:
                progress(meta["tokens"])
            if tokens is not None and meta["tokens"] >= tokens:
                break
    if not meta["tokens"]:
        raise SteerError("the texts are empty: there are no activations to store")
    meta["done"] = True
    replace_file(path / META_FILE, json.dumps(meta, indent=2).encode())
    return CachedActivations(path)


def first_activations(stream: ActivationStream, count: int) -> HeldActivations:
    """The first `count` activations of `stream`, in memory, or all of them where there are fewer."""
    gathered: list[Window] = []
    kept = 0
    for window in stream.windows():
        gathered.append(window)
        kept += sum(window.keep)
        if kept >= count:
            break
    if not gathered:
        raise SteerError("the texts are empty: there are no activations to measure on")
    return HeldActivations(read_all(stream.reader, gathered)[:count].cpu(), stream.describe())


class HeldActivations:
    """
    Activations in memory, (count, width). Batches are drawn from all of them at random, without replacement
    in an epoch; the order depends on the seed alone. `rank` of `world` takes every world-th row of a batch.
    """

    def __init__(
        self,
        rows: Tensor | np.ndarray,
        source: dict[str, Any],
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.rows, self.source = rows, source
        self.epochs, self.seed, self.rank, self.world = epochs, seed, rank, world
        self.width: int = rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self) -> dict[str, Any]:
        return self.source

    def order(self) -> dict[str, Any]:
        """What decides which activations a batch holds."""
        return {"stored": len(self), "seed": self.seed, "world": self.world}

    def take(self, indices: Tensor) -> Tensor:
        """Rows (n, width) in float32."""
        return cast(Tensor, self.rows)[indices].float()

    def in_order(self, size: int) -> Iterator[Tensor]:
        """All rows once, in batches of at most `size`."""
        return map(self.take, torch.arange(len(self)).split(size))

    def batches(self, size: int, start: int = 0) -> Iterator[Tensor]:
        """Batches (size, width) from the `start`-th on; this process's share where there are several."""
        per_epoch = len(self) // (size * self.world)
        for epoch in range(self.epochs):
            if start >= per_epoch:
                start -= per_epoch
                continue
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self), generator=generator)
            for index in range(start, per_epoch):
                rows = order[index * size * self.world : (index + 1) * size * self.world]
                yield self.take(rows[self.rank :: self.world])
            start = 0


class CachedActivations(HeldActivations):
    """Activations that `write_cache` stored, read from the disk row by row."""

    def __init__(self, folder: str | Path, epochs: int = 1, seed: int = 0, rank: int = 0, world: int = 1):
        path = Path(folder)
        meta = _read_meta(path)
        if (path / DATA_FILE).stat().st_size < 2 * meta["width"] * meta["tokens"]:
            raise SteerError(f"{path / DATA_FILE} is cut short; remove the folder and write it again")
        shape = (meta["tokens"], meta["width"])
        rows = np.memmap(path / DATA_FILE, dtype=np.float16, mode="r", shape=shape)
        super().__init__(rows, meta["source"], epochs, seed, rank, world)
        self.factor: float = meta["factor"]

    def take(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(cast(np.ndarray, self.rows)[indices.numpy()]).float() / self.factor


def difference(old: Any, new: Any, name: str = "") -> str:
    """The first setting that differs, as 'saes.topk.d_in was 576, now 640'; empty when none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if key in UNRECORDED and key not in old:
                continue
            found = difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return ""
    return "" if old == new else f"{name} was {old!r}, now {new!r}"


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = read_json(folder / META_FILE)
        if not isinstance(meta["width"], int) or not isinstance(meta["tokens"], int):
            raise TypeError("width and tokens are not whole numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteerError(f"{folder} holds no stored activations ({error}); write them first") from error
    return meta

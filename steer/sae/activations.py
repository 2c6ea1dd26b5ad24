"""
Activations of a language model as training data: read at a site, without special tokens, shuffled in blocks.

Texts are cut into windows. A block is the activations of as many windows as fill it, in random order. Which
windows make a block, and their order, depend on the tokens and the seed alone, so a stream can go on anywhere
without computing what came before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from steer.artifact_scores import vectors_checksum
from steer.compat import with_cache
from steer.config import SITES
from steer.errors import SteerError
from steer.hooks import hooked
from steer.identity import describe, has_other_weights
from steer.places import adds_as_is, find_places
from steer.sites import find_decoder, input_device
from steer.vectors import attached

# Tokens of one forward pass, padding included.
PASS = 4096


class Window(NamedTuple):
    """Token ids that are read together, and whose activations are kept."""

    ids: list[int]
    keep: list[bool]


def windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int = 256, skip: int = 1
) -> Iterator[Window]:
    """
    Each text in pieces of at most `length` tokens, with the special tokens that the tokenizer puts in. A BOS
    token that it puts before every text is before every piece.

    Special tokens are not kept, nor are the first `skip` tokens of a piece: models use the first one as an
    attention sink, with a norm many times that of all others ("Massive Activations", arXiv 2402.17762).
    """
    special = set(tokenizer.all_special_ids)
    bos = first_token(tokenizer)
    lead = [] if bos is None else [bos]
    step = max(1, length - len(lead))
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"][len(lead) :]
        for start in range(0, len(ids), step):
            piece = [*lead, *ids[start : start + step]]
            keep = [place >= skip and token not in special for place, token in enumerate(piece)]
            if any(keep):
                yield Window(piece, keep)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token of a tokenizer that puts it before every text, else None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else None


class Reader:
    """
    Reads the activations of `model` at `site` of `layer`: (kept tokens, width) in float32 on `device`. At
    resid_mid that is the stream itself: what the layer is given, plus what its attention adds.

    what: "as_is" (steered where the model has vectors), "base" (its vectors off), or "difference" (steered
    minus base, what DiffSAE is trained on). Raises SteerError for a layer or site that the model does not
    have, and where there are no vectors to switch off.
    """

    def __init__(
        self, model: PreTrainedModel, layer: int, site: str = "resid_post", what: str = "as_is"
    ) -> None:
        decoder = find_decoder(model)
        if site not in SITES:
            raise SteerError(f"site={site!r} is unknown; choose one of {', '.join(SITES)}")
        if not -decoder.num_hidden_layers <= layer < decoder.num_hidden_layers:
            raise SteerError(
                f"layer {layer} does not exist: the model has layers 0 to {decoder.num_hidden_layers - 1}"
            )
        if what not in ("as_is", "base", "difference"):
            raise SteerError(f"what={what!r} is unknown; choose one of as_is, base, difference")
        self.model, self.backbone, self.width = model, decoder.backbone, decoder.hidden_size
        self.layer, self.site, self.what = layer % decoder.num_hidden_layers, site, what
        self.place = find_places(model, [self.layer], site)[0]
        self._vectors = attached(model) if what != "as_is" else None
        if what != "base" and "steering_vectors" in model.__dict__:
            attached(model).config.refuse_condition("activations of texts, which have no prompts")

    @cached_property
    def added(self) -> bool | None:
        """Whether the layer adds what its modules return as it is; None where a pass does not tell."""
        try:
            return adds_as_is(self.model, self.layer)
        except SteerError:
            return None

    def describe(self) -> dict[str, Any]:
        """
        What an SAE records of its source: the base model and its precision, the layer and the site, and the
        checksum of the vectors that change what is read.
        """
        base = describe(self.model)
        source: dict[str, Any] = {"model": base["base_model_name_or_path"]}
        source |= {name: base[name] for name in ("base_revision", "base_adapter", "base_checksum")}
        source["model_dtype"] = str(self.model.dtype).removeprefix("torch.")
        if self.what != "base" and (vectors := self.model.__dict__.get("steering_vectors")):
            source["vectors"] = vectors_checksum(vectors.config, vectors.tensors())
        source |= {"layer": self.layer, "site": self.site, "what": self.what}
        if self.site in ("attn_out", "mlp_out"):
            source["added"] = self.added
        # Caches of 0.1.0 hold what the attention adds there, and are not taken for the stream.
        return {**source, "reads": "stream"} if self.site == "resid_mid" else source

    @torch.no_grad()
    def read(self, batch: Sequence[Window]) -> Tensor:
        """
        Activations of the kept tokens of `batch`, window after window; SteerError where they are not finite.
        """
        device = input_device(self.model)
        longest = max(len(window.ids) for window in batch)
        shape = (len(batch), longest)  # padded on the right, where no token sees it
        ids, mask, keep = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for row, window in enumerate(batch):
            size = len(window.ids)
            ids[row, :size], mask[row, :size] = torch.tensor(window.ids), 1
            keep[row, :size] = torch.tensor(window.keep)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        off = self._vectors.disabled() if self._vectors and self.what == "base" else nullcontext()
        with off:
            activations = self._capture(inputs)
        if self._vectors and self.what == "difference":
            with self._vectors.disabled():
                activations = activations - self._capture(inputs)
        kept = activations[keep.bool().to(activations.device)]
        if not torch.isfinite(kept).all():
            raise SteerError(
                f"activations at {self.site} of layer {self.layer} are not finite; load the model in "
                "float32 or bfloat16, and check its weights and vectors"
            )
        return kept

    @torch.no_grad()
    def base(self, ids: Tensor, cache: Cache) -> Tensor:
        """
        Activations (rows, columns, width) of `ids` with the vectors off; `cache` holds the tokens before.
        """
        assert self._vectors is not None
        with self._vectors.disabled():
            return self._capture({"input_ids": ids, **with_cache(self.backbone, cache)})

    def _capture(self, inputs: dict[str, Any]) -> Tensor:
        """(rows, columns, width) in float32, from a pass that ends at the site."""
        taken: list[Tensor] = []

        def take(hidden: Tensor) -> None:
            taken.append(hidden.float())
            raise _Stop

        was_training = self.model.training
        self.model.eval()
        try:
            with hooked(*self.place.watch(take)), suppress(_Stop):
                self.backbone(**{"use_cache": False, **inputs})
        finally:
            self.model.train(was_training)
        return taken[0]


def check_base(source: Mapping[str, Any] | None, model: PreTrainedModel, name: str = "the SAE") -> None:
    """Warn where `model` has other weights than the base model that an SAE records as its source."""
    source = source or {}
    if has_other_weights(model, source.get("base_checksum")):
        adapter = source.get("base_adapter")
        merged = f" with adapter {adapter} merged into it (--base-adapter)" if adapter else ""
        warnings.warn(
            f"{name}: trained on {source.get('model') or 'an unnamed model'}{merged}; this model "
            f"({model.config.name_or_path or 'an unnamed model'}) has the same shape but other weights: "
            "evaluate the SAE on it first",
            stacklevel=3,
        )


class _Stop(Exception):
    """Ends a forward pass where the activations were taken."""


def read_all(reader: Reader, batch: Sequence[Window]) -> Tensor:
    """Activations of any number of windows, in their order; each pass has windows of similar length."""
    order = sorted(range(len(batch)), key=lambda index: len(batch[index].ids))
    parts: list[Tensor | None] = [None] * len(batch)
    while order:
        longest = len(batch[order[-1]].ids)
        count = max(1, PASS // longest)
        chosen, order = order[-count:], order[:-count]
        counts = [sum(batch[index].keep) for index in chosen]
        for index, part in zip(chosen, reader.read([batch[i] for i in chosen]).split(counts), strict=True):
            parts[index] = part
    return torch.cat([part for part in parts if part is not None])


class ActivationStream:
    """
    Shuffled batches straight from a model.

    block: tokens that are held and shuffled at once. epochs: how often the texts are read. rank of world: the
    windows that this process reads, every world-th one.
    """

    def __init__(
        self,
        reader: Reader,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        length: int = 256,
        block: int = 1 << 18,
        epochs: int = 1,
        seed: int = 0,
        skip: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.reader, self.texts, self.tokenizer = reader, texts, tokenizer
        self.length, self.block, self.epochs, self.seed, self.skip = length, block, epochs, seed, skip
        self.rank, self.world = rank, world
        self.width = reader.width

    def describe(self) -> dict[str, Any]:
        told = {**self.reader.describe(), "texts": getattr(self.texts, "sources", None)}
        if checksums := getattr(self.texts, "checksums", None):
            told["texts_sha256"] = checksums
        # Activations of 0.1.0 have BOS before the first piece of a text alone, and are not taken for these.
        return told if first_token(self.tokenizer) is None else {**told, "bos": "before every piece"}

    def order(self) -> dict[str, Any]:
        """What decides, with the texts, which activations a batch holds."""
        names = ("block", "seed", "skip", "world")
        return {"window": self.length, **{name: getattr(self, name) for name in names}}

    def windows(self) -> Iterator[Window]:
        """The windows of this process, one epoch."""
        pieces = windows(self.texts, self.tokenizer, self.length, self.skip)
        return (window for index, window in enumerate(pieces) if index % self.world == self.rank)

    def blocks(self) -> Iterator[tuple[list[Window], int]]:
        """
        The windows of each block and how many of their tokens are kept; nothing is computed. A block ends
        with its epoch, so that more epochs change none of those before.
        """
        for _ in range(self.epochs):
            gathered: list[Window] = []
            kept = 0
            for window in self.windows():
                gathered.append(window)
                kept += sum(window.keep)
                if kept >= self.block:
                    yield gathered, kept
                    gathered, kept = [], 0
            if gathered:
                yield gathered, kept

    def batches(self, size: int, start: int = 0) -> Iterator[Tensor]:
        """
        Batches (size, width) from the `start`-th on. The last tokens of a block that fill no batch are left
        out.
        """
        for number, (gathered, kept) in enumerate(self.blocks()):
            count = kept // size
            if start >= count:
                start -= count
                continue
            rows = read_all(self.reader, gathered)
            order = torch.randperm(
                kept, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            )
            for index in range(start, count):
                yield rows[order[index * size : (index + 1) * size].to(rows.device)]
            start = 0

"""
The residual streams of two models on the same texts, token by token: what a map between them is fitted on.

Two tokenizers cut a text differently. A token of one is paired with the token of the other that ends at the
same character: both have then read exactly the same text.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.files import json_lines, read_text
from steer.hooks import hooked
from steer.places import Place, find_places
from steer.sites import Decoder, input_device
from steer.tasks.arithmetic import Arithmetic

# The longest piece of a text that is read at once, in characters, and where a piece is cut in tokens.
PIECE = 800
MAX_TOKENS = 320
BATCH = 8  # pieces per forward pass
# Attention sinks beside the first token: a few tokens whose norm is many times that of all others ("Massive
# Activations in Large Language Models", arXiv 2402.17762). They would decide every covariance.
OUTLIER = 4.0


@dataclass(frozen=True)
class Side:
    """One of the two models: its decoder, and the tokenizer that reads the texts for it."""

    model: PreTrainedModel
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise SteerError(
                f"{type(self.tokenizer).__name__} of {self.model.config.name_or_path or 'the model'} gives "
                "no character offsets, which pair the tokens of two models; pass a fast tokenizer "
                "(AutoTokenizer with use_fast=True)"
            )


@dataclass(frozen=True)
class Pairs:
    """Streams of paired tokens: (tokens, hidden_size) in float32 by layer, row n after the same text."""

    donor: dict[int, torch.Tensor]
    recipient: dict[int, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.donor.values())))


def read_texts(texts: Sequence[str] | str | os.PathLike[str] | None, hidden_size: int) -> list[str]:
    """
    The text sample, without duplicates.

    texts: strings, or a file: `.txt` holds one text a line, `.jsonl` records with `text`, or with `problem`
        and optional `solution` or `answer`. None is the built-in sample, long enough for models of
        `hidden_size`.
    Raises SteerError for a file that cannot be read so and for an empty sample.
    """
    if texts is None:
        return builtin_texts(75 * hidden_size)
    if isinstance(texts, (str, os.PathLike)):
        texts = _from_file(Path(texts))
    unique = list(dict.fromkeys(text for text in texts if text.strip()))
    if not unique:
        raise SteerError(
            "the text sample is empty; give some thousand words, or none for the built-in sample"
        )
    return unique


def builtin_texts(characters: int) -> list[str]:
    """
    About `characters` characters of text that every machine has: three parts of prose, the paragraphs of
    Python's own language reference, and one part of generated arithmetic.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some slim distributions leave it out
        raise SteerError(
            "this Python comes without its language reference, the built-in text; give texts"
        ) from error
    rng = random.Random(0)
    prose = [piece for name in sorted(topics) for piece in pieces(topics[name])]
    rng.shuffle(prose)
    problems = Arithmetic(operators="+-*", problems=10_000).generate()
    lines = [f"{row['problem']} {row['problem'][8:-1]} = {row['answer']}" for row in problems]
    sums = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    chosen = _upto(prose, characters * 3 // 4) + _upto(sums, characters // 4)
    rng.shuffle(chosen)
    return chosen


def pieces(text: str) -> list[str]:
    """`text` in pieces of at most `PIECE` characters, cut at a blank line, line or word if there is one."""
    made = []
    while len(text) > PIECE:
        cut = max(text.rfind(mark, PIECE // 2, PIECE) for mark in ("\n\n", "\n", " "))
        cut = cut if cut > 0 else PIECE
        made.append(text[:cut])
        text = text[cut:].lstrip()
    return [*made, text] if text.strip() else made


def pair(donor: Sequence[int | None], recipient: Sequence[int | None]) -> list[tuple[int, int]]:
    """
    Indices of the tokens that end at the same character. Each argument holds, token by token, the index of
    the character after it, None for a special token. Of several tokens that end in one character (its
    bytes), the last is taken. The first token of either side is left out: models use it as an attention sink.
    """
    last = {end: index for index, end in enumerate(donor) if end is not None}
    other = {end: index for index, end in enumerate(recipient) if end is not None}
    return [(last[end], other[end]) for end in sorted(last.keys() & other.keys()) if last[end] and other[end]]


def paired(
    donor: Side,
    recipient: Side,
    texts: Sequence[str],
    donor_layers: Sequence[int],
    recipient_layers: Sequence[int],
    site: str = "resid_post",
    label: str = "reading texts",
) -> Iterator[Pairs]:
    """
    Paired streams of both base models (their vectors off), one batch of texts at a time. A token whose norm
    is more than `OUTLIER` times the batch's median, at any layer asked for, is left out. At `attn_out` and
    `mlp_out` the stream after the layer is read.
    """
    read = site if site in ("resid_pre", "resid_mid") else "resid_post"  # outputs of modules join this stream
    places = find_places(donor.model, donor_layers, read)
    other_places = find_places(recipient.model, recipient_layers, read)
    rows = [piece for text in texts for piece in pieces(text)]
    for start in tqdm(range(0, len(rows), BATCH), desc=label, unit="batch", leave=False):
        batch = rows[start : start + BATCH]
        ids, ends = zip(*(_encode(donor, text) for text in batch), strict=True)
        other_ids, other_ends = zip(*(_encode(recipient, text) for text in batch), strict=True)
        matches = [(row, i, j) for row in range(len(batch)) for i, j in pair(ends[row], other_ends[row])]
        if not matches:
            continue
        row, i, j = torch.tensor(matches).T
        pairs = Pairs(
            _streams(donor, ids, donor_layers, places, (row, i)),
            _streams(recipient, other_ids, recipient_layers, other_places, (row, j)),
        )
        keep = torch.ones(len(pairs), dtype=torch.bool)
        for stream in (*pairs.donor.values(), *pairs.recipient.values()):
            norms = stream.norm(dim=1)
            keep &= norms <= OUTLIER * norms.median()
        yield Pairs(
            {layer: stream[keep] for layer, stream in pairs.donor.items()},
            {layer: stream[keep] for layer, stream in pairs.recipient.items()},
        )


def _encode(side: Side, text: str) -> tuple[list[int], list[int | None]]:
    """Token ids as the model expects them (its own BOS included), and where each token ends in `text`."""
    encoded: Any = side.tokenizer(text, return_offsets_mapping=True, verbose=False)
    ends = [end if end > start else None for start, end in encoded["offset_mapping"]]
    reach = getattr(side.model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
    most = min(MAX_TOKENS, reach)
    return encoded["input_ids"][:most], ends[:most]


@torch.no_grad()
def _streams(
    side: Side,
    ids: Sequence[list[int]],
    layers: Sequence[int],
    places: Sequence[Place],
    where: tuple[torch.Tensor, torch.Tensor],
) -> dict[int, torch.Tensor]:
    """The streams at `places`, one a layer, at the tokens `where` = (rows, columns)."""
    longest = max(map(len, ids))
    tokens = torch.zeros(len(ids), longest, dtype=torch.long)  # padded on the right: no token sees it
    mask = torch.zeros_like(tokens)
    for row, line in enumerate(ids):
        tokens[row, : len(line)] = torch.tensor(line)
        mask[row, : len(line)] = 1
    streams: dict[int, torch.Tensor] = {}

    def keep(layer: int, stream: torch.Tensor) -> None:
        rows, columns = (index.to(stream.device) for index in where)
        streams[layer] = stream[rows, columns].to("cpu", torch.float32)

    pairs = zip(layers, places, strict=True)
    vectors = side.model.__dict__.get("steering_vectors")
    device = input_device(side.model)
    was_training = side.model.training
    side.model.eval()
    try:
        with (
            hooked(*(handle for layer, place in pairs for handle in place.watch(partial(keep, layer)))),
            vectors.disabled() if vectors is not None else nullcontext(),
        ):
            side.decoder.backbone(tokens.to(device), attention_mask=mask.to(device), use_cache=False)
    finally:
        side.model.train(was_training)
    return streams


def _from_file(path: Path) -> list[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise SteerError(f"texts {str(path)!r}: expected a .txt file (one text a line) or a .jsonl file")
    if path.suffix == ".txt":
        return read_text(path).split("\n")
    texts = []
    for number, record in enumerate(json_lines(path), 1):
        if record is None:
            continue
        parts = [record.get("text") or record.get("problem")] if isinstance(record, dict) else [None]
        if not isinstance(parts[0], str):
            raise SteerError(f"{path.name}, line {number}: expected a record with 'text' or 'problem'")
        if not record.get("text"):
            parts.append(record.get("solution") or record.get("answer"))
        texts.append("\n".join(str(part) for part in parts if part))
    return texts


def _upto(texts: Sequence[str], characters: int) -> list[str]:
    chosen = []
    for text in texts:
        if characters <= 0:
            break
        chosen.append(text)
        characters -= len(text)
    return chosen

"""Forward passes over many texts in several conditions at once, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from steer.lens.conditions import Condition, open_lanes, watch
from steer.lens.subject import Padded, Row, Subject, chunks

MAX_LOGITS = 1 << 27  # numbers: half a gigabyte in float32


class Pass(NamedTuple):
    """What one batch gave. `first` is the index of its first row among all rows."""

    first: int
    rows: Sequence[Row]
    logits: torch.Tensor  # (conditions, rows, columns, vocabulary) in the model's dtype
    starts: list[int]  # by row: the column of `logits` of the row's token 0 (negative: cut off)

    def next_token(self, index: int, whole: bool = False) -> torch.Tensor:
        """
        Float32 logits (conditions, positions, vocabulary) of row `index` of this batch. Position n predicts
        token n of the completion (of a prompt alone: the one token that comes next); with `whole`, token n +
        1 of the row.
        """
        row = self.rows[index]
        start, at = self.starts[index], row.predicting
        return self.logits[:, index, start + (0 if whole else at.start) : start + at.stop].float()


@torch.no_grad()
def passes(
    subject: Subject,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    *,
    whole: bool = False,
    label: str | None = None,
) -> Iterator[Pass]:
    """
    Every row in every condition, batch by batch: memory depends on `batch_size` and the longest text, not on
    the number of rows, and no more than `MAX_LOGITS` logits are held. `whole` keeps those of the prompt too.
    """
    longest = max(len(row.ids) for row in rows)
    kept = longest if whole else longest - min(row.prompt for row in rows) + 1
    size = MAX_LOGITS // (len(conditions) * kept * len(subject.model.get_output_embeddings().weight))
    for first, batch in _batches(subject, rows, conditions, label, size):
        padded = subject.padded(batch)
        starts = padded.start.tolist()
        if whole:
            low, high = 0, padded.ids.shape[1]
        else:
            low = min(start + row.predicting.start for start, row in zip(starts, batch, strict=True))
            high = max(start + row.predicting.stop for start, row in zip(starts, batch, strict=True))
        logits = run(subject, padded, batch, conditions, torch.arange(low, high, device=subject.device))
        yield Pass(
            first,
            batch,
            logits.unflatten(0, (len(conditions), len(batch))),
            [start - low for start in starts],
        )


@torch.no_grad()
def streams(
    subject: Subject,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    seen: Callable[[int, torch.Tensor, Sequence[Row], list[int]], None],
    *,
    layers: Sequence[int] | None = None,
    label: str | None = None,
) -> None:
    """
    Calls `seen(layer, stream, rows, starts)` for every batch and each of `layers` (all of them by default):
    stream (conditions, rows, columns, hidden_size) after the layer, and the column of each row's first token.
    """
    layers = range(subject.decoder.num_hidden_layers) if layers is None else layers
    for _, batch in _batches(subject, rows, conditions, label):
        padded = subject.padded(batch)
        starts = padded.start.tolist()

        def look(
            layer: int, stream: torch.Tensor, batch: Sequence[Row] = batch, starts: list = starts
        ) -> None:
            seen(layer, stream.unflatten(0, (len(conditions), len(batch))), batch, starts)

        last = torch.arange(padded.ids.shape[1] - 1, padded.ids.shape[1], device=subject.device)
        run(subject, padded, batch, conditions, last, look, layers)


def run(
    subject: Subject,
    padded: Padded,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    keep: torch.Tensor,
    seen: Callable[[int, torch.Tensor], None] | None = None,
    layers: Sequence[int] = (),
) -> torch.Tensor:
    """Logits (conditions * rows, len(keep), vocabulary) of one batch at columns `keep`."""
    batch = padded.repeat(len(conditions))
    prompt = prompt_columns(padded, rows).repeat(len(conditions)).to(subject.device)
    with ExitStack() as stack:
        stack.enter_context(open_lanes(subject, conditions))
        if seen is not None:
            stack.enter_context(watch(subject, seen, layers))
        stack.enter_context(subject.vectors.prompt_length(prompt))
        return subject.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=keep,
        ).logits


def prompt_columns(padded: Padded, rows: Sequence[Row]) -> torch.Tensor:
    """Columns up to the end of each row's prompt, padding included: (rows,)."""
    return padded.start + torch.tensor([row.prompt for row in rows])


def _batches(
    subject: Subject,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    label: str | None,
    size: int | None = None,
) -> Iterator[tuple[int, Sequence[Row]]]:
    size = (
        subject.batch_size // len(conditions)
        if size is None
        else min(size, subject.batch_size // len(conditions))
    )
    with tqdm(total=len(rows), desc=label, unit="text", leave=False, disable=label is None) as bar:
        for first, batch in chunks(rows, size):
            yield first, batch
            bar.update(len(batch))

"""Forward passes over many texts in several conditions at once, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from steer.hooks import hidden_in, hidden_out, hooked, replace_out
from steer.lens.conditions import Condition, open_lanes, watch
from steer.lens.subject import Padded, Row, Subject, chunks
from steer.sites import Decoder

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
    share: bool = False,
    label: str | None = None,
) -> Iterator[Pass]:
    """
    Every row in every condition, batch by batch: memory depends on `batch_size` and the longest text, not on
    the number of rows, and no more than `MAX_LOGITS` logits are held, or those of one row. `whole` keeps
    those of the prompt too. `share` computes the layers below the first difference of the conditions once; it
    is for callers that have no hooks of their own there.
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
        keep = torch.arange(low, high, device=subject.device)
        logits = (run_shared if share else run)(subject, padded, batch, conditions, keep)
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
    share: bool = False,
    label: str | None = None,
) -> None:
    """
    Calls `seen(layer, stream, rows, starts)` for every batch and each of `layers` (all of them by default):
    stream (conditions, rows, columns, hidden_size) after the layer, and the column of each row's first token.
    `share` as in `passes`, for the layers below the first of `layers`.
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
        (run_shared if share else run)(subject, padded, batch, conditions, last, look, layers)


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


def run_shared(
    subject: Subject,
    padded: Padded,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    keep: torch.Tensor,
    seen: Callable[[int, torch.Tensor], None] | None = None,
    layers: Sequence[int] = (),
) -> torch.Tensor:
    """
    `run`, with the layers below the first difference of the conditions (and below `layers`) passed once, in
    the first condition, and skipped in the others. Falls back on `run` where that changes the logits, as in
    models whose layers read what earlier ones keep.
    """
    different = frozenset[int]().union(*(conditions[0].differing(one) for one in conditions[1:]))
    first = min([*different, *layers], default=0)
    if first < 1:
        return run(subject, padded, rows, conditions, keep, seen, layers)
    if first not in subject.shares:
        subject.shares[first] = _can_share(subject, [rows[0], rows[-1]], conditions[:2], first)
    if not subject.shares[first]:
        return run(subject, padded, rows, conditions, keep, seen, layers)
    return _above(subject, padded, rows, conditions, keep, seen, layers, first)


def _can_share(subject: Subject, rows: Sequence[Row], conditions: Sequence[Condition], first: int) -> bool:
    """Whether the logits stay what they are when the layers below `first` are passed once."""
    padded = subject.padded(rows)
    last = torch.tensor([padded.ids.shape[1] - 1], device=subject.device)
    wanted = run(subject, padded, rows, conditions, last)
    try:
        made = _above(subject, padded, rows, conditions, last, None, (), first)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        return False  # a layer found nothing of what an earlier one keeps for it, or the wrong number of rows
    error = (made - wanted).abs().max() / wanted.std()
    return bool(error <= (1e-3 if wanted.dtype in (torch.float32, torch.float64) else 0.05))


def _above(
    subject: Subject,
    padded: Padded,
    rows: Sequence[Row],
    conditions: Sequence[Condition],
    keep: torch.Tensor,
    seen: Callable[[int, torch.Tensor], None] | None,
    layers: Sequence[int],
    first: int,
) -> torch.Tensor:
    """`run` in which the layers from `first` on alone run in every condition."""
    decoder, made = subject.decoder, []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        made.append(output)

    last = torch.tensor([padded.ids.shape[1] - 1], device=subject.device)
    # First in line: what the layer itself returns. Steering comes after it, in the second pass too.
    with hooked(decoder.layers[first - 1].register_forward_hook(note, prepend=True)):
        above = range(first, decoder.num_hidden_layers)
        with skipped(decoder, above, lambda layer, hidden: replace_out(made[0], hidden)):
            run(subject, padded, rows, conditions[:1], last)
    stream = hidden_out(made[0])
    if stream.shape[:2] != padded.ids.shape:  # several residual streams
        return run(subject, padded, rows, conditions, keep, seen, layers)
    stream = torch.cat([stream] * len(conditions))

    def below(layer: int, hidden: torch.Tensor) -> object:
        return replace_out(made[0], stream if layer == first - 1 else hidden)

    with skipped(decoder, range(first), below):
        return run(subject, padded, rows, conditions, keep, seen, layers)


@contextmanager
def skipped(
    decoder: Decoder, layers: Sequence[int], returned: Callable[[int, torch.Tensor], object]
) -> Iterator[None]:
    """Inside, `layers` compute nothing and return `returned(layer, hidden states)`. Hooks still run."""
    modules = [(layer, decoder.layers[layer]) for layer in layers]
    before = [vars(module).get("forward") for _, module in modules]

    def forward(layer: int, *args: Any, **kwargs: Any) -> object:
        return returned(layer, hidden_in(args, kwargs))

    for layer, module in modules:
        module.forward = partial(forward, layer)
    try:
        yield
    finally:
        for (_, module), own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


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

"""What is looked at: a model with vectors in it, the tokenizer, and how problems are put to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer.errors import SteerError
from steer.extract.rows import Row
from steer.models import check_context
from steer.prompt import PromptSpec
from steer.sites import Decoder, find_decoder, input_device
from steer.tasks.prompts import Question, format_prompt, question
from steer.vectors import SteeringVectors

T = TypeVar("T")


@dataclass
class Subject:
    """
    A model with vectors attached, and how problems are put to it.

    batch_size: sequences per forward pass, and with the length of the texts all that memory depends on.
    Neither it nor `padding_side` ("left" or "right") changes a result beyond rounding; a model on which
    padding on the left would is padded on the right.
    """

    vectors: SteeringVectors
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptSpec | None = None
    max_new_tokens: int = 64
    batch_size: int = 128
    padding_side: str = "left"
    # by layer: whether the layers below it can be passed once for several conditions (`passes.run_shared`)
    shares: dict[int, bool] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise SteerError(f"padding_side={self.padding_side!r} is unknown; choose left or right")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise SteerError(f"{name}={getattr(self, name)} is not a number from 1")
        self.model.eval()

    @property
    def model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.vectors.model)

    @property
    def decoder(self) -> Decoder:
        return find_decoder(self.model)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @property
    def layers(self) -> list[int]:
        """The layers that have a vector."""
        return self.vectors.layers

    @property
    def site(self) -> str:
        """Where the vectors are added; adaptive ones, whose config has no site, at the MLP's output."""
        config = self.vectors.config
        return "mlp_out" if config.kind == "adaptive" else config.site

    def row(self, problem: Question, forced: str | Sequence[int] = "") -> Row:
        """The prompt of one problem; `forced` (text or token ids) is a completion's opening that is given."""
        ids = self.encode(format_prompt(problem, self.tokenizer, self.prompt))
        opening = self.encode(forced) if isinstance(forced, str) else list(forced)
        return Row((*ids, *opening), len(ids))

    def rows(self, problems: Iterable[dict[str, Any]], forced: str | Sequence[int] = "") -> list[Row]:
        """`row` of every problem record; SteerError when there is none."""
        rows = [self.row(question(problem), forced) for problem in problems]
        if not rows:
            raise SteerError("no problems were given: there is no text to look at")
        longest = max(len(row.ids) for row in rows)
        check_context(self.model.config, longest, self.max_new_tokens, "--max-new-tokens")
        return rows

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def pad_token(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def padded(self, rows: Sequence[Row], side: str | None = None) -> Padded:
        """
        `rows` as tensors on the model's device, padded on `side`. The default is the subject's, or the right
        for a model that padding on the left changes; SteerError where that is asked for of such a model.
        """
        side = side or (self.padding_side if self._left_changes(rows) is None else "right")
        if side == "left" and (reason := self._left_changes(rows)):
            raise SteerError(
                f"{type(self.model).__name__}: {reason}, and texts of unequal length are generated together; "
                "set the batch size so low that each is alone"
            )
        return pad(rows, side, self.pad_token, self.device)

    def _left_changes(self, rows: Sequence[Row]) -> str | None:
        """Why these rows must not be padded on the left; None where they need no padding or may be."""
        from steer.generation.verify import fast_paths  # which imports trl, a matter of seconds

        return fast_paths(self.model).padding if len({len(row.ids) for row in rows}) > 1 else None

    def token(self, index: int) -> str:
        """The text of one token as a reader should see it; bytes that are not text come as \\x.. ."""
        return token_text(self.tokenizer, index)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        return [self.token(int(index)) for index in ids]

    def answers(self, rows: Sequence[Row]) -> list[str]:
        """The completions as text, special tokens left out."""
        return [str(self.tokenizer.decode([*row.completion], skip_special_tokens=True)) for row in rows]


def token_text(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """Token `index` as text. A piece of a multi-byte character has none of its own: its raw form is given."""
    if index >= len(tokenizer):
        return f"<unused {index}>"
    text = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:
        return str(tokenizer.convert_ids_to_tokens(int(index)))
    return str(text)


class Padded(NamedTuple):
    """Rows as tensors (rows, columns), and the column where each row's tokens start."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    start: torch.Tensor  # (rows,)

    def repeat(self, conditions: int) -> Padded:
        return Padded(
            self.ids.repeat(conditions, 1),
            self.mask.repeat(conditions, 1),
            self.positions.repeat(conditions, 1),
            self.start,
        )


def pad(rows: Sequence[Row], side: str, token: int, device: torch.device | str = "cpu") -> Padded:
    """
    `rows` side by side, padded with `token` on `side`. Positions count real tokens alone, so that padding
    changes nothing for models with learned positions either.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), token, dtype=torch.long)
    mask = torch.zeros_like(ids)
    start = torch.tensor([longest - len(row.ids) if side == "left" else 0 for row in rows])
    for index, row in enumerate(rows):
        columns = slice(int(start[index]), int(start[index]) + len(row.ids))
        ids[index, columns] = torch.tensor(row.ids)
        mask[index, columns] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Padded(ids.to(device), mask.to(device), positions.to(device), start)


def chunks(items: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Runs of at most `size` items (at least one), with the index of their first."""
    size = max(1, size)
    for first in range(0, len(items), size):
        yield first, items[first : first + size]

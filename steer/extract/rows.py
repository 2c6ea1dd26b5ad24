"""Texts as token ids that a model reads: a prompt, and what follows it."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One text: token ids, the first `prompt` of which are the prompt, the others the completion."""

    ids: tuple[int, ...]
    prompt: int

    @property
    def completion(self) -> tuple[int, ...]:
        return self.ids[self.prompt :]

    @property
    def predicting(self) -> range:
        """Indices of the tokens that predict the completion; of a prompt alone, its last."""
        return range(self.prompt - 1, self.prompt - 1 + max(1, len(self.completion)))

    @property
    def question(self) -> Row:
        """The prompt alone."""
        return Row(self.ids[: self.prompt], self.prompt)

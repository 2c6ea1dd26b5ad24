"""What an LM head is given."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel


def contiguous_inputs(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each product of the LM head from now on: whether its input was a tensor of its own, and no view."""
    head, found, plain = model.get_output_embeddings(), [], torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self is head:
            found.append(x.is_contiguous())
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return found

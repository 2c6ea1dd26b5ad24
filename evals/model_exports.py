"""What other tools compute with the exported vectors of one tiny model: logits, through files."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

import steer
from evals import model_oracle as oracle
from steer.artifact import Artifact
from steer.export import checkpoint, gguf, peft
from steer.models import load_model


def through_peft(made: Artifact, base: PreTrainedModel, row: torch.Tensor, folder: Path) -> torch.Tensor:
    """Of `base`, which has no vectors, with a PEFT adapter."""
    peft.write(made, folder / "adapter")
    return oracle.logits(PeftModel.from_pretrained(base, str(folder / "adapter")), row)


def through_checkpoint(
    made: Artifact, base: PreTrainedModel, row: torch.Tensor, folder: Path
) -> torch.Tensor:
    """Of a plain checkpoint that is written from `base`, as transformers loads it."""
    base.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no tokenizer
        checkpoint.write(made, str(folder / "base"), folder / "steered")
    return oracle.logits(load_model(str(folder / "steered")), row)


def through_gguf(made: Artifact, base: PreTrainedModel, row: torch.Tensor, folder: Path) -> torch.Tensor:
    """Of `base` with the vectors that a control vector file holds."""
    file = gguf.write(made, folder / "vectors.gguf", block_0="keep")
    steer.load(gguf.read(file, base, block_0="keep"), base)
    return oracle.logits(base, row)

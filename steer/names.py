"""
Names of vectors: those of the plain base model, whatever a compiler, an adapter or a launcher wraps it in.
"""

from __future__ import annotations

import re

# torch.compile, FSDP, activation checkpointing, DDP
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)(?:\.|$)")
_ADAPTED = "base_model.model."  # PEFT


def canonical(name: str) -> str:
    """`_orig_mod.base_model.model.model.layers` is `model.layers`."""
    return _WRAPPERS.sub("", name).removeprefix(_ADAPTED).rstrip(".")

"""
Which model is this, and do vectors fit it? Checksums tell a base model, and a vocabulary, from others of the
same shape.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.models import loaded_revision
from steer.sharded import gathered, shape
from steer.sites import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In the config of a base with an adapter merged into it (`steer.base_adapter`): what it is made of.
MERGED = "steer_merged"
# Rows of the embedding matrix that enter the checksum: enough that fine-tuning moves some, read in a moment.
ROWS = 256


def describe(model: nn.Module) -> dict[str, Any]:
    """
    The fields of a steering config that say which model it is for: name, revision, architecture, hidden
    size, number of layers and checksum.
    """
    decoder = find_decoder(model)
    base: Any = model.config
    merged = getattr(base, MERGED, None) or {}
    return {
        "base_model_name_or_path": merged.get("base") or base.name_or_path or None,
        "base_revision": merged.get("revision") if merged else loaded_revision(model),
        "base_adapter": merged.get("adapter"),
        "model_type": base.get_text_config().model_type,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_hidden_layers,
        "base_checksum": base_checksum(model),
    }


def base_checksum(model: nn.Module) -> str | None:
    """
    16 hex digits from the architecture's numbers and a sample of the weights in bfloat16: 256 rows of the
    embeddings, and the one-dimensional parameters of the last layer. The same in float32 and bfloat16, and
    for a quantised copy, which keeps those; another for a fine-tuned one, and for one with an adapter merged
    into it. None where weights are not at hand (meta, sharded by FSDP2).
    """
    decoder = find_decoder(model)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    last = decoder.layers[-1].named_parameters()
    sample = [embeddings, *(p for name, p in last if len(shape(p)) == 1 and "steering" not in name)]
    with gathered(sample):
        if any(p.is_meta or not p.numel() or hasattr(p, "full_tensor") for p in sample):
            return None
        last_row, count = len(embeddings) - 1, min(ROWS, len(embeddings))
        rows = [i * last_row // max(count - 1, 1) for i in range(count)]
        sizes = [config.model_type, decoder.hidden_size, decoder.num_hidden_layers, len(embeddings)]
        digest = hashlib.sha256(json.dumps(sizes).encode())
        for tensor in (embeddings[torch.tensor(rows, device=embeddings.device)], *sample[1:]):
            digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        # an adapter changes none of these weights
        if merged := getattr(model.config, MERGED, None):
            digest.update(str(merged["checksum"]).encode())
        return digest.hexdigest()[:16]


def has_other_weights(model: nn.Module, recorded: str | None) -> bool:
    """Whether a file records another base checksum than the model's; False where one of them is unknown."""
    return recorded is not None and (own := base_checksum(model)) is not None and own != recorded


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits from the vocabulary: which text each token id stands for."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_fits(config: SteeringConfig, model: nn.Module, name: str, tokenizer: Any = None) -> None:
    """
    Refuse vectors that are for a model of another shape; warn where `model` has other weights, or its
    `tokenizer` another vocabulary, than they were made for. `name` is theirs in the messages.
    """
    decoder = find_decoder(model)
    kind = model.config.get_text_config().model_type  # type: ignore[union-attr, operator]
    have = {
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_hidden_layers,
        "model_type": kind,
    }
    for field, value in have.items():
        if getattr(config, field) != value:
            raise SteerError(
                f"{name}: made for {config.base_model_name_or_path} with {field}={getattr(config, field)}, "
                f"this model has {field}={value}; vectors only fit a model of the same shape: "
                "`steer transfer` carries them over"
            )
    here: Any = model.config
    names = [config.base_model_name_or_path or "an unnamed model", here.name_or_path or "an unnamed model"]
    if config.base_adapter:
        names[0] += f" with adapter {config.base_adapter} merged into it (--base-adapter)"
    tell = f"{name}: made for {names[0]}; this model ({names[1]}) has the same shape"
    if has_other_weights(model, config.base_checksum):
        warnings.warn(f"{tell} but other weights: measure what they do here", stacklevel=3)
    vocabulary = config.tokenizer_checksum
    if tokenizer is not None and vocabulary is not None and tokenizer_checksum(tokenizer) != vocabulary:
        warnings.warn(f"{tell} but another vocabulary: measure what they do here", stacklevel=3)

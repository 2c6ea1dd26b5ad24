"""
Which model is this, and do vectors fit it? Checksums tell a base model, and a vocabulary, from others of the
same shape.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from os.path import expanduser, realpath
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


def check_shape(
    config: SteeringConfig, hidden_size: int, num_hidden_layers: int, model_type: str | None, name: str
) -> None:
    """Refuse vectors that are for a model of another shape. `name` is theirs in the message."""
    have = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "model_type": model_type}
    for field, value in have.items():
        if getattr(config, field) != value:
            raise SteerError(
                f"{name}: made for {config.base_model_name_or_path} with {field}={getattr(config, field)}, "
                f"this model has {field}={value}; vectors only fit a model of the same shape: "
                "`steer transfer` carries them over"
            )


def names_another_base(
    config: SteeringConfig, base: str | None, adapter: str | None, name: str
) -> str | None:
    """
    A warning where vectors record another base, or another adapter merged into it, than `base` and `adapter`:
    for an engine, whose weights are not at hand. None where they agree or the vectors record no base. `name`
    is theirs in the message.
    """
    made_for = config.base_model_name_or_path
    if made_for is None or (same_name(made_for, base) and same_name(config.base_adapter, adapter)):
        return None
    return (
        f"{name}: made for {_called(made_for, config.base_adapter)}; this model is {_called(base, adapter)}, "
        "and the engine does not compare weights: measure what they do here"
    )


def same_name(one: str | None, other: str | None) -> bool:
    """Whether two names are equal, or lead to one place."""
    if not one or not other:
        return not one and not other
    return one == other or realpath(expanduser(one)) == realpath(expanduser(other))


def _called(base: str | None, adapter: str | None = None) -> str:
    """A model in messages."""
    merged = f" with adapter {adapter} merged into it (--base-adapter)" if adapter else ""
    return f"{base or 'an unnamed model'}{merged}"


def check_fits(config: SteeringConfig, model: nn.Module, name: str, tokenizer: Any = None) -> None:
    """
    Refuse vectors that are for a model of another shape; warn where `model` has other weights, or its
    `tokenizer` another vocabulary, than they were made for. `name` is theirs in the messages.
    """
    decoder = find_decoder(model)
    kind = model.config.get_text_config().model_type  # type: ignore[union-attr, operator]
    check_shape(config, decoder.hidden_size, decoder.num_hidden_layers, kind, name)
    here: Any = model.config
    made_for, this = _called(config.base_model_name_or_path, config.base_adapter), _called(here.name_or_path)
    tell = f"{name}: made for {made_for}; this model ({this}) has the same shape"
    if has_other_weights(model, config.base_checksum):
        warnings.warn(f"{tell} but other weights: measure what they do here", stacklevel=3)
    vocabulary = config.tokenizer_checksum
    if tokenizer is not None and vocabulary is not None and tokenizer_checksum(tokenizer) != vocabulary:
        warnings.warn(f"{tell} but another vocabulary: measure what they do here", stacklevel=3)

"""
Load a causal language model and its tokenizer by one name: a hub id (`org/model`), a local folder, a local
`.gguf` file, or the short name of bundled weights (`steer.weights`).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer import compat, hub
from steer.errors import SteerError, one_line
from steer.quantization import bitsandbytes, check_quantization, keep_gradients
from steer.weights import BUNDLED, choices, model_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

log = logging.getLogger(__name__)
DTYPES = ("auto", "fast", "float32", "bfloat16", "float16")
# Mixed precision, as the settings of trainers name it, and what it computes in.
MIXED = {"bf16": "bfloat16", "fp16": "float16"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict[str, int | str] | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> PreTrainedModel:
    """
    The causal language model `name`, in eval mode; or the vision-language model, where its type has no text
    model of its own in transformers.

    `dtype` is "float32", "bfloat16", "float16", a torch dtype, "auto" for the dtype it was saved in (float32
    for converted GGUF weights, bfloat16 for those over 1 GiB), or "fast" (`fast_dtype`).
    `config.name_or_path` is `name` as given, and `loaded_revision` tells the commit. `load_in_4bit` and
    `load_in_8bit` quantise the weights with bitsandbytes as they are loaded (`steer.quantization`).
    `attn_implementation` is transformers' own choice where it is None, except for models with a cap on
    attention scores (Gemma 2): those get "eager".

    Raises SteerError as `model_path` does, and when the hub does not answer, when the model is not a
    decoder-only language model, when the checkpoint lacks weights or is quantised by a method that is not
    tested, or for a dtype that is not one of these.
    """
    import torch

    wanted = _dtype(dtype)
    source = model_source(name, revision)
    common = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = _check_causal(name, source, common)
        if load_in_4bit or load_in_8bit:
            asked = load_in_4bit, load_in_8bit, quantization_config
            quantization_config = bitsandbytes(config, name, *asked, wanted)
            if device_map is None and torch.cuda.is_available():
                device_map = {"": torch.cuda.current_device()}
        check_quantization(config, name, quantization_config)
        quantized = {"quantization_config": quantization_config} if quantization_config else {}
        loaded: Any = _auto_model(config).from_pretrained(
            source,
            dtype=wanted,
            output_loading_info=True,
            attn_implementation=attn_implementation or _exact_attention(config),
            device_map=device_map,
            **quantized,  # None would mean that the checkpoint's own is to be ignored
            **common,
        )
    except (SteerError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many kinds: a bad name, no network, torn files
        raise _load_error("model", name, source, error) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random values there
        raise SteerError(
            f"model {name!r} lacks {len(missing)} of the weights a {type(model).__name__} needs "
            f"({missing[0]} first): expected a causal language model's complete checkpoint"
        )
    model.config.name_or_path = name  # artifacts record this: a cache path would mean nothing elsewhere
    model.steer_revision = hub.commit(source, revision) or revision
    keep_gradients(model)
    model.eval()
    return model


def skeleton(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model `name` on the meta device: its modules, names and shapes without weights, in a moment."""
    import torch

    source = model_source(name, revision)
    common = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = _check_causal(name, source, common)
        with torch.device("meta"):
            model: Any = _auto_model(config).from_config(config, trust_remote_code=trust_remote_code)
    except SteerError:
        raise
    except Exception as error:
        raise _load_error("model", name, source, error) from error
    model.config.name_or_path = name
    model.steer_revision = hub.commit(source, revision) or revision
    return model


def loaded_revision(model: torch.nn.Module) -> str | None:
    """
    The commit that `load_model` or `skeleton` took `model` from, or the revision that was asked for where the
    cache of the hub does not tell the commit. None for local and bundled models, and for one that something
    else loaded. It is no part of the config, which is saved with other weights too.
    """
    return getattr(model, "steer_revision", None)


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`, padding on the left, with a pad token (eos where it had none).

    Raises SteerError as `model_path` does, when the hub does not answer, when there are no tokenizer files,
    or when the tokenizer has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    source = model_source(name, revision, tokenizer=True)
    try:
        common = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
    except Exception as error:
        raise _load_error("tokenizer", name, source, error) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SteerError(
                f"tokenizer of {name!r} has no pad and no eos token: set one and save the tokenizer again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = name
    return tokenizer


def model_source(name: str, revision: str | None, tokenizer: bool = False) -> str:
    """What to hand to from_pretrained for `name`: a local folder, or the name itself where it is a hub id."""
    path = Path(name).expanduser()
    local = name in BUNDLED or path.exists()
    if local:
        hub.refuse_revision(name, revision)
    if not local and _HUB_ID.fullmatch(name) and not name.lower().endswith(".gguf"):
        return name
    if tokenizer and name not in BUNDLED and path.is_dir():
        return str(path)  # may hold a tokenizer alone
    return str(model_path(name))


def context_length(config: PreTrainedConfig) -> int | None:
    """
    Most tokens that a model of this configuration reads, answer included; None where it has no limit.

    With longrope (Phi-3.5) these are those of its short factors. One row that is longer changes the rotation
    of all rows of its pass, and of no keys in a cache.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit:
        limit = max(
            [limit, *(int((rope.get("factor") or 1) * length) for rope, length in _scaled(text, "yarn"))]
        )
        limit = min([limit, *(length for _, length in _scaled(text, "longrope"))])
    return limit


def _scaled(text: PreTrainedConfig, kind: str) -> list[tuple[dict[str, Any], int]]:
    """The RoPE parameters of a type, of all layers or of a type of layers, each with its unscaled length."""
    ropes = getattr(text, "rope_parameters", None) or {}
    every = [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]
    lengths = [(rope, rope.get("original_max_position_embeddings")) for rope in every]
    return [(rope, length) for rope, length in lengths if length and rope.get("rope_type") == kind]


def check_context(config: PreTrainedConfig, prompt: int, answer: int, option: str, of: str = "") -> None:
    """
    Refuse a prompt and an answer that do not fit into the model together.

    Args:
        config: the model's configuration.
        prompt: tokens of the longest prompt.
        answer: most tokens of an answer.
        option: the option that limits an answer, for the message, such as "--max-new-tokens".
        of: what the prompt is of, for the message.

    Raises:
        SteerError: says how much room there is.
    """
    context = context_length(config)
    if context and prompt + answer > context:
        room = context - prompt
        fix = f"{option} {room}" if room > 0 else "a shorter prompt, or a model with a longer context"
        why = ", after which longrope rotates all of them by other factors"
        raise SteerError(
            f"{of}a prompt of {prompt} tokens and an answer of up to {answer} do not fit the context of "
            f"{config.name_or_path or config.model_type} ({context} tokens"
            f"{why if _scaled(config.get_text_config(), 'longrope') else ''}); use {fix}"
        )


def fast_dtype() -> str:
    """
    The precision in which this machine multiplies matrices fastest: bfloat16 on an accelerator and on a CPU
    with instructions for it, else float32. A CPU without them takes up to a hundred times longer in bfloat16.
    """
    import torch

    return "bfloat16" if torch.accelerator.is_available() else cpu_dtype()


def cpu_dtype() -> str:
    """The same for the CPU alone."""
    return "bfloat16" if compat.cpu_multiplies_bfloat16() else "float32"


def _dtype(dtype: str | torch.dtype) -> Any:
    import torch

    if dtype == "fast":
        dtype = fast_dtype()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype if dtype == "auto" else getattr(torch, dtype)
    raise SteerError(f"dtype {str(dtype)!r} is not known: expected one of {', '.join(DTYPES)}")


def _check_causal(name: str, source: str, common: dict[str, Any]) -> Any:
    """The configuration of the model `name`; SteerError where it is not a causal language model's."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(source, **common)
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise SteerError(f"model {name!r} ({kind}) is an encoder-decoder: expected a decoder-only model")
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return config
    # Encoders such as BERT have a causal head too, but only checkpoints marked is_decoder are trained for it.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or sees_images(config)
    if encoder or not known or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise SteerError(
            f"model {name!r} ({kind}) is not a causal language model: expected a decoder-only one"
        )
    return config


def _exact_attention(config: PreTrainedConfig) -> str | None:
    """The attention of a model that transformers' fused attention computes wrong; None for all others."""
    if not getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return None
    log.warning(
        "%s is loaded with attn_implementation=eager: transformers' fused attention leaves out the cap on "
        "attention scores",
        config.model_type,
    )
    return "eager"


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether this is the configuration of a vision-language model that transformers has as a whole only."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(config)
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


def _auto_model(config: PreTrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def _load_error(what: str, name: str, source: str, error: Exception) -> SteerError:
    if isinstance(error, ValueError) and "`trust_remote_code=True`" in str(error):
        return SteerError(
            f"{what} {name!r} comes with Python code of its own, which is not run by default; read it, then "
            "set trust_remote_code (on the command line --trust_remote_code)"
        )
    if source != name or Path(source).exists():
        return SteerError(f"{what} {name!r} cannot be loaded: {one_line(error)}")
    return SteerError(
        f"{what} {name!r} cannot be loaded from the hub: {one_line(error)}; check the name and the network, "
        f"or pass a local folder or .gguf file ({choices()})"
    )

"""
Quantised bases: which methods work, and the settings of those that steer applies as it loads a model.

bitsandbytes' 4 and 8 bits are tested: forward pass, gradient, files, training. Every other method has kernels
of its own, some without a gradient, and is refused by its name until it is tested on a machine that runs it.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from steer.errors import SteerError

if TYPE_CHECKING:
    from torch import nn

TESTED = ("bitsandbytes",)


def quantization_method(config: Any) -> str | None:
    """
    How the weights of a model are quantised.

    Args:
        config: its configuration, or a configuration of transformers' quantisation.

    Returns:
        The name that transformers gives the method, such as "awq"; None for weights that are not quantised.
    """
    settings: Any = config
    if hasattr(config, "get_text_config"):
        settings = getattr(config, "quantization_config", None)
        settings = settings or getattr(config.get_text_config(), "quantization_config", None)
    if not settings:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    method = values.get("quant_method")
    return str(getattr(method, "value", method)).lower()


def check_quantization(config: Any, name: str, wanted: Any = None) -> None:
    """
    Refuse weights that are quantised by a method that is not in `TESTED`.

    Args:
        config: the model's configuration.
        name: the model's name, for the message.
        wanted: the quantisation that it is to be loaded with. One that sets `dequantize` gives ordinary
            weights, whatever they are in the checkpoint.

    Raises:
        SteerError: names the method.
    """
    if getattr(wanted, "dequantize", False):
        return
    for settings in (config, wanted):
        method = quantization_method(settings) if settings is not None else None
        if method is not None and method not in TESTED:
            fix = "give a copy that is not quantised"
            if method in ("mxfp4", "fp8"):
                kind = "Mxfp4Config" if method == "mxfp4" else "FineGrainedFP8Config"
                fix += f", or load_model(..., quantization_config={kind}(dequantize=True))"
            raise SteerError(
                f"model {name!r} is quantised with {method}, on which vectors are not tested; expected "
                f"{' or '.join(TESTED)}, or no quantisation: {fix}"
            )


def bitsandbytes(config: Any, name: str, four: bool, eight: bool, given: Any, dtype: Any) -> Any:
    """
    What transformers is told to quantise a model with as it is loaded.

    Args:
        config: the model's configuration.
        name: the model's name, for messages.
        four: to 4 bits: NormalFloat (arXiv 2305.14314), computed in the precision of the rest of the model.
        eight: to 8 bits: LLM.int8 (arXiv 2208.07339).
        given: another quantisation that is asked for.
        dtype: precision of what is not quantised.

    Raises:
        SteerError: for two quantisations, and without bitsandbytes.
    """
    import torch
    from transformers import BitsAndBytesConfig

    option = "load_in_4bit" if four else "load_in_8bit"
    if (four and eight) or given is not None:
        raise SteerError(f"{option} is given with another quantization; give one of them")
    if (method := quantization_method(config)) is not None:
        raise SteerError(
            f"{option}: the weights of {name!r} are quantised ({method}) as they are; leave it out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SteerError(f"{option} needs bitsandbytes, which is not installed; pip install bitsandbytes")
    if eight:
        return BitsAndBytesConfig(load_in_8bit=True)
    saved = getattr(config.get_text_config(), "dtype", None) or torch.float32
    computed = saved if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)


def keep_gradients(model: nn.Module) -> None:
    """
    Keep 4-bit weights as they are. On a CPU that multiplies bfloat16, bitsandbytes packs them in the first
    pass without gradients, for kernels that give no gradient and leave no way back.

    Raises:
        SteerError: when they are packed.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise SteerError(
                f"a forward pass has packed the 4-bit weights of {name} for the CPU, which gives no gradient "
                "any more; load the model again with steer.models.load_model, or attach before the first pass"
            )
        module.support_avx512bf16_for_cpu = False

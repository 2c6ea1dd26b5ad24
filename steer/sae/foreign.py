"""
SAEs of other tools: what their settings and weights mean here.

Every setting of a file is honoured, or in a list of those that do not change features and reconstructions,
with the reason, or refused by name and value. The lists hold the settings of SAELens up to 6.54, sparsify up
to 1.3 and dictionary_learning 0.1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from steer.errors import SteerError
from steer.sae.config import SAEConfig

Read = tuple[SAEConfig, dict[str, Tensor]]

_SOURCE = "where the activations come from"
_FILE = "how the file was written; tensors have their own dtype and are read on the CPU"
_TRAINING = "of training; the weights are its outcome"

# SAELens: by setting, why it is not looked at.
SAELENS_IRRELEVANT = {
    **dict.fromkeys(("dtype", "device", "sae_lens_version", "sae_lens_training_version"), _FILE),
    **dict.fromkeys(
        (
            *("metadata", "model_name", "model_class_name", "model_from_pretrained_kwargs", "neuronpedia_id"),
            *("hook_name", "hook_point", "hook_layer", "hook_point_layer", "hook_head_index"),
            *("hook_point_head_index", "hf_hook_name", "context_size", "prepend_bos", "seqpos_slice"),
            *("exclude_special_tokens", "dataset_path", "dataset_trust_remote_code"),
        ),
        _SOURCE,
    ),
}
# The values under which an SAE is a plain one; any other changes what goes in or what comes out.
SAELENS_PLAIN = {
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none",),
    "finetuning_scaling_factor": (False, None),
}
SPARSIFY_IRRELEVANT = {
    "normalize_decoder": "of training; the decoder is used as it is",
    "multi_topk": "of training: another loss",
}
SPARSIFY_PLAIN = {
    "activation": ("topk",),
    "transcode": (False,),
    "skip_connection": (False,),
    "signed": (False,),
}
DICTIONARY_IRRELEVANT = {
    **dict.fromkeys(("layer", "lm_name", "submodule_name"), _SOURCE),
    **dict.fromkeys(("trainer_class", "lr", "steps", "seed", "warmup_steps", "decay_start"), _TRAINING),
    **dict.fromkeys(("auxk_alpha", "top_k_aux", "threshold_beta", "threshold_start_step"), _TRAINING),
    **dict.fromkeys(("bandwidth", "sparsity_penalty", "sparsity_warmup_steps"), _TRAINING),
    **dict.fromkeys(("device", "wandb_name"), _FILE),
}


def check_settings(
    tool: str,
    settings: Mapping[str, Any],
    honoured: Collection[str],
    irrelevant: Collection[str],
    plain: Mapping[str, tuple[Any, ...]],
) -> None:
    """
    SteerError for the first setting that is neither honoured nor irrelevant, or has another than its plain
    values.
    """
    for name, value in settings.items():
        if name in plain:
            if not any(value is one or (value == one and type(value) is type(one)) for one in plain[name]):
                only = " or ".join(map(repr, plain[name]))
                raise SteerError(
                    f"{tool} setting {name}={value!r} is not known here, only {only}: features would "
                    "differ from those of the tool"
                )
        elif name not in honoured and name not in irrelevant:
            raise SteerError(
                f"{tool} setting {name}={value!r} is not known here, and may change the features; remove it "
                "from the file if it does not"
            )


def from_saelens(config: dict[str, Any], tensors: dict[str, Tensor]) -> Read:
    """W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in), b_dec, and threshold (d_sae,) for jumprelu."""
    activations = ("activation_fn_str", "activation_fn", "activation_fn_kwargs")
    honoured = ("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
    check_settings("SAELens", config, (*honoured, *activations), SAELENS_IRRELEVANT, SAELENS_PLAIN)
    kind = config["architecture"]
    if kind not in ("topk", "jumprelu", "standard"):
        raise SteerError(f"SAELens architecture {kind!r} is not known here; topk, jumprelu and standard are")
    if "hook_z" in str(config.get("hook_name", "")) and "reshape_activations" not in config:
        raise SteerError(
            f"hook_name={config['hook_name']!r}: SAELens reshapes its input, which is not known here"
        )
    kind, k = _saelens_activation(config, kind)
    rescaled = _boolean(config, "rescale_acts_by_decoder_norm", False)
    if rescaled and kind != "topk":
        raise SteerError(
            f"rescale_acts_by_decoder_norm=True is not known for architecture {kind!r}, only topk"
        )
    names = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"threshold"} if kind == "jumprelu" else set())
    scale = tensors.get("scaling_factor")
    if scale is not None and torch.equal(scale, torch.ones_like(scale)):  # some versions wrote ones
        tensors = {name: value for name, value in tensors.items() if name != "scaling_factor"}
    _check_tensors("SAELens", tensors, names)
    table = tensors["W_dec"]
    state = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": table,
        "b_dec": tensors["b_dec"],
    }
    if rescaled:
        # activations are in units of the decoder's rows, which then count as unit rows
        norms = table.norm(dim=1)
        state["encoder.weight"] = state["encoder.weight"] * norms[:, None]
        state["encoder.bias"], state["W_dec"] = state["encoder.bias"] * norms, table / norms[:, None]
    if kind != "topk":  # ReLU is JumpReLU with thresholds of zero
        thresholds = tensors["threshold"] if kind == "jumprelu" else torch.zeros_like(tensors["b_enc"])
        state["log_threshold"] = _log(thresholds)
    tied = _boolean(config, "apply_b_dec_to_input", True)
    return _config(config["d_in"], config["d_sae"], k, "topk" if kind == "topk" else "jumprelu", tied), state


def _saelens_activation(config: dict[str, Any], kind: str) -> tuple[str, int | None]:
    """
    The architecture and k. Before version 6 a TopK SAE was a standard one with the activation "topk" and k
    among its arguments.
    """
    given = [config[name] for name in ("activation_fn_str", "activation_fn") if name in config]
    arguments = config.get("activation_fn_kwargs") or {}
    activation = given[0] if given else "relu"
    top = activation == "topk" and kind in ("standard", "topk")
    allowed = {"k"} if top else set()
    fine = isinstance(arguments, dict) and set(arguments) <= allowed and given[1:] in ([], given[:1])
    if not fine or not (top or activation == "relu"):
        raise SteerError(
            f"SAELens activation_fn_str={activation!r} with activation_fn_kwargs={arguments!r} is not known "
            f"for architecture {kind!r}; relu without arguments, and topk with k, are"
        )
    if not top and kind != "topk":
        if "k" in config:
            raise SteerError(f"SAELens setting k={config['k']!r} is not known for architecture {kind!r}")
        return kind, None
    counts = [value for value in (config.get("k"), arguments.get("k")) if value is not None]
    if not counts or counts[1:] not in ([], counts[:1]):
        what = f"two values of k, {counts[0]!r} and {counts[1]!r}" if counts else "no k"
        raise SteerError(f"a SAELens topk SAE must say how many features are active; this one has {what}")
    return "topk", counts[0]


def from_sparsify(config: dict[str, Any], tensors: dict[str, Tensor]) -> Read:
    """encoder.weight (d_sae, d_in), encoder.bias, W_dec (d_sae, d_in), b_dec, which is always taken off."""
    honoured = ("d_in", "k", "num_latents", "expansion_factor")
    for name in ("transcode", "skip_connection"):
        if config.get(name):
            raise SteerError(
                f"this is a sparsify transcoder ({name}={config[name]!r}); only autoencoders are known"
            )
    check_settings("sparsify", config, honoured, SPARSIFY_IRRELEVANT, SPARSIFY_PLAIN)
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    _check_tensors("sparsify", tensors, set(names))
    d_in, k, d_sae = config["d_in"], config["k"], len(tensors["W_dec"])
    if config.get("num_latents"):
        _check_size("num_latents", config["num_latents"], d_sae)
    elif "expansion_factor" in config:
        _check_size("expansion_factor * d_in", config["expansion_factor"] * d_in, d_sae)
    return _config(d_in, d_sae, k, "topk", True), {name: tensors[name] for name in names}


def from_dictionary_learning(config: dict[str, Any], tensors: dict[str, Tensor]) -> Read:
    """TopK and BatchTopK as nn.Linear layers, JumpReLU as W_enc, W_dec and threshold."""
    check_settings("dictionary_learning", config, ("trainer",), ("buffer",), {})
    trainer = config["trainer"]
    if not isinstance(trainer, dict):
        raise SteerError(f"dictionary_learning setting trainer={trainer!r} is not a mapping of settings")
    kind = trainer["dict_class"]
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"):
        raise SteerError(
            f"dictionary_learning class {kind!r} is not known here; AutoEncoderTopK, BatchTopKSAE and "
            "JumpReluAutoEncoder are"
        )
    jump = kind == "JumpReluAutoEncoder"
    honoured = {"dict_class", "activation_dim", "dict_size", "k"} | ({"target_l0"} if jump else set())
    check_settings("dictionary_learning", trainer, honoured, DICTIONARY_IRRELEVANT, {})
    names = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    if not jump:
        names = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"}
    _check_tensors("dictionary_learning", tensors, names)
    if jump:
        state = {
            "encoder.weight": tensors["W_enc"].T.contiguous(),
            "encoder.bias": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
            "log_threshold": _log(tensors["threshold"]),
        }
        k = trainer.get("k", trainer.get("target_l0"))
    else:
        state = {
            "encoder.weight": tensors["encoder.weight"],
            "encoder.bias": tensors["encoder.bias"],
            "W_dec": tensors["decoder.weight"].T.contiguous(),
            "b_dec": tensors["b_dec"],
        }
        if kind == "BatchTopKSAE":
            state["threshold"] = tensors["threshold"]
        k = int(tensors["k"])
        _check_size("k", trainer.get("k", k), k)
    d_sae, d_in = state["W_dec"].shape
    _check_size("activation_dim", trainer.get("activation_dim", d_in), d_in)
    _check_size("dict_size", trainer.get("dict_size", d_sae), d_sae)
    activation = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk"}.get(kind, "jumprelu")
    return _config(d_in, d_sae, k, activation, not jump), state


def _config(d_in: int, d_sae: int, k: Any, activation: str, tied: bool) -> SAEConfig:
    """`k` None: a JumpReLU file does not say what it aimed at, and nothing that is computed depends on it."""
    if k is None:
        k = min(50, d_sae)
    if activation == "jumprelu" and isinstance(k, float):  # a target, which may lie between two numbers
        k = max(1, round(k))
    return SAEConfig(d_in, d_sae, k, activation=activation, bias="tied" if tied else "free")


def _boolean(config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise SteerError(f"{name}={value!r} is neither true nor false")
    return value


def _check_size(name: str, told: Any, have: int) -> None:
    if told != have:
        raise SteerError(
            f"the settings say {name}={told!r}, the weights have {have}; one of the two is wrong"
        )


def _check_tensors(tool: str, tensors: Mapping[str, Tensor], known: set[str]) -> None:
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise SteerError(
            f"{tool} weights {', '.join(unknown)} are not known here for this kind of SAE, which has "
            f"{', '.join(sorted(known))}"
        )


def _log(thresholds: Tensor) -> Tensor:
    """Logarithms of thresholds; a threshold of 0 becomes one that no positive number is below."""
    return thresholds.clamp(min=torch.finfo(thresholds.dtype).tiny).log()

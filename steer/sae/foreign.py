"""
SAEs of sparsify and dictionary_learning: what their settings and weights mean here, and the checks that
`steer.sae.saelens` shares.

Every setting of a file is honoured, or in a list of those that do not change features and reconstructions,
with the reason, or refused by name and value. The lists hold the settings of sparsify up to 1.3 and
dictionary_learning 0.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.config import SITES
from steer.errors import SteerError
from steer.files import json_object
from steer.sae.config import SAEConfig

Read = tuple[SAEConfig, dict[str, Tensor]]

SOURCE = "where the activations come from"
FILE = "how the file was written; tensors have their own dtype and are read on the CPU"
_TRAINING = "of training; the weights are its outcome"

# By setting, why it is not looked at; and the values under which an SAE is a plain one: any other changes
# what goes in or what comes out.
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
    **dict.fromkeys(("layer", "lm_name", "submodule_name"), SOURCE),
    **dict.fromkeys(("trainer_class", "lr", "steps", "seed", "warmup_steps", "decay_start"), _TRAINING),
    **dict.fromkeys(("auxk_alpha", "top_k_aux", "threshold_beta", "threshold_start_step"), _TRAINING),
    **dict.fromkeys(("bandwidth", "sparsity_penalty", "sparsity_warmup_steps"), _TRAINING),
    **dict.fromkeys(("device", "wandb_name"), FILE),
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
    check_tensors("sparsify", tensors, set(names))
    d_in, k, d_sae = config["d_in"], config["k"], len(tensors["W_dec"])
    if config.get("num_latents"):
        _check_size("num_latents", config["num_latents"], d_sae)
    elif "expansion_factor" in config:
        _check_size("expansion_factor * d_in", config["expansion_factor"] * d_in, d_sae)
    return sae_config(d_in, d_sae, k, "topk", True), {name: tensors[name] for name in names}


def sparsify_source(folder: Path) -> dict[str, Any]:
    """
    Layer and model of an SAE of sparsify, which its settings do not say: it is written to a folder named
    after the module that it reads, such as `layers.12`, beside the settings of the run.
    """
    source: dict[str, Any] = {"tool": "sparsify"}
    if found := re.fullmatch(r"(?:\w+\.)*layers\.(\d+)", folder.resolve().name):
        source |= {"layer": int(found[1]), "site": "resid_post"}
        run = folder.resolve().parent / "config.json"
        model = json_object(run.read_bytes(), run).get("model") if run.is_file() else None
        source |= {"model": model} if isinstance(model, str) else {}
    elif re.match(r"(?:\w+\.)*layers\.\d+\.", folder.resolve().name):
        source["hook"] = folder.resolve().name  # a module inside a layer
    return source


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
    check_tensors("dictionary_learning", tensors, names)
    if jump:
        state = {
            "encoder.weight": tensors["W_enc"].T.contiguous(),
            "encoder.bias": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
            "log_threshold": log_thresholds(tensors["threshold"]),
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
    return sae_config(d_in, d_sae, k, activation, not jump, _dictionary_source(trainer)), state


def _dictionary_source(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The model, and where the submodule is named after a site, the layer and the site."""
    source: dict[str, Any] = {"tool": "dictionary_learning"}
    if isinstance(trainer.get("lm_name"), str):
        source["model"] = trainer["lm_name"]
    layer, named = (
        trainer.get("layer"),
        re.match(f"({'|'.join(SITES)})(_layer_|$)", str(trainer.get("submodule_name"))),
    )
    if named and isinstance(layer, int):
        source |= {"layer": layer, "site": named[1]}
    elif trainer.get("submodule_name") is not None:
        source["hook"] = str(trainer["submodule_name"])
    return source


def sae_config(
    d_in: int, d_sae: int, k: Any, activation: str, tied: bool, source: dict[str, Any] | None = None
) -> SAEConfig:
    """`k` None: a JumpReLU file does not say what it aimed at, and nothing that is computed depends on it."""
    if k is None:
        k, source = min(50, d_sae), {**(source or {}), "k": None}
    if activation == "jumprelu" and isinstance(k, float):  # a target, which may lie between two numbers
        k = max(1, round(k))
    return SAEConfig(d_in, d_sae, k, activation=activation, bias="tied" if tied else "free", source=source)


def boolean(config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise SteerError(f"{name}={value!r} is neither true nor false")
    return value


def _check_size(name: str, told: Any, have: int) -> None:
    if told != have:
        raise SteerError(
            f"the settings say {name}={told!r}, the weights have {have}; one of the two is wrong"
        )


def check_tensors(tool: str, tensors: Mapping[str, Tensor], known: set[str]) -> None:
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise SteerError(
            f"{tool} weights {', '.join(unknown)} are not known here for this kind of SAE, which has "
            f"{', '.join(sorted(known))}"
        )


def log_thresholds(thresholds: Tensor) -> Tensor:
    """Logarithms of thresholds; a threshold of 0 becomes one that no positive number is below."""
    return thresholds.clamp(min=torch.finfo(thresholds.dtype).tiny).log()

"""
SAE files: our own, and those of SAELens, sparsify and dictionary_learning, to read and to write.

    format               files
    steer                sae_config.json, model.safetensors: every variant (`steer.sae.own`)
    saelens              cfg.json, sae_weights.safetensors: TopK, JumpReLU, and BatchTopK as a JumpReLU
    sparsify             cfg.json, sae.safetensors: TopK
    dictionary_learning  config.json, ae.pt: TopK, BatchTopK, JumpReLU

Features and reconstructions are equal after either way. An SAE that a format cannot express is refused with
the reason: the other three know dense encoders only, and a KronSAE equals one only where all p and q of each
head read the same direction. Settings of other tools that are not known are refused (`saelens`, `foreign`).
Nothing that is read can execute code.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from steer import hub
from steer.errors import SteerError
from steer.files import replace_files
from steer.sae import own
from steer.sae.config import SAEConfig
from steer.sae.foreign import from_dictionary_learning, from_sparsify, sparsify_source
from steer.sae.model import SAE
from steer.sae.own import check_finite
from steer.sae.saelens import from_release, from_saelens

# By format: the file of its settings and that of its weights.
FILES = {
    "steer": (own.CONFIG_FILE, own.WEIGHTS_FILE),
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
}


def save_sae(sae: SAE, folder: str | os.PathLike[str], format: str = "steer") -> Path:
    """Write `sae` into `folder`, both files or neither; SteerError where the format cannot express it."""
    if format not in FILES:
        raise SteerError(f"SAE format {format!r} is unknown; choose one of {', '.join(FILES)}")
    if format == "steer":
        return sae.save_pretrained(folder)
    if (sae.cfg.source or {}).get("what") == "difference":
        raise SteerError(
            f"this SAE reads differences that vectors make, and format={format!r} would name it one of the "
            "activations themselves; save it with format='steer'"
        )
    write: dict[str, Callable[[SAE], tuple[dict[str, Any], dict[str, Tensor]]]] = {
        "saelens": _to_saelens,
        "sparsify": _to_sparsify,
        "dictionary_learning": _to_dictionary_learning,
    }
    config, tensors = write[format](as_dense(sae))
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if format == "dictionary_learning":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    else:
        content = save(tensors)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    settings, weights = FILES[format]
    replace_files({path / weights: content, path / settings: json.dumps(config, indent=2).encode()})
    return path


def load_sae(name_or_path: str | os.PathLike[str]) -> SAE:
    """
    An SAE in any of the formats, in eval mode.

    Args:
        name_or_path: a folder; RELEASE:ID of SAELens, such as
            "gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_medium", or user/name:FOLDER of a repository in
            its format (SAELens must be installed); or a hub id, user/name, of an SAE in steer's own format.

    Raises:
        SteerError: there is no such SAE, its files are damaged, its weights do not fit the settings or are
            not finite, or it is of a variant that is not known here.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if not path.exists():
        release, colon, sae_id = name.partition(":")
        if colon and release and sae_id:
            return _published(name, release, sae_id)
        if hub.is_hub_id(name):
            return SAE.from_pretrained(name)
    format = detect(path)
    if format == "steer":
        return SAE.from_pretrained(path)
    settings, weights = FILES[format]
    try:
        config = json.loads((path / settings).read_text())
        content = (path / weights).read_bytes()
        if format == "dictionary_learning":
            tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        else:
            tensors = load(content)
    except Exception as error:  # json, safetensors and torch raise kinds of their own
        line = " ".join(str(error).split())[:150]
        raise SteerError(f"{path} holds a damaged {format} SAE ({line}); fetch or write it again") from error
    if not isinstance(config, dict) or not isinstance(tensors, dict):
        raise SteerError(f"{path} holds no {format} SAE: expected settings and named tensors")
    check_finite(tensors, path)
    read = {
        "saelens": from_saelens,
        "sparsify": from_sparsify,
        "dictionary_learning": from_dictionary_learning,
    }
    try:
        sae_config, state = read[format](config, tensors)
        if format == "sparsify":
            sae_config.source = sparsify_source(path)
    except KeyError as error:
        raise SteerError(
            f"{path}: a {format} SAE must have {error.args[0]!r}, and it is not there"
        ) from error
    except SteerError as error:
        raise SteerError(f"{path}: {error}") from error
    return SAE.from_state(sae_config, state, path)


def _published(name: str, release: str, sae_id: str) -> SAE:
    try:
        config, state = from_release(release, sae_id)
        check_finite(state, Path(name))
    except KeyError as error:
        raise SteerError(f"{name}: a SAELens SAE must have {error.args[0]!r}, and it is not there") from error
    except SteerError as error:
        raise SteerError(f"{name}: {error}") from error
    return SAE.from_state(config, state, Path(name))


def detect(folder: str | os.PathLike[str]) -> str:
    """Which format the files in `folder` are; SteerError when they are none."""
    path = Path(folder)
    for format, names in FILES.items():
        if all((path / name).is_file() for name in names):
            return format
    raise SteerError(
        f"{path} holds no SAE; expected one of " + ", ".join(" + ".join(names) for names in FILES.values())
    )


@torch.no_grad()
def as_dense(sae: SAE) -> SAE:
    """
    The same SAE with a dense encoder. A dense one is given back as it is; a KronSAE has an equal only where
    all p and q of each head are positive multiples of one another: then sqrt(p q) is linear where it is
    positive. SteerError says so for any other.
    """
    cfg = sae.cfg
    if cfg.encoder == "dense":
        return sae
    if cfg.interaction != "mand":
        raise SteerError(
            f"this KronSAE has no equal dense encoder: with interaction={cfg.interaction!r} its features are "
            "quadratic in the input; save it with format='steer'"
        )
    rows = torch.cat([sae.encoder.weight, sae.encoder.bias[:, None]], 1)
    heads = torch.cat(sae.kron.factors(rows), 1)
    norms = heads.norm(dim=2, keepdim=True)
    unit = heads / norms.clamp(min=1e-30)
    apart = (unit - unit[:, :1]).norm(dim=2).amax(1) > 1e-6
    if apart.any():
        raise SteerError(
            f"this KronSAE has no equal dense encoder: sqrt(p q) is not linear in the input, in "
            f"{int(apart.sum())} of {len(apart)} heads; save it with format='steer'"
        )
    sizes = (norms[:, : cfg.m] * norms[:, cfg.m :].transpose(1, 2)).sqrt()
    dense = (sizes[..., None] * unit[:, :1, None, :]).reshape(cfg.d_sae, -1)
    values = {**cfg.to_dict(), "encoder": "dense", "heads": None}
    copy = SAE(SAEConfig.from_dict(values)).to(sae.device, sae.dtype)
    state = {**sae.state_dict(), "encoder.weight": dense[:, :-1], "encoder.bias": dense[:, -1]}
    copy.load_state_dict(state)
    return copy.train(sae.training)


# --- SAELens: W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in), b_dec, and threshold (d_sae,) for jumprelu


def _to_saelens(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg, source = sae.cfg, sae.cfg.source or {}
    config = {
        "architecture": "topk" if cfg.activation == "topk" else "jumprelu",
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": cfg.bias == "tied",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": source.get("model"),
            "hook_name": _hook_name(source),
            "prepend_bos": None,
            "sae_lens_training_version": None,
        },
    }
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if cfg.activation == "topk":
        config |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    else:
        tensors["threshold"] = _thresholds(sae)
    return config, tensors


def _hook_name(source: dict[str, Any]) -> str | None:
    """
    The site's name in TransformerLens, which SAELens uses. Its hook_attn_out and hook_mlp_out are what the
    layer adds to the stream: SteerError where that is known to be another place than the SAE's.
    """
    site = source.get("site", "")
    if site in ("attn_out", "mlp_out") and source.get("tool") != "SAELens":
        if source.get("added") is False:
            raise SteerError(
                f"this SAE reads {site} of a model that normalises or scales it before it is added to the "
                f"stream, and SAELens's hook_{site} is after that; save it with format='steer'"
            )
        if source.get("added") is None:
            warnings.warn(
                f"the SAE does not say whether its model adds {site} to the stream as it is, and SAELens's "
                f"hook_{site} is what is added: another place in models such as Gemma and OLMo 2",
                stacklevel=4,
            )
    names = {
        "resid_pre": "hook_resid_pre",
        "resid_mid": "hook_resid_mid",
        "resid_post": "hook_resid_post",
        "attn_out": "hook_attn_out",
        "mlp_out": "hook_mlp_out",
    }
    name = names.get(site)
    return f"blocks.{source['layer']}.{name}" if name and "layer" in source else None


# --- sparsify: encoder.weight (d_sae, d_in), encoder.bias, W_dec (d_sae, d_in), b_dec, always taken off


def _to_sparsify(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg = sae.cfg
    if cfg.activation != "topk":
        raise SteerError(f"sparsify has no {cfg.activation} SAEs; choose format='saelens' or 'steer'")
    config = {
        "activation": "topk",
        "expansion_factor": max(1, cfg.d_sae // cfg.d_in),
        "normalize_decoder": True,
        "num_latents": cfg.d_sae,
        "k": cfg.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": cfg.d_in,
    }
    names = ("encoder.weight", "W_dec", "b_dec")
    state = sae.state_dict()
    return config, {**{name: state[name] for name in names}, "encoder.bias": _tied_bias(sae)}


# --- dictionary_learning: TopK and BatchTopK as nn.Linear layers, JumpReLU as W_enc, W_dec and threshold


def _to_dictionary_learning(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg, source = sae.cfg, sae.cfg.source or {}
    classes = {"topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "jumprelu": "JumpReluAutoEncoder"}
    trainer = {
        "dict_class": classes[cfg.activation],
        "activation_dim": cfg.d_in,
        "dict_size": cfg.d_sae,
        **({} if cfg.stated_k is None else {"k": cfg.k}),
        "layer": source.get("layer"),
        "lm_name": source.get("model"),
        "submodule_name": source.get("site"),
    }
    if cfg.activation == "jumprelu":  # it never takes b_dec off
        free = sae.b_enc - (sae.encoder.weight @ sae.b_dec if cfg.bias == "tied" else 0)
        tensors = {"W_enc": sae.W_enc, "b_enc": free, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors["threshold"] = _thresholds(sae)
    else:
        tensors = {
            "encoder.weight": sae.encoder.weight,
            "encoder.bias": _tied_bias(sae),
            "decoder.weight": sae.W_dec.T,
            "b_dec": sae.b_dec,
            "k": torch.tensor(cfg.k, dtype=torch.int),
            "threshold": sae.threshold.float(),
        }
    return {"trainer": trainer, "buffer": None}, tensors


# --- shared


def _tied_bias(sae: SAE) -> Tensor:
    """The encoder's bias for inputs that b_dec is taken off: W x + b = W (x - b_dec) + (b + W b_dec)."""
    return sae.b_enc + (sae.encoder.weight @ sae.b_dec if sae.cfg.bias == "free" else 0)


def _thresholds(sae: SAE) -> Tensor:
    """(d_sae,): what a JumpReLU with `z > threshold` needs to keep what this SAE keeps."""
    if sae.cfg.activation == "jumprelu":
        return sae.log_threshold.exp()
    if sae.threshold < 0:
        raise SteerError("this BatchTopK SAE has no threshold yet; train it before saving it as a JumpReLU")
    least = torch.nextafter(sae.threshold, torch.zeros_like(sae.threshold))  # >= becomes >
    return least.expand(sae.cfg.d_sae)

"""
PEFT adapters: what `PeftModel.from_pretrained` loads with no steer installed.

constant, shared   BEFT (peft 0.20 and later): a bias on the last matrix of the MLP or of the attention,
                   `base_model.model.model.layers.12.mlp.down_proj.beft_bias` (1, hidden_size)
adaptive           LoRA of rank one on the MLP's last matrix: `…down_proj.lora_A.weight` (1, inner) is the
                   read-out, `…down_proj.lora_B.weight` (hidden_size, 1) the vector; vLLM serves it as a LoRA

Neither has a place for a scale: it is folded into the vectors, and shared directions into one vector per
layer. Steer's own config travels in the tensor file's metadata, which PEFT does not look at.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from steer import artifact as artifacts
from steer.artifact import Artifact
from steer.artifact_file import MAX_BYTES
from steer.artifact_scores import for_export
from steer.config import SteeringConfig, shown
from steer.errors import SteerError
from steer.export.architecture import bias_place, layer_names
from steer.export.origin import origin
from steer.files import json_object, replace_files, safetensors_header
from steer.identity import describe
from steer.sites import find_decoder, find_down_projections
from steer.weights import public_name

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

Parts = dict[int, dict[str, torch.Tensor]]  # by layer, then by the name's last part: `beft_bias`, …

_ROOT = "base_model.model"  # PEFT wraps the model twice
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PARTS = ("beft_bias", "lora_A.weight", "lora_B.weight")
# Fields that say how an adapter was made or where it goes; any other must be unset, or it computes more.
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "task_type"),
    *("r", "lora_alpha", "use_rslora"),  # the last divides by the square root of the rank, which is one
    *("lora_dropout", "fan_in_fan_out", "init_weights", "runtime_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying", "eva_config", "corda_config", "lora_ga_config"),
}
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights


def write(artifact: Artifact, folder: str | os.PathLike[str], base: str | None = None) -> Path:
    """
    Write `artifact` as a PEFT adapter to `folder` (made if missing), atomically per file. Returns the folder.
    The adapter names `base` as its model, without a revision; by default the artifact's with its revision,
    and for bundled weights the original ones on the hub (`steer.weights.public_name`).

    Raises SteerError for vectors that are no bias of a matrix (other positions than all; a site or a model
    type that `steer.export.architecture` lacks), and for constant vectors of models whose layers PEFT's BEFT
    does not take (GPT2's).
    """
    config, folder = artifact.config, Path(folder)
    place = bias_place(config, "a PEFT adapter")
    if config.kind != "adaptive" and config.model_type == "gpt2":
        raise SteerError(
            "PEFT's BEFT takes no Conv1D layers, of which gpt2 is made; export a plain checkpoint instead"
        )
    tensors: dict[str, torch.Tensor] = {}
    if config.kind == "adaptive":
        steered = artifact.rank_one()
        for layer, (vector, readout) in steered.items():
            name = f"{_ROOT}.{artifact.decoder}.{layer}.{place}"
            tensors[f"{name}.lora_A.weight"] = readout.reshape(1, -1).contiguous()
            tensors[f"{name}.lora_B.weight"] = vector.reshape(-1, 1).contiguous()
        layers = list(steered)
    else:
        vectors = artifact.by_layer()
        for layer, vector in vectors.items():
            name = f"{_ROOT}.{artifact.decoder}.{layer}.{place}"
            tensors[f"{name}.beft_bias"] = vector.reshape(1, -1).contiguous()
        layers = list(vectors)
    adapter = _adapter_config(config, artifact.decoder, layers, place, base)
    if config.base_adapter and not base:
        warnings.warn(
            f"the vectors are for {config.base_model_name_or_path} with adapter {config.base_adapter} merged "
            "into it, and the exported adapter names the model alone; give the merged model (--model)",
            stacklevel=2,
        )
    try:
        told = json.dumps(for_export(config, artifact.tensors).to_dict())
        metadata = {"format": "pt", "steering_config": told}
    except (TypeError, ValueError, RecursionError) as error:
        reason = shown(str(error))
        raise SteerError(
            f"cannot save an adapter to {folder}: its provenance is not plain JSON ({reason})"
        ) from error
    if folder.is_file():
        raise SteerError(f"cannot save an adapter to {folder}: it is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(adapter, indent=2, sort_keys=True) + "\n"
        replace_files({folder / TENSOR_FILE: save(tensors, metadata), folder / CONFIG_FILE: text.encode()})
    except OSError as error:
        raise SteerError(f"cannot save an adapter to {folder}: {error.strerror}") from error
    return folder


def read(folder: str | os.PathLike[str], model: nn.Module) -> Artifact:
    """
    The vectors of a BEFT adapter, or of a LoRA of rank one on the MLP's last matrix, for `model` (any device,
    `meta` too). What `write` wrote comes back with its config; scale is folded in, shared vectors are
    constant.

    Raises SteerError for adapters that compute anything else, that do not fit `model`, or that are damaged.
    """
    folder = Path(folder)
    adapter = _read_config(folder / CONFIG_FILE)
    metadata, tensors = _read_tensors(folder / TENSOR_FILE)
    decoder = find_decoder(model).name
    places, parts = _by_layer(tensors, decoder, folder)
    known = layer_names(model.config.get_text_config().model_type)  # type: ignore[union-attr, operator]
    own = [known.mlp] if adapter["peft_type"] == "LORA" else [known.mlp, known.attention]
    wanted = [place for place in own if place is not None]
    if not wanted:
        raise SteerError(
            f"{folder}: a LoRA, which would be adaptive vectors on the MLP's last matrix, but the MLP of "
            "this model is a mixture of experts without one last matrix: no adaptive vectors can be imported"
        )
    if len(places) != 1 or not places <= set(wanted):
        raise SteerError(
            f"{folder}: the adapter is at {shown(sorted(places))}; steering vectors are at "
            f"{' or at '.join(wanted)}, not at both"
        )
    if adapter["peft_type"] == "LORA":
        made = _adaptive(parts, float(adapter["lora_alpha"]), model, folder)
    else:
        # The MLP's bias is called a vector on the stream where it is one; the attention's, on its output.
        sites = ("resid_post", "mlp_out", "attn_out")
        site = next(site for site in sites if known.sites().get(site) in places)
        made = _constant(parts, site, model, folder)
    made.config.provenance = origin("peft", folder, adapter.get("base_model_name_or_path"))
    artifacts.check(made, str(folder))
    return _restored(made, metadata.get("steering_config"), folder)


def has_config(folder: str | os.PathLike[str]) -> bool:
    """Whether an adapter that `read` accepts has the config of steer, which names its own base model."""
    return "steering_config" in _read_tensors(Path(folder) / TENSOR_FILE)[0]


def _adapter_config(
    config: SteeringConfig, decoder: str, layers: list[int], place: str, base: str | None
) -> dict[str, Any]:
    indices = "|".join(map(str, layers))
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": base or public_name(config.base_model_name_or_path),
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None if base else config.base_revision,
        "target_modules": rf"{re.escape(decoder)}\.({indices})\.{re.escape(place)}",
        "task_type": "CAUSAL_LM",
    }
    if config.kind != "adaptive":
        return {**common, "peft_type": "BEFT", "init_weights": True}
    return {
        **common,
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.model_type == "gpt2",  # its layers keep their weights transposed
        "init_lora_weights": True,
    }


def _constant(parts: Parts, site: str, model: nn.Module, where: Path) -> Artifact:
    hidden_size = find_decoder(model).hidden_size
    for layer, tensors in parts.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes not in ({"beft_bias": (1, hidden_size)}, {"beft_bias": (hidden_size,)}):
            raise SteerError(
                f"{where}: layer {layer} holds {shapes}, expected beft_bias of shape (1, {hidden_size})"
            )
    vectors = {layer: tensors["beft_bias"].flatten() for layer, tensors in parts.items()}
    return artifacts.from_vectors(vectors, model, site=site, dtype=_dtype(parts))


def _adaptive(parts: Parts, alpha: float, model: nn.Module, where: Path) -> Artifact:
    decoder = find_decoder(model)
    layers = ",".join(map(str, parts))
    asked = SteeringConfig(kind="adaptive", layers=layers, scale=alpha, dtype=_dtype(parts))
    config = replace(asked, **describe(model))
    downs = find_down_projections(decoder, config.resolve_layers(decoder.num_hidden_layers))
    tensors = {}
    for (layer, pair), (_, inner) in zip(parts.items(), downs, strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in pair.items()}
        expected = {"lora_A.weight": (1, inner), "lora_B.weight": (decoder.hidden_size, 1)}
        if shapes != expected:
            raise SteerError(
                f"{where}: layer {layer} holds {shapes}, expected a LoRA of rank one: {expected}"
            )
        tensors[f"{decoder.name}.{layer}.steering.vector"] = pair["lora_B.weight"].flatten()
        tensors[f"{decoder.name}.{layer}.steering.readout"] = pair["lora_A.weight"].flatten()
    return Artifact(config, tensors)


def _dtype(parts: Parts) -> str:
    return str(next(iter(next(iter(parts.values())).values())).dtype).removeprefix("torch.")


def _restored(made: Artifact, text: str | None, where: Path) -> Artifact:
    """`made` with the rest of the config that steer left in the metadata, where the two agree."""
    if text is None:
        return made
    saved = SteeringConfig.from_json(text, where)
    config = made.config
    shape = ("model_type", "hidden_size", "num_hidden_layers")
    same = all(getattr(saved, name) == getattr(config, name) for name in shape)
    place = "a PEFT adapter"
    if (
        not same
        or (saved.kind == "adaptive") != (config.kind == "adaptive")
        or saved.resolve_layers(made.num_hidden_layers) != config.resolve_layers(made.num_hidden_layers)
        or bias_place(saved, place) != bias_place(config, place)
    ):
        raise SteerError(
            f"{where}: written for layers {shown(saved.layers)} of {shown(saved.base_model_name_or_path)}, a "
            f"{shown(saved.model_type)} with hidden_size={saved.hidden_size} and "
            f"num_hidden_layers={saved.num_hidden_layers}; its tensors, or the model given, are others"
        )
    kind = "adaptive" if saved.kind == "adaptive" else "constant"
    return Artifact(replace(saved, kind=kind, scale=config.scale, dtype=config.dtype), made.tensors)


def _by_layer(tensors: Mapping[str, torch.Tensor], decoder: str, where: Path) -> tuple[set[str], Parts]:
    """The places inside a layer that the adapter is at, and its tensors by layer (ascending) and part."""
    places: set[str] = set()
    parts: Parts = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix(f"{_ROOT}.{decoder}.").partition(".")
        part = next((part for part in _PARTS if rest.endswith(f".{part}")), None)
        # a number that is written as no tool writes it could be a second tensor of the same layer
        if part is None or len(layer) > 5 or not layer.isdecimal() or layer != str(int(layer)):
            raise SteerError(
                f"{where}: unexpected tensor {shown(name)}; those of a steering vector are like "
                f"'{_ROOT}.{decoder}.12.mlp.down_proj.beft_bias'"
            )
        places.add(rest.removesuffix(f".{part}"))
        parts.setdefault(int(layer), {})[part] = tensor
    if not parts:
        raise SteerError(f"{where}: the adapter holds no tensors")
    return places, dict(sorted(parts.items()))


def _read_config(path: Path) -> dict[str, Any]:
    """The adapter's config; SteerError unless it is a BEFT, or a LoRA of rank one, and nothing more."""
    adapter = json_object(_read_bytes(path), path)
    kind = adapter.get("peft_type")
    if kind not in ("BEFT", "LORA"):
        raise SteerError(
            f"{path}: peft_type is {shown(kind)}; steering vectors are BEFT, or LORA of rank one"
        )
    extra = {k: v for k, v in adapter.items() if k not in _INERT and v and v != "none"}
    if extra.pop("init_lora_weights", True) not in _PLAIN_INITS:
        extra["init_lora_weights"] = adapter["init_lora_weights"]
    if extra:
        name, value = next(iter(extra.items()))
        raise SteerError(
            f"{path}: {shown(name)} is {shown(value)}, which computes more than a steering vector does"
        )
    if kind == "LORA":
        rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
        if rank != 1:
            raise SteerError(f"{path}: a LoRA of rank {shown(rank)}; adaptive vectors are of rank one")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
            raise SteerError(f"{path}: lora_alpha is {shown(alpha)}, expected a number")
    return adapter


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SteerError(f"{path} has {size} bytes, more than any set of steering vectors ({MAX_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise SteerError(
            f"{path} cannot be read ({error.strerror}); expected a folder of {CONFIG_FILE} and {TENSOR_FILE}"
        ) from error


def _read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata, and every tensor by name; all of one floating dtype."""
    content = _read_bytes(path)
    try:
        tensors = load(content)  # checks offsets, lengths and dtypes
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise SteerError(
            f"{path} is not a readable safetensors file ({shown(str(error))}); was it cut short or altered?"
        ) from error
    header = safetensors_header(content, path)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise SteerError(f"{path}: the tensors are {sorted(map(str, dtypes))}, expected one floating dtype")
    return header.get("__metadata__") or {}, tensors

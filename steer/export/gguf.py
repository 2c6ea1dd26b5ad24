"""
GGUF control vectors: what llama.cpp (`--control-vector`), EasySteer and repeng read and write.

    general.architecture        "controlvector"
    controlvector.model_hint    the model's type, as Hugging Face names it
    controlvector.layer_count   number of tensors
    controlvector.method        "steer"; EasySteer writes its own there, the others nothing
    steer.config                JSON of the steering config, which `read` restores
    direction.{k}               float32 (hidden_size,): added to the residual stream after block k, from 0 on

There is no place for a scale (it is folded in), and the vectors are added at every token. llama.cpp refuses a
file that has `direction.0`; EasySteer and repeng steer block 0 with it. Some architectures of llama.cpp
ignore control vectors without a word: compare its output with and without. A GGUF model with the vectors
inside (`steer.export.gguf_model`) has neither of these limits.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from steer import artifact as artifacts
from steer.artifact import Artifact
from steer.artifact_file import MAX_BYTES
from steer.artifact_scores import for_export, without_scores
from steer.config import SteeringConfig
from steer.errors import SteerError
from steer.export.architecture import check_everywhere, check_one_stream
from steer.export.gguf_header import parse, short
from steer.export.origin import origin
from steer.files import replace_file
from steer.sites import find_decoder

ARCHITECTURE = "controlvector"
CONFIG_KEY = "steer.config"
BLOCK_0 = {
    "refuse": "do not write the file",
    "drop": "leave it out",
    "fold": "add it to block 1's vector, which is close to the same",
    "keep": "write it; EasySteer and repeng read it, llama.cpp refuses the file",
}
_READ_BLOCK_0 = ("refuse", "drop", "keep")
_NAME = re.compile(r"direction\.(0|[1-9]\d{0,4})", re.ASCII)
# What tools put in model_hint when they do not know.
_NO_HINT = (None, "", "unknown")


def write(artifact: Artifact, path: str | os.PathLike[str], *, block_0: str = "refuse") -> Path:
    """
    Write `artifact` to `path` as a control vector in float32, atomically, `config.scale` folded in. Returns
    the path.

    `block_0`: what to do with a vector of layer 0, which llama.cpp cannot apply; a key of `BLOCK_0`. A
    warning says how much was left out or moved. Raises SteerError for adaptive vectors, for sites other than
    resid_post, for positions other than all, and for layer 0 unless told what to do.
    """
    config, path = artifact.config, Path(path)
    _check_choice(block_0, tuple(BLOCK_0))
    check_everywhere(config, "a GGUF control vector")
    check_one_stream(config, "a GGUF control vector")
    if config.site != "resid_post":
        raise SteerError(
            f"a GGUF control vector is added after a block, these vectors at {config.site}; only those of "
            "resid_post can be written"
        )
    vectors = {k: vector.detach().cpu().float() for k, vector in artifact.by_layer().items()}
    broken = [k for k, vector in vectors.items() if not vector.isfinite().all()]
    if broken:
        raise SteerError(f"the vector of layer {broken[0]} holds NaN or Inf in float32, which GGUF has")
    made = for_export(config, artifact.tensors).provenance or {}
    if 0 in vectors and block_0 != "keep":
        vectors = _without_block_0(vectors, artifact.num_hidden_layers, block_0)
        made = {**without_scores(made), "block_0": block_0}
    inside = replace(
        config,
        kind="constant",
        layers=",".join(map(str, vectors)),
        scale=1.0,
        dtype="float32",
        provenance=made or None,
    )
    try:
        replace_file(path, _content(vectors, inside))
    except OSError as error:
        raise SteerError(f"cannot write {path}: {error.strerror}; give the path of a .gguf file") from error
    return path


def _without_block_0(
    vectors: dict[int, torch.Tensor], num_hidden_layers: int, block_0: str
) -> dict[int, torch.Tensor]:
    rest = {k: vector for k, vector in vectors.items() if k}
    first = vectors[0]
    share = first.norm() / sum(vector.norm() for vector in vectors.values()) if first.any() else 0.0
    size = f"layer 0's vector, {share:.0%} of all norms together,"
    if block_0 == "refuse":
        raise SteerError(
            f"llama.cpp cannot steer block 0, and {size} is there: leave it out (block_0='drop'), add it "
            "to block 1's (block_0='fold'), keep it for EasySteer and repeng (block_0='keep'), or export a "
            "whole GGUF model, which is exact"
        )
    if block_0 == "fold":
        if num_hidden_layers < 2:
            raise SteerError("the model has a single block, and llama.cpp cannot steer block 0")
        warnings.warn(f"{size} is added after block 1 instead: block 1 does not see it", stacklevel=3)
        rest[1] = rest[1] + first if 1 in rest else first
        return dict(sorted(rest.items()))
    if not rest:
        raise SteerError("only layer 0 is steered, which llama.cpp cannot: without it nothing would be")
    warnings.warn(f"{size} is left out: llama.cpp cannot steer block 0", stacklevel=3)
    return rest


def _content(vectors: dict[int, torch.Tensor], config: SteeringConfig) -> bytes:
    with tempfile.TemporaryDirectory() as folder:  # the writer needs a path
        file = Path(folder) / "vectors.gguf"
        writer = gguf.GGUFWriter(file, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", config.model_type or "unknown")
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        writer.add_string(f"{ARCHITECTURE}.method", "steer")
        writer.add_string(CONFIG_KEY, json.dumps(config.to_dict()))
        for k, vector in vectors.items():
            writer.add_tensor(f"direction.{k}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def read(path: str | os.PathLike[str], model: nn.Module, *, block_0: str = "refuse") -> Artifact:
    """
    The vectors of a control vector file for `model` (any device, `meta` too), bit for bit. What `write` wrote
    comes back with its config.

    `block_0` says what `direction.0` is where the file does not tell (EasySteer's and ours do): "keep" takes
    it for the vector of block 0, "drop" leaves it out, "refuse" refuses the file, as llama.cpp does. Raises
    SteerError for a file that is damaged or no control vector, and for one of another hidden size or
    more layers than `model`'s; warns when it names another type of model.
    """
    path = Path(path)
    _check_choice(block_0, _READ_BLOCK_0)
    metadata, vectors = _load(path)
    if 0 in vectors and block_0 != "keep":
        if block_0 == "drop":
            del vectors[0]
        elif f"{ARCHITECTURE}.method" not in metadata:
            raise SteerError(
                f"{path} has direction.0, which llama.cpp refuses: if it is the vector of the first block, "
                "give block_0='keep', else block_0='drop'"
            )
    made = artifacts.from_vectors(_fitting(vectors, model, path), model, provenance=origin("gguf", path))
    if CONFIG_KEY in metadata:
        return _restored(made, metadata[CONFIG_KEY], path)
    hint, known = metadata.get(f"{ARCHITECTURE}.model_hint"), made.config.model_type
    if hint not in _NO_HINT and not _same_type(str(hint), str(known)):
        warnings.warn(f"{path} is for a {short(hint)}, this model is a {known}: does it fit?", stacklevel=2)
    return made


def has_config(path: str | os.PathLike[str]) -> bool:
    """Whether a file that `read` accepts has the config of steer, which names its own base model."""
    return CONFIG_KEY in _load(Path(path))[0]


def _load(path: Path) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """Metadata, and float32 vectors by block, of one length and finite."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SteerError(f"{path} is larger than any control vector ({MAX_BYTES} bytes): is it a model?")
        content = path.read_bytes()
    except OSError as error:
        raise SteerError(f"cannot read {path}: {error.strerror}") from error
    header = parse(content, str(path))
    architecture = header.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise SteerError(
            f"{path} is a GGUF file of architecture {short(architecture)}, expected {ARCHITECTURE!r}"
        )
    count = header.metadata.get(f"{ARCHITECTURE}.layer_count", len(header.tensors))
    if not header.tensors or count != len(header.tensors):
        stored = len(header.tensors)
        raise SteerError(f"{path} holds {stored} tensors and speaks of {short(count)}: was it altered?")
    vectors: dict[int, np.ndarray] = {}
    for name, tensor in header.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise SteerError(f"{path} has a tensor {name!r}, expected names like 'direction.12'")
        if tensor.type != "F32" or len(tensor.shape) != 1:
            raise SteerError(
                f"{path}: {name} is {tensor.type} {list(tensor.shape)}, expected F32 [hidden_size]"
            )
        vector = np.frombuffer(content, "<f4", tensor.shape[0], tensor.at).copy()
        if not np.isfinite(vector).all():
            raise SteerError(f"{path}: {name} holds NaN or Inf")
        vectors[int(match[1])] = vector
    return header.metadata, vectors


def _fitting(vectors: dict[int, np.ndarray], model: nn.Module, path: Path) -> dict[int, torch.Tensor]:
    """`vectors` in ascending order; SteerError unless they fit `model`."""
    decoder = find_decoder(model)
    if not vectors:
        raise SteerError(f"{path} holds nothing but direction.0: without it nothing would be steered")
    for k, vector in sorted(vectors.items()):
        if len(vector) != decoder.hidden_size:
            raise SteerError(
                f"{path}: direction.{k} has {len(vector)} numbers, the model's residual stream "
                f"{decoder.hidden_size}: import it for its own model, `steer transfer` carries it over"
            )
        if k >= decoder.num_hidden_layers:
            raise SteerError(
                f"{path} steers block {k}, the model has blocks 0 to {decoder.num_hidden_layers - 1}"
            )
    return {k: torch.from_numpy(vector) for k, vector in sorted(vectors.items())}


def _restored(made: Artifact, text: Any, path: Path) -> Artifact:
    """`made` with the config that steer left in the file."""
    if not isinstance(text, str):
        raise SteerError(f"{path}: {CONFIG_KEY} is not a steering config but a {type(text).__name__}")
    saved = SteeringConfig.from_json(text, path)
    layers = saved.resolve_layers(made.num_hidden_layers)
    config = made.config
    for field in ("model_type", "hidden_size", "num_hidden_layers"):
        if getattr(saved, field) != getattr(config, field):
            raise SteerError(
                f"{path} was made for {short(saved.base_model_name_or_path)} with "
                f"{field}={getattr(saved, field)}, this model has {field}={getattr(config, field)}: "
                "`steer transfer` carries it over"
            )
    resolved = config.resolve_layers(made.num_hidden_layers)
    whole = replace(saved, kind="constant", layers=config.layers, scale=1.0, dtype="float32")
    same_place = (saved.site, saved.positions) == (config.site, config.positions)
    if [k for k in layers if k or 0 in resolved] != resolved or not same_place:
        raise SteerError(
            f"{path} holds {config.site} vectors of layers {config.layers}, its {CONFIG_KEY} speaks of "
            f"{saved.site} ones of layers {saved.layers} at {saved.positions} tokens: was it altered?"
        )
    return Artifact(whole, made.tensors)


def _same_type(hint: str, model_type: str) -> bool:
    """Do the names mean one architecture? llama.cpp has its own for some, and one for all like Llama's."""
    plain, known = (re.sub(r"[^a-z0-9]|text$", "", name.lower()) for name in (hint, model_type))
    return plain == known or (plain == "llama" and known in ("mistral", "mixtral", "smollm3"))


def _check_choice(given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise SteerError(f"block_0={given!r} is not known; expected one of {', '.join(choices)}")

"""
lm-evaluation-harness: the `.pt` file of `lm_eval --model steered --model_args pretrained=…,steer_path=….pt`.

A dict by hookpoint, which is a module's name inside the base model without the head: `layers.12`, or `h.12`
for GPT2. lm-eval adds `steering_coefficient * steering_vector` to the module's output at every token. `bias`
must be None: the harness's own example gives one, and then refuses it. lm-eval itself unpickles the file
with code and all; `read` here does not.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer import artifact as artifacts
from steer.artifact import Artifact
from steer.artifact_file import MAX_BYTES
from steer.errors import SteerError, shown
from steer.export.architecture import bias_place, check_everywhere, check_one_stream, layer_names
from steer.export.origin import origin
from steer.files import replace_file
from steer.sites import find_decoder

_INFO = {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def write(artifact: Artifact, path: str | os.PathLike[str]) -> Path:
    """
    Write constant or shared vectors to `path`, which must end in `.pt` or `.pth`; atomically. Returns it.

    The scale is folded into the vectors. Raises SteerError for adaptive vectors, for other positions than
    all, and for sites that no module's output is.
    """
    path, config = Path(path), artifact.config
    if path.suffix not in (".pt", ".pth"):
        raise SteerError(f"lm-eval reads .pt and .pth files only, got {path.name!r}; name it vectors.pt")
    vectors = artifact.by_layer()
    check_everywhere(config, "lm-eval")
    check_one_stream(config, "lm-eval")
    # the layer's output needs no table; the others are the outputs of their last matrix
    place = "" if config.site == "resid_post" else f".{bias_place(config, 'lm-eval')}"
    stack = artifact.decoder.partition(".")[2]  # lm-eval looks below the module that holds the backbone
    steers = {
        f"{stack}.{layer}{place}": {
            "steering_vector": vector.contiguous(),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for layer, vector in vectors.items()
    }
    content = io.BytesIO()
    torch.save(steers, content)
    try:
        replace_file(path, content.getvalue())
    except OSError as error:
        raise SteerError(f"cannot save vectors to {path}: {error.strerror}") from error
    return path


def is_one(path: str | os.PathLike[str]) -> bool:
    """Whether the file at `path` is of lm-eval's form, rather than one of plain vectors."""
    try:
        values = _unpickle(Path(path)).values()
    except SteerError:
        return False
    return all(isinstance(value, dict) and "steering_vector" in value for value in values)


def read(path: str | os.PathLike[str], model: nn.Module) -> Artifact:
    """
    The vectors of lm-eval's file `path` as a constant artifact for `model` (any device, `meta` too), the
    coefficients folded in.

    Raises SteerError for a file that holds more than plain tensors, for actions other than adding one vector
    at one place of each layer, and for vectors that do not fit `model`.
    """
    path = Path(path)
    steers = _unpickle(path)
    decoder = find_decoder(model)
    stack = decoder.name.partition(".")[2]
    vectors: dict[int, torch.Tensor] = {}
    places = set()
    for hookpoint, info in steers.items():
        layer, place = _parse(hookpoint, stack, path)
        places.add(place)
        if layer in vectors or len(places) > 1:
            raise SteerError(f"{path}: {shown(hookpoint)} is a second place; give one place in each layer")
        vectors[layer] = _vector(info, decoder.hidden_size, f"{path}: {shown(hookpoint)}")
    if not vectors:
        raise SteerError(f"{path} steers nothing: it is an empty dict")
    place = places.pop()
    site = "resid_post"
    if place:
        known = layer_names(model.config.get_text_config().model_type)  # type: ignore[union-attr, operator]
        sites = {"mlp_out": known.mlp, "attn_out": known.attention}
        # the module that the matrix ends has the same output
        candidates = [
            s for s, matrix in sites.items() if matrix and place in (matrix, matrix.rpartition(".")[0])
        ]
        if not candidates:
            raise SteerError(
                f"{path}: hookpoint {shown(place)} is not a site; expected one of {', '.join(sites)}"
            )
        site = candidates[0]
    wide = torch.float64 in {vector.dtype for vector in vectors.values()}
    dtype = "float64" if wide else "float32"
    return artifacts.from_vectors(vectors, model, site=site, dtype=dtype, provenance=origin("lm-eval", path))


def _parse(hookpoint: Any, stack: str, path: Path) -> tuple[int, str]:
    """`layers.12.mlp` as (12, "mlp")."""
    inside = isinstance(hookpoint, str) and hookpoint.startswith(f"{stack}.")
    layer, _, place = hookpoint[len(stack) + 1 :].partition(".") if inside else ("", "", "")
    if not (layer.isascii() and layer.isdecimal()) or len(layer) > 5 or layer != str(int(layer)):
        raise SteerError(
            f"{path}: hookpoint {shown(hookpoint)} is not a layer of the model; expected names like "
            f"'{stack}.12'"
        )
    return int(layer), place


def _vector(info: Any, hidden_size: int, where: str) -> torch.Tensor:
    """(hidden_size,), the coefficient folded in."""
    if not isinstance(info, dict) or not {"steering_vector", "action"} <= set(info) <= _INFO:
        raise SteerError(f"{where} is not described by the fields {', '.join(sorted(_INFO))}")
    if info["action"] != "add" or info.get("bias") is not None or info.get("head_index") is not None:
        raise SteerError(f"{where} is not steered by adding a vector to every head: nothing else can be read")
    factor, vector = info.get("steering_coefficient", 1.0), info["steering_vector"]
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not abs(factor) < 1e30:
        raise SteerError(f"{where}: steering_coefficient is not a finite number")
    # the shape first: a tensor of a few bytes may claim any
    if not isinstance(vector, torch.Tensor) or tuple(vector.shape) not in ((hidden_size,), (1, hidden_size)):
        shape = f"of shape {tuple(vector.shape)}" if isinstance(vector, torch.Tensor) else "no tensor"
        raise SteerError(
            f"{where}: steering_vector is {shape}, expected ({hidden_size},) or (1, {hidden_size})"
        )
    if vector.dtype not in _DTYPES or vector.layout != torch.strided or vector.is_meta:
        raise SteerError(f"{where}: steering_vector is not a tensor of plain floats ({vector.dtype})")
    vector = vector.detach().flatten()
    return factor * (vector if vector.dtype == torch.float64 else vector.float())


def _unpickle(path: Path) -> dict[Any, Any]:
    """The file's dict, read by PyTorch's unpickler that knows tensors and plain values, no code."""
    try:
        size = path.stat().st_size
        if size <= MAX_BYTES:
            with zipfile.ZipFile(path) as archive:  # a small file may unpack to anything
                size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise SteerError(
                f"{path} holds {size} bytes, more than any set of steering vectors ({MAX_BYTES})"
            )
        steers = torch.load(path, map_location="cpu", weights_only=True)
    except SteerError:
        raise
    except Exception as error:  # the unpickler raises whatever a torn or hostile file trips over
        reason = shown(str(error) or type(error).__name__)
        raise SteerError(f"{path} is not a .pt file of plain tensors ({reason})") from error
    if not isinstance(steers, dict):
        raise SteerError(f"{path} holds a {type(steers).__name__}, expected lm-eval's dict by hookpoint")
    return steers

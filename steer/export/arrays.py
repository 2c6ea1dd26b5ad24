"""
Plain arrays of steering vectors: `.npz`, `.npy`, `.pt`, `.safetensors`, and activation-steering's `.svec`.

    (num_hidden_layers, hidden_size)
        row i is layer i's vector; a row of zeros is a layer that is not steered
    (num_hidden_layers + 1, hidden_size)
        as `hidden_states` are counted, row 0 the embeddings': only with `embeddings_row`
    (n, hidden_size)
        the vectors of `layers`, in the order given there
    (hidden_size,)
        the vector of the one layer in `layers`, as EasySteer's `.pt` files
    by name
        one (hidden_size,) array a layer: 12, "layer12", "layers.12", "direction.12"
    .svec
        JSON of `activation-steering` (IBM), {"directions": {"12": [...]}}

Nothing that is read can execute code: `.pt` files go through PyTorch's weights-only unpickler, arrays of
Python objects are refused, and nothing may unpack to more than MAX_BYTES.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from steer import artifact as artifacts
from steer.artifact import Artifact
from steer.artifact_file import MAX_BYTES
from steer.config import MAX_LAYERS, SteeringConfig
from steer.errors import SteerError, one_line
from steer.export.architecture import check_everywhere
from steer.export.origin import origin
from steer.files import json_object, replace_file, safetensors_header
from steer.sites import find_decoder

WRITABLE = (".npz", ".npy", ".pt")
# Names of the arrays in an .npz that `write` makes.
VECTORS, LAYERS = "vectors", "layers"

Layers = str | int | list[int] | None
# A layer's vector at resid_post. Other words behind the number would mean another place in the layer.
_NAME = re.compile(
    r"(?P<head>.*[._/]|layer|)(?P<layer>\d{1,5})(\.vector|\.steering\.vector|\.hook_resid_post)?", re.ASCII
)
# Another place in the layer, or NumPy's own numbering of nameless arrays.
_NO_LAYER = re.compile(r"attn|attention|mlp|norm|resid_pre|resid_mid|^arr_$")


def write(artifact: Artifact, path: str | os.PathLike[str]) -> Path:
    """
    Write `artifact` as one array (num_hidden_layers, hidden_size) to `path`, a `.npz`, `.npy` or `.pt` file,
    atomically, with zeros for layers that are not steered and `config.scale` folded in. float32, or float64
    where the vectors are. Returns the path.

    An `.npz` holds the steered layers as well, as `layers`. Raises SteerError for adaptive vectors and for
    positions other than all; the site is not in the file, which a warning says unless it is resid_post.
    """
    path, config = Path(path), artifact.config
    if path.suffix not in WRITABLE:
        raise SteerError(f"cannot write arrays to {path}: the name must end in one of {', '.join(WRITABLE)}")
    check_everywhere(config, "a plain array")
    steered = {i: vector.detach().cpu() for i, vector in artifact.by_layer().items()}
    if config.site != "resid_post":
        warnings.warn(f"{path} cannot say that its vectors are for {config.site}: do so", stacklevel=2)
    first = next(iter(steered.values()))
    array = torch.zeros(artifact.num_hidden_layers, len(first), dtype=first.dtype)
    for i, vector in steered.items():
        array[i] = vector
    out = io.BytesIO()
    if path.suffix == ".pt":
        torch.save(array, out)
    elif path.suffix == ".npy":
        np.save(out, array.numpy(), allow_pickle=False)
    else:
        np.savez(out, allow_pickle=False, **{VECTORS: array.numpy(), LAYERS: np.array(list(steered))})
    try:
        replace_file(path, out.getvalue())
    except OSError as error:
        raise SteerError(f"cannot write {path}: {error.strerror}") from error
    return path


def read(
    path: str | os.PathLike[str], model: nn.Module, layers: Layers = None, *, embeddings_row: bool = False
) -> Artifact:
    """
    The vectors in the file `path` for `model` (any device, `meta` too), at resid_post. float64 is kept, the
    rest becomes float32, both exactly.

    `layers` (an index, a list, or '4-20') says which layers the rows of an array are for. `embeddings_row`
    says that row 0 is the embeddings', which no layer adds: it is left out, with a warning unless it is zero;
    in `hidden_states` of transformers the last row is taken behind the final norm, so weigh that layer's
    vector with care. A `.svec` goes to resid_pre, because activation-steering adds the vector of layer i
    before that layer. Raises SteerError for any other shape, and for damaged files.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise SteerError(f"cannot read arrays from {path}: the name must end in one of {', '.join(_READERS)}")
    arrays = _READERS[path.suffix](_bytes(path), path)
    decoder = find_decoder(model)
    if set(arrays) == {VECTORS, LAYERS}:
        _check_untold(path, layers is None and not embeddings_row)
        vectors = _own(
            arrays[VECTORS], arrays[LAYERS], (decoder.num_hidden_layers, decoder.hidden_size), path
        )
    elif len(arrays) == 1 and (_layer(*arrays) is None or next(iter(arrays.values())).dim() == 2):
        (array,) = arrays.values()
        vectors = _by_row(array, decoder.hidden_size, decoder.num_hidden_layers, layers, embeddings_row, path)
    else:
        _check_untold(path, layers is None and not embeddings_row)
        vectors = _by_name(arrays, path)
    _check(vectors, decoder.hidden_size, decoder.num_hidden_layers, path)
    double = any(vector.dtype == torch.float64 for vector in vectors.values())
    return artifacts.from_vectors(
        dict(sorted(vectors.items())),
        model,
        dtype="float64" if double else "float32",
        site="resid_pre" if path.suffix == ".svec" else "resid_post",
        provenance=origin("arrays", path),
    )


def _check_untold(path: Path, untold: bool) -> None:
    if not untold:
        raise SteerError(f"{path} says itself which layers its vectors are for: leave layers out")


def _own(
    array: torch.Tensor, steered: torch.Tensor, shape: tuple[int, int], path: Path
) -> dict[int, torch.Tensor]:
    """What `write` wrote to an .npz: every layer's row, and which of them are steered."""
    indices = steered.tolist() if steered.dim() == 1 and steered.dtype == torch.int64 else []
    if tuple(array.shape) != shape:
        raise SteerError(f"{path} holds an array {tuple(array.shape)}, expected {shape} for this model")
    if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < shape[0]:
        raise SteerError(f"{path}: {LAYERS!r} are not ascending indices of the model's {shape[0]} layers")
    if any(row.any() for i, row in enumerate(array) if i not in indices):
        raise SteerError(f"{path} has vectors for layers that its {LAYERS!r} leave out: was it altered?")
    return {i: array[i] for i in indices}


def _by_row(
    array: torch.Tensor,
    hidden_size: int,
    num_hidden_layers: int,
    layers: Layers,
    embeddings_row: bool,
    path: Path,
) -> dict[int, torch.Tensor]:
    shape = tuple(array.shape)
    if array.dim() not in (1, 2) or shape[-1] != hidden_size:
        raise SteerError(
            f"{path} holds an array {shape}, expected (layers, {hidden_size}) for this model; "
            "`steer transfer` carries vectors to another hidden size"
        )
    rows = array.reshape(-1, hidden_size)
    if layers is not None:
        indices = _in_order(layers, num_hidden_layers)
        if embeddings_row or len(rows) != len(indices):
            raise SteerError(f"{path} holds an array {shape}, layers={layers!r} names {len(indices)} layers")
        return dict(zip(indices, rows, strict=True))
    if array.dim() == 1 or len(rows) != num_hidden_layers + embeddings_row:
        hint = (
            f"expected ({num_hidden_layers + embeddings_row}, {hidden_size}), or layers= to say which layers "
        )
        hint += "the rows are for"
        if shape == (num_hidden_layers + 1, hidden_size):
            hint += "; if row 0 is the embeddings' (as in hidden_states), give embeddings_row=True"
        raise SteerError(f"{path} holds an array {shape}, {hint}")
    if embeddings_row:
        if rows[0].any():
            share = float(rows[0].double().norm() / rows.double().norm(dim=1).sum())
            warnings.warn(f"{path}: row 0, {share:.0%} of all norms together, is left out", stacklevel=3)
        rows = rows[1:]
    steered = {i: row for i, row in enumerate(rows) if row.any()}  # NaN is something, too
    if not steered:
        raise SteerError(f"{path} holds nothing but zeros: no layer would be steered")
    return steered


def _in_order(layers: Layers, num_hidden_layers: int) -> list[int]:
    """Layer indices in the order given: each row belongs to the layer at its place."""
    parts = SteeringConfig(layers=layers).layers.split(",")  # type: ignore[arg-type]
    indices = [i for part in parts for i in SteeringConfig(layers=part).resolve_layers(num_hidden_layers)]
    if len(set(indices)) < len(indices):
        raise SteerError(f"layers={layers!r} names a layer twice")
    return indices


def _by_name(arrays: Mapping[str, torch.Tensor], path: Path) -> dict[int, torch.Tensor]:
    vectors: dict[int, torch.Tensor] = {}
    for name, array in arrays.items():
        layer = _layer(name)
        if layer is None or layer in vectors:
            raise SteerError(
                f"{path}: the name {name[:80]!r} is not that of one layer's vector, such as 'layers.12'"
                + (f", or names layer {layer} again" if layer is not None else "")
            )
        vectors[layer] = array
    if not vectors:
        raise SteerError(f"{path} holds no arrays")
    return vectors


def _layer(name: str) -> int | None:
    match = _NAME.fullmatch(name)
    return int(match["layer"]) if match and not _NO_LAYER.search(match["head"]) else None


def _check(vectors: Mapping[int, torch.Tensor], hidden_size: int, num_hidden_layers: int, path: Path) -> None:
    for i, vector in vectors.items():
        if i >= num_hidden_layers:
            raise SteerError(
                f"{path} has a vector for layer {i}, the model has layers 0 to {num_hidden_layers - 1}"
            )
        if tuple(vector.shape) != (hidden_size,):
            raise SteerError(
                f"{path}: the vector of layer {i} has shape {tuple(vector.shape)}, expected "
                f"({hidden_size},) for this model; `steer transfer` carries vectors to another hidden size"
            )
        if not vector.is_floating_point():
            raise SteerError(f"{path}: the vector of layer {i} is {vector.dtype}, expected floats")
        if not vector.isfinite().all():
            raise SteerError(f"{path}: the vector of layer {i} holds NaN or Inf")


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SteerError(f"{path} is larger than any set of steering vectors ({MAX_BYTES} bytes)")
        return path.read_bytes()
    except OSError as error:
        raise SteerError(f"cannot read {path}: {error.strerror}") from error


def _npy(content: bytes, where: object) -> dict[str, torch.Tensor]:
    """One array in NumPy's format. The size that its header claims is held against the bytes there."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[version](stream)
    except Exception as error:  # it parses a Python literal: whatever that trips over
        raise SteerError(f"{where} is not a whole NumPy array ({one_line(error)})") from error
    data = content[stream.tell() :]
    known = dtype.kind in "fi" and dtype.itemsize in (2, 4, 8)
    if not known or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise SteerError(f"{where} claims {str(shape)[:80]} of {str(dtype)[:80]} in {len(data)} bytes")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return {"": torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))}


def _npz(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    arrays = {}
    for name, member in _members(content, path, compressed=True).items():
        (arrays[name.removesuffix(".npy")],) = _npy(member(), f"{path}: {name[:80]!r}").values()
    return arrays


def _members(content: bytes, path: Path, compressed: bool) -> dict[str, Callable[[], bytes]]:
    """The files in a zip archive by name, if together they are small enough."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        entries = archive.infolist()
    except Exception as error:
        raise SteerError(f"{path} is not a whole zip archive ({one_line(error)})") from error
    if sum(entry.file_size for entry in entries) > MAX_BYTES or len(entries) > MAX_LAYERS:
        raise SteerError(f"{path} unpacks to more than any set of steering vectors ({MAX_BYTES} bytes)")
    if not compressed and any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise SteerError(f"{path} holds compressed parts, which torch.save does not write")
    if len({entry.filename for entry in entries}) < len(entries):
        raise SteerError(f"{path} holds a file twice: was it altered?")

    def member(entry: zipfile.ZipInfo) -> bytes:
        try:
            return archive.read(entry)
        except Exception as error:  # a wrong checksum, an unknown or broken compression, a password
            raise SteerError(f"{path}: {entry.filename[:80]!r} is damaged ({one_line(error)})") from error

    return {entry.filename: partial(member, entry) for entry in entries}


def _pt(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    if not content.startswith(b"PK"):
        raise SteerError(f"{path} is not a whole file of torch.save (1.6 and later): load and save it again")
    _members(content, path, compressed=False)
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise SteerError(
            f"{path} holds Python objects, which could run code and were left alone: save the tensors only"
        ) from error
    except Exception as error:  # whatever a torn archive trips over
        raise SteerError(f"{path} is a damaged file of torch.save ({one_line(error)})") from error
    named = loaded if isinstance(loaded, dict) else {"": loaded}
    if any(isinstance(value, dict) and "steering_vector" in value for value in named.values()):
        raise SteerError(f"{path} is a file of lm-eval's steered models: import it as that")
    for key, value in named.items():
        plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided
        if type(key) not in (int, str) or not plain or not value.is_floating_point() or value.dim() > 2:
            kind = f"{value.dtype} {tuple(value.shape)}" if plain else type(value).__name__
            raise SteerError(f"{path} holds {kind} under {str(key)[:80]!r}, expected floats by layer")
        if value.numel() * value.itemsize > MAX_BYTES or value.device.type != "cpu":
            raise SteerError(f"{path} claims an array {tuple(value.shape)}, larger than the file")
    return {str(key): value.detach().contiguous() for key, value in named.items()}


def _safetensors(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    header = safetensors_header(content, path)
    if "steering_config" in (header.get("__metadata__") or {}):
        raise SteerError(f"{path} is an artifact of steer itself: nothing is to be imported, use it as it is")
    try:
        arrays = load_safetensors(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise SteerError(f"{path} is not a readable safetensors file ({one_line(error)})") from error
    return arrays


def _svec(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    directions = json_object(content, path).get("directions")
    if not isinstance(directions, dict):
        raise SteerError(f"{path} has no 'directions': it is not a vector of activation-steering")
    arrays = {}
    for name, values in directions.items():
        if not isinstance(values, list) or any(type(value) not in (float, int) for value in values):
            raise SteerError(f"{path}: the direction of layer {name[:80]!r} is not a list of numbers")
        try:
            exact = torch.tensor(values, dtype=torch.float64)
        except (OverflowError, RuntimeError) as error:
            raise SteerError(f"{path}: layer {name[:80]!r} holds a number that is no float") from error
        arrays[name] = exact
    single = all(torch.equal(array.float().double(), array) for array in arrays.values())
    return {name: array.float() if single else array for name, array in arrays.items()}


_READERS: dict[str, Callable[[bytes, Path], dict[str, torch.Tensor]]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".pt": _pt,
    ".pth": _pt,
    ".safetensors": _safetensors,
    ".svec": _svec,
}

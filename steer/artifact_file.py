"""
An artifact's tensor file (`steer.artifact` describes the format): found in a folder, as a file or on the hub,
and read with every check that needs neither torch nor numpy.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from steer import hub
from steer.config import SteeringConfig
from steer.errors import SteerError, shown
from steer.files import safetensors_header
from steer.names import canonical

CONFIG_FILE = "steering_config.json"
TENSOR_FILE = "steering.safetensors"
# A 405B model's vectors in float64 are 17 MB; anything far larger is not an artifact.
MAX_BYTES = 1 << 28

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAME = re.compile(r"[\w.]{1,200}\.(?:vector|readout|mix|directions|probe)", re.ASCII)


def read_file(
    source: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> tuple[Path, SteeringConfig, dict[str, tuple[str, list[int], bytes]]]:
    """The config and, by name, each tensor's dtype, shape and little-endian bytes."""
    from safetensors import SafetensorError, deserialize

    path = _tensor_file(source, revision, token)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SteerError(f"{path} has {size} bytes, more than any set of steering vectors ({MAX_BYTES})")
        content = path.read_bytes()
        pairs = deserialize(content)  # checks offsets, lengths and dtypes
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, SteerError):
            raise
        raise SteerError(
            f"{path} is not a readable safetensors file ({shown(str(error))}); was it cut short or altered?"
        ) from error
    header = safetensors_header(content, path)
    text = (header.get("__metadata__") or {}).get("steering_config")
    if text is None:
        raise SteerError(f"{path} holds no steering config in its metadata; it was not written by steer")
    entries = {}
    for name, entry in sorted(pairs, key=lambda item: item[0]):
        if not _NAME.fullmatch(name):
            raise SteerError(
                f"{path}: unexpected tensor {shown(name)}; names are like 'model.layers.12.steering.vector'"
            )
        if entry["dtype"] not in _DTYPES:
            raise SteerError(f"{path}: {name} is {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        if not entry["data"]:
            raise SteerError(f"{path}: {name} has shape {tuple(entry['shape'])}, which holds no numbers")
        entries[canonical(name)] = (_DTYPES[entry["dtype"]], entry["shape"], bytes(entry["data"]))
    data = {name: bytes(entry["data"]) for name, entry in pairs}
    sums = {header["__metadata__"].get("sha256"), digest(text, data)}
    if len(sums - {None}) > 1:
        raise SteerError(
            f"{path}: its content does not have the checksum it was written with: fetch it again"
        )
    config = SteeringConfig.from_json(text, path)
    for name, (dtype, shape, _) in entries.items():
        if dtype != config.dtype:
            raise SteerError(f"{path}: {name} is {dtype} of shape {tuple(shape)}, expected {config.dtype}")
    sidecar = path.with_name(CONFIG_FILE)
    if path.name == TENSOR_FILE and sidecar.exists() and not _holds(sidecar, config):
        warnings.warn(
            f"{sidecar} differs from the config inside {path.name}; the latter is used", stacklevel=4
        )
    return path, config, entries


def digest(text: str, data: Mapping[str, bytes]) -> str:
    """sha256 of the config's text and every tensor's name and bytes, in the order of the names."""
    hasher = sha256(text.encode())
    for name in sorted(data):
        hasher.update(name.encode() + data[name])
    return hasher.hexdigest()


def _tensor_file(source: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    path = Path(source)
    if path.exists():
        hub.refuse_revision(path, revision)
    if path.is_dir():
        if not (path / TENSOR_FILE).exists():
            raise SteerError(f"{path} holds no {TENSOR_FILE}: it is not a folder of steering vectors")
        return path / TENSOR_FILE
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or not hub.is_hub_id(str(source)):
        raise SteerError(f"no steering vectors at {source}: there is no such file or folder")
    return hub.fetch(str(source), TENSOR_FILE, revision, token)


def _holds(sidecar: Path, config: SteeringConfig) -> bool:
    try:
        return SteeringConfig.from_json(sidecar.read_text(errors="replace"), sidecar) == config
    except (SteerError, OSError):
        return False

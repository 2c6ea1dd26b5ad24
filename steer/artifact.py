"""
The artifact: a folder of two small files that holds a set of steering vectors.

Format, version 1
-----------------
`steering.safetensors`
    One 1-D tensor per steered layer, named exactly as the parameter is named inside the model
    (`model.layers.12.steering.vector`), of the model's width, finite. The file's metadata holds the key
    `steering_config`: the JSON text of the config, so this one file is a whole artifact.
`steering_config.json`
    The same config, for people and for tools that do not read safetensors. When the two differ (a kill
    between the two writes, a hand edit), the copy inside the tensor file is the truth and a warning says so.

Each file is written beside its target and renamed over it, tensors first: a kill at any moment leaves the old
artifact or the new one. Nothing in either file can execute code.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steer.config import SteeringConfig
from steer.errors import SteerError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "steering_config.json"
TENSOR_FILE = "steering.safetensors"
# A 405B model's vectors in float64 are 17 MB; anything far larger is not an artifact.
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Artifact:
    """Vectors at rest: `config`, and `tensors` by parameter name, each of shape (width,)."""

    config: SteeringConfig
    tensors: dict[str, torch.Tensor]


def write(folder: str | os.PathLike[str], artifact: Artifact) -> Path:
    """
    Write `artifact` to `folder` (made if missing), atomically per file. Returns the folder. NaN and Inf are
    refused.
    """
    from safetensors.torch import save

    check(artifact, str(folder))
    text = json.dumps(artifact.config.to_dict(), indent=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in artifact.tensors.items()}
    folder = Path(folder)
    if folder.is_file():
        raise SteerError(f"cannot save vectors to {folder}: it is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = save(tensors, metadata={"steering_config": text})
        replace_files({folder / TENSOR_FILE: whole, folder / CONFIG_FILE: (text + "\n").encode()})
    except OSError as error:
        raise SteerError(
            f"cannot save vectors to {folder}: {error.strerror}; what was there before is untouched"
        ) from error
    return folder


def read(source: str | os.PathLike[str], revision: str | None = None) -> Artifact:
    """
    Read an artifact from a folder, a single `.safetensors` file or a hub id, and check every tensor in it.
    """
    from safetensors import SafetensorError, safe_open

    path = _tensor_file(source, revision)
    if path.stat().st_size > MAX_BYTES:
        raise SteerError(
            f"{path} has {path.stat().st_size} bytes, more than any set of steering vectors ({MAX_BYTES})"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise SteerError(
            f"{path} is not a readable safetensors file ({error}); was it cut short or altered?"
        ) from error
    if "steering_config" not in metadata:
        raise SteerError(f"{path} holds no steering config in its metadata; it was not written by steer")
    artifact = Artifact(_parse(metadata["steering_config"], path), tensors)
    sidecar = path.with_name(CONFIG_FILE)
    if path.name == TENSOR_FILE and sidecar.exists() and not _holds(sidecar, artifact.config):
        warnings.warn(
            f"{sidecar} differs from the config inside {path.name}; the latter is used", stacklevel=2
        )
    check(artifact, str(path))
    return artifact


def check(artifact: Artifact, where: str) -> None:
    """Raise SteerError unless every tensor is a finite floating vector of the config's width."""
    import torch

    if not artifact.tensors:
        raise SteerError(f"{where}: the artifact holds no vectors")
    expected = (artifact.config.width,)
    for name, tensor in artifact.tensors.items():
        if not name.endswith(".steering.vector"):
            raise SteerError(f"{where}: unexpected tensor {name!r}; names end in '.steering.vector'")
        if tuple(tensor.shape) != expected or tensor.dtype not in (
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.float16,
        ):
            raise SteerError(
                f"{where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected floats "
                f"{expected}"
            )
        if not torch.isfinite(tensor).all():
            raise SteerError(
                f"{where}: {name} holds NaN or Inf; lower the learning rate or load an earlier checkpoint"
            )


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, flush it to the disk, and rename it over `path`."""
    replace_files({path: content})


def replace_files(contents: dict[Path, bytes]) -> None:
    """The same for several: none is renamed before all are on the disk, so a full disk changes none."""
    written: dict[str, Path] = {}
    try:
        for path, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written[temporary] = path
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        for temporary, path in written.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)
        raise


def _holds(sidecar: Path, config: SteeringConfig) -> bool:
    try:
        return _parse(sidecar.read_text(errors="replace"), sidecar) == config
    except (SteerError, OSError):
        return False


def _parse(text: str, path: Path) -> SteeringConfig:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, too long a number, too deep a nesting
        raise SteerError(f"{path}: the steering config is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise SteerError(f"{path}: the steering config is a {type(values).__name__}, expected a JSON object")
    try:
        return SteeringConfig.from_dict(values)
    except TypeError as error:
        raise SteerError(f"{path}: the steering config has a field of the wrong type ({error})") from error


def _tensor_file(source: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / TENSOR_FILE).exists():
            raise SteerError(f"{path} holds no {TENSOR_FILE}: it is not a folder of steering vectors")
        return path / TENSOR_FILE
    if path.is_file():
        return path
    if path.suffix or path.is_absolute() or str(source).count("/") != 1:
        raise SteerError(f"no steering vectors at {source}: there is no such file or folder")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), TENSOR_FILE, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: not an id
        reason = str(error).splitlines()[0]
        raise SteerError(
            f"no folder {source}, and the hub did not give {TENSOR_FILE} of that id ({reason})"
        ) from error

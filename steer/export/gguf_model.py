"""
A GGUF model with the vectors inside: whatever is built on llama.cpp runs it, layer 0 included.

llama.cpp reads a bias of the MLP's and of the attention's last matrix, `blk.{i}.ffn_down.bias` and
`blk.{i}.attn_output.bias`, in models of its architecture `llama`: a constant vector is such a bias. The
base's weights are copied byte for byte, quantised as they are; the biases are float32. A vector is added to
a bias that the base has there.

Qwen2 models are written as `llama` ones, which have biases on queries and keys as well. The two differ in
which numbers of a head are rotated together: (i, i + half) there, (2i, 2i + 1) here. Reordering the rows of
the query and key matrices, whose blocks of quantised numbers each lie within a row, makes up for it exactly.

The metadata get one more entry, `steer.config`: the steering config as JSON, for whoever wonders.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from steer.artifact import Artifact
from steer.artifact_scores import for_export
from steer.errors import SteerError
from steer.export.architecture import bias_place
from steer.export.gguf_header import MAGIC, START, U32, U64, Header, Tensor, pad, parse, short

CONFIG_KEY = "steer.config"
# By llama.cpp's architecture, which has places for biases: the model types that it runs.
ARCHITECTURES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",)}
_BIASES = {"mlp.down_proj": "ffn_down.bias", "self_attn.o_proj": "attn_output.bias"}


def write(artifact: Artifact, base: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """
    Write the GGUF model `base` with the vectors of `artifact` inside to `path`, atomically. Returns the path.

    The tensors of `base` stay as they are, so the file is larger by the vectors alone. Raises SteerError for
    adaptive vectors, for positions other than all, for models whose layers have no place for a bias in
    llama.cpp, and for a `base` of another hidden size or number
    of layers.
    """
    base, path = Path(base), Path(path)
    place = bias_place(artifact.config, "a GGUF model")
    vectors = {i: vector.detach().cpu().float() for i, vector in artifact.by_layer().items()}
    biases = {f"blk.{i}.{_BIASES[place]}": vector.numpy() for i, vector in vectors.items()}
    config = for_export(artifact.config, artifact.tensors)
    note = _text(CONFIG_KEY) + U32.pack(GGUFValueType.STRING) + _text(json.dumps(config.to_dict()))
    try:
        if not base.stat().st_size:
            raise SteerError(f"{base} is empty, expected a GGUF model")
        with base.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = parse(content, str(base))
            _check_base(artifact, header, place, base)
            with _replacing(path) as out:
                _write(out, content, header, biases, note)
    except OSError as error:
        raise SteerError(f"cannot write {path} from {base}: {error.strerror}") from error
    return path


def _check_base(artifact: Artifact, header: Header, place: str, base: Path) -> None:
    metadata, config = header.metadata, artifact.config
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise SteerError(
            f"{base} is a GGUF model of {short(architecture)}, llama.cpp has places for biases in "
            f"{' and '.join(ARCHITECTURES)} ones; write a control vector instead"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise SteerError(f"{base} is a mixture of experts, with no place for biases; write a control vector")
    if metadata.get("split.count", 0) not in (0, 1):
        raise SteerError(f"{base} is a piece of a model; join the pieces with llama-gguf-split --merge")
    shape = [metadata.get(f"{architecture}.{key}") for key in ("embedding_length", "block_count")]
    fits = shape == [config.hidden_size, config.num_hidden_layers]
    if (
        not fits
        or config.model_type not in ARCHITECTURES[architecture]
        or "token_embd.weight" not in header.tensors
    ):
        raise SteerError(
            f"{base} is a {architecture} with hidden_size={shape[0]} and num_hidden_layers={shape[1]}, the "
            f"vectors are for {config.base_model_name_or_path}, a {config.model_type} with "
            f"hidden_size={config.hidden_size} and num_hidden_layers={config.num_hidden_layers}: give the "
            "GGUF file of that model"
        )
    if CONFIG_KEY in metadata:
        raise SteerError(f"{base} has vectors inside already; give the model without vectors")
    own = {name: tensor.type for name, tensor in header.tensors.items() if name.endswith(_BIASES[place])}
    if other := sorted(set(own.values()) - {"F32"}):
        raise SteerError(f"{base} has biases in {', '.join(other)}, which vectors are added to in F32 only")


def _write(
    out: IO[bytes], content: mmap.mmap, header: Header, biases: dict[str, np.ndarray], note: bytes
) -> None:
    relabel = header.metadata["general.architecture"] == "qwen2"
    tensors = list(header.tensors.values())
    own = {
        name: biases[name] + _floats(content, header.tensors[name]) for name in biases.keys() & header.tensors
    }
    biases = {name: bias for name, bias in biases.items() if name not in own}
    spans = {key: span for key, span in header.spans.items() if key != CONFIG_KEY}
    out.write(START.pack(MAGIC, header.version, len(tensors) + len(biases), len(spans) + 1))
    for key, (start, end) in spans.items():
        out.write(_as_llama(key, content[start:end]) if relabel else content[start:end])
    out.write(note)
    out.write(content[slice(*header.infos)])
    after = pad(tensors[-1].at + tensors[-1].size - tensors[0].at, header.alignment)
    for name, bias in biases.items():
        out.write(_text(name) + U32.pack(1) + U64.pack(len(bias)) + U32.pack(GGMLQuantizationType.F32))
        out.write(U64.pack(after))
        after = pad(after + bias.nbytes, header.alignment)
    for tensor in tensors:
        _align(out, header.alignment)
        if tensor.name in own:
            out.write(own[tensor.name].astype("<f4").tobytes())
            continue
        turned = relabel and tensor.name.split(".")[2:3] in (["attn_q"], ["attn_k"])
        out.write(_reordered(content, tensor, header.metadata) if turned else _bytes(content, tensor))
    for bias in biases.values():
        _align(out, header.alignment)
        out.write(bias.astype("<f4").tobytes())
    _align(out, header.alignment)


def _floats(content: mmap.mmap, tensor: Tensor) -> np.ndarray:
    """The numbers of a float32 tensor."""
    return np.frombuffer(_bytes(content, tensor), "<f4")


def _bytes(content: mmap.mmap, tensor: Tensor) -> bytes:
    return content[tensor.at : tensor.at + tensor.size]


def _as_llama(key: str, entry: bytes) -> bytes:
    """A metadata entry of a Qwen2 model as a Llama one has it."""
    if key == "general.architecture":
        return _text(key) + U32.pack(GGUFValueType.STRING) + _text("llama")
    if key.startswith("qwen2."):
        return _text("llama." + key.removeprefix("qwen2.")) + entry[len(_text(key)) :]
    return entry


def _reordered(content: mmap.mmap, tensor: Tensor, metadata: dict[str, Any]) -> bytes:
    """Rows of each head from (i, i + half) to (2i, 2i + 1): a matrix (inputs, rows) or a bias (rows,)."""
    heads = metadata.get("qwen2.attention.head_count")
    if "attn_k" in tensor.name:
        heads = metadata.get("qwen2.attention.head_count_kv", heads)
    rows = tensor.shape[-1]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise SteerError(f"{tensor.name} has {rows} rows for {heads} heads: the GGUF model is damaged")
    by_head = np.frombuffer(_bytes(content, tensor), np.uint8).reshape(heads, 2, rows // heads // 2, -1)
    return by_head.swapaxes(1, 2).tobytes()


def _text(value: str) -> bytes:
    return U64.pack(len(value.encode())) + value.encode()


def _align(out: IO[bytes], alignment: int) -> None:
    out.write(bytes(pad(out.tell(), alignment) - out.tell()))


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that is renamed over it at the end; too large for `steer.files`."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

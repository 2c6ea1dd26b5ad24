"""
The header of a GGUF file (versions 2 and 3, little-endian), read with a bound on every count and length.

The `gguf` package's own reader trusts the counts in the file: a damaged one makes it loop for hours. This
one accepts what llama.cpp accepts, in one pass over bytes that are there, and is held against that reader
in the tests. A file is:

    magic "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries
    metadata entries: key, u32 type, value          (a text is a u64 length and that many UTF-8 bytes)
    tensor infos: name, u32 number of dimensions, u64 each, u32 type, u64 offset from the start of the data
    padding to the alignment, then the data, every tensor padded to the alignment
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import prod
from struct import Struct, error
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from steer.errors import SteerError

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"
# Largest counts that are believed: the biggest models have some 100,000 tensors and a million merges.
MAX_TENSORS = 1 << 17
MAX_ENTRIES = 1 << 12
MAX_ELEMENTS = 1 << 22
MAX_NAME = 63

START = Struct("<4sIQQ")
U32, U64 = Struct("<I"), Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: Struct("<B"),
    GGUFValueType.INT8: Struct("<b"),
    GGUFValueType.UINT16: Struct("<H"),
    GGUFValueType.INT16: Struct("<h"),
    GGUFValueType.UINT32: U32,
    GGUFValueType.INT32: Struct("<i"),
    GGUFValueType.FLOAT32: Struct("<f"),
    GGUFValueType.BOOL: Struct("<?"),
    GGUFValueType.UINT64: U64,
    GGUFValueType.INT64: Struct("<q"),
    GGUFValueType.FLOAT64: Struct("<d"),
}
_TYPE_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType}


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` with the fastest axis first, `at` and `size` its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    at: int
    size: int


@dataclass(frozen=True)
class Header:
    """What comes before the data. `spans` are the bytes of each metadata entry, `infos` of all infos."""

    version: int
    metadata: dict[str, Any]  # numbers, flags and texts; arrays are passed over
    spans: dict[str, tuple[int, int]]
    infos: tuple[int, int]
    alignment: int
    tensors: dict[str, Tensor]


def parse(content: bytes | mmap.mmap, where: str) -> Header:
    """
    The header of the GGUF file `content`. SteerError where llama.cpp would refuse the file as well: cut
    short, an unknown version or type, a key or tensor twice, tensors that overlap or leave gaps.
    """
    try:
        return _parse(content)
    except error as short:
        raise SteerError(f"{where} ends in the middle of its GGUF header: was it cut short?") from short
    except UnicodeDecodeError as damage:
        raise SteerError(f"{where} is a damaged GGUF file: a text in its header is not UTF-8") from damage
    except _Damage as damage:
        raise SteerError(f"{where} is not a whole GGUF file: {damage}") from damage


class _Damage(Exception):
    """What is wrong, for the message."""


def _parse(content: bytes | mmap.mmap) -> Header:
    magic, version, tensor_count, entry_count = START.unpack_from(content, 0)
    if magic != MAGIC:
        raise _Damage(f"it starts with {magic!r}, expected {MAGIC!r}")
    if version not in (2, 3):
        raise _Damage(f"its version is {version}, expected 2 or 3 (little-endian)")
    if tensor_count > MAX_TENSORS or entry_count > MAX_ENTRIES:
        raise _Damage(f"it claims {tensor_count} tensors and {entry_count} metadata entries")
    cursor = _Cursor(content, START.size)
    metadata: dict[str, Any] = {}
    spans = {}
    for _ in range(entry_count):
        start = cursor.at
        key = cursor.text()
        if key in spans:
            raise _Damage(f"the key {short(key)} is there twice")
        kind = cursor.take(U32)
        value = cursor.value(kind)
        if key == ALIGNMENT and kind != GGUFValueType.UINT32:
            raise _Damage(f"{ALIGNMENT} is {value!r}, expected a 32-bit number")
        if kind != GGUFValueType.ARRAY:
            metadata[key] = value
        spans[key] = (start, cursor.at)
    alignment = metadata.get(ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        raise _Damage(f"{ALIGNMENT} is {alignment}, expected a power of two")
    first_info = cursor.at
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    data = pad(cursor.at, alignment)
    tensors: dict[str, Tensor] = {}
    expected = 0
    for name, shape, kind, offset, size in infos:
        if name in tensors:
            raise _Damage(f"the tensor {name!r} is there twice")
        if offset != expected:
            raise _Damage(f"tensor {name!r} lies at {offset}, expected {expected}")
        if data + offset + size > len(content):
            raise _Damage(f"the data of tensor {name!r} end after the file's {len(content)} bytes")
        tensors[name] = Tensor(name, shape, kind, data + offset, size)
        expected = pad(offset + size, alignment)
    return Header(version, metadata, spans, (first_info, cursor.at), alignment, tensors)


def pad(offset: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-offset // alignment) * alignment


def short(value: object) -> str:
    """A value from the file, for a message: on one line, and not a megabyte of it."""
    return repr(value)[:80]


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
    name = cursor.text()
    if len(name) > MAX_NAME:
        raise _Damage(f"the tensor name {short(name)} is longer than {MAX_NAME}")
    dimensions = cursor.take(U32)
    if not 1 <= dimensions <= 4:
        raise _Damage(f"tensor {name!r} has {dimensions} dimensions, expected 1 to 4")
    shape = tuple(cursor.take(U64) for _ in range(dimensions))
    code, offset = cursor.take(U32), cursor.take(U64)
    kind = _TYPE_NAMES.get(code)
    if kind is None:
        raise _Damage(f"tensor {name!r} is of the unknown type {code}")
    block, block_size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if not all(shape) or shape[0] % block:
        raise _Damage(f"tensor {name!r} has shape {list(shape)}, which {kind} cannot have")
    return name, shape, kind, offset, prod(shape) // block * block_size


class _Cursor:
    """Takes values from the front; `struct.error` where the bytes end."""

    def __init__(self, content: bytes | mmap.mmap, at: int):
        self.content, self.at = content, at
        self.elements = 0
        self.end = len(content)

    def take(self, layout: Struct) -> Any:
        (value,) = layout.unpack_from(self.content, self.at)
        self.at += layout.size
        return value

    def skip(self, size: int) -> int:
        """Start of the next `size` bytes, which are passed over."""
        start = self.at
        if size > self.end - start:
            raise error
        self.at = start + size
        return start

    def text(self) -> str:
        size = self.take(U64)
        start = self.skip(size)
        return self.content[start : start + size].decode()

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self.skip_array(self.take(U32), self.take(U64))
        if kind not in _SCALARS:
            raise _Damage(f"a metadata entry is of the unknown type {kind}")
        return self.take(_SCALARS[GGUFValueType(kind)])

    def skip_array(self, kind: int, length: int) -> None:
        self.elements += length
        if self.elements > MAX_ELEMENTS:
            raise _Damage(f"its metadata arrays claim {self.elements} elements")
        if kind == GGUFValueType.STRING:
            for _ in range(length):
                self.skip(self.take(U64))
        elif kind in _SCALARS:
            self.skip(length * _SCALARS[GGUFValueType(kind)].size)
        else:
            raise _Damage(f"a metadata array is of the unknown type {kind}")

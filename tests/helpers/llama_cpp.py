"""
Runs llama.cpp, the copy inside the wheel `xllamacpp`, through its own C interface, in a process of its own:

    python tests/helpers/llama_cpp.py MODEL.gguf OUT.npz '[[1, 2, 3]]' GREEDY [CONTROL_VECTOR.gguf SCALE]

OUT gets, for each list of token ids, `logits{i}` (tokens + GREEDY, vocabulary): those after each token, fed
one by one, and after each of the GREEDY tokens that llama.cpp chooses next. Exit code 3: llama.cpp refused
the control vector; 4: it refused the model.

Structs that llama.cpp passes by value are opaque blocks here, larger than they are, so that no layout of one
release is written down; the two C++ types of the control vector loader have had theirs for years.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

REFUSED_VECTOR, REFUSED_MODEL = 3, 4


def run(
    model: Path,
    tokens: list[list[int]],
    folder: Path,
    greedy: int = 0,
    vector: Path | None = None,
    scale: float = 1.0,
) -> list[np.ndarray]:
    """The logits (tokens + greedy, vocabulary) of each list of tokens, by llama.cpp in a new process."""
    out = folder / "logits.npz"
    command = [sys.executable, __file__, str(model), str(out), json.dumps(tokens), str(greedy)]
    command += [str(vector), str(scale)] if vector else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, "llama.cpp", done.stdout, done.stderr)
    with np.load(out) as saved:
        return [saved[f"logits{i}"] for i in range(len(tokens))]


class Opaque(ctypes.Structure):
    """A struct of llama.cpp's that is only handed on."""

    _fields_ = (("content", ctypes.c_char * 4096),)


class Text(ctypes.Structure):
    """libstdc++'s std::string since 2015: where the characters are, how many, and room for a few."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("local", ctypes.c_char * 16))


class OldText(ctypes.Structure):
    """The one before, in wheels for old systems: its length stands before the characters."""

    _fields_ = (("data", ctypes.c_void_p),)


class OldTextRoom(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("capacity", ctypes.c_size_t),
        ("references", ctypes.c_int),
        ("content", ctypes.c_char * 4096),
    )


class Vector(ctypes.Structure):
    """std::vector: first, past the last, past the room."""

    _fields_ = (("first", ctypes.c_void_p), ("last", ctypes.c_void_p), ("room", ctypes.c_void_p))


class ControlVector(ctypes.Structure):
    """common_control_vector_data"""

    _fields_ = (("n_embd", ctypes.c_int), ("data", Vector))


POINTER, INT = ctypes.c_void_p, ctypes.c_int32
OLD_TEXTS = "_Z15common_tokenizePK13llama_contextRKSsbb"  # exists where std::string is the old one
LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Opaque, []),
    "llama_model_load_from_file": (POINTER, [ctypes.c_char_p, Opaque]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_model_n_layer": (INT, [POINTER]),
    "llama_context_default_params": (Opaque, []),
    "llama_init_from_model": (POINTER, [POINTER, Opaque]),
    "llama_set_n_threads": (None, [POINTER, INT, INT]),
    "llama_batch_get_one": (Opaque, [POINTER, INT]),
    "llama_decode": (INT, [POINTER, Opaque]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [POINTER, INT]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_clear": (None, [POINTER, ctypes.c_bool]),
    "llama_set_adapter_cvec": (INT, [POINTER, POINTER, ctypes.c_size_t, INT, INT, INT]),
    LOADER: (ControlVector, [POINTER]),
}


def library() -> ctypes.CDLL:
    found = importlib.util.find_spec("xllamacpp")
    assert found and found.origin
    lib = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    return lib


def load(lib: ctypes.CDLL, path: bytes, strength: float) -> ControlVector:
    """common_control_vector_load: what `--control-vector-scaled` calls."""
    room: Any  # kept until the end: the loader reads from it
    fname: Any
    if hasattr(lib, OLD_TEXTS):
        room = OldTextRoom(len(path), len(path), 0, path)
        fname = OldText(ctypes.addressof(room) + OldTextRoom.content.offset)
    else:
        room = ctypes.create_string_buffer(path)
        fname = Text(ctypes.addressof(room), len(path))
    # common_control_vector_load_info
    fields = [("strength", ctypes.c_float), ("fname", type(fname))]
    info = type("LoadInfo", (ctypes.Structure,), {"_fields_": fields})(strength, fname)
    start = ctypes.addressof(info)
    end = start + ctypes.sizeof(info)
    return getattr(lib, LOADER)(ctypes.byref(Vector(start, end, end)))


def main(model_path: str, out: str, tokens: str, greedy: str, vector: str = "", scale: str = "1") -> int:
    lib = library()
    model = lib.llama_model_load_from_file(model_path.encode(), lib.llama_model_default_params())
    if not model:
        return REFUSED_MODEL
    context = lib.llama_init_from_model(model, lib.llama_context_default_params())
    lib.llama_set_n_threads(context, 1, 1)
    if vector:
        loaded = load(lib, vector.encode(), float(scale))
        if loaded.n_embd < 1:
            return REFUSED_VECTOR
        size = (loaded.data.last - loaded.data.first) // 4
        last = lib.llama_model_n_layer(model)  # as without --control-vector-layer-range
        assert lib.llama_set_adapter_cvec(context, loaded.data.first, size, loaded.n_embd, 1, last) == 0
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def step(token: int) -> np.ndarray:
        assert lib.llama_decode(context, lib.llama_batch_get_one(ctypes.byref(INT(token)), 1)) == 0
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocabulary,)).copy()

    results: dict[str, Any] = {}
    for index, ids in enumerate(json.loads(tokens)):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        rows = [step(token) for token in ids]
        for _ in range(int(greedy)):
            rows.append(step(int(rows[-1].argmax())))
        results[f"logits{index}"] = np.stack(rows)
    np.savez(out, **results)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

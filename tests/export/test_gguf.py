"""GGUF control vectors: exact round trips, other tools' files, what is refused, damaged files."""

from __future__ import annotations

import random
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from helpers.foreign import DEPTH, WIDTH, damaged, made, rows, same
from helpers.fuzz import how_many
from helpers.steering import message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from steer import SteerError, artifact
from steer.artifact import Artifact
from steer.export import gguf
from steer.export.gguf_header import parse

ARCHITECTURE = "controlvector"


def foreign(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = ARCHITECTURE,
    metadata: Iterable[tuple[str, Any]] = (("controlvector.model_hint", "llama"),),
) -> Path:
    """A control vector as other tools write it, by the library they use."""
    writer = library.GGUFWriter(path, architecture)
    for key, value in metadata:
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(*blocks: int) -> dict[str, np.ndarray]:
    return {f"direction.{k}": rows()[k].numpy() for k in blocks}


@pytest.mark.parametrize(
    "fields",
    [{}, {"scale": -0.3}, {"layers": "2"}, {"dtype": "bfloat16"}, {"kind": "shared", "rank": 2}],
    ids=str,
)
def test_round_trip_is_exact(fields: dict[str, Any], tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    before = made(tiny_model, **fields)
    path = gguf.write(before, tmp_path / "v.gguf", block_0="keep")
    after = gguf.read(path, tiny_model)
    assert same(before, after)
    assert (after.config.scale, after.config.dtype, after.config.kind) == (1.0, "float32", "constant")
    assert gguf.write(after, tmp_path / "again.gguf", block_0="keep").read_bytes() == path.read_bytes()


def test_the_config_comes_back(tiny_llama: PreTrainedModel, build_tiny: Any, tmp_path: Path) -> None:
    tiny_llama.config._name_or_path = "somebody/model"
    before = artifact.from_vectors({1: rows()[1]}, tiny_llama, provenance={"recipe": "x", "text": "µ\n"})
    path = gguf.write(before, tmp_path / "v.gguf")
    other = build_tiny("llama", seed=1)  # other weights: the file still says whose vectors they are
    assert gguf.read(path, other).config == before.config
    with torch.device("meta"):
        skeleton = type(other)(other.config)
    assert gguf.read(path, skeleton).config == before.config


def test_what_others_read(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    before = made(tiny_llama, layers="1-2", scale=2.0)
    reader = library.GGUFReader(gguf.write(before, tmp_path / "v.gguf"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == ARCHITECTURE
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    expected = before.by_layer()
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for k, tensor in zip((1, 2), reader.tensors, strict=True):
        assert tensor.tensor_type == library.GGMLQuantizationType.F32
        assert tensor.data.shape == (WIDTH,)
        assert np.array_equal(tensor.data, expected[k].numpy())


def test_block_0_is_refused_unless_told(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    vectors = {0: torch.full((WIDTH,), 3.0), 1: torch.ones(WIDTH)}
    before, path = artifact.from_vectors(vectors, tiny_llama), tmp_path / "v.gguf"
    with pytest.raises(SteerError, match="layer 0's vector, 75% of all norms together") as error:
        gguf.write(before, path)
    assert all(f"block_0='{choice}'" in message(error) for choice in ("drop", "fold", "keep"))
    assert not path.exists()
    with pytest.warns(UserWarning, match=r"75% of all norms together, is left out"):
        gguf.write(before, path, block_0="drop")
    dropped = gguf.read(path, tiny_llama)
    assert dropped.config.layers == "1"
    assert dropped.config.provenance == {"block_0": "drop"}
    assert torch.equal(dropped.by_layer()[1], vectors[1])
    with pytest.warns(UserWarning, match="75% of all norms together, is added after block 1"):
        gguf.write(before, path, block_0="fold")
    assert torch.equal(gguf.read(path, tiny_llama).by_layer()[1], vectors[0] + vectors[1])
    with pytest.warns(UserWarning, match="100% of all norms"):
        gguf.write(before.layers(0, 0), path, block_0="fold")
    assert torch.equal(gguf.read(path, tiny_llama).by_layer()[1], vectors[0])
    with pytest.raises(SteerError, match="only layer 0 is steered"):
        gguf.write(before.layers(0, 0), path, block_0="drop")
    with pytest.raises(SteerError, match="expected one of refuse, drop, fold, keep"):
        gguf.write(before, path, block_0="yes")


def test_direction_0_of_other_tools(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    path = foreign(tmp_path / "v.gguf", directions(0, 1))
    with pytest.raises(SteerError, match="block_0='keep'") as error:
        gguf.read(path, tiny_llama)
    message(error)
    assert list(gguf.read(path, tiny_llama, block_0="keep").by_layer()) == [0, 1]
    assert list(gguf.read(path, tiny_llama, block_0="drop").by_layer()) == [1]
    with pytest.raises(SteerError, match=r"nothing but direction\.0"):
        gguf.read(foreign(path, directions(0)), tiny_llama, block_0="drop")
    # EasySteer marks its files, and means block 0
    easysteer = [("controlvector.model_hint", "llama"), ("controlvector.method", "diffmean")]
    marked = foreign(path, directions(0, 1), metadata=[*easysteer, ("controlvector.normalize", 1.0)])
    assert list(gguf.read(marked, tiny_llama).by_layer()) == [0, 1]


def test_files_of_other_tools(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    repeng = [("controlvector.model_hint", "llama"), ("controlvector.layer_count", 2)]
    more = [*repeng, ("general.name", "x"), ("some.list", [1, 2, 3]), ("some.texts", ["a", "b"])]
    for metadata in (repeng, more, ()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after = gguf.read(foreign(tmp_path / "v.gguf", directions(2, 1), metadata=metadata), tiny_llama)
        assert same(after, artifact.from_vectors({1: rows()[1], 2: rows()[2]}, tiny_llama))
        assert after.config.site == "resid_post"


@pytest.mark.parametrize(
    ("hint", "model_type", "warns"),
    [
        ("gemma3", "gemma3_text", False),
        ("gptneox", "gpt_neox", False),
        ("llama", "mistral", False),
        ("unknown", "qwen2", False),
        ("qwen2.5", "llama", True),
        ("qwen2", "qwen3", True),
    ],
)
def test_another_models_hint(
    hint: str, model_type: str, warns: bool, build_tiny: Any, tmp_path: Path
) -> None:
    path = foreign(tmp_path / "v.gguf", directions(1), metadata=[("controlvector.model_hint", hint)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gguf.read(path, build_tiny(model_type))
    assert [f"is for a {hint!r}" in str(w.message) for w in caught] == [True] * warns


def test_another_model_is_refused(tiny_llama: PreTrainedModel, build_tiny: Any, tmp_path: Path) -> None:
    path = gguf.write(made(tiny_llama, layers="1"), tmp_path / "v.gguf")
    cases = {
        "model_type=llama, this model has model_type=qwen2": build_tiny("qwen2"),
        "residual stream 64": build_tiny("llama", hidden_size=64),
        "num_hidden_layers=3, this model has num_hidden_layers=2": build_tiny("llama", num_hidden_layers=2),
    }
    for expected, model in cases.items():
        with pytest.raises(SteerError, match=expected) as error:
            gguf.read(path, model)
        message(error)


ONE = np.ones(WIDTH, np.float32)
REFUSED: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "other width": ({"direction.1": ONE[1:]}, {}, "direction.1 has 31 numbers"),
    "two widths": ({"direction.1": ONE, "direction.2": ONE[1:]}, {}, "direction.2 has 31 numbers"),
    "block the model lacks": ({"direction.3": ONE}, {}, "steers block 3, the model has blocks 0 to 2"),
    "half precision": ({"direction.1": ONE.astype(np.float16)}, {}, "direction.1 is F16"),
    "whole numbers": ({"direction.1": ONE.astype(np.int32)}, {}, "direction.1 is I32"),
    "a matrix": ({"direction.1": np.ones((1, WIDTH), np.float32)}, {}, r"F32 \[32, 1\]"),
    "NaN": ({"direction.1": ONE * np.nan}, {}, "NaN or Inf"),
    "Inf": ({"direction.1": ONE * np.inf}, {}, "NaN or Inf"),
    "negative block": ({"direction.-1": ONE}, {}, "'direction.-1'"),
    "leading zero": ({"direction.01": ONE}, {}, "'direction.01'"),
    "another tensor": ({"direction.1": ONE, "token_embd.weight": ONE}, {}, "'token_embd.weight'"),
    "a model": ({"direction.1": ONE}, {"architecture": "llama"}, "of architecture 'llama'"),
    "no vectors": ({}, {}, "holds 0 tensors"),
    "lost vectors": ({"direction.1": ONE}, {"metadata": [("controlvector.layer_count", 2)]}, "speaks of 2"),
    "no JSON": ({"direction.1": ONE}, {"metadata": [("steer.config", "{")]}, "steering config"),
    "no config": ({"direction.1": ONE}, {"metadata": [("steer.config", "[]")]}, "steering config"),
    "newer format": (
        {"direction.1": ONE},
        {"metadata": [("steer.config", '{"format_version": 9}')]},
        "newer",
    ),
    "config as a list": ({"direction.1": ONE}, {"metadata": [("steer.config", 1)]}, "steering config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    tensors, changes, expected = REFUSED[case]
    path = foreign(tmp_path / "v.gguf", tensors, **changes)
    with pytest.raises(SteerError, match=expected) as error:
        gguf.read(path, tiny_llama)
    message(error)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


HINT = entry("general.architecture", 8, text(ARCHITECTURE))


def info(name: str, size: int = WIDTH, kind: int = 0, offset: int = 0, dimensions: int = 1) -> bytes:
    return text(name) + struct.pack("<I", dimensions) + struct.pack("<QIQ", size, kind, offset)


def raw(
    entries: list[bytes], infos: list[bytes], counts: tuple[int, int] | None = None, version: int = 3
) -> bytes:
    """A GGUF file by hand, with zeros for data."""
    tensors, pairs = counts or (len(infos), len(entries))
    start = struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + b"".join(entries) + b"".join(infos)
    return start + bytes(-len(start) % 32) + bytes(128 * max(len(infos), 1))


HUGE = 1 << 62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "tensors": (raw([HINT], [], (HUGE, 1)), f"claims {HUGE} tensors"),
    "entries": (raw([HINT], [], (0, HUGE)), f"{HUGE} metadata entries"),
    "some more tensors": (raw([HINT], [info("direction.1")], (3, 1)), "dimensions"),
    "text": (raw([entry("k", 8, struct.pack("<Q", HUGE))], []), "cut short"),
    "text of all bits": (raw([entry("k", 8, struct.pack("<Q", (1 << 64) - 1))], []), "cut short"),
    "array of bytes": (raw([entry("k", 9, struct.pack("<IQ", 0, HUGE))], []), "arrays claim"),
    "array of texts": (raw([entry("k", 9, struct.pack("<IQ", 8, 1 << 22))], []), "cut short"),
    "nested array": (raw([entry("k", 9, struct.pack("<IQ", 9, 1))], []), "unknown type 9"),
    "unknown value": (raw([entry("k", 77, b"")], []), "unknown type 77"),
    "key twice": (raw([HINT, HINT], []), "'general.architecture' is there twice"),
    "key not UTF-8": (raw([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 0)], []), "not UTF-8"),
    "tensor twice": (raw([HINT], [info("direction.1"), info("direction.1", offset=128)]), "is there twice"),
    "overlap": (raw([HINT], [info("direction.1"), info("direction.2")]), "lies at 0, expected 128"),
    "gap": (raw([HINT], [info("direction.1", offset=32)]), "lies at 32, expected 0"),
    "elements": (raw([HINT], [info("direction.1", size=HUGE)]), "end after the file's"),
    "no elements": (raw([HINT], [info("direction.1", size=0)]), "which F32 cannot have"),
    "dimensions": (raw([HINT], [info("direction.1", dimensions=1 << 31)]), "dimensions, expected 1 to 4"),
    "unknown tensor type": (raw([HINT], [info("direction.1", kind=4)]), "unknown type 4"),
    "long name": (raw([HINT], [info("d" * 64)]), "longer than 63"),
    "alignment 0": (raw([HINT, entry("general.alignment", 4, bytes(4))], []), "expected a power of two"),
    "alignment 33": (raw([HINT, entry("general.alignment", 4, b"!\0\0\0")], []), "expected a power of two"),
    "alignment as text": (raw([HINT, entry("general.alignment", 8, text("32"))], []), "32-bit number"),
    "version 1": (raw([HINT], [info("direction.1")], version=1), "its version is 1"),
    "big-endian": (raw([HINT], [info("direction.1")], version=3 << 24), "its version is"),
    "another file": (b"PK\3\4" + bytes(100), "it starts with"),
    "empty": (b"", "cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_cost_nothing(case: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    content, expected = HOSTILE[case]
    (tmp_path / "v.gguf").write_bytes(content)
    with pytest.raises(SteerError, match=expected) as error:
        gguf.read(tmp_path / "v.gguf", tiny_llama)
    assert len(message(error)) < 500


def test_cut_short_anywhere(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    whole = gguf.write(made(tiny_llama, layers="1-2"), tmp_path / "v.gguf").read_bytes()
    for size in range(0, len(whole), 7):
        with pytest.raises(SteerError):
            parse(whole[:size], "v.gguf")
    assert parse(whole, "v.gguf").tensors.keys() == {"direction.1", "direction.2"}


def test_files_that_are_none(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    with (tmp_path / "large.gguf").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    for name, expected in (
        ("large.gguf", "is it a model"),
        ("none.gguf", "cannot read"),
        ("", "cannot read"),
    ):
        with pytest.raises(SteerError, match=expected) as error:
            gguf.read(tmp_path / name, tiny_llama)
        message(error)


def test_what_cannot_be_written(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(b"before")
    refused: list[tuple[Artifact, str]] = [
        (made(tiny_llama, kind="adaptive"), "adaptive"),
        (made(tiny_llama, positions="prompt"), "every token"),
        (made(tiny_llama, site="mlp_out"), "only those of resid_post"),
        (
            artifact.from_vectors(
                {1: torch.full((WIDTH,), 1e300, dtype=torch.float64)}, tiny_llama, dtype="float64"
            ),
            "float32",
        ),
    ]
    for given_, expected in refused:
        with pytest.raises(SteerError, match=expected) as error:
            gguf.write(given_, path)
        message(error)
    assert path.read_bytes() == b"before"
    for bad in (tmp_path, tmp_path / "missing" / "v.gguf"):
        with pytest.raises(SteerError, match="cannot write"):
            gguf.write(made(tiny_llama, layers="1"), bad)
    assert [file.name for file in tmp_path.iterdir()] == ["v.gguf"]


FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=WIDTH, max_size=WIDTH)
FREE = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).map("free.".__add__),
    st.one_of(
        st.text(max_size=50).filter(bool), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=1)
    ),
    max_size=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vectors=st.dictionaries(st.integers(1, DEPTH - 1), FLOATS, min_size=1), metadata=FREE)
def test_agrees_with_the_library(
    vectors: dict[int, list[float]], metadata: dict[str, Any], tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = {f"direction.{k}": np.array(numbers, np.float32) for k, numbers in vectors.items()}
    path = foreign(tmp_path / "v.gguf", tensors, metadata=metadata.items())
    header, reader = parse(path.read_bytes(), "v.gguf"), library.GGUFReader(path)
    plain = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == {key: value for key, value in plain.items() if not isinstance(value, list)}
    assert header.spans.keys() == plain.keys()
    assert [(t.name, t.at, t.size) for t in header.tensors.values()] == [
        (t.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    after = gguf.read(path, tiny_llama).by_layer()
    assert {f"direction.{k}": v.numpy().tobytes() for k, v in after.items()} == {
        t.name: t.data.tobytes() for t in reader.tensors
    }


def fuzz(model: PreTrainedModel, folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """
    Read `count` damaged control vectors. Each must be refused in one line, or hold exactly what the library's
    reader finds in the file; returns how many were refused and how many read.
    """
    random_ = random.Random(seed)
    gguf.write(made(model, layers="1-2"), folder / "own.gguf")
    foreign(
        folder / "foreign.gguf",
        directions(1, 2),
        metadata=[("controlvector.layer_count", 2), ("a", ["b", "c"])],
    )
    files = [(folder / name).read_bytes() for name in ("own.gguf", "foreign.gguf")]
    outcomes = {"refused": 0, "read": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(count):
            path = folder / f"{index}.gguf"  # a new file is far quicker than one that is written again
            path.write_bytes(damaged(random_.choice(files), random_))
            try:
                found = gguf.read(path, model)
            except SteerError as error:
                assert "\n" not in str(error), str(error)
                assert len(str(error)) < 1000
                path.unlink()
                outcomes["refused"] += 1
                continue
            artifact.check(found, str(path))
            theirs = {t.name: t.data.tobytes() for t in library.GGUFReader(path).tensors}
            assert {f"direction.{k}": v.numpy().tobytes() for k, v in found.by_layer().items()} == theirs
            path.unlink()
            outcomes["read"] += 1
    return outcomes


def test_damaged_files_are_refused_or_read_right(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    outcomes = fuzz(tiny_llama, tmp_path, how_many(250))
    assert min(outcomes.values()) > 5

"""
Damaged artifacts: both readers refuse them in one line, or both load exactly what the file says.
STEER_FUZZ is the number of damaged files (default 500); 100,000 take minutes.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fuzz import how_many, mutations
from safetensors.torch import save

from steer import SteerError, SteeringConfig, artifact
from steer.artifact import CONFIG_FILE, Artifact
from steer.artifact_tensors import expected_names

COUNT = how_many(500)
SEED = int(os.environ.get("STEER_FUZZ_SEED", "0"))
# Lines of steer's code that reading one file may run: some hundred as a rule, more where the config claims
# thousands of layers. What runs on is stopped by counting, so that no machine is too slow for the test.
LINES = 150_000

CASES: dict[str, dict[str, Any]] = {
    "constant": {
        "provenance": {"recipe": "test", "parts": [{"pass@1": 0.5}]},
        "base_model_name_or_path": "org/tiny",
    },
    "some layers": {"layers": "0,last", "dtype": "bfloat16", "scale": -0.5, "site": "mlp_out"},
    "shared": {"kind": "shared", "rank": 2, "dtype": "float64", "base_checksum": "0123456789abcdef"},
    "adaptive": {"kind": "adaptive", "dtype": "float16", "positions": "completion"},
}


def valid(case: str) -> Artifact:
    config = SteeringConfig(
        **{"hidden_size": 4, "num_hidden_layers": 3, "model_type": "llama", **CASES[case]}
    )
    generator, dtype = torch.Generator().manual_seed(1), getattr(torch, config.dtype)
    shapes = expected_names(config, "model.layers")
    tensors = {n: torch.randn([d or 6 for d in s], generator=generator).to(dtype) for n, s in shapes.items()}
    return Artifact(config, tensors)


def whole_file(case: str) -> bytes:
    """What `artifact.write` puts into `steering.safetensors`."""
    made = valid(case)
    return save(dict(made.tensors), metadata={"steering_config": json.dumps(made.config.to_dict(), indent=2)})


class TooLong(Exception):
    """Reading ran on and on."""


@contextmanager
def line_limit(limit: int) -> Iterator[None]:
    """Stops code of `steer` that has run more than `limit` lines; a loop's every turn counts."""
    left, home = limit, str(Path(artifact.__file__).parent)

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise TooLong(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(home) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def attempt(reader: Callable[[Path], Artifact], path: Path) -> Artifact | str:
    """The artifact, or the one line that refuses it; whatever else is raised fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with line_limit(LINES + path.stat().st_size):
                return reader(path)
        except SteerError as error:
            text = str(error)
            assert text
            assert text.isprintable(), f"not one line of plain text: {text[:300]!r}"
            assert len(text) < 2000, f"a line of {len(text)} characters: {text[:300]}"
            return text


def by_hand(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A second reader, for files whose header is sound: the config's values and every tensor in float64."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key is there twice"
        return dict(pairs)

    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end], object_pairs_hook=once)
    config = json.loads(header.pop("__metadata__")["steering_config"], object_pairs_hook=once)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    tensors = {}
    for name, entry in header.items():
        if isinstance(entry, list):  # safetensors takes the fields by their order, too
            entry = dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
        dtype = next(iter(entry["dtype"])) if isinstance(entry["dtype"], dict) else entry["dtype"]
        start, stop = entry["data_offsets"]
        flat = np.frombuffer(content[end:][start:stop], kinds[dtype])
        if dtype == "BF16":
            flat = (flat.astype("<u4") << 16).view("<f4")
        tensors[name] = flat.reshape(entry["shape"]).astype("<f8")
    return config, tensors


def check_loaded(content: bytes, tensors: Artifact, arrays: Artifact) -> None:
    """What both readers gave is what the file says, and fit for use."""
    said, expected = by_hand(content)
    config = tensors.config
    assert config == arrays.config
    for name, value in said.items():
        if name == "layers":
            value = SteeringConfig(layers=value).layers
        elif name == "scale":
            value = float(value)
        assert getattr(config, name) == value or value != value, name
    assert set(tensors.tensors) == set(arrays.tensors) == set(expected)
    assert set(expected) == set(expected_names(config, tensors.decoder))
    for name, array in expected.items():
        assert tensors.tensors[name].dtype == getattr(torch, config.dtype)
        assert np.array_equal(tensors.tensors[name].double().numpy(), array)
        assert np.array_equal(arrays.tensors[name], array)
        assert np.isfinite(array).all()
    json.dumps(config.to_dict())  # it can be saved again
    for text in (config.base_model_name_or_path, config.base_revision, config.model_type):
        assert text is None or text.isprintable()  # and shown
    # and used: one vector a steered layer
    parts = tensors.rank_one() if config.kind == "adaptive" else tensors.by_layer()
    assert list(parts) == config.resolve_layers(config.num_hidden_layers)


@pytest.mark.parametrize("case", CASES)
def test_the_files_to_damage_are_what_write_writes(tmp_path, case):
    content = whole_file(case)
    artifact.write(tmp_path, valid(case))
    # save for the checksum, without which damage gets past the door
    assert artifact.read(tmp_path).config == valid(case).config
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tensors, arrays = attempt(artifact.read, path), attempt(artifact.read_numpy, path)
    assert isinstance(tensors, Artifact) and isinstance(arrays, Artifact)
    check_loaded(content, tensors, arrays)


@pytest.mark.parametrize("case", CASES)
def test_damaged_files_are_refused_or_load_what_they_say(tmp_path, case):
    path, outcomes = tmp_path / "x.safetensors", Counter[str]()
    for index, content in enumerate(mutations(whole_file(case), COUNT // len(CASES), SEED)):
        path.write_bytes(content)
        try:
            tensors, arrays = attempt(artifact.read, path), attempt(artifact.read_numpy, path)
            if isinstance(tensors, str) or isinstance(arrays, str):
                assert isinstance(tensors, str) and isinstance(arrays, str)
                outcomes[tensors.replace(str(path), "").strip(": ")[:24]] += 1
            else:
                check_loaded(content, tensors, arrays)
                outcomes["loaded"] += 1
        except Exception as error:
            error.add_note(f"damaged file {index} of seed {SEED}, made from {case!r}: {content[:3000]!r}")
            raise
    # the damage is of many kinds, and some is none: otherwise this would test the first check alone
    assert outcomes["loaded"] > 0
    assert len(outcomes) > 8, outcomes


def test_damaged_sidecars_change_nothing_that_is_loaded(tmp_path):
    made = valid("constant")
    artifact.write(tmp_path, made)
    sidecar = tmp_path / CONFIG_FILE
    whole, warned = sidecar.read_bytes(), 0
    for content in mutations(whole_file("constant"), COUNT // 4, SEED):
        # the damaged config, cut out of a damaged file where it can be found, else any damaged bytes
        try:
            text = by_hand_text(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = content
        sidecar.write_bytes(text)
        with warnings.catch_warnings(record=True) as caught, line_limit(LINES):
            warnings.simplefilter("always")
            found = artifact.read(tmp_path)
        assert found.config == made.config
        assert all(CONFIG_FILE in str(warning.message) for warning in caught)
        if not caught:
            assert SteeringConfig.from_dict(json.loads(text)) == made.config
        warned += len(caught)
    assert warned > COUNT // 20
    sidecar.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artifact.read(tmp_path)


def by_hand_text(content: bytes) -> bytes:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"]["steering_config"].encode(errors="surrogatepass")


# --- small files that ask for much work


def with_config(text: str) -> bytes:
    return save(dict(valid("constant").tensors), metadata={"steering_config": text})


def keys(count: int) -> str:
    return ",".join(f'"k{i}":1' for i in range(count))


MODEL = '"hidden_size": 4, "num_hidden_layers": 3, "model_type": "llama"'
# By the name of the bomb: the config, and the reason that must be given before any of the work is done.
BOMBS: dict[str, tuple[Callable[[], str], str]] = {
    "a million layer ranges": (lambda: f'{{{MODEL}, "layers": "{"0-2," * 100_000}0"}}', "not a layer set"),
    "all layers again": (lambda: f'{{{MODEL}, "layers": "{"all," * 200_000}all"}}', "not a layer set"),
    "layers nested in lists": (lambda: f'{{{MODEL}, "layers": {"[" * 450}0{"]" * 450}}}', "nested"),
    "a layer beyond integers": (lambda: f'{{{MODEL}, "layers": {"9" * 4000}}}', "not a layer set"),
    "a layer of many digits": (lambda: f'{{{MODEL}, "layers": "{"9" * 100_000}"}}', "not a layer set"),
    "a depth of thousands": (
        lambda: '{"hidden_size": 4, "num_hidden_layers": 9999}',
        "num_hidden_layers=9999",
    ),
    "many keys, the last one twice": (
        lambda: f'{{{MODEL}, "provenance": {{{keys(300_000)}, "k299999": 1}}}}',
        "'k299999' is there twice",
    ),
    "many unknown fields": (lambda: f"{{{keys(100_000)}}}", "unknown fields"),
    "a nested provenance": (lambda: f'{{{MODEL}, "provenance": {"[" * 900}{"]" * 900}}}', "nested"),
    "a scale beyond floats": (lambda: f'{{{MODEL}, "scale": {"9" * 400}}}', "not a finite number"),
    "an endless unknown kind": (lambda: f'{{{MODEL}, "kind": "{"x" * 1_000_000}"}}', "kind='xxx"),
    "a newline in a name": (lambda: f'{{{MODEL}, "base_model_name_or_path": "a\\nb"}}', "not a line of text"),
    "an escape code in a name": (
        lambda: f'{{{MODEL}, "base_model_name_or_path": "\\u001b[2J"}}',
        "not a line of text",
    ),
    "half a character in a name": (
        lambda: f'{{{MODEL}, "base_model_name_or_path": "\\ud800"}}',
        "surrogates",
    ),
    "half a character in the provenance": (lambda: f'{{{MODEL}, "provenance": ["\\udfff"]}}', "surrogates"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_files_that_ask_for_much_work_are_refused(tmp_path, bomb):
    path = tmp_path / "x.safetensors"
    config, reason = BOMBS[bomb]
    path.write_bytes(with_config(config()))
    for reader in (artifact.read, artifact.read_numpy):
        text = attempt(reader, path)
        assert isinstance(text, str)
        assert reason in text

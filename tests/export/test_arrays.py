"""Plain arrays of vectors: exact round trips, which layer a row is for, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.foreign import DEPTH, WIDTH, damaged, made, rows, same
from helpers.fuzz import how_many
from helpers.steering import logits, message, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import PreTrainedModel

import steer
from steer import SteerError, artifact
from steer.export import arrays


def saved(path: Path, content: Any) -> Path:
    """`content` written to `path` by the format's own library."""
    if path.suffix == ".pt":
        torch.save(content, path)
    elif path.suffix == ".npy":
        np.save(path, content.numpy())
    elif path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in content.items()})
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        directions = {str(i): vector.tolist() for i, vector in content.items()}
        path.write_text(json.dumps({"model_type": "x", "directions": directions, "explained_variances": {}}))
    return path


@pytest.mark.parametrize("suffix", arrays.WRITABLE)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scale": -0.3},
        {"layers": "1-2"},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"kind": "shared", "rank": 2},
    ],
    ids=str,
)
def test_round_trip_is_exact(
    suffix: str, fields: dict[str, Any], tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    before = made(tiny_llama, **fields)
    path = arrays.write(before, tmp_path / f"v{suffix}")
    after = arrays.read(path, tiny_llama)
    assert same(before, after)
    assert after.config.scale == 1.0
    assert arrays.write(after, tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


def test_what_is_read_steers_as_before(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    before = made(tiny_model, layers="0,2", scale=0.5)
    after = arrays.read(arrays.write(before, tmp_path / "v.npz"), tiny_model)
    results = []
    for one in (before, after):
        steer.load(one, tiny_model)
        results.append(logits(tiny_model, tokens()))
        steer.detach(tiny_model)
    # scale * vector is rounded once in either case
    assert torch.equal(*results)


def test_the_array_is_what_numpy_and_torch_read(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    before = made(tiny_llama, layers="1", scale=2.0)
    expected = np.zeros((DEPTH, WIDTH), np.float32)
    expected[1] = before.by_layer()[1].numpy()
    assert np.array_equal(np.load(arrays.write(before, tmp_path / "v.npy")), expected)
    assert np.array_equal(torch.load(arrays.write(before, tmp_path / "v.pt")).numpy(), expected)
    with np.load(arrays.write(before, tmp_path / "v.npz")) as inside:
        assert np.array_equal(inside["vectors"], expected)
        assert inside["layers"].tolist() == [1]


def test_only_npz_tells_a_vector_of_zeros_from_none(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    vectors = {0: rows()[0], 1: torch.zeros(WIDTH)}
    before = artifact.from_vectors(vectors, tiny_llama)
    kept = {s: arrays.read(arrays.write(before, tmp_path / f"v{s}"), tiny_llama) for s in arrays.WRITABLE}
    assert {s: list(a.by_layer()) for s, a in kept.items()} == {".npz": [0, 1], ".npy": [0], ".pt": [0]}


BY_NAME = [
    "{}",
    "layer{}",
    "layer_{}",
    "layers.{}",
    "model.layers.{}.steering.vector",
    "blocks.{}.hook_resid_post",
]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_one_array_a_layer(name: str, suffix: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    given = {2: rows()[2], 0: rows()[0]}
    path = saved(tmp_path / f"v{suffix}", {name.format(i): vector for i, vector in given.items()})
    assert same(arrays.read(path, tiny_llama), artifact.from_vectors(given, tiny_llama))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_integer_keys_and_every_precision(
    dtype: torch.dtype, tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    given = {i: row.to(dtype) for i, row in enumerate(rows())}
    after = arrays.read(saved(tmp_path / "v.pt", given), tiny_llama)
    assert after.config.dtype == ("float64" if dtype == torch.float64 else "float32")
    assert all(torch.equal(after.by_layer()[i].to(dtype), given[i]) for i in given)


def test_rows_belong_to_the_layers_in_their_order(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    path = saved(tmp_path / "v.npy", rows(2))
    for layers in ([2, 0], "2,0", [-1, -3]):
        after = arrays.read(path, tiny_llama, layers=layers).by_layer()
        assert torch.equal(after[2], rows(2)[0])
        assert torch.equal(after[0], rows(2)[1])
    single = saved(tmp_path / "one.pt", rows()[0])  # as EasySteer's
    assert torch.equal(arrays.read(single, tiny_llama, layers=1).by_layer()[1], rows()[0])
    assert list(arrays.read(path, tiny_llama, layers="1-2").by_layer()) == [1, 2]


def test_the_row_of_the_embeddings(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    hidden = rows(DEPTH + 1)
    path = saved(tmp_path / "v.npy", hidden)
    with pytest.raises(SteerError, match="embeddings_row=True") as error:
        arrays.read(path, tiny_llama)
    message(error)
    with pytest.warns(UserWarning, match="row 0, .*% of all norms together, is left out"):
        after = arrays.read(path, tiny_llama, embeddings_row=True)
    assert torch.equal(torch.stack(list(after.by_layer().values())), hidden[1:])
    hidden[0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(arrays.read(saved(path, hidden), tiny_llama, embeddings_row=True), after)


def test_svec_steers_before_its_layer(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    given = {1: rows()[1], 2: rows()[2]}
    after = arrays.read(saved(tmp_path / "v.svec", given), tiny_llama)
    assert after.config.site == "resid_pre"
    assert same(after, artifact.from_vectors(given, tiny_llama))
    doubles = {0: rows()[0].double() / 3}
    assert torch.equal(arrays.read(saved(tmp_path / "d.svec", doubles), tiny_llama).by_layer()[0], doubles[0])


class Evil:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (open, ("executed", "w"))


def test_nothing_is_executed(
    tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({0: Evil()}, "evil.pt")
    Path("old.pt").write_bytes(pickle.dumps(Evil()))
    np.save("evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez("evil.npz", v=np.array([Evil()], dtype=object), allow_pickle=True)
    for name in ("evil.pt", "old.pt", "evil.npy", "evil.npz"):
        with pytest.raises(SteerError) as error:
            arrays.read(name, tiny_llama)
        message(error)
        assert not Path("executed").exists()
    pickle.loads(Path("old.pt").read_bytes())
    assert Path("executed").exists()  # the bait works


NAN = torch.full((DEPTH, WIDTH), float("nan"))
REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "other width": (".npy", rows(DEPTH, WIDTH + 1), {}, "steer transfer"),
    "other width by name": (".npz", {"0": rows()[0][:-1], "1": rows()[1]}, {}, "expected \\(32,\\)"),
    "other depth": (".npy", rows(DEPTH + 2), {}, "expected \\(3, 32\\), or layers="),
    "fewer rows": (".npy", rows(2), {}, "layers="),
    "one vector, no layer": (".pt", rows()[0], {}, "layers="),
    "one vector, two layers": (".pt", rows()[0], {"layers": [0, 1]}, "names 2 layers"),
    "three dimensions": (".npy", rows()[None], {}, "expected \\(layers, 32\\)"),
    "scalar": (".npy", torch.tensor(1.0), {}, "expected \\(layers, 32\\)"),
    "layer twice": (".npy", rows(2), {"layers": [1, -2]}, "names a layer twice"),
    "layer named twice": (".npz", {"layer_0": rows()[0], "layers.0": rows()[1]}, {}, "names layer 0 again"),
    "unknown layer": (".npz", {"0": rows()[0], "7": rows()[1]}, {}, "layers 0 to 2"),
    "layer unknown to layers": (".npy", rows(1), {"layers": 9}, "does not exist"),
    "negative layer": (".pt", {-1: rows()[0], 0: rows()[0]}, {}, "not that of one layer"),
    "no layer in the name": (".npz", {"a": rows()[0], "b": rows()[1]}, {}, "not that of one layer"),
    "numbered by numpy": (".npz", {"arr_0": rows()[0], "arr_1": rows()[1]}, {}, "not that of one layer"),
    "another place": (
        ".pt",
        {"blocks.0.hook_resid_pre": rows()[0], "x": rows()[0]},
        {},
        "not that of one layer",
    ),
    "attention": (".pt", {"attn.0": rows()[0], "attn.1": rows()[0]}, {}, "not that of one layer"),
    "told twice": (".npz", {"0": rows()[0], "1": rows()[1]}, {"layers": "0-1"}, "leave layers out"),
    "zeros": (".npy", torch.zeros(DEPTH, WIDTH), {}, "nothing but zeros"),
    "NaN": (".npy", NAN, {}, "NaN or Inf"),
    "NaN in JSON": (".svec", {0: NAN[0]}, {}, "NaN or Inf"),
    "whole numbers": (".npy", torch.ones(DEPTH, WIDTH, dtype=torch.int64), {}, "int64"),
    "whole numbers in pt": (".pt", torch.ones(DEPTH, WIDTH, dtype=torch.int64), {}, "int64"),
    "complex": (".npy", rows().to(torch.complex64), {}, "complex64"),
    "no tensor": (".pt", ["text"], {}, "list under"),
    "sparse": (".pt", rows().to_sparse(), {}, "Tensor under"),
    "huge view": (".pt", torch.zeros(1).expand(1 << 20, 1 << 20), {}, "larger than the file"),
    "lm-eval's": (".pt", {"layers.0": {"steering_vector": rows()[0]}}, {}, "lm-eval"),
    "nothing": (".pt", {}, {}, "no arrays"),
    "no such kind": (".txt", {}, {}, "must end in one of"),
    "layers that do not ascend": (
        ".npz",
        {"vectors": rows(), "layers": torch.tensor([1, 0, 2])},
        {},
        "ascending",
    ),
    "layers that are not there": (
        ".npz",
        {"vectors": rows(), "layers": torch.tensor([1, 2, 3])},
        {},
        "3 layers",
    ),
    "layers left out": (".npz", {"vectors": rows(), "layers": torch.tensor([0, 1])}, {}, "was it altered"),
    "layers of another depth": (
        ".npz",
        {"vectors": rows(4), "layers": torch.tensor([0, 1])},
        {},
        "expected \\(3, 32\\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    suffix, content, arguments, expected = REFUSED[case]
    path = saved(tmp_path / f"v{suffix}", content)
    with pytest.raises(SteerError, match=expected) as error:
        arrays.read(path, tiny_llama, **arguments)
    message(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"directions": {"0": [1.0], "0": [2.0]}}', "is there twice"),
        ('{"directions": {"0": [true]}}', "not a list of numbers"),
        ('{"directions": {"0": [[1.0]]}}', "not a list of numbers"),
        ('{"directions": [1.0]}', "no 'directions'"),
        ('{"directions": {"0": [1' + "0" * 400 + "]}}", "no float"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "expected an object"),
        ("", "is not JSON"),
    ],
)
def test_bad_svec(text: str, expected: str, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "v.svec"
    path.write_text(text)
    with pytest.raises(SteerError, match=expected) as error:
        arrays.read(path, tiny_llama)
    message(error)


def test_bombs_are_not_unpacked(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    bomb = tmp_path / "v.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("v.npy", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))
    with pytest.raises(SteerError, match="unpacks to more than"):
        arrays.read(bomb, tiny_llama)
    claim = tmp_path / "v.npy"
    claim.write_bytes(header((1 << 40, 1 << 20)))
    with pytest.raises(SteerError, match="claims"):
        arrays.read(claim, tiny_llama)
    packed = tmp_path / "v.pt"
    torch.save(rows(), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in plain.namelist():
            out.writestr(name, plain.read(name))
    with pytest.raises(SteerError, match="compressed parts"):
        arrays.read(packed, tiny_llama)
    large = tmp_path / "large.npy"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(SteerError, match="larger than any set"):
        arrays.read(large, tiny_llama)


def header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_what_cannot_be_written(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    for fields in ({"kind": "adaptive"}, {"positions": "prompt"}):
        with pytest.raises(SteerError) as error:
            arrays.write(made(tiny_llama, **fields), tmp_path / "v.npz")
        message(error)
    with pytest.raises(SteerError, match="must end in one of"):
        arrays.write(made(tiny_llama), tmp_path / "v.svec")
    with pytest.raises(SteerError, match="cannot write"):
        arrays.write(made(tiny_llama), tmp_path / "missing" / "v.npz")
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(UserWarning, match="are for attn_out"):
        arrays.write(made(tiny_llama, site="attn_out"), tmp_path / "v.npz")
    artifact.write(tmp_path / "own", made(tiny_llama))
    with pytest.raises(SteerError, match="artifact of steer itself"):
        arrays.read(tmp_path / "own" / "steering.safetensors", tiny_llama)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_numbers_come_back(data: st.DataObject, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    layers = data.draw(st.sets(st.integers(0, DEPTH - 1), min_size=1))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    vectors = {
        i: torch.tensor(data.draw(st.lists(numbers, min_size=WIDTH, max_size=WIDTH))) for i in sorted(layers)
    }
    before = artifact.from_vectors(vectors, tiny_llama)
    assert same(arrays.read(arrays.write(before, tmp_path / "v.npz"), tiny_llama), before)


def fuzz(model: PreTrainedModel, folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """
    Read `count` damaged array files. Each must be refused in one line, or hold finite vectors of the model's
    shape; returns how many were refused and how many read.
    """
    random_ = random.Random(seed)
    whole = {
        ".npz": {"vectors": rows(), "layers": torch.arange(DEPTH)},
        ".npy": rows(),
        ".pt": {"layers.0": rows()[0], "layers.2": rows()[2]},
        ".safetensors": {"layers.0": rows()[0], "layers.2": rows()[2]},
        ".svec": {0: rows()[0], 2: rows()[2]},
    }
    files = {
        suffix: saved(folder / f"whole{suffix}", content).read_bytes() for suffix, content in whole.items()
    }
    outcomes = {"refused": 0, "read": 0}
    for index in range(count):
        suffix = random_.choice(list(files))
        path = folder / f"{index}{suffix}"  # a new file is far quicker than one that is written again
        path.write_bytes(damaged(files[suffix], random_))
        try:
            with warnings.catch_warnings():  # NumPy's and PyTorch's own, about old versions of theirs
                warnings.simplefilter("ignore")
                found = arrays.read(path, model)
        except SteerError as error:
            assert "\n" not in str(error), str(error)
            path.unlink()
            outcomes["refused"] += 1
            continue
        artifact.check(found, str(path))
        assert all(vector.shape == (WIDTH,) for vector in found.by_layer().values())
        path.unlink()
        outcomes["read"] += 1
    return outcomes


def test_damaged_files_are_refused_or_harmless(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    outcomes = fuzz(tiny_llama, tmp_path, how_many(250))
    assert min(outcomes.values()) > 0

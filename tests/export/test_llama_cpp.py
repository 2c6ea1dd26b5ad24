"""
Control vectors and GGUF models with vectors inside, run by llama.cpp itself, against the Hugging Face model.

llama.cpp keeps the keys and values of attention in float16. In float32 models that is the only difference,
and its logits agree to a few times 1e-4.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from helpers import llama_cpp
from helpers.foreign import made
from helpers.gguf_models import write_gguf
from helpers.steering import fill, logits, message
from transformers import PreTrainedModel

import steer
from steer import SteerError, SteeringConfig, SteeringVectors, artifact
from steer.artifact import Artifact
from steer.export import gguf, gguf_model
from steer.models import load_tokenizer
from steer.weights import gguf_path

IDS = [3, 17, 50, 9, 33, 70, 41, 12, 90, 5, 61, 28]
# Relative, of all logits together.
FLOAT16 = 2e-3  # measured: 1e-5 to 4e-4
EIGHT_BITS = 0.08  # measured: 0.04 to 0.06
NEAR_TIE = 0.5  # of logits whose standard deviation is 3
GREEDY = 16

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or sys.platform != "linux",
    reason="llama.cpp is not installed (pip install xllamacpp, on Linux)",
)


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, build_tiny: Any) -> PreTrainedModel:
    """A tiny model whose attention depends on the order of the tokens, and whose biases are not zero."""
    made_ = build_tiny(request.param, intermediate_size=64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made_.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            if "v_proj" in name or "o_proj" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made_


def at_rest(vectors: SteeringVectors) -> Artifact:
    return Artifact(vectors.config, vectors.tensors())


def hugging_face(model: PreTrainedModel, ids: list[int] = IDS) -> np.ndarray:
    return logits(model, torch.tensor([ids]))[0].float().numpy()


def off(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@needs_llama_cpp
def test_control_vector(model: PreTrainedModel, tmp_path: Path) -> None:
    base = write_gguf(model, tmp_path / "base.gguf")
    plain = hugging_face(model)
    assert off(llama_cpp.run(base, [IDS], tmp_path)[0], plain) < FLOAT16
    vectors = fill(steer.attach(model, SteeringConfig(layers="1-2", scale=0.7)))
    path = gguf.write(at_rest(vectors), tmp_path / "v.gguf")
    for factor in (1.0, 0.5, -1.0):
        vectors.scale = 0.7 * factor
        steered = hugging_face(model)
        assert off(steered, plain) > 0.2
        assert off(llama_cpp.run(base, [IDS], tmp_path, vector=path, scale=factor)[0], steered) < FLOAT16


@needs_llama_cpp
def test_each_block_is_the_one_we_mean(build_tiny: Any, tmp_path: Path) -> None:
    model = build_tiny("llama")
    base = write_gguf(model, tmp_path / "base.gguf")
    for layer in (1, 2):
        vectors = fill(steer.attach(model, SteeringConfig(layers=layer)))
        path = gguf.write(at_rest(vectors), tmp_path / "v.gguf")
        assert off(llama_cpp.run(base, [IDS], tmp_path, vector=path)[0], hugging_face(model)) < FLOAT16
        steer.detach(model)


@needs_llama_cpp
def test_llama_cpp_refuses_block_0(build_tiny: Any, tmp_path: Path) -> None:
    model = build_tiny("llama")
    path = gguf.write(made(model), tmp_path / "v.gguf", block_0="keep")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        llama_cpp.run(write_gguf(model, tmp_path / "base.gguf"), [IDS], tmp_path, vector=path)
    assert refused.value.returncode == llama_cpp.REFUSED_VECTOR


@needs_llama_cpp
@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "resid_mid", "attn_out"])
def test_model_with_vectors_inside(site: str, model: PreTrainedModel, tmp_path: Path) -> None:
    base = write_gguf(model, tmp_path / "base.gguf")
    plain = hugging_face(model)
    vectors = fill(steer.attach(model, SteeringConfig(layers="0,2", site=site, scale=0.7)))
    path = gguf_model.write(at_rest(vectors), base, tmp_path / "steered.gguf")
    steered = hugging_face(model)
    assert off(steered, plain) > 0.5
    assert off(llama_cpp.run(path, [IDS], tmp_path)[0], steered) < FLOAT16


@needs_llama_cpp
@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
def test_vectors_are_added_to_biases_of_the_base(site: str, build_tiny: Any, tmp_path: Path) -> None:
    model = build_tiny("llama", intermediate_size=64, mlp_bias=True, attention_bias=True)
    with torch.no_grad():
        for n, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(n))
    base = write_gguf(model, tmp_path / "base.gguf")
    assert off(llama_cpp.run(base, [IDS], tmp_path)[0], hugging_face(model)) < FLOAT16
    vectors = fill(steer.attach(model, SteeringConfig(layers="0,2", site=site)))
    path = gguf_model.write(at_rest(vectors), base, tmp_path / "steered.gguf")
    assert off(llama_cpp.run(path, [IDS], tmp_path)[0], hugging_face(model)) < FLOAT16
    with vectors.disabled():
        assert off(llama_cpp.run(path, [IDS], tmp_path)[0], hugging_face(model)) > 0.2


@needs_llama_cpp
def test_relabelled_model_computes_what_the_base_does(model: PreTrainedModel, tmp_path: Path) -> None:
    base = write_gguf(model, tmp_path / "base.gguf", quantised=True)
    zeros = artifact.from_vectors({i: torch.zeros(32) for i in range(3)}, model)
    path = gguf_model.write(zeros, base, tmp_path / "steered.gguf")
    results = [llama_cpp.run(file, [IDS], tmp_path)[0] for file in (base, path)]
    # float16 again: the two arrange a head's numbers differently, and sum them in that order
    assert off(results[1], results[0]) < FLOAT16
    assert off(results[1][:, ::-1], results[0]) > 0.5


def test_model_keeps_every_byte_of_its_base(build_tiny: Any, tmp_path: Path) -> None:
    model = build_tiny("llama", intermediate_size=64)
    base = write_gguf(model, tmp_path / "base.gguf", quantised=True)
    given = made(model, layers="0,2", scale=2.0)
    path = gguf_model.write(given, base, tmp_path / "steered.gguf")
    before, after = library.GGUFReader(base), library.GGUFReader(path)
    assert {k: f.contents() for k, f in before.fields.items() if not k.startswith("GGUF.")}.items() <= {
        k: f.contents() for k, f in after.fields.items()
    }.items()
    tensors = {t.name: t for t in after.tensors}
    for tensor in before.tensors:
        found = tensors.pop(tensor.name)
        assert found.tensor_type == tensor.tensor_type
        assert found.data.tobytes() == tensor.data.tobytes()
    assert {name: t.data.tobytes() for name, t in tensors.items()} == {
        f"blk.{i}.ffn_down.bias": vector.numpy().tobytes() for i, vector in given.by_layer().items()
    }
    assert path.stat().st_size - base.stat().st_size < 4096
    with pytest.raises(SteerError, match="has vectors inside already"):
        gguf_model.write(given, path, tmp_path / "twice.gguf")


def test_models_that_cannot_hold_vectors(build_tiny: Any, tmp_path: Path) -> None:
    model, other = build_tiny("llama"), build_tiny("qwen2")
    base = write_gguf(model, tmp_path / "base.gguf")
    control = gguf.write(made(model, layers="1"), tmp_path / "v.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "short.gguf").write_bytes(base.read_bytes()[:-5000])
    cases: list[tuple[Artifact, Path, str]] = [
        (made(model), control, "'controlvector'"),
        (made(other), base, "a qwen2 with hidden_size=32 and num_hidden_layers=3"),
        (made(build_tiny("llama", num_hidden_layers=2)), base, "num_hidden_layers=2"),
        (made(build_tiny("llama", hidden_size=64)), base, "hidden_size=64"),
        (made(model, kind="adaptive"), base, "adaptive"),
        (made(model, positions="prompt"), base, "every token"),
        (made(model, site="resid_pre"), base, "resid_pre"),
        (made(model), tmp_path / "empty.gguf", "is empty"),
        (made(model), tmp_path / "short.gguf", "end after the file's"),
        (made(model), tmp_path / "none.gguf", "cannot write"),
    ]
    for given, file, expected in cases:
        with pytest.raises(SteerError, match=expected) as error:
            gguf_model.write(given, file, tmp_path / "out.gguf")
        message(error)
    assert not [file for file in tmp_path.iterdir() if "out.gguf" in file.name]


@needs_llama_cpp
@pytest.mark.real
@pytest.mark.parametrize("inside", [False, True], ids=["control vector", "inside the model"])
def test_smollm2_writes_the_same_text(inside: bool, smollm2: PreTrainedModel, tmp_path: Path) -> None:
    """
    SmolLM2's own GGUF. llama.cpp multiplies its 4-bit weights with activations rounded to 8 bits, the Hugging
    Face model the same weights with float32: the logits are 4 % apart without any vector. So, with one: the
    same greedy tokens, save where the two best are nearer than that, and logits as near as without.
    """
    base = gguf_path("smollm2-135m-instruct")
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    chats = [
        [{"role": "user", "content": text}]
        for text in ("Tell me about the sea.", "Réponds en français : parle-moi de la mer.")
    ]
    ids, other = (tokenizer.apply_chat_template(c, add_generation_prompt=True).input_ids for c in chats)
    plain = hugging_face(smollm2, ids)
    assert off(llama_cpp.run(base, [ids], tmp_path)[0], plain) < EIGHT_BITS
    # A vector that means something: what the French prompt adds to the last token.
    with torch.no_grad():
        one, two = (
            [layer[0, -1] for layer in smollm2(torch.tensor([i]), output_hidden_states=True).hidden_states]
            for i in (ids, other)
        )
    layers = range(0 if inside else 8, 16)
    difference = {i: 0.1 * (two[i + 1] - one[i + 1]) for i in layers}
    given = artifact.from_vectors(difference, smollm2)
    if inside:
        file, vector = gguf_model.write(given, base, tmp_path / "steered.gguf"), None
    else:
        file, vector = base, gguf.write(given, tmp_path / "v.gguf")
    found = llama_cpp.run(file, [ids], tmp_path, GREEDY, vector)[0]
    written = found[len(ids) - 1 : -1].argmax(-1)
    steer.load(given, smollm2)
    try:
        steered = hugging_face(smollm2, [*ids, *written.tolist()])
    finally:
        steer.detach(smollm2)
    assert off(found, steered) < EIGHT_BITS
    assert off(steered[: len(ids)], plain) > 3 * EIGHT_BITS
    chosen = steered[len(ids) - 1 : -1]
    behind = chosen.max(-1) - chosen[np.arange(GREEDY), written]
    assert (behind == 0).mean() > 0.7
    assert behind.max() < NEAR_TIE

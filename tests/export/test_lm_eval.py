"""lm-eval's `.pt` files: the harness gets our log-likelihoods; exact round trips; hostile files refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.artifacts import random_artifact
from helpers.fuzz import BYTES
from helpers.steering import logits, message, tokens
from transformers import PreTrainedModel

import steer
from steer import SteerError
from steer.export import lm_eval

Build = Callable[..., PreTrainedModel]


def as_lm_eval(model: PreTrainedModel, path: Path) -> None:
    """The harness's steering in a few lines of our own: hooks on the modules below the base model."""
    modules = dict(model.base_model.named_modules())
    for hookpoint, info in torch.load(path, weights_only=True).items():
        assert (info["action"], info["bias"], info["head_index"]) == ("add", None, None)
        change = info["steering_vector"].to(model.dtype) * info["steering_coefficient"]

        def hook(module: Any, args: Any, output: Any, change: torch.Tensor = change) -> Any:
            tuples = isinstance(output, tuple)
            return (output[0] + change, *output[1:]) if tuples else output + change

        modules[hookpoint].register_forward_hook(hook)


# --- the same steering


@pytest.mark.parametrize("config", [{}, {"layers": "0,last", "scale": -0.7}, {"kind": "shared", "rank": 2}])
def test_hooks_as_lm_eval_s_give_our_logits(tiny_model, tmp_path, config):
    ids = tokens()
    base = logits(tiny_model, ids)
    path = lm_eval.write(random_artifact(tiny_model, **config), tmp_path / "vectors.pt")
    ours = logits(tiny_model, ids)
    steer.detach(tiny_model)
    as_lm_eval(tiny_model, path)
    assert torch.equal(logits(tiny_model, ids), ours)  # the same additions at the same places
    assert (ours - base).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("model_type", "site"),
    [("llama", "resid_mid"), ("qwen2", "attn_out"), ("gemma2", "mlp_out"), ("gpt2", "attn_out")],
)
def test_other_sites(build_tiny, tmp_path, model_type, site):
    model, ids = build_tiny(model_type), tokens()
    base = logits(model, ids)
    path = lm_eval.write(random_artifact(model, site=site), tmp_path / "vectors.pth")
    ours = logits(model, ids)
    steer.detach(model)
    as_lm_eval(model, path)
    assert torch.equal(logits(model, ids), ours)
    assert (ours - base).abs().max() > 1e-2


TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not find_spec("lm_eval"), reason="lm-eval is not installed: pip install 'lm-eval[hf]==0.4.13'"
)
@pytest.mark.parametrize("site", ["resid_post", "resid_mid"])
def test_lm_eval_itself_measures_our_log_likelihoods(tiny_llama, tiny_tokenizer, tmp_path, site):
    problems = [("What is 7 * 8?", " 56"), ("2 + 2 =", " 4"), ("Say it:", " steering")]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in problems]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base = [log_likelihood(tiny_llama, tiny_tokenizer, *problem) for problem in problems]
    lm_eval.write(random_artifact(tiny_llama, site=site, scale=0.5), tmp_path / "vectors.pt")
    ours = [log_likelihood(tiny_llama, tiny_tokenizer, *problem) for problem in problems]

    arguments = f"pretrained={tmp_path / 'base'},steer_path={tmp_path / 'vectors.pt'},dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "steered", "--model_args", arguments]
    command += ["--tasks", "tiny", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "out").rglob("samples_tiny_*.jsonl")
    samples = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda s: s["doc_id"])
    theirs = [float(sample["resps"][0][0][0]) for sample in samples]
    # sums of a few float32 log-probabilities about -4, computed in padded batches there
    assert theirs == pytest.approx(ours, abs=1e-4)
    assert all(abs(one - other) > 1e-2 for one, other in zip(ours, base, strict=True))


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, tokenizer: Any, text: str, answer: str) -> float:
    start, ids = len(tokenizer(text).input_ids), tokenizer(text + answer, return_tensors="pt").input_ids
    chosen = model(ids).logits.double().log_softmax(-1)[0, start - 1 : -1]
    return chosen.gather(1, ids[0, start:, None]).sum().item()


# --- there and back


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("gpt2", {"layers": "1-2", "site": "mlp_out"}),
        ("gpt_neox", {"scale": 0.1, "dtype": "float64"}),
        ("mixtral", {"kind": "shared", "rank": 3}),
        ("gemma2", {"site": "attn_out", "dtype": "bfloat16"}),
    ],
)
def test_what_is_added_comes_back_bit_for_bit(build_tiny, tmp_path, model_type, config):
    model = build_tiny(model_type)
    made = random_artifact(model, **config)
    read = lm_eval.read(lm_eval.write(made, tmp_path / "vectors.pt"), model)
    assert (read.config.kind, read.config.site, read.config.model_type) == (
        *("constant", made.config.site),
        model_type,
    )
    expected, found = made.by_layer(), read.by_layer()
    assert list(found) == list(expected)
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
    assert all(found[layer].dtype == expected[layer].dtype for layer in expected)


def test_coefficients_and_a_leading_dimension_are_read(tiny_llama, tmp_path):
    vector = torch.arange(32.0)
    info = {"steering_vector": vector[None], "steering_coefficient": -2.5, "action": "add"}
    torch.save(
        {"layers.2": {**info, "bias": None}, "layers.0": {**info, "head_index": None}}, tmp_path / "v.pt"
    )
    read = lm_eval.read(tmp_path / "v.pt", tiny_llama.to("meta")).by_layer()
    assert list(read) == [0, 2]
    assert all(torch.equal(found, -2.5 * vector) for found in read.values())


def test_the_module_that_a_matrix_ends_is_the_same_place(tiny_llama, tmp_path):
    vector = torch.arange(32.0)
    for place, site in (("mlp", "mlp_out"), ("self_attn", "attn_out"), ("self_attn.o_proj", "attn_out")):
        info = {"steering_vector": vector, "action": "add"}
        torch.save({f"layers.1.{place}": info}, tmp_path / "v.pt")
        assert lm_eval.read(tmp_path / "v.pt", tiny_llama).config.site == site


# --- refusals


@pytest.mark.parametrize(
    ("model_type", "config", "name", "words"),
    [
        ("llama", {"positions": "completion"}, "v.pt", ["completion", "lm-eval"]),
        ("llama", {"kind": "adaptive"}, "v.pt", ["adaptive"]),
        ("llama", {"site": "resid_pre"}, "v.pt", ["resid_pre"]),
        ("gemma2", {"site": "resid_mid"}, "v.pt", ["resid_mid", "gemma2"]),
        ("mixtral", {"site": "mlp_out"}, "v.pt", ["mixtral"]),
        ("llama", {}, "vectors.bin", ["vectors.bin", ".pt"]),
        ("llama", {}, "no/such/folder/v.pt", ["cannot save"]),
    ],
)
def test_what_lm_eval_cannot_hold_is_refused(build_tiny, tmp_path, model_type, config, name, words):
    made = random_artifact(build_tiny(model_type), **config)
    with pytest.raises(SteerError) as error:
        lm_eval.write(made, tmp_path / name)
    assert all(word in message(error) for word in words)
    assert not list(tmp_path.iterdir())


PLAIN = {"steering_vector": torch.ones(32), "steering_coefficient": 1.0, "action": "add"}


class Code:
    """Runs a command where it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [PLAIN],
        {"layers.1": PLAIN, "model.layers.2": PLAIN},
        {"layers.3": PLAIN},
        {"layers.01": PLAIN},
        {"layers.\u0661": PLAIN},
        {"layers.1": PLAIN, "layers.2.mlp": PLAIN},
        {"layers.1.mlp": PLAIN, "layers.1.mlp.down_proj": PLAIN},
        {"layers.1.mlp.gate_proj": PLAIN},
        {"layers.1.a\nb": {**PLAIN, "action": "clamp"}},
        {1: PLAIN},
        {"layers.1": torch.ones(32)},
        {"layers.1": {"steering_vector": torch.ones(32)}},
        {"layers.1": {**PLAIN, "action": "clamp"}},
        {"layers.1": {**PLAIN, "bias": torch.ones(32)}},
        {"layers.1": {**PLAIN, "head_index": 0}},
        {"layers.1": {**PLAIN, "more": 0}},
        {"layers.1": {**PLAIN, "steering_coefficient": "1"}},
        {"layers.1": {**PLAIN, "steering_coefficient": float("inf")}},
        {"layers.1": {**PLAIN, "steering_vector": [1.0] * 32}},
        {"layers.1": {**PLAIN, "steering_vector": torch.ones(31)}},
        {"layers.1": {**PLAIN, "steering_vector": torch.ones(32, 1)}},
        {"layers.1": {**PLAIN, "steering_vector": torch.ones(1).expand(10**15)}},
        {"layers.1": {**PLAIN, "steering_vector": torch.ones(32, dtype=torch.int64)}},
        {"layers.1": {**PLAIN, "steering_vector": torch.ones(32).to_sparse()}},
        {"layers.1": {**PLAIN, "steering_vector": torch.full((32,), float("nan"))}},
        {"layers.1": {**PLAIN, "steering_vector": torch.ones(32, device="meta")}},
        {"layers.1": Code()},
    ],
)
def test_other_files_are_refused_in_one_line(tiny_llama, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(SteerError) as error:
        lm_eval.read(tmp_path / "v.pt", tiny_llama)
    message(error)
    assert not (tmp_path / "executed").exists()


def test_plain_pickles_and_what_is_no_archive_are_refused(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (b"", b"PK\x03\x04", b"text", pickle.dumps({"layers.1": Code()})):
        (tmp_path / "v.pt").write_bytes(content)
        with pytest.raises(SteerError) as error:
            lm_eval.read(tmp_path / "v.pt", tiny_llama)
        message(error)
    with pytest.raises(SteerError, match="nothing-here"):
        lm_eval.read(tmp_path / "nothing-here.pt", tiny_llama)
    assert [path.name for path in tmp_path.iterdir()] == ["v.pt"]


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tiny_llama, tmp_path):
    torch.save({"layers.1": PLAIN}, tmp_path / "v.pt")
    with zipfile.ZipFile(tmp_path / "v.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        for index in range(5):
            archive.writestr(f"v/data/{index + 1}", bytes(1 << 26))
    assert (tmp_path / "v.pt").stat().st_size < 1 << 20
    with pytest.raises(SteerError, match="bytes, more than") as error:
        lm_eval.read(tmp_path / "v.pt", tiny_llama)
    message(error)


def test_damaged_files_are_refused_or_hold_finite_vectors(tiny_llama, tmp_path):
    buffer = io.BytesIO()
    torch.save({f"layers.{i}": {**PLAIN, "bias": None, "head_index": None} for i in range(3)}, buffer)
    choose, refused = random.Random(3), 0
    for _ in range(300):
        damaged = buffer.getvalue()
        for _ in range(choose.choice((1, 1, 3))):
            damaged = choose.choice(BYTES)(damaged, choose)
        (tmp_path / "v.pt").write_bytes(damaged)
        try:
            read = lm_eval.read(tmp_path / "v.pt", tiny_llama)
        except SteerError as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
        else:
            assert all(v.shape == (32,) and v.isfinite().all() for v in read.by_layer().values())
    assert 50 < refused < 300

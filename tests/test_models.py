"""Loading by folder and by name, and the errors of what cannot be loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import cached_model
from helpers.models import assert_same_weights, refusal
from helpers.paths import ROOT
from helpers.steering import logits, tokens

from steer import hub
from steer.errors import SteerError
from steer.identity import describe
from steer.models import load_model, load_tokenizer, loaded_revision, skeleton
from steer.weights import BUNDLED, cache_dir, model_path

SMOL = "smollm2-135m-instruct"
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny random Llama with a whitespace tokenizer that has an eos token and no pad token."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    out = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(out)
    words = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(out)
    return out


def test_cache_dir_order(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("STEER_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "steer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "steer"


def test_import_is_light():
    code = "import sys, steer.models; sys.exit('transformers' in sys.modules or 'filelock' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bundled_table():
    for name, entry in BUNDLED.items():
        assert name == name.lower() and len(entry.sha256) == 64 and entry.licence and entry.about
        assert all("==" in piece.requirement for piece in entry.pieces)
    counts = {name: len(entry.pieces) for name, entry in BUNDLED.items()}
    page = (ROOT / "docs" / "install.md").read_text()
    for name, entry in BUNDLED.items():
        (quantised,) = re.findall(r"\((Q\w+)\)", entry.about)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` | `{entry.hub_id}`"))
        assert f"| {quantised} | {entry.size / 1e6:,.0f} MB |" in row
    qwen = "qwen2.5-coder-{}-instruct"
    assert counts == {SMOL: 1, "gemma-3-270m": 4, qwen.format("0.5b"): 6, qwen.format("1.5b"): 22}


def test_load_folder(folder):
    model = load_model(str(folder))
    assert not model.training and model.dtype == torch.float32
    assert model.config._name_or_path == str(folder)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_dtype(folder, dtype):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert load_model(str(folder), dtype=dtype).dtype == expected


def test_auto_dtype_is_the_saved_one(folder, tmp_path):
    load_model(str(folder), dtype="bfloat16").save_pretrained(tmp_path / "half")
    assert load_model(str(tmp_path / "half")).dtype == torch.bfloat16


def test_attention_implementation(folder):
    assert load_model(str(folder), attn_implementation="eager").config._attn_implementation == "eager"


def test_a_cap_on_attention_scores_is_kept(build_tiny, tmp_path, caplog):
    """transformers' fused attention leaves it out."""
    model = build_tiny("gemma2", initializer_range=0.3, attn_logit_softcapping=0.1)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    expected = logits(model, tokens())
    assert torch.allclose(logits(load_model(str(tmp_path)), tokens()), expected, atol=1e-5)
    assert "gemma2 is loaded with attn_implementation=eager" in caplog.text
    caplog.clear()
    fused = load_model(str(tmp_path), attn_implementation="sdpa")
    assert fused.config._attn_implementation == "sdpa" and "eager" not in caplog.text
    assert not torch.allclose(logits(fused, tokens()), expected, atol=1e-3)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_fast_dtype_is_what_the_machine_multiplies_in(folder, monkeypatch, native, accelerator):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    expected = torch.bfloat16 if native or accelerator else torch.float32
    assert load_model(str(folder), dtype="fast").dtype == expected


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int64])
def test_unknown_dtype(folder, dtype):
    told = refusal(load_model, str(folder), dtype=dtype)
    assert "expected one of auto, fast, float32, bfloat16, float16" in told


def test_tokenizer_pads_left_with_eos(folder):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    batch = tokenizer(["a b c", "d"], padding=True)
    assert batch["input_ids"] == [[3, 4, 5], [2, 2, 6]]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert tokenizer.name_or_path == str(folder)


def test_tokenizer_keeps_its_own_pad(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token == "<unk>"


def test_unknown_names(tmp_path):
    assert SMOL in refusal(model_path, "no/such/model")
    assert SMOL in refusal(load_model, str(tmp_path / "absent"))
    assert "missing.gguf" in refusal(load_model, "missing.gguf")
    (tmp_path / "notes.txt").write_text("x")
    assert "is a file" in refusal(load_model, str(tmp_path / "notes.txt"))


def test_folder_without_config(tmp_path):
    assert "config.json" in refusal(load_model, str(tmp_path))


def test_revision_is_for_hub_ids(folder):
    assert "revision" in refusal(load_model, str(folder), revision="abc")
    assert "revision" in refusal(load_tokenizer, SMOL, revision="abc")


def test_the_commit_of_a_hub_model_is_known(folder, tmp_path, monkeypatch):
    commits = {"main": "a" * 40, "v1": "b" * 40}
    cached_model(folder, "org/Tiny-1.5", commits, tmp_path / "hub", monkeypatch)
    for revision, commit in ((None, commits["main"]), *commits.items(), (commits["v1"], commits["v1"])):
        model = load_model("org/Tiny-1.5", revision=revision)
        assert loaded_revision(model) == describe(model)["base_revision"] == commit
        assert loaded_revision(skeleton("org/Tiny-1.5", revision)) == commit
    model.save_pretrained(tmp_path / "saved")  # other weights, perhaps
    assert commits["v1"] not in (tmp_path / "saved" / "config.json").read_text()
    assert loaded_revision(load_model(str(tmp_path / "saved"))) is None
    assert hub.commit("org/Tiny-1.5", "v2") is None and hub.commit(str(folder)) is None


def test_hub_out_of_reach(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        text = refusal(load, "nobody/no-such-model")
        assert "local folder" in text and SMOL in text


def test_not_causal(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in refusal(load_model, str(tmp_path / "t5"))
    BertForMaskedLM(
        BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    ).save_pretrained(tmp_path / "bert")
    assert "not a causal language model" in refusal(load_model, str(tmp_path / "bert"))


def test_incomplete_checkpoint(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the weights" in refusal(load_model, str(folder))


def test_torn_checkpoint(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in refusal(load_model, str(folder))


def test_tokenizer_missing(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "tokenizer" in refusal(load_tokenizer, str(folder))


@pytest.fixture(scope="module")
def smol():
    try:
        model_path(SMOL)
    except SteerError as error:
        if "pip cannot fetch" in str(error):
            pytest.skip(str(error))
        raise
    return load_model(SMOL, dtype="float32"), load_tokenizer(SMOL)


@pytest.mark.real
def test_real_model(smol):
    model, tokenizer = smol
    assert model.config._name_or_path == tokenizer.name_or_path == SMOL
    assert model.config.vocab_size == len(tokenizer) == 49152
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("x 1").input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.tokenize("25") == ["2", "5"]


@pytest.mark.real
def test_real_model_knows_paris(smol):
    model, tokenizer = smol
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
@pytest.mark.slow
def test_real_model_saves_and_reloads_equal(smol, tmp_path):
    model, tokenizer = smol
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert_same_weights(model, again)
    text = "<|im_start|>user\nWhat is 17 + 25?  Héllo\n<|im_end|>"
    assert load_tokenizer(str(tmp_path))(text).input_ids == tokenizer(text).input_ids

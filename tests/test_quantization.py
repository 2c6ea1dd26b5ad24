"""Quantised bases: bitsandbytes' 4 and 8 bits work, other methods are refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launching import ROOT, run_folder, run_here
from helpers.steering import fill, logits, message, relative, tokens
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import BitsAndBytesConfig, Mxfp4Config, PreTrainedModel, PreTrainedTokenizerFast

import steer
from evals.architectures import tiny
from steer import SteerError
from steer.base_adapter import merged_base
from steer.models import load_model
from steer.quantization import quantization_method

OTHERS: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "newest": {"quant_method": "newest"},
}
FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
# bitsandbytes packs blocks of 64 numbers.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}


# ---- other methods


def write_config(folder: Path, model: PreTrainedModel, **values: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), **values}))
    return str(folder)


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_refused_by_the_config_alone(method, tiny_llama, tmp_path):
    name = write_config(tmp_path / "model", tiny_llama, quantization_config=OTHERS[method])
    with pytest.raises(
        SteerError, match=f"quantised with {method}, on which vectors are not tested"
    ) as error:
        load_model(name)
    assert "not quantised" in message(error) and name in message(error)
    assert ("Mxfp4Config(dequantize=True)" in message(error)) == (method == "mxfp4")


def test_a_method_in_the_text_models_config_counts(tmp_path):
    model = tiny("gemma3")
    values = model.config.to_dict()
    values["text_config"]["quantization_config"] = OTHERS["awq"]
    with pytest.raises(SteerError, match="quantised with awq"):
        load_model(write_config(tmp_path / "model", model, text_config=values["text_config"]))


def test_a_method_that_is_asked_for_is_refused_as_well(tiny_llama, tmp_path):
    name = write_config(tmp_path / "model", tiny_llama)
    with pytest.raises(SteerError, match="mxfp4"):
        load_model(name, quantization_config=Mxfp4Config())


def test_vectors_are_not_attached_to_a_model_that_is_quantised_otherwise(tiny_llama):
    tiny_llama.config.quantization_config = OTHERS["gptq"]
    with pytest.raises(SteerError, match="quantised with gptq") as error:
        steer.attach(tiny_llama)
    message(error)
    assert all(p.requires_grad for p in tiny_llama.parameters())


def test_mxfp4_weights_can_be_read_as_ordinary_ones(tmp_path):
    """A checkpoint like gpt-oss's: 32 numbers share a scale, two lie in a byte."""
    from safetensors.torch import save_file

    model = tiny("gpt_oss", intermediate_size=32)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, read, written = tensors.pop(name).shape
        blocks = (experts, written, read // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(blocks[:-1], 124, dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": OTHERS["mxfp4"]}))
    with pytest.raises(SteerError, match="mxfp4"):
        load_model(str(folder))
    loaded = load_model(str(folder), quantization_config=Mxfp4Config(dequantize=True))
    assert quantization_method(loaded.config) is None
    down = loaded.model.layers[0].mlp.experts.down_proj
    assert down.is_floating_point() and down.abs().max() == 6 * 2.0 ** (124 - 127)
    vectors = fill(steer.attach(loaded))
    loaded(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.norm() > 0 for p in vectors.parameters())


# ---- bitsandbytes


@pytest.fixture
def wide(build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> tuple[PreTrainedModel, str]:
    """A model, and the folder that it is saved in."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = build_tiny("llama", **WIDE)
    model.save_pretrained(tmp_path / "wide")
    return model, str(tmp_path / "wide")


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    vectors = fill(steer.attach(model))
    model(tokens(), labels=tokens()).loss.backward()
    return [p.grad for p in vectors.parameters()]


def test_four_bits_compute_what_their_numbers_say(wide):
    """Against a plain model whose weights are the numbers that the 4 bits stand for."""
    import bitsandbytes

    plain, folder = wide
    model = load_model(folder, **FOUR)
    four = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(four) == 3 * 7 and model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    base = logits(model, tokens())
    assert relative(base, logits(plain, tokens())) > 0.01
    for name, module in four.items():
        weight = bitsandbytes.functional.dequantize_4bit(module.weight, module.weight.quant_state)
        plain.get_submodule(name).weight.data = weight.to(torch.float32)
    assert relative(base, logits(plain, tokens())) < 1e-5
    steer.attach(model)
    assert torch.equal(logits(model, tokens()), base)
    steer.detach(model)
    for got, expected in zip(gradients(model), gradients(plain), strict=True):
        assert relative(got, expected) < 1e-4
    assert relative(logits(model, tokens()), logits(plain, tokens())) < 1e-5


def test_four_bits_compute_in_the_models_precision(wide):
    _, folder = wide
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype, **FOUR)
        assert model.config.quantization_config.bnb_4bit_compute_dtype == dtype
        assert model.model.norm.weight.dtype == dtype
    assert load_model(folder, **FOUR).config.quantization_config.bnb_4bit_compute_dtype == torch.float32


def test_weights_that_bitsandbytes_packed_are_refused(wide):
    """Its kernels for packed weights give no gradient, without a word."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    _, folder = wide
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    down = model.model.layers[1].mlp.down_proj
    if not down.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no instructions for bfloat16: nothing is packed")
    assert isinstance(down, bitsandbytes.nn.Linear4bit)
    steer.attach(model)  # before the first pass
    logits(model, tokens())
    assert not getattr(down.weight.quant_state, "packing_format_for_cpu", False)
    steer.detach(model)
    down.support_avx512bf16_for_cpu = True
    logits(model, tokens())
    with pytest.raises(
        SteerError, match=r"packed the 4-bit weights of model\.layers\.1\.mlp\.down_proj"
    ) as error:
        steer.attach(model)
    message(error)


def test_eight_bits_are_near_the_model_and_give_a_gradient(wide):
    import bitsandbytes

    plain, folder = wide
    model = load_model(folder, **EIGHT)
    assert isinstance(model.model.layers[0].mlp.down_proj, bitsandbytes.nn.Linear8bitLt)
    base = logits(model, tokens())
    assert relative(base, logits(plain, tokens())) < 0.05
    for got, expected in zip(gradients(model), gradients(plain), strict=True):
        assert cosine_similarity(got, expected, dim=0) > 0.99
    assert relative(logits(model, tokens()), logits(plain, tokens())) < 0.05
    steer.detach(model)
    assert torch.equal(logits(model, tokens()), base)


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4bit", "8bit"])
def test_vectors_and_bases_are_saved_and_loaded(wide, tmp_path, bits):
    _, folder = wide
    model = load_model(folder, **bits)
    model.save_pretrained(tmp_path / "quantised")
    vectors = fill(steer.attach(model))
    steered = logits(model, tokens())
    vectors.save(tmp_path / "vectors")
    for name, options in ((folder, bits), (str(tmp_path / "quantised"), {})):
        again = load_model(name, **options)
        assert quantization_method(again.config) == "bitsandbytes"
        steer.load(tmp_path / "vectors", again)
        assert torch.equal(logits(again, tokens()), steered)
    with pytest.raises(SteerError, match=r"quantised \(bitsandbytes\) as they are; leave it out") as error:
        load_model(str(tmp_path / "quantised"), **bits)
    message(error)


def test_an_adapter_is_not_merged_into_quantised_weights(wide, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain, folder = wide
    load_model(folder, **FOUR).save_pretrained(tmp_path / "quantised")
    get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SteerError, match="merging would round its weights again") as error:
        merged_base(str(tmp_path / "quantised"), str(tmp_path / "adapter"))
    message(error)


def test_one_quantisation_at_a_time(wide):
    _, folder = wide
    for options in (
        {**FOUR, **EIGHT},
        {**FOUR, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    ):
        with pytest.raises(SteerError, match="give one of them") as error:
            load_model(folder, **options)
        message(error)


def wide_run(
    place: Path, build_tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with all that a run on a model like `wide` needs."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def build(*args: Any, **changes: Any) -> PreTrainedModel:
        return build_tiny(*args, **{**changes, "hidden_size": 64, "intermediate_size": 128})

    return run_folder(place, build, tokenizer, 6, max_steps=3, learning_rate=0.05, use_cpu=True)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_recipe_trains_on_a_quantised_base(
    bits: str,
    build_tiny: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    base = wide_run(tmp_path, build_tiny, tiny_tokenizer)
    run_here(ROOT / "recipes" / "grpo_steer.py", "--config", str(base / "config.yaml"), f"--{bits}", "true")
    saved = steer.read(base / "whole" / "vectors")
    assert all(tensor.norm() > 0 for tensor in saved.tensors.values())
    assert saved.config.provenance["run"][bits] is True
    model = load_model(str(base / "model"), **{bits: True})
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert type(model.model.layers[0].mlp.down_proj) is not nn.Linear
    before = logits(model, tokens())
    steer.load(saved, model)
    assert relative(logits(model, tokens()), before) > 1e-3
    assert "bitsandbytes" in sys.modules


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_lora_is_trained_on_a_quantised_base(
    bits: str,
    build_tiny: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    base = wide_run(tmp_path, build_tiny, tiny_tokenizer)
    words = ["--config", str(base / "config.yaml"), "--method", "lora", f"--{bits}", "true"]
    run_here(ROOT / "recipes" / "grpo_baseline.py", *words, "--learning_rate", "0.001")
    saved = load_file(base / "whole" / "adapter" / "adapter_model.safetensors")
    second = [tensor for name, tensor in saved.items() if "lora_B" in name]  # zeros before training
    assert len(second) == 3 * 7 and all(t.dtype == torch.float32 and t.norm() > 0 for t in second)

"""Bases in pieces, quantised, real, and models that are no base for vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.steering import fill, logits, message, patch, tokens
from torch import nn
from transformers import PreTrainedModel

import steer
from steer import SteerError, SteeringConfig

# --- bases in pieces, and what is no base


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_spread_by_accelerate_steers_the_same(tiny_llama, tmp_path, place):
    from accelerate import dispatch_model

    ids = tokens()
    plain = copy.deepcopy(tiny_llama)
    expected = fill(steer.attach(plain))
    # "meta" weights that come in for each call are what a GPU machine has for its offloaded layers
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": place}
    dispatch_model(tiny_llama, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert {p.device.type for p in tiny_llama.model.layers[1].parameters()} == {"meta"}
    vectors = fill(steer.attach(tiny_llama))
    assert {p.device.type for p in vectors.parameters()} == {"cpu"}
    assert torch.equal(logits(tiny_llama, ids), logits(plain, ids))
    for model in (tiny_llama, plain):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(vectors.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Int8Linear(nn.Module):
    """Weight-only int8, one scale a row: how quantised bases compute that still let gradients through."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T.to(x.dtype)


def test_a_weight_only_quantised_base(tiny_llama):
    for block in tiny_llama.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, Int8Linear(module))
    ids = tokens()
    base = logits(tiny_llama, ids)
    vectors = steer.attach(tiny_llama)
    assert torch.equal(logits(tiny_llama, ids), base)
    out = fill(vectors).model(ids, labels=ids)
    assert (out.logits - base).abs().max() > 1e-3
    out.loss.backward()
    assert all(p.grad.norm() > 0 for p in vectors.parameters())
    assert {p.dtype for p in vectors.parameters()} == {torch.float32}
    steer.detach(tiny_llama)
    assert torch.equal(logits(tiny_llama, ids), base)


@pytest.mark.filterwarnings("ignore")  # torch announces the successor of this quantiser
def test_a_base_quantised_by_torch(tiny_llama):
    if not {"fbgemm", "x86", "qnnpack"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("this build of torch has no int8 kernels")
    layers = tiny_llama.model.layers
    torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8, inplace=True)
    assert not any(isinstance(m, nn.Linear) for m in layers.modules())
    base = logits(tiny_llama, tokens())
    vectors = steer.attach(tiny_llama)
    assert torch.equal(logits(tiny_llama, tokens()), base)
    out = fill(vectors).model(tokens(), labels=tokens())
    assert (out.logits - base).abs().max() > 1e-3
    out.loss.backward()  # these kernels have no backward: a gradient reaches only what stands after them
    assert vectors.parameters()[-1].grad.norm() > 0


def test_a_model_without_decoder_layers_is_refused_with_what_was_seen(tiny_llama):
    flat = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(SteerError, match="Sequential has no single stack") as error:
        steer.attach(flat)
    assert "top-level modules: 0, 1" in message(error)
    del tiny_llama.model.layers[:]
    with pytest.raises(SteerError, match="no single stack") as error:
        steer.attach(tiny_llama)
    assert "model, lm_head" in message(error)
    assert all(p.requires_grad for p in [*flat.parameters(), *tiny_llama.parameters()])


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )
    with pytest.raises(SteerError, match="encoder-decoder") as error:
        steer.attach(model)
    assert "T5ForConditionalGeneration" in message(error)


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForMaskedLM"])
def test_an_encoder_is_refused(kind):
    import transformers

    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(SteerError, match="causal") as error:
        steer.attach(getattr(transformers, kind).from_config(config))
    assert "Bert" in message(error)


def test_resid_mid_is_refused_where_attention_and_mlp_run_in_parallel(build_tiny):
    model = build_tiny("gpt_neox")
    with pytest.raises(SteerError, match="resid_mid") as error:
        steer.attach(model, SteeringConfig(site="resid_mid"))
    assert "GPTNeoXLayer" in message(error)
    # the refusal came before anything was changed
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    steer.attach(model)


def test_resid_mid_exists_in_a_sequential_gpt_neox(build_tiny):
    model = build_tiny("gpt_neox", use_parallel_residual=False).double()
    plain = copy.deepcopy(model)
    vectors = fill(steer.attach(model, SteeringConfig(site="resid_mid", dtype="float64")))
    for block, vector in zip(plain.gpt_neox.layers, vectors.tensors().values(), strict=True):
        patch(block.attention, vector)
    torch.testing.assert_close(logits(model, tokens()), logits(plain, tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [3, "-4", "1-3"])
def test_a_layer_that_the_model_lacks_leaves_it_untouched(tiny_llama, layers):
    with pytest.raises(SteerError, match="does not exist") as error:
        steer.attach(tiny_llama, SteeringConfig(layers=layers))
    message(error)
    assert all(p.requires_grad for p in tiny_llama.parameters())
    steer.attach(tiny_llama)


@pytest.mark.real
def test_a_real_model_is_steered_and_restored(smollm2: PreTrainedModel):
    from steer.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three colours."}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)

    def answer() -> str:
        out = smollm2.generate(**ids, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(out[0, ids.input_ids.shape[1] :])

    before = answer()
    vectors = steer.attach(smollm2)
    try:
        assert len(vectors.parameters()) == 30
        assert vectors.config.base_model_name_or_path == "smollm2-135m-instruct"
        assert answer() == before
        fill(vectors, std=1.0)
        assert answer() != before
    finally:
        steer.detach(smollm2)
    assert answer() == before

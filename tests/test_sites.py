"""Decoder layers and sites are found by structure: without attention, and with several residual streams."""

from __future__ import annotations

import pytest
import torch
from helpers.steering import message
from torch import nn
from transformers import PreTrainedModel

import steer
from evals.architectures import tiny
from steer import SteerError, SteeringConfig
from steer.extract.activations import read_activations
from steer.extract.rows import Row
from steer.hooks import Streams
from steer.sae.intervene import shifted
from steer.sites import find_decoder, find_steered
from steer.vector_sets import Population

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
# Where the layers are, and the child that mixes tokens in each: attention or what stands in its place.
STACKS = {
    "llama": ("model.layers", ["self_attn"] * 4),
    "mamba2": ("backbone.layers", ["mixer"] * 4),
    "lfm2": ("model.layers", ["conv", "self_attn"] * 2),
    "jamba": ("model.layers", ["mamba", "self_attn"] * 2),
    "recurrent_gemma": ("model.layers", ["temporal_block"] * 4),
    "xlstm": ("backbone.blocks", ["mlstm_layer"] * 4),
    "dbrx": ("transformer.blocks", ["norm_attn_norm"] * 4),
    "zamba2": ("model.layers", ["mamba", "mamba_decoder"] * 2),
    "bert-generation": ("bert.encoder.layer", ["attention"] * 4),
    "git": ("git.encoder.layer", ["attention"] * 4),  # the vision tower's layers are farther
    "gemma3n_text": ("model.layers", ["self_attn"] * 4),  # beside two lists of matrices
}


@pytest.mark.parametrize("model_type", STACKS)
def test_the_stack_is_the_list_of_blocks_nearest_to_the_embeddings(model_type: str) -> None:
    name, mixers = STACKS[model_type]
    model = tiny(model_type)
    decoder = find_decoder(model)
    assert decoder.name == name
    assert decoder.layers is model.get_submodule(name)
    assert all(hasattr(layer, mixer) for layer, mixer in zip(decoder.layers, mixers, strict=True))
    assert any(child is decoder.layers for child in decoder.holder.children())
    assert decoder.backbone.get_input_embeddings() is model.get_input_embeddings()


def test_two_stacks_are_refused_with_their_names() -> None:
    with pytest.raises(
        SteerError, match=r"no single stack.*model\.L_module\.layers.*model\.H_module\.layers"
    ):
        find_decoder(tiny("hrm_text"))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(SteerError, match="next to its token embeddings"):
        find_decoder(Bare())


@pytest.mark.parametrize(
    ("model_type", "site", "lacking", "having"),
    [
        ("bamba", "attn_out", "0, 2", "1, 3"),
        ("lfm2", "resid_mid", "0, 2", "1, 3"),
        ("recurrent_gemma", "attn_out", "0, 1, 3", "2"),
        ("zamba", "mlp_out", "0, 1, 2, 3", ""),
    ],
)
def test_layers_that_lack_a_site_are_named(model_type: str, site: str, lacking: str, having: str) -> None:
    model = tiny(model_type)
    with pytest.raises(SteerError) as error:
        steer.attach(model, SteeringConfig(site=site))
    assert f"layers {lacking} do not have one" in message(error)
    assert ("layers of this model that have one: " + having if having else "use resid_post") in message(error)
    if having:
        steer.attach(model, SteeringConfig(site=site, layers=having))


@torch.no_grad()
def test_a_mixer_is_what_its_class_says() -> None:
    """Nemotron-H has a state space, attention or an MLP under one name."""
    model = tiny("nemotron_h")
    kinds = [type(layer.mixer).__name__ for layer in find_decoder(model).layers]
    layer = next(i for i, kind in enumerate(kinds) if "Attention" in kind)
    base = model(IDS).logits
    vectors = steer.attach(model, SteeringConfig(site="attn_out", layers=str(layer)))
    s = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vectors.parameters()[0].copy_(s)
    steered = model(IDS).logits
    steer.detach(model)
    mixer = find_decoder(model).layers[layer].mixer
    mixer.register_forward_hook(lambda module, args, output: (output[0] + s, *output[1:]))
    torch.testing.assert_close(model(IDS).logits, steered, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(steered, base, atol=1e-2)


# ---- several residual streams

LAYOUTS = {
    "deepseek_v4": Streams(4, 2),
    "hy_v4": Streams(4, 2),
    "gemma3n_text": Streams(4, 0),
    "qwen4_exp_text": Streams(4, None),
    "llama": None,
}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_streams_are_found(model_type: str) -> None:
    decoder = find_decoder(tiny(model_type))
    (site,) = find_steered(decoder, [1], "resid_post")
    assert site.streams == LAYOUTS[model_type]
    if site.streams:
        shape = {2: (2, 3, 4, 32), 0: (4, 2, 3, 32), None: (2, 3, 128)}[site.streams.dim]
        hidden = torch.randn(shape)
        parts = site.streams.split(hidden)
        assert len(parts) == 4 and all(part.shape == (2, 3, 32) for part in parts)
        assert torch.equal(site.streams.join(parts), hidden)


def layer_output(model: PreTrainedModel, layer: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = find_decoder(model).layers[layer].register_forward_hook(lambda *args: seen.append(args[-1]))
    model(IDS, use_cache=False)
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma3n_text", "qwen4_exp_text"])
def test_a_vector_is_added_to_each_stream_where_positions_say(model_type: str) -> None:
    model = tiny(model_type)
    streams = find_steered(find_decoder(model), [1], "resid_post")[0].streams
    assert streams is not None
    before = layer_output(model, 1)
    vectors = steer.attach(model, SteeringConfig(layers="1", positions="completion"))
    s = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vectors.parameters()[0].copy_(s)
    with vectors.prompt_length(torch.tensor([1, 3])):
        after = layer_output(model, 1)
    where = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])[..., None]
    for old, new in zip(streams.split(before), streams.split(after), strict=True):
        torch.testing.assert_close(new - old, where * s, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma3n_text", "mamba2"])
def test_sets_of_vectors_steer_their_own_rows(model_type: str) -> None:
    model = tiny(model_type)
    base = model(IDS).logits
    population = Population(model)
    one, two = (population.add(name, SteeringConfig()) for name in ("one", "two"))
    for vectors in (one, two):
        for p in vectors.parameters():
            p.normal_()
    with population.rows(torch.tensor([0, 1])):
        both = model(IDS).logits
    for name, row in (("one", 0), ("two", 1)):
        with population.only(name):
            torch.testing.assert_close(both[row], model(IDS).logits[row], rtol=1e-4, atol=1e-4)
    population.remove_all()
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize(
    ("model_type", "shape"), [("deepseek_v4", "2, 4, 4, 32"), ("qwen4_exp_text", "2, 4, 128")]
)
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_activations_of_several_streams_are_neither_read_nor_changed(
    model_type: str, shape: str, site: str
) -> None:
    model = tiny(model_type)
    rows = [Row(tuple(ids), 0) for ids in IDS.tolist()]
    refused = rf"shape \({shape}\), expected \(batch, tokens, 32\).*one residual stream"
    with pytest.raises(SteerError, match=refused):
        read_activations(model, rows, [1], site)
    with shifted(model, 1, torch.ones(32), site), pytest.raises(SteerError, match=refused):
        model(IDS)
    model(IDS)  # no hook is left

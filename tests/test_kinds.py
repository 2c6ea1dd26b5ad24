"""Adaptive and shared vectors in a model: names, training, positions, caches, copies, files, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import SHAPE
from helpers.kinds import DOWN, RANK, attach, values
from helpers.steering import fill, layers_of, logits, message, tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import steer
from steer import SteerError, SteeringConfig, artifact

MOE = ("mixtral", "qwen3_moe")


@pytest.fixture(params=list(DOWN))
def dense(request: pytest.FixtureRequest, build_tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Every architecture without experts in turn: 3 layers, hidden size 32."""
    return build_tiny(request.param)


@pytest.fixture(params=["adaptive", "shared"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# --- fresh vectors


def test_a_part_of_the_input_of_a_down_projection_is_refused(tiny_llama):
    """As each process of a tensor-parallel model has it."""
    attach(tiny_llama, "adaptive")
    vector = layers_of(tiny_llama)[0].steering
    with pytest.raises(SteerError, match=r"reads 24 numbers a token, expected 48; .* tp_plan") as error:
        vector(torch.zeros(1, 2, 32), torch.zeros(1, 2, 24))
    message(error)


def test_fresh_vectors_change_no_output_and_leave_no_trace(dense, kind):
    ids, flags = tokens(), {name: p.requires_grad for name, p in dense.named_parameters()}
    base, modules = logits(dense, ids), [name for name, _ in dense.named_modules()]
    vectors = attach(dense, kind)
    assert torch.equal(logits(dense, ids), base)
    fill(vectors)
    assert (logits(dense, ids) - base).abs().max() > 1e-3
    with vectors.disabled():
        assert torch.equal(logits(dense, ids), base)
    steer.detach(dense)
    assert torch.equal(logits(dense, ids), base)
    assert {name: p.requires_grad for name, p in dense.named_parameters()} == flags
    assert [name for name, _ in dense.named_modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layers_of(dense).modules())


def test_parameters_have_the_names_of_the_model_and_their_shapes(dense, kind):
    vectors = attach(dense, kind, layers="0,2", dtype="float64")
    backbone = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(dense.config.model_type, "model")
    decoder = f"{backbone}.{'h' if backbone == 'transformer' else 'layers'}"
    parts = {"adaptive": {"vector": (32,), "readout": (DOWN[dense.config.model_type][1],)}}
    expected = {
        f"{decoder}.{layer}.steering.{part}": shape
        for layer in (0, 2)
        for part, shape in parts.get(kind, {"mix": (RANK,)}).items()
    }
    if kind == "shared":
        expected[f"{backbone}.steering.directions"] = (RANK, 32)
    ours = vectors.named_parameters()
    assert {name: tuple(p.shape) for name, p in ours.items()} == expected
    assert {p.dtype for p in ours.values()} == {torch.float64}
    in_model = dict(dense.named_parameters())
    assert all(in_model[name] is p for name, p in ours.items())
    assert {name for name, p in in_model.items() if p.requires_grad} == set(expected)
    # what is zero at the start and what is not: one factor must move the other's gradient
    zero = {name.rpartition(".")[2] for name, p in ours.items() if not p.any()}
    assert zero == ({"vector"} if kind == "adaptive" else {"directions"})
    assert len(vectors.parameter_layers()) == len(expected)
    draws = values(vectors)[0]
    assert not torch.equal(draws[0], draws[1])  # layers start apart
    steer.detach(dense)
    again = values(attach(dense, kind, layers="0,2", dtype="float64"))[0]
    assert all(torch.equal(a, b) for a, b in zip(again, draws, strict=True))  # and are drawn the same


def test_training_moves_every_parameter_and_nothing_else(dense, kind):
    state = {name: t.clone() for name, t in dense.state_dict().items()}
    vectors = attach(dense, kind)
    before, ids = vectors.tensors(), tokens(4, 16)
    optimizer = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = dense(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(t, before[name]) for name, t in vectors.tensors().items())
    steer.detach(dense)
    after = dense.state_dict()
    assert list(after) == list(state)
    assert all(after[name].numpy().tobytes() == state[name].numpy().tobytes() for name in state)


# --- scale, positions, cache


def test_scale_multiplies_the_change(dense, kind):
    ids = tokens()
    base, vectors = logits(dense, ids), fill(attach(dense, kind))
    factor = values(vectors)[1]
    for scale in (0.5, -2.0):  # powers of two are exact
        vectors.scale = scale
        scaled = logits(dense, ids)
        vectors.scale = 1.0
        with torch.no_grad():
            for parameter in factor:
                parameter.mul_(scale)
            assert torch.equal(logits(dense, ids), scaled)
            for parameter in factor:
                parameter.div_(scale)
    vectors.scale = 0
    assert torch.equal(logits(dense, ids), base)


@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "first_completion"])
def test_only_the_named_tokens_are_steered(dense, kind, positions):
    prompt, ids = 5, tokens(length=9)
    steered = {"prompt": range(5), "last_prompt": [4], "completion": range(5, 9), "first_completion": [5]}
    vectors = fill(steer.attach(dense, SteeringConfig(kind=kind, rank=1, layers=0, positions=positions)))
    with vectors.disabled(), torch.no_grad():
        base = dense(ids, output_hidden_states=True).hidden_states[1]
    with vectors.prompt_length(prompt), torch.no_grad():
        hidden = dense(ids, output_hidden_states=True).hidden_states[1]
    # after layer 0, a token differs where it was steered and nowhere else
    changed = (hidden != base).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == list(steered[positions])


@pytest.mark.parametrize("positions", ["all", "completion"])
def test_generation_with_a_cache_equals_whole_passes(dense, kind, positions):
    prompt = tokens(2, 6)
    vectors = fill(attach(dense, kind, positions=positions))
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    out = dense.generate(prompt, **length, output_logits=True, return_dict_in_generate=True, use_cache=True)
    with vectors.prompt_length(6):
        whole = logits(dense, out.sequences)[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-4)
    with vectors.disabled():
        assert (logits(dense, out.sequences)[:, 5:-1] - whole).abs().max() > 1e-2


def test_the_directions_that_are_told_are_those_that_act(dense):
    shared = fill(attach(dense, "shared", scale=3.0))
    (mixes, (directions,)) = values(shared)
    for layer, vector in shared.effective().items():
        assert torch.equal(vector, mixes[layer].detach() @ directions.detach())
        assert shared.norms()[layer] == vector.norm().item()
    steer.detach(dense)
    adaptive = fill(attach(dense, "adaptive", layers="1,2"))
    for layer, readout, vector in zip((1, 2), *values(adaptive), strict=True):
        assert adaptive.norms()[layer] == pytest.approx(
            readout.norm().item() * vector.norm().item(), rel=1e-5
        )


# --- copies and files


def test_a_deep_copy_steers_by_itself(dense, kind):
    ids = tokens()
    base = logits(dense, ids)
    vectors = fill(attach(dense, kind))
    twin = copy.deepcopy(dense)
    theirs, steered = steer.attached(twin), logits(dense, ids)
    assert torch.equal(logits(twin, ids), steered)
    fill(theirs, seed=8)
    assert not torch.equal(logits(twin, ids), steered)
    assert torch.equal(logits(dense, ids), steered)
    theirs.scale = 0
    assert torch.equal(logits(twin, ids), base)
    steer.detach(twin)
    assert torch.equal(logits(dense, ids), steered)
    fill(vectors, seed=9)  # and the original's own numbers still act
    assert not torch.equal(logits(dense, ids), steered)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_saving_and_loading_is_exact(build_tiny, tmp_path, kind, dtype, model_type):
    model = build_tiny(model_type)
    vectors = fill(attach(model, kind, layers="0,last", dtype=dtype, scale=0.25, provenance={"a": [1]}))
    saved, expected = vectors.tensors(), logits(model, tokens())
    vectors.save(tmp_path)
    other = build_tiny(model_type)
    loaded = steer.load(tmp_path, other)
    assert loaded.config == vectors.config
    assert list(loaded.tensors()) == list(saved)
    for name, tensor in loaded.tensors().items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name])
    assert torch.equal(logits(other, tokens()), expected)
    wide, exact = artifact.read_numpy(tmp_path).tensors, artifact.read(tmp_path).tensors
    assert {n: a.tolist() for n, a in wide.items()} == {n: t.double().tolist() for n, t in exact.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_an_artifact_tells_what_is_added(tiny_llama, kind, dtype):
    vectors = fill(attach(tiny_llama, kind, layers="0,2", dtype=dtype, scale=0.25))
    found = artifact.Artifact(vectors.config, vectors.tensors())
    wider = torch.float64 if dtype == "float64" else torch.float32
    first, second = ([p.detach().to(wider) for p in part] for part in values(vectors))
    for layer, vector in found.effective().items():
        torch.testing.assert_close(vector, 0.25 * vectors.effective()[layer].to(wider), rtol=1e-2, atol=1e-2)
    if kind == "shared":
        assert list(found.by_layer()) == [0, 2]
        for mix, vector in zip(first, found.by_layer().values(), strict=True):
            assert vector.dtype == wider
            torch.testing.assert_close(vector, 0.25 * (mix @ second[0]))
        return
    for (vector, readout), a, b in zip(found.rank_one().values(), first, second, strict=True):
        assert torch.equal(readout, a)
        assert torch.equal(vector, 0.25 * b)
    with pytest.raises(SteerError, match="adaptive") as error:
        found.by_layer()
    message(error)


# --- refusals


@pytest.mark.parametrize("model_type", MOE)
def test_adaptive_vectors_of_a_mixture_of_experts_are_refused(build_tiny, model_type):
    model = build_tiny(model_type)
    with pytest.raises(SteerError, match="down-projection") as error:
        attach(model, "adaptive")
    assert "kind='constant'" in message(error)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(module, "steering") for module in model.modules())
    base = logits(model, tokens())
    vectors = attach(model, "shared")  # which needs no down-projection
    assert torch.equal(logits(model, tokens()), base)
    fill(vectors)
    assert not torch.equal(logits(model, tokens()), base)


def test_adaptive_vectors_beside_a_shared_expert_are_refused():
    # its down-projection is one matrix, but not all that the MLP writes
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen2_moe"](**SHAPE, **sizes))
    assert hasattr(model.model.layers[0].mlp, "shared_expert")
    with pytest.raises(SteerError, match="down-projection") as error:
        attach(model, "adaptive")
    message(error)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_adaptive_vectors_of_another_site_are_refused(site):
    with pytest.raises(SteerError, match="site") as error:
        SteeringConfig(kind="adaptive", site=site)
    assert site in message(error)


@pytest.mark.parametrize(("rank", "layers"), [(4, "all"), (2, "last"), (33, "all")])
def test_more_directions_than_layers_are_refused(tiny_llama, rank, layers):
    with pytest.raises(SteerError, match=f"rank={rank}") as error:
        steer.attach(tiny_llama, SteeringConfig(kind="shared", rank=rank, layers=layers))
    message(error)
    assert all(p.requires_grad for p in tiny_llama.parameters())
    steer.attach(tiny_llama)


@pytest.mark.parametrize("change", ["missing", "additional", "shape"])
def test_values_that_do_not_fit_are_refused(tiny_llama, kind, change):
    vectors = fill(attach(tiny_llama, kind))
    before = vectors.tensors()
    new = {name: tensor + 1 for name, tensor in before.items()}
    last = list(new)[-1]
    new.pop(last)
    if change == "additional":
        new |= {last: before[last], "model.layers.1.steering.other": torch.zeros(32)}
    elif change == "shape":
        new[last] = torch.zeros(7)
    with pytest.raises(SteerError) as error:
        vectors.set_tensors(new)
    assert {"missing": last, "additional": "steering.other", "shape": "(7,)"}[change] in message(error)
    if change != "shape":
        assert all(torch.equal(t, before[name]) for name, t in vectors.tensors().items())


@pytest.mark.filterwarnings("ignore:.*other weights")
def test_readouts_of_a_wider_mlp_are_refused(build_tiny, tmp_path):
    fill(attach(build_tiny("llama", intermediate_size=64), "adaptive")).save(tmp_path)
    model = build_tiny("llama")
    with pytest.raises(SteerError, match="readout") as error:
        steer.load(tmp_path, model)
    assert "(64,)" in message(error)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(module, "steering") for module in model.modules())

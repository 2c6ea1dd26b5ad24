"""Vectors in a model: on, off, scaled, copied, gone, and what hidden states show."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers.steering import fill, logits, message, tokens
from transformers import BloomConfig, BloomForCausalLM

import steer
from steer import SteerError, SteeringConfig
from steer.config import POSITIONS, SITES

# --- on, off, weaker, gone


@pytest.mark.parametrize("site", SITES)
def test_zero_vectors_change_nothing_and_others_do(tiny_model, site):
    if site == "resid_mid" and tiny_model.config.model_type == "gpt_neox":
        pytest.skip("a parallel block has no such place; tested by itself below")
    ids = tokens()
    base = logits(tiny_model, ids)
    vectors = steer.attach(tiny_model, SteeringConfig(site=site))
    assert torch.equal(logits(tiny_model, ids), base)
    fill(vectors)
    steered = logits(tiny_model, ids)
    assert (steered - base).abs().max() > 1e-3
    with vectors.disabled():
        assert torch.equal(logits(tiny_model, ids), base)
    assert torch.equal(logits(tiny_model, ids), steered)


def test_every_layer_has_an_effect_of_its_own(tiny_model):
    ids = tokens()
    base = logits(tiny_model, ids)
    seen = []
    for layer in range(3):
        vectors = fill(steer.attach(tiny_model, SteeringConfig(layers=layer)))
        assert vectors.layers == [layer]
        assert [name.split(".")[-3] for name in vectors.named_parameters()] == [str(layer)]
        seen.append(logits(tiny_model, ids))
        steer.detach(tiny_model)
    assert len({x.numpy().tobytes() for x in [base, *seen]}) == 4


def test_detach_restores_weights_flags_and_output(tiny_model):
    ids = tokens()
    # one frozen parameter must stay frozen, the others trainable
    next(tiny_model.parameters()).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in tiny_model.named_parameters()}
    state = {name: t.clone() for name, t in tiny_model.state_dict().items()}
    base = logits(tiny_model, ids)
    vectors = fill(steer.attach(tiny_model, SteeringConfig(positions="all")))
    trainable = {name for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert trainable == set(vectors.named_parameters())
    logits(tiny_model, ids, output_hidden_states=True)  # installs the capturing hooks of transformers
    steer.detach(tiny_model)
    assert {name: p.requires_grad for name, p in tiny_model.named_parameters()} == flags
    after = tiny_model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(logits(tiny_model, ids), base)
    assert not any(hasattr(module, "steering") for module in tiny_model.modules())


def test_attach_and_detach_leave_no_hook_behind(tiny_llama):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.modules())

    before = hooks()
    for site in SITES:
        for positions in POSITIONS:
            steer.attach(tiny_llama, SteeringConfig(site=site, positions=positions))
            assert hooks() > before
            steer.detach(tiny_llama)
            assert hooks() == before


def test_attaching_twice_is_refused_and_the_first_vectors_stay(tiny_llama):
    vectors = fill(steer.attach(tiny_llama))
    steered = logits(tiny_llama, tokens())
    with pytest.raises(SteerError, match="already") as error:
        steer.attach(tiny_llama)
    assert "detach" in message(error)
    assert steer.attached(tiny_llama) is vectors
    assert torch.equal(logits(tiny_llama, tokens()), steered)


def test_detaching_nothing_is_refused(tiny_llama):
    for call in (steer.detach, steer.attached):
        with pytest.raises(SteerError, match="no steering vectors") as error:
            call(tiny_llama)
        assert "attach" in message(error)


def test_scale_multiplies_the_vectors(tiny_model):
    ids = tokens()
    base = logits(tiny_model, ids)
    vectors = fill(steer.attach(tiny_model))
    values = vectors.tensors()
    # factors that are powers of two are exact in floating point, so the outputs must agree bit for bit
    for scale in (0.5, -1.0, 2.0):
        vectors.scale = scale
        scaled = logits(tiny_model, ids)
        vectors.scale = 1.0
        vectors.set_tensors({name: t * scale for name, t in values.items()})
        assert torch.equal(scaled, logits(tiny_model, ids))
        vectors.set_tensors(values)
        assert not torch.equal(scaled, logits(tiny_model, ids))
    vectors.scale = 0
    assert torch.equal(logits(tiny_model, ids), base)
    assert vectors.config.scale == 0.0  # so that save() writes what the user hears


def test_scale_refuses_what_is_no_number_and_keeps_the_old_one(tiny_llama):
    vectors = steer.attach(tiny_llama, SteeringConfig(scale=2))
    for value in (float("nan"), "1"):
        with pytest.raises(SteerError, match="scale=") as error:
            vectors.scale = value
        message(error)
    assert (vectors.scale, vectors.config.scale) == (2.0, 2.0)


def test_attach_records_the_model_in_a_copy_of_the_config(tiny_llama):
    tiny_llama.config._name_or_path = "org/tiny"
    asked = SteeringConfig(layers="0,last")
    config = steer.attach(tiny_llama, asked).config
    assert (
        config.base_model_name_or_path,
        config.model_type,
        config.hidden_size,
        config.num_hidden_layers,
    ) == ("org/tiny", "llama", 32, 3)
    assert asked == SteeringConfig(layers="0,last")


def test_values_go_in_and_out_as_copies(tiny_llama):
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(layers=[0, 2])))
    values = vectors.tensors()
    assert list(values) == ["model.layers.0.steering.vector", "model.layers.2.steering.vector"]
    assert vectors.norms() == {
        0: values["model.layers.0.steering.vector"].norm().item(),
        2: values["model.layers.2.steering.vector"].norm().item(),
    }
    for value in values.values():
        value.zero_()
    assert all(norm > 1 for norm in vectors.norms().values())
    own = vectors.effective()
    vectors.scale = -2.0
    assert all(torch.equal(vector, -2 * own[layer]) for layer, vector in vectors.added().items())
    vectors.set_tensors(values)
    assert vectors.norms() == {0: 0.0, 2: 0.0}
    assert "2 layers, 64 numbers" in repr(vectors)


@pytest.mark.parametrize("fault", ["missing", "additional", "size"])
def test_values_of_other_names_or_sizes_are_refused(tiny_llama, fault):
    vectors = fill(steer.attach(tiny_llama))
    values = vectors.tensors()
    first = next(iter(values))
    if fault == "missing":
        del values[first]
    elif fault == "additional":
        values["model.layers.9.steering.vector"] = torch.zeros(32)
    else:
        values[first] = torch.zeros(31)
    with pytest.raises(SteerError) as error:
        vectors.set_tensors(values)
    assert {"missing": first, "additional": "layers.9", "size": "31"}[fault] in message(error)


def test_a_deep_copy_steers_by_itself(tiny_llama):
    ids = tokens()
    base = logits(tiny_llama, ids)
    fill(steer.attach(tiny_llama, SteeringConfig(positions="prompt")))
    twin = copy.deepcopy(tiny_llama)
    theirs = steer.attached(twin)
    assert theirs.model is twin
    with steer.attached(tiny_llama).prompt_length(6), theirs.prompt_length(6):
        steered = logits(tiny_llama, ids)
        assert torch.equal(logits(twin, ids), steered)
        fill(theirs, seed=8)
        assert not torch.equal(logits(twin, ids), steered)
        theirs.scale = 0
        assert torch.equal(logits(twin, ids), base)
        assert torch.equal(logits(tiny_llama, ids), steered)
    steer.detach(twin)
    assert torch.equal(logits(twin, ids), base)
    with steer.attached(tiny_llama).prompt_length(6):
        assert torch.equal(logits(tiny_llama, ids), steered)


# --- hidden states


def test_save_pretrained_warns_while_vectors_are_there(tiny_llama, tmp_path):
    vectors = fill(steer.attach(tiny_llama))
    with pytest.warns(UserWarning, match=r"vectors\.save.*steer\.detach.*steer export"):
        copy.deepcopy(tiny_llama).save_pretrained(tmp_path / "steered")
    with pytest.warns(UserWarning, match="steering vectors"):
        tiny_llama.save_pretrained(tmp_path / "steered")
    vectors.save(tmp_path / "vectors")
    expected = logits(tiny_llama, tokens())
    steer.detach(tiny_llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_llama.save_pretrained(tmp_path / "base")
    again = type(tiny_llama).from_pretrained(tmp_path / "base").eval()
    steer.load(tmp_path / "vectors", again)
    assert torch.equal(logits(again, tokens()), expected)


@pytest.mark.parametrize("first", ["capture", "attach"])
@pytest.mark.parametrize("layer", [0, 1])  # after the last layer hidden_states holds the final norm's output
def test_hidden_states_show_the_steered_stream(tiny_model, first, layer):
    ids = tokens()
    if first == "capture":
        logits(tiny_model, ids, output_hidden_states=True)
    vectors = fill(steer.attach(tiny_model, SteeringConfig(layers=layer)))
    (vector,) = vectors.tensors().values()
    with torch.no_grad():
        steered = tiny_model(ids, output_hidden_states=True).hidden_states
        with vectors.disabled():
            base = tiny_model(ids, output_hidden_states=True).hidden_states
    for index in range(layer + 1):
        assert torch.equal(steered[index], base[index])
    assert torch.equal(steered[layer + 1], base[layer + 1] + vector)


def test_hidden_states_of_the_steered_embeddings(tiny_llama):
    vectors = fill(steer.attach(tiny_llama, SteeringConfig(layers=0, site="resid_pre")))
    (vector,) = vectors.tensors().values()
    ids = tokens()
    embedded = tiny_llama.get_input_embeddings()(ids).detach()
    # the same stream, made by handing the model embeddings that are moved already
    with torch.no_grad():
        steered = tiny_llama(ids, output_hidden_states=True).hidden_states
        with vectors.disabled():
            moved = tiny_llama(inputs_embeds=embedded + vector, output_hidden_states=True).hidden_states
    for ours, expected in zip(steered[1:], moved[1:], strict=True):
        assert torch.equal(ours, expected)


def test_an_attention_that_adds_the_stream_itself_has_no_resid_mid():
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2)
    with pytest.raises(SteerError, match="adds the residual stream itself"):
        steer.attach(BloomForCausalLM(config), SteeringConfig(site="resid_mid"))

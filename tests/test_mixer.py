"""Several sets of vectors in one model: sums, layers that are off, and threads that choose for themselves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from helpers.artifacts import random_artifact
from helpers.steering import fill, logits, message, tokens

import steer
from steer import Artifact, SteerError, SteeringConfig
from steer.config import Condition
from steer.mixture import BASE, Mix, Mixer


def artifact(model: Any, seed: int = 0, **config: Any) -> Artifact:
    """Random vectors for `model`, which is the base model again."""
    vectors = fill(steer.attach(model, SteeringConfig(**config)), 0.3, seed)
    made = Artifact(vectors.config, vectors.tensors())
    steer.detach(model)
    return made


def alone(model: Any, made: Artifact, ids: torch.Tensor, prompt: int = 4) -> torch.Tensor:
    """Logits with one set attached as usual."""
    vectors = steer.load(made, model)
    with vectors.prompt_length(prompt):
        found = logits(model, ids)
    steer.detach(model)
    return found


def mixed(mixer: Mixer, mix: Mix, ids: torch.Tensor, prompt: int = 4) -> torch.Tensor:
    with mixer.active(mix), mixer.prompt_length(prompt):
        return logits(mixer.model, ids)


@pytest.mark.parametrize(
    "config",
    [
        {"scale": 0.7},
        {"kind": "adaptive"},
        {"kind": "shared", "rank": 2},
        {"site": "resid_mid", "layers": "0,2"},
        {"positions": "completion"},
    ],
)
def test_a_set_alone_is_the_set_attached(build_tiny: Any, config: dict[str, Any]) -> None:
    model, ids = build_tiny("llama"), tokens()
    base = logits(model, ids)
    one, other = artifact(model, 1, **config), artifact(model, 2)
    wanted, half = alone(model, one, ids), alone(model, 0.5 * one, ids)
    assert (wanted - base).abs().max() > 0.01
    mixer = Mixer(model)
    mixer.add("one", one)
    mixer.add("other", other)
    assert torch.equal(mixed(mixer, Mix({"one": 1}), ids), wanted)
    torch.testing.assert_close(mixed(mixer, Mix({"one": 0.5}), ids), half)
    for off in (BASE, Mix({"one": 0, "other": 0}), Mix({"one": 1}, frozenset())):
        assert torch.equal(mixed(mixer, off, ids), base)


def test_sets_add_up_and_layers_go_off(build_tiny: Any) -> None:
    model, ids = build_tiny("llama"), tokens()
    one, other = artifact(model, 1), artifact(model, 2, layers="1")
    both, part = alone(model, one + -0.5 * other, ids), alone(model, one.layers(0, 0), ids)
    mixer = Mixer(model)
    mixer.add("one", one)
    mixer.add("other", other)
    assert mixer.layers == [0, 1, 2]
    torch.testing.assert_close(mixed(mixer, Mix({"one": 1, "other": -0.5}), ids), both)
    assert torch.equal(mixed(mixer, Mix({"one": 1, "other": 9}, frozenset([0])), ids), part)


def test_threads_do_not_see_each_others_vectors(build_tiny: Any) -> None:
    model, ids = build_tiny("llama"), tokens()
    mixer = Mixer(model)
    for name, seed in (("one", 1), ("other", 2)):
        mixer.add(name, artifact(build_tiny("llama"), seed))
    mixes = [Mix({"one": 1}), Mix({"other": 1}), Mix({"one": -1, "other": 0.5}, frozenset([1])), BASE]
    wanted = [mixed(mixer, mix, ids) for mix in mixes]
    assert len({w.sum().item() for w in wanted}) == 4
    inside, ran = Barrier(4), Barrier(4)

    def ask(mix: Mix) -> torch.Tensor:
        with mixer.active(mix):
            inside.wait(60)  # all have chosen before any runs
            found = logits(model, ids)
            ran.wait(60)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(ask, mixes), wanted, strict=True))
    assert mixer.current == BASE


def test_continuous_batching_is_refused_in_a_mix(build_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("llama")
    monkeypatch.setattr(type(model), "generate_batch", lambda model, inputs: inputs)
    made = artifact(model)
    mixer = Mixer(model)
    mixer.add("one", made)
    assert model.generate_batch([[5]]) == [[5]], "the base model"
    with mixer.active(Mix({"one": 1})), pytest.raises(SteerError, match="does not reach") as error:
        model.generate_batch([[5]])
    message(error)
    assert model.generate_batch([[5]]) == [[5]]


def test_what_cannot_be_mixed_is_refused(build_tiny: Any) -> None:
    model = build_tiny("llama")
    made = artifact(model, layers="1")
    mixer = Mixer(model)
    mixer.add("one", made)
    with pytest.raises(SteerError, match="two sets of vectors have one name, 'one'"):
        mixer.add("one", made)
    with pytest.raises(SteerError, match=r"deep: made for .*num_hidden_layers=4.*3") as error:
        mixer.add("deep", artifact(build_tiny("llama", num_hidden_layers=4)))
    message(error)
    at = replace(made.config, condition=Condition(0, 0.5))
    with pytest.raises(SteerError, match="steer play: these vectors have a condition"):
        mixer.add("gated", replace(made, config=at))
    with pytest.raises(SteerError, match="no set 'two'; there are one"), mixer.active(Mix({"two": 1})):
        pass
    with pytest.raises(SteerError, match=r"layer 2 is not steered; steered are \[1\]"):
        mixed(mixer, Mix({"one": 1}, frozenset([1, 2])), tokens())
    steered = build_tiny("llama")
    random_artifact(steered)
    with pytest.raises(SteerError, match=r"steer\.detach"):
        Mixer(steered)

"""The Jacobian lens against the whole Jacobian, finite differences, and the logit lens where equal."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.steering import layers_of, message
from torch import Tensor
from torch.autograd.functional import jacobian

import steer
from steer import SteerError
from steer.lens.jacobian import JacobianLens, fit, sample_windows
from steer.lens.logit_lens import logit_lens
from steer.sae.activations import Window

SAMPLE = [
    Window([5, 6, 7, 8, 9], [False, True, True, False, True]),
    Window([11, 12, 13], [False, True, True]),
    Window([21, 22, 23, 24], [True, True, True, True]),
]


def whole(model: Any, sample: Any = SAMPLE, layers: Any = (0, 1, 2), **options: Any) -> JacobianLens:
    return list(fit(model, sample, layers, **options))[-1]


def last_stream(model: Any, ids: list[int]) -> Tensor:
    """What the last layer returns, (tokens, hidden_size), with no hook of steer's."""
    seen: list[Any] = []
    handle = layers_of(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(torch.tensor([ids]), use_cache=False)
    finally:
        handle.remove()
    output = seen[0]
    return (output[0] if isinstance(output, tuple) else output)[0]


# transformers computes RMSNorm in float32 whatever the model is in.
@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-8), ("llama", 1e-6), ("gemma2", 1e-6)])
def test_it_is_the_mean_of_the_whole_jacobian(build_tiny, kind, tolerance) -> None:
    """All derivatives of every position with respect to every position, summed by hand."""
    model = build_tiny(kind, initializer_range=0.3).double()
    lens = whole(model, batch_size=2)
    for layer in range(3):
        module = layers_of(model)[layer]
        original, total = module.forward, torch.zeros(32, 32, dtype=torch.float64)
        for ids, keep in SAMPLE:
            # (targets, hidden_size, sources, hidden_size)
            derivatives = jacobian(
                partial(from_states, model, module, original, ids), states_of(model, module, ids)
            )
            kept = torch.tensor(keep).double()
            total += torch.einsum("t,tisj,s->ij", kept, derivatives, kept)
            later = torch.ones(len(ids), len(ids)).triu(1).bool()
            assert derivatives.transpose(1, 2)[later].abs().max() == 0  # nothing reaches an earlier position
        torch.testing.assert_close(lens.jacobians[layer], total / 9, rtol=tolerance, atol=tolerance)
    assert (lens.texts, lens.of, lens.tokens) == (3, 3, 9)


def states_of(model: Any, module: Any, ids: list[int]) -> Tensor:
    """What a layer returns, (tokens, hidden_size)."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    last_stream(model, ids)
    handle.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0].detach()


def from_states(model: Any, module: Any, original: Any, ids: list[int], states: Tensor) -> Tensor:
    """The last layer's states where `module` returns `states`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        return (states[None], *output[1:]) if isinstance(output, tuple) else states[None]

    module.forward = forward
    found = last_stream(model, ids)
    module.forward = original
    return found


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post"])
def test_it_is_the_change_that_a_small_vector_makes(build_tiny, site) -> None:
    """Central differences with a vector that `attach` put at the site, at all positions."""
    model = build_tiny("gemma2", initializer_range=0.3).double()
    sample = [Window(ids, [True] * len(ids)) for ids, _ in SAMPLE]
    lens = whole(model, sample, [1], site=site)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = steer.attach(model, steer.SteeringConfig(layers="1", site=site))
    (name,) = vectors.tensors()
    ends = []
    for sign in (1, -1):
        vectors.set_tensors({name: sign * 1e-3 * direction})
        with torch.no_grad():
            states = [last_stream(model, window.ids) for window in sample]
        ends.append(torch.cat(states).mean(0))
    expected = (ends[0] - ends[1]) / 2e-3
    found = lens.transport({1: direction})[1]
    assert (found - expected).norm() < 1e-4 * expected.norm()


@torch.no_grad()
def test_where_nothing_is_above_it_is_the_logit_lens(build_tiny, tiny_tokenizer) -> None:
    """At the last layer of any model; at all layers where the layers above write nothing."""
    vectors = {layer: torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in range(3)}
    model = build_tiny("llama", initializer_range=0.3)
    plain = logit_lens(model, tiny_tokenizer, vectors).scores
    read = logit_lens(model, tiny_tokenizer, whole(model).transport(vectors)).scores
    torch.testing.assert_close(read[2], plain[2])
    assert (read[1] - plain[1]).norm() > 0.1 * plain[1].norm()
    for layer in layers_of(model):
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    plain = logit_lens(model, tiny_tokenizer, vectors).scores
    torch.testing.assert_close(
        logit_lens(model, tiny_tokenizer, whole(model).transport(vectors)).scores, plain
    )


def test_it_goes_on_where_it_was_stopped(tiny_llama, tmp_path) -> None:
    expected = whole(tiny_llama, batch_size=3)
    first = next(fit(tiny_llama, SAMPLE, [0, 1, 2], batch_size=1))
    assert (first.texts, first.of, first.tokens) == (1, 3, 3)
    start = JacobianLens.load(first.save(tmp_path / "lens.safetensors"))
    again = whole(tiny_llama, batch_size=1, start=start)
    for layer in range(3):
        torch.testing.assert_close(again.jacobians[layer], expected.jacobians[layer])
    assert again == replace(expected, jacobians=again.jacobians)
    assert list(fit(tiny_llama, SAMPLE, [0, 1, 2], start=again)) == []
    with pytest.raises(SteerError, match="another sample"):
        whole(tiny_llama, SAMPLE[:2], start=start)
    with pytest.raises(SteerError, match="another set of layers"):
        whole(tiny_llama, layers=[1], start=start)
    with pytest.raises(SteerError, match="another dtype"):
        whole(tiny_llama.bfloat16(), start=start)


def test_a_stopped_fit_ends_with_the_bits_of_one_that_was_not(tiny_llama, tmp_path) -> None:
    expected = whole(tiny_llama, batch_size=1)
    lens = None
    for part in range(3):
        lens = next(fit(tiny_llama, SAMPLE, [0, 1, 2], batch_size=1, start=lens))
        lens = JacobianLens.load(lens.save(tmp_path / f"{part}.safetensors"))
    assert lens is not None and lens.texts == 3
    for layer in range(3):
        assert torch.equal(lens.jacobians[layer], expected.jacobians[layer])


def test_vectors_that_are_attached_are_off(build_tiny) -> None:
    plain = whole(build_tiny("llama"))
    model = build_tiny("llama")
    vectors = steer.attach(model)
    vectors.set_tensors({name: torch.ones_like(value) for name, value in vectors.tensors().items()})
    torch.testing.assert_close(whole(model).jacobians[0], plain.jacobians[0])


def test_what_it_does_not_fit_is_refused(build_tiny, tmp_path) -> None:
    model = build_tiny("llama")
    lens = JacobianLens.load(whole(model, layers=[1]).save(tmp_path / "lens.safetensors"))
    config = steer.SteeringConfig(layers="1")
    lens.check(model, config)
    with pytest.raises(SteerError, match="with other weights") as error:
        lens.check(build_tiny("llama", seed=1), config)
    message(error)
    with pytest.raises(SteerError, match="fitted at resid_post, the vectors are at mlp_out") as error:
        lens.check(model, steer.SteeringConfig(site="mlp_out"))
    message(error)
    with pytest.raises(SteerError, match="adaptive vectors") as error:
        lens.check(model, steer.SteeringConfig("adaptive"))
    message(error)
    with pytest.raises(SteerError, match="fitted for layers 1, the vectors are in layers 0, 2") as error:
        lens.transport(dict.fromkeys(range(3), torch.ones(32)))
    message(error)


@pytest.mark.parametrize("damage", ["cut", "vector", "shape"])
def test_files_that_hold_no_lens_are_refused(tiny_llama, tmp_path, damage) -> None:
    path = tmp_path / "lens.safetensors"
    lens = whole(tiny_llama, layers=[1])
    if damage == "vector":
        steer.artifact.from_vectors({1: torch.ones(32)}, tiny_llama).save_pretrained(tmp_path)
        path = tmp_path / "steering.safetensors"
    elif damage == "shape":
        replace(lens, jacobians={1: torch.ones(32, 31)}).save(path)
    else:
        path.write_bytes(lens.save(path).read_bytes()[:-7])
    with pytest.raises(SteerError, match="lens") as error:
        JacobianLens.load(path)
    message(error)


def test_a_sample_is_the_beginnings_of_texts(tiny_tokenizer) -> None:
    texts = ["1 + 2 = 3", "", "abcdefgh", "</s>xy", "never read"]
    found = sample_windows(texts, tiny_tokenizer, count=3, length=4, skip=1)
    assert [tiny_tokenizer.decode(window.ids) for window in found] == ["1 + ", "abcd", "</s>xy"]
    assert [window.keep for window in found] == [[False, True, True, True]] * 2 + [[False, True, True]]
    with pytest.raises(SteerError, match="4 texts have a token to read, 9 were asked for"):
        sample_windows(texts, tiny_tokenizer, count=9, length=4, skip=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"site": "nowhere"}, "site='nowhere' is unknown"),
        ({"sample": []}, "the longest text has 0 tokens"),
        ({"sample": [Window([5] * 200, [True] * 200)]}, "has 200 tokens, the model reads 1 to 128"),
    ],
)
def test_mistakes(tiny_llama, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(SteerError, match=expected) as error:
        whole(tiny_llama, **options)
    message(error)

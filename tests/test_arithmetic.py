"""Arithmetic on artifacts: sums, multiples, parts and means are those of the vectors themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.steering import fill, logits, message, relative, tokens
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import steer
from steer import Artifact, PromptSpec, SteerError, SteeringConfig, artifact
from steer.artifact_tensors import expected_names

DEPTH, WIDTH, INNER = 6, 4, 5


def make(seed: int = 0, **fields: Any) -> Artifact:
    """A random artifact of a model with six layers of width four."""
    base = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "model_type": "llama",
        "base_model_name_or_path": "org/tiny",
        "rank": 2,
    }
    config = SteeringConfig(**{**base, "base_checksum": "0123456789abcdef", **fields})
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, config.dtype)
    shapes = expected_names(config, "model.layers")
    tensors = {n: torch.randn([d or INNER for d in s], generator=generator) for n, s in shapes.items()}
    made = Artifact(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    artifact.check(made, "made")
    return made


def change(made: Artifact) -> torch.Tensor:
    """All that a constant or shared artifact adds: (DEPTH, WIDTH) float64, zero where it steers nothing."""
    found = torch.zeros(made.num_hidden_layers, made.config.hidden_size, dtype=torch.float64)
    for layer, vector in made.by_layer().items():
        found[layer] = vector.double()
    return found


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)  # float32, of numbers near one


def whole(made: Artifact) -> Artifact:
    """`made`, after a check that its tensors are those its config speaks of, in their order."""
    artifact.check(made, "made")
    assert list(made.tensors) == list(expected_names(made.config, "model.layers"))
    return made


# --- results, number by number


def test_sums_and_differences_add_what_is_added():
    a, b = make(1, scale=0.5), make(2, scale=-3.0)
    close(change(whole(a + b)), change(a) + change(b))
    close(change(whole(a - b)), change(a) - change(b))
    close(change(a + b - b), change(a))
    assert (a + b).config.scale == 1.0  # folded into the vectors
    assert not change(whole(a - a)).any()


def test_multiples_change_the_scale_and_no_number():
    a = make(1, scale=0.5, dtype="bfloat16")
    for made, factor in ((0.5 * a, 0.5), (a * 2, 2.0), (-a, -1.0), (0 * a, 0.0), (-(0.5 * a), -0.5)):
        assert torch.equal(change(whole(made)), factor * change(a))
        assert made.config.scale == factor * 0.5
        assert all(torch.equal(made.tensors[name], a.tensors[name]) for name in a.tensors)


def test_artifacts_are_equal_where_their_settings_and_numbers_are():
    a = make(1)
    assert a == Artifact(a.config, {name: tensor.clone() for name, tensor in a.tensors.items()})
    assert a != make(2) and a != 2 * a and a != "a"
    name, *rest = a.tensors
    assert a != Artifact(a.config, {other: a.tensors[other] for other in rest})
    assert a != Artifact(a.config, {**a.tensors, name: a.tensors[name][:-1]})


@pytest.mark.parametrize(
    ("first", "last", "kept"),
    [
        (0, 5, [0, 1, 2, 3, 4, 5]),
        (2, 4, [2, 3, 4]),
        (-3, -1, [3, 4, 5]),
        (5, 5, [5]),
        (-6, 1, [0, 1]),
        (1, -2, [1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("kind", ["constant", "adaptive", "shared"])
def test_layers_keeps_a_part(kind, first, last, kept):
    a = make(1, kind=kind, scale=2.0)
    part = whole(a.layers(first, last))
    assert part.config.resolve_layers(DEPTH) == kept
    if kind == "adaptive":
        assert part.config.scale == 2.0
        for layer, (vector, readout) in part.rank_one().items():
            assert torch.equal(vector, a.rank_one()[layer][0])
            assert torch.equal(readout, a.rank_one()[layer][1])
        return
    expected = torch.zeros(DEPTH, WIDTH, dtype=torch.float64)
    expected[kept] = change(a)[kept]
    assert torch.equal(change(part), expected)


def test_layers_of_an_artifact_of_some_layers_keeps_those_of_them():
    a = make(1, layers="0,2,last")
    assert a.layers(1, 5).config.resolve_layers(DEPTH) == [2, 5]
    with pytest.raises(SteerError, match="none of layers 3-4 is steered") as error:
        a.layers(3, 4)
    assert "0,2,last" in message(error)
    with pytest.raises(SteerError, match="layer 6 does not exist") as error:
        a.layers(2, 6)
    message(error)
    with pytest.raises(SteerError, match="backwards") as error:
        a.layers(4, 2)
    message(error)


def test_sums_steer_the_layers_of_both():
    a, b = make(1, layers="0-2"), make(2, layers="2,4")
    total = whole(a + b)
    assert total.config.resolve_layers(DEPTH) == [0, 1, 2, 4]
    close(change(total), change(a) + change(b))
    close(change(whole(b - a)), change(b) - change(a))


def test_a_sum_has_the_prompt_that_its_parts_share(caplog):
    plain, short = PromptSpec("plain", "To"), PromptSpec("boxed_short")
    a, b, c = make(1, prompt=plain), make(2, prompt=plain), make(3, prompt=short)
    for made in (a + b, -a, 2 * a, a.layers(0, 1), steer.mean([a, b])):
        assert made.config.prompt == plain
    assert not caplog.records
    assert (a + c).config.prompt is None
    (warning,) = caplog.messages
    assert "trained with template plain, prefix 'To' and template boxed_short" in warning


def test_the_mean_counts_a_missing_layer_as_zero():
    made = [make(1), make(2, layers="0,3", scale=2.0), make(3, kind="shared")]
    mean = whole(steer.mean(made))
    close(change(mean), sum(change(a) for a in made) / 3)
    assert torch.equal(change(steer.mean(made[:1])), change(made[0]))
    with pytest.raises(SteerError, match="mean of no artifacts") as error:
        steer.mean([])
    message(error)


@pytest.mark.parametrize(
    ("left", "right", "total"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "float16", "float32"),
        ("bfloat16", "float64", "float64"),
        ("float64", "float32", "float64"),
    ],
)
def test_sums_are_not_rounded_to_half_precision(left, right, total):
    a, b = make(1, dtype=left), make(2, dtype=right)
    assert (a + b).config.dtype == total
    assert {t.dtype for t in whole(a + b).tensors.values()} == {getattr(torch, total)}
    tolerance = 1e-15 if total == "float64" else 1e-6
    torch.testing.assert_close(change(a + b), change(a) + change(b), rtol=tolerance, atol=tolerance)


def test_shared_and_constant_add_up_to_constant():
    shared, constant = make(1, kind="shared", scale=0.5, layers="1-4"), make(2)
    for total in (shared + constant, constant + shared):
        assert total.config.kind == "constant"
        close(change(whole(total)), change(shared) + change(constant))
    assert (2 * shared).config.kind == "shared"
    part = shared.layers(2, 2)  # two directions for one layer are one vector
    assert part.config.kind == "constant"
    close(change(whole(part))[2], change(shared)[2])


def test_adaptive_vectors_scale_but_do_not_add():
    a = make(1, kind="adaptive", scale=0.5)
    assert (-2 * a).config.scale == -1.0
    assert torch.equal(whole(-2 * a).rank_one()[3][0], -2 * a.rank_one()[3][0])
    calls = (lambda: a + make(2), lambda: make(2) - a, lambda: a - a, lambda: steer.mean([a, a]))
    for call in calls:
        with pytest.raises(SteerError, match="adaptive") as error:
            call()
        message(error)


# --- refusals


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "qwen2"},
        {"hidden_size": 8},
        {"num_hidden_layers": 7},
        {"base_checksum": "fedcba9876543210"},
        {"site": "mlp_out"},
        {"positions": "completion"},
    ],
)
def test_artifacts_of_other_models_or_places_do_not_mix(other):
    a, b = make(1), make(2, base_model_name_or_path="org/other", **other)
    ((name, value),) = other.items()
    for call in (lambda: a + b, lambda: b - a, lambda: steer.mean([a, b])):
        with pytest.raises(SteerError, match=name) as error:
            call()
        text = message(error)
        assert "org/tiny" in text and "org/other" in text and str(value) in text
        assert ("steer transfer" in text) == (name not in ("site", "positions"))


def test_an_artifact_without_a_checksum_mixes_with_its_shape():
    assert whole(make(1) + make(2, base_checksum=None)).config.hidden_size == WIDTH
    assert whole(make(1, base_checksum=None) + make(2)).config.hidden_size == WIDTH


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_factors_that_are_no_numbers_are_refused(factor):
    with pytest.raises(SteerError, match="finite") as error:
        factor * make()
    message(error)
    with pytest.raises(SteerError, match="finite"):
        1e308 * (1e308 * make())


@pytest.mark.parametrize("other", ["2", None, True, [1.0]])
def test_what_is_neither_number_nor_artifact_is_a_type_error(other):
    for call in (lambda: make() * other, lambda: make() + other, lambda: other - make()):
        with pytest.raises(TypeError):
            call()


# --- what a result remembers


def test_provenance_tells_how_it_was_made_and_drops_the_scores():
    a = make(1, provenance={"recipe": "grpo", "results": [0.5], "controls": {"random": 0.1}, "seed": 1})
    b = make(2, provenance={"recipe": "sft", "results": [0.4]}, base_model_name_or_path="org/b")
    total = (0.5 * (a + b)).layers(0, 3)
    made = total.config.provenance
    assert {k: v for k, v in made.items() if k != "derived"} == {"recipe": "grpo", "seed": 1}
    plus, times, layers = made["derived"]
    assert plus["plus"]["recipe"] == "sft" and plus["plus"]["base_model_name_or_path"] == "org/b"
    assert times == {"times": 0.5}
    assert layers == {"layers": [0, 3]}
    assert "minus" in (a - b).config.provenance["derived"][0]
    # the parts are as they were
    assert a.config.provenance["results"] == [0.5] and "derived" not in a.config.provenance


def test_odd_provenances_are_no_obstacle():
    assert (-make(provenance={"derived": "by hand"})).config.provenance["derived"] == [{"times": -1.0}]
    assert (-make(provenance=None)).config.provenance == {"derived": [{"times": -1.0}]}


@pytest.mark.parametrize("nested", [lambda a, s: a + s, lambda a, s: s + a], ids=["right", "left"])
def test_results_of_many_steps_are_written_and_read(tmp_path, nested):
    total = make(0)
    for seed in range(1, 30):
        total = 0.9 * nested(make(seed), total)
    artifact.write(tmp_path, total)
    found = artifact.read(tmp_path)
    assert found.config == total.config
    assert torch.equal(change(found), change(total))


@pytest.mark.parametrize("kind", ["constant", "adaptive", "shared"])
def test_results_are_written_and_read(tmp_path, kind):
    a = make(1, kind=kind, dtype="bfloat16")
    made = {"part": (0.3 * a).layers(1, -2), "negative": -a}
    if kind != "adaptive":
        made |= {"sum": a + make(2), "mean": steer.mean([a, make(2), make(3)])}
    for name, result in made.items():
        artifact.write(tmp_path / name, result)
        found = artifact.read(tmp_path / name)
        assert found.config == result.config
        assert found.tensors.keys() == result.tensors.keys()
        assert all(torch.equal(found.tensors[n], t) for n, t in result.tensors.items())


# --- in a model


def of(model: PreTrainedModel, seed: int, **config: Any) -> Artifact:
    vectors = fill(steer.attach(model, SteeringConfig(**config)), seed=seed)
    steer.detach(model)
    return Artifact(vectors.config, vectors.tensors())


def run(model: PreTrainedModel, *made: Artifact) -> torch.Tensor:
    """Logits in float64 with these artifacts one after the other, added by hand where there are several."""
    handles = []
    for one in made:
        for layer, vector in one.by_layer().items():
            hook = lambda module, args, output, vector=vector: output + vector  # noqa: E731
            handles.append(model.model.layers[layer].register_forward_hook(hook))
    found = logits(model, tokens())
    for handle in handles:
        handle.remove()
    return found


def test_results_steer_as_both_together(build_tiny):
    model = build_tiny("llama").double()
    a = of(model, 1, layers="0,1", scale=0.5, dtype="float64")
    b = of(model, 2, kind="shared", rank=2, layers="1-2", dtype="float64")
    base = logits(model, tokens())
    for total, by_hand in (
        (a + b, run(model, a, b)),
        (a - b, run(model, a, -b)),
        (steer.mean([a, b]), run(model, 0.5 * a, 0.5 * b)),
        (b.layers(2, 2), run(model, b.layers(2, 2))),
    ):
        steer.load(total, model)
        steered = logits(model, tokens())
        steer.detach(model)
        torch.testing.assert_close(steered, by_hand, rtol=0, atol=1e-12)
        assert relative(steered, base) > 1e-2


@pytest.mark.parametrize("kind", ["constant", "adaptive", "shared"])
def test_parts_and_multiples_of_every_kind_attach(build_tiny, kind):
    model = build_tiny("llama", num_hidden_layers=4)
    a = of(model, 1, kind=kind, rank=3)
    for first, last in ((0, 3), (1, 2), (-1, -1)):  # two and one layers of three shared directions too
        part = -0.5 * a.layers(first, last)
        steered = steer.load(part, model)
        out = logits(model, tokens())
        steer.detach(model)
        # the whole, with the other layers' vectors at zero
        vectors = steer.load(a, model)
        vectors.scale = -0.5
        others = [
            p
            for p, layer in zip(vectors.parameters(), vectors.parameter_layers(), strict=True)
            if layer is not None and layer not in steered.layers
        ]
        with torch.no_grad():
            for parameter in others:
                parameter.zero_()
        torch.testing.assert_close(out, logits(model, tokens()), rtol=1e-5, atol=1e-5)
        steer.detach(model)


# --- laws

LAYERS = st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=DEPTH, unique=True)
ANY = st.builds(
    lambda seed, layers, scale, kind, dtype: make(seed, layers=layers, scale=scale, kind=kind, dtype=dtype),
    st.integers(0, 1000),
    LAYERS,
    st.floats(-4, 4, width=16),
    st.sampled_from(["constant", "shared"]),
    st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
)


def near(left: Artifact, right: Artifact) -> None:
    torch.testing.assert_close(change(left), change(right), rtol=1e-5, atol=1e-4)


@given(ANY, ANY, ANY)
def test_addition_commutes_and_associates(a, b, c):
    assert torch.equal(change(a + b), change(b + a))
    near((a + b) + c, a + (b + c))
    near(a - b, -(b - a))
    near(a - b, a + -b)


@given(ANY, ANY, st.floats(-3, 3, width=16))
def test_factors_distribute(a, b, factor):
    near(factor * (a + b), factor * a + factor * b)
    near(factor * a, a * factor)
    near(a + a, 2 * a)


@given(ANY, st.integers(1, 5))
def test_the_mean_of_copies_is_the_one(a, count):
    near(steer.mean([a] * count), a)


@given(ANY, st.integers(1, DEPTH - 1))
def test_parts_add_up_to_the_whole(a, cut):
    parts = [p for p in (_part(a, 0, cut - 1), _part(a, cut, DEPTH - 1)) if p is not None]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    near(total, a)
    assert total.config.resolve_layers(DEPTH) == a.config.resolve_layers(DEPTH)


def _part(a: Artifact, first: int, last: int) -> Artifact | None:
    inside = any(first <= layer <= last for layer in a.config.resolve_layers(DEPTH))
    return whole(a.layers(first, last)) if inside else None

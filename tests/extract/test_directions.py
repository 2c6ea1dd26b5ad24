"""
Extracted vectors against a few lines of torch on `output_hidden_states`, one text at a time and unpadded.

Tolerances: both sides compute in float32; batches pad and sum in another order, which moves activations of
size 1 by some 1e-6. Differences of means keep that as an absolute error, hence 1e-4 of a direction's length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lens import texts
from helpers.steering import fill, logits, message, relative, tokens
from scipy.optimize import minimize
from transformers import PreTrainedModel

import steer
from steer import SteerError
from steer.artifact import from_vectors
from steer.config import SITES
from steer.extract import Contrast, from_contrast, from_direction, token_direction
from steer.extract.activations import read_activations
from steer.extract.directions import mean_difference, principal_component
from steer.extract.rows import Row
from steer.final_norm import find_final_norm, onto_stream, through_final_norm
from steer.sites import find_decoder

NEAR = 1e-4


@torch.no_grad()
def streams(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """(layers, tokens, hidden_size) after each layer, of one text."""
    found: list[torch.Tensor] = []
    layers = find_decoder(model).layers
    hooks = [
        layer.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    model(torch.tensor([row.ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack([hidden.view(len(row.ids), -1) for hidden in found])


def last_tokens(model: PreTrainedModel, rows: list[Row]) -> torch.Tensor:
    """(texts, layers, hidden_size)."""
    return torch.stack([streams(model, row)[:, -1] for row in rows])


CHOSEN: dict[str, Callable[[Row], slice]] = {
    "last": lambda row: slice(-1, None),
    "all": lambda row: slice(1, None),
    "completion": lambda row: slice(row.prompt, None),
}


@pytest.mark.parametrize("where", CHOSEN)
def test_mean_difference_is_that_of_plain_passes(tiny_model: Any, tiny_tokenizer: Any, where: str) -> None:
    positive, negative = texts(seed=1), texts(((7, 3), (2, 2)), seed=2)
    made = from_contrast(
        tiny_model, tiny_tokenizer, Contrast(positive, negative), tokens=where, share=0.3, batch_size=2
    )
    found = made.by_layer()
    means, norms = [], []
    for rows in (positive, negative):
        parts = [streams(tiny_model, row)[:, CHOSEN[where](row)] for row in rows]
        means.append(torch.cat(parts, 1).mean(1))
        norms.append(torch.cat(parts, 1).norm(dim=2).mean(1))
    for layer in range(3):
        direction = means[0][layer] - means[1][layer]
        length = 0.1 * (norms[0][layer] + norms[1][layer]) / 2
        assert relative(found[layer], direction / direction.norm() * length) < NEAR
        assert found[layer].norm() == pytest.approx(length.item(), rel=1e-5)


def test_the_principal_component_is_that_of_an_svd(tiny_model: Any, tiny_tokenizer: Any) -> None:
    lengths = tuple((3 + i % 4, 2) for i in range(40))  # more pairs than the hidden size, and fewer
    positive, negative = texts(lengths, seed=1), texts(lengths, seed=2)
    for count in (5, 40):
        pairs = [(i, (i + 1) % count) for i in range(count)]
        contrast = Contrast(positive[:count], negative[:count], pairs)
        made = from_contrast(tiny_model, tiny_tokenizer, contrast, method="pca", batch_size=7).by_layer()
        one, other = (last_tokens(tiny_model, rows[:count]) for rows in (positive, negative))
        for layer in range(3):
            rows = one[:, layer] - other[[j for _, j in pairs], layer]
            expected = torch.linalg.svd(rows.double()).Vh[0]
            expected *= (rows.double().mean(0) @ expected).sign()
            unit = made[layer].double() / made[layer].double().norm()
            # near-equal singular values turn the component by their share of the error
            assert unit @ expected > 1 - 1e-4


@pytest.mark.parametrize("counts", [(5, 3), (20, 15)])  # fewer texts than the hidden size, and more
def test_the_svm_is_that_of_its_dual_problem(tiny_llama: Any, tiny_tokenizer: Any, counts: tuple) -> None:
    """A second implementation: the dual problem, by scipy's sequential quadratic programming."""
    rows = [texts(tuple((3 + i % 4, 2) for i in range(n)), seed=seed) for seed, n in enumerate(counts, 1)]
    made = from_contrast(tiny_llama, tiny_tokenizer, Contrast(*rows, []), method="svm").by_layer()
    states = [last_tokens(tiny_llama, some).double().numpy() for some in rows]
    y = np.repeat([1.0, -1.0], counts)
    for layer in range(3):
        points = np.concatenate([part[:, layer] for part in states])
        points -= points.mean(0)
        points /= np.sqrt((points**2).sum(1).mean())
        # maximise sum(a) - |w|^2 / 2 - |a|^2 / 4 with w = sum(a y x), a >= 0 and sum(a y) = 0
        kernel = np.outer(y, y) * (points @ points.T) + np.eye(len(y)) / 2
        done = minimize(
            lambda a, kernel=kernel: (a @ kernel @ a / 2 - a.sum(), kernel @ a - 1),
            np.ones(len(y)),
            jac=True,
            method="SLSQP",
            bounds=[(0, None)] * len(y),
            constraints={"type": "eq", "fun": lambda a: a @ y, "jac": lambda a: y},
            options={"maxiter": 1000, "ftol": 1e-14},
        )
        expected = (done.x * y) @ points
        unit = made[layer].double().numpy() / made[layer].double().norm().item()
        assert unit @ expected / np.linalg.norm(expected) > 1 - 1e-5


def test_texts_that_are_the_same_have_no_plane_between_them(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    rows = texts(((5, 2), (6, 2)))
    with pytest.raises(SteerError, match="positive and negative texts are the same there"):
        from_contrast(tiny_llama, tiny_tokenizer, Contrast(rows, rows, []), method="svm")


@pytest.mark.parametrize("site", [site for site in SITES if site != "resid_post"])
def test_other_sites_are_read_where_the_vectors_stand(tiny_llama: Any, site: str) -> None:
    rows = texts(((5, 0),))
    found = read_activations(tiny_llama, rows, [1], site)
    layer = tiny_llama.model.layers[1]
    inside: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k: inside.update(resid_pre=(*a, *k.values())[0]), with_kwargs=True
        ),
        layer.self_attn.register_forward_hook(lambda m, a, out: inside.update(attn_out=out[0])),
        layer.mlp.register_forward_hook(lambda m, a, out: inside.update(mlp_out=out)),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: inside.update(resid_mid=a[0])),
        layer.register_forward_hook(
            lambda m, a, out: inside.update(resid_post=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    tiny_llama(torch.tensor([rows[0].ids]))
    for hook in hooks:
        hook.remove()
    states = {name: hidden.view(-1, 32)[-1] for name, hidden in inside.items()}
    torch.testing.assert_close(found.mean[0].float(), states[site], rtol=1e-5, atol=1e-6)
    stream = states[site if site.startswith("resid_") else "resid_post"]
    assert found.norm[0].item() == pytest.approx(stream.norm().item(), rel=1e-5)


def test_attached_vectors_are_off_while_texts_are_read(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    contrast = Contrast(texts(seed=1), texts(seed=2))
    before = from_contrast(tiny_llama, tiny_tokenizer, contrast).by_layer()
    fill(steer.attach(tiny_llama))
    again = from_contrast(tiny_llama, tiny_tokenizer, contrast).by_layer()
    assert all(torch.equal(again[layer], vector) for layer, vector in before.items())


@pytest.mark.parametrize("site", ["resid_mid", "resid_post"])
def test_resid_mid_is_read_beside_vectors_that_ask_where_a_prompt_ends(tiny_llama: Any, site: str) -> None:
    rows = texts()
    before = read_activations(tiny_llama, rows, [1], "resid_mid").mean
    fill(steer.attach(tiny_llama, steer.SteeringConfig(site=site, positions="completion")))
    assert torch.equal(read_activations(tiny_llama, rows, [1], "resid_mid").mean, before)


def test_raw_directions_have_their_own_length(tiny_llama: Any) -> None:
    positive, negative = (
        read_activations(tiny_llama, texts(seed=s), [0, 2], keep_texts=True) for s in (1, 2)
    )
    difference = mean_difference(positive, negative)
    one, other = (last_tokens(tiny_llama, texts(seed=s)) for s in (1, 2))
    assert relative(difference[2].float(), one[:, 2].mean(0) - other[:, 2].mean(0)) < NEAR
    component = principal_component(positive, negative, [(0, 0), (1, 1), (2, 2)])[2].float()
    along = (one[:, 2] - other[:, 2]) @ component / component.norm()
    assert component.norm().item() == pytest.approx(along.square().mean().sqrt().item(), rel=1e-4)


def random_norm(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in find_final_norm(model).parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.3)


def test_a_token_direction_raises_its_logit_most(tiny_model: Any, tiny_tokenizer: Any) -> None:
    random_norm(tiny_model)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(3, 32, generator=generator)
    torch.testing.assert_close(through_final_norm(tiny_model, a) @ b.T, a @ onto_stream(tiny_model, b).T)
    token = tiny_tokenizer.convert_tokens_to_ids("7")
    direction = token_direction(tiny_model, tiny_tokenizer, "7")
    made = from_direction(tiny_model, tiny_tokenizer, direction, {"from": "7"}, share=1.0)
    before = logits(tiny_model, tokens())[..., token]
    own, gains = made.by_layer()[2], []
    for vector in (own, *torch.randn(20, 32, generator=generator)):
        steer.load(from_vectors({2: vector / vector.norm() * own.norm()}, tiny_model), tiny_model)
        gains.append((logits(tiny_model, tokens())[..., token] - before).mean().item())
        steer.detach(tiny_model)
    assert gains[0] > 0 and gains[0] == max(gains)


def test_what_the_artifact_says_of_itself(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    contrast = Contrast(texts(seed=1), texts(seed=2), [(0, 0), (1, 1)], {"from": "two texts"})
    made = from_contrast(
        tiny_llama,
        tiny_tokenizer,
        contrast,
        method="pca",
        layers="1-2",
        site="mlp_out",
        positions="completion",
    )
    made.save_pretrained(tmp_path / "v")
    back = steer.read(tmp_path / "v")
    assert (back.config.layers, back.config.site, back.config.positions) == ("1-2", "mlp_out", "completion")
    told = back.config.provenance["extract"]
    assert told["from"] == "two texts" and told["pairs"] == 2 and told["positive texts"] == 3
    card = (tmp_path / "v" / "README.md").read_text()
    for part in (
        "two texts",
        "principal component",
        "0.05 of the mean length",
        "the last token of each text",
    ):
        assert part in card
    assert "reinforcement-learning" not in card
    vectors = steer.load(tmp_path / "v", tiny_llama, tokenizer=tiny_tokenizer)
    assert all(norm > 0 for norm in vectors.norms().values())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "median"}, "choose one of mean, pca"),
        ({"method": "pca"}, "needs pairs"),
        ({"layers": "7"}, "layer 7 does not exist: the model has layers 0 to 2"),
        ({"site": "attn"}, "choose one of resid_post"),
        ({"tokens": "first"}, "choose one of last, all, completion"),
        ({"share": 0.0}, "not a number above 0"),
        ({"share": float("nan")}, "not a number above 0"),
    ],
)
def test_what_cannot_work_is_refused(
    tiny_llama: Any, tiny_tokenizer: Any, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SteerError) as error:
        from_contrast(tiny_llama, tiny_tokenizer, Contrast(texts(seed=1), texts(seed=2)), **changes)
    assert expected in message(error)


def test_a_share_is_checked_before_any_forward_pass(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    passes: list[Any] = []
    tiny_llama.model.register_forward_pre_hook(lambda module, args: passes.append(args))
    with pytest.raises(SteerError, match="not a number above 0"):
        from_contrast(tiny_llama, tiny_tokenizer, Contrast(texts(seed=1), texts(seed=2)), share=-1)
    with pytest.raises(SteerError, match="not a number above 0"):
        from_direction(tiny_llama, tiny_tokenizer, torch.ones(32), {"from": "ones"}, share=float("inf"))
    assert not passes


def test_texts_that_give_no_direction_are_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    for method in ("mean", "pca"):
        same = Contrast(texts(seed=1), texts(seed=1), [(0, 0), (1, 1)])
        with pytest.raises(SteerError) as error:
            from_contrast(tiny_llama, tiny_tokenizer, same, method=method)
        assert "layer 0: positive and negative texts are the same there" in message(error)
    alone = Contrast([Row((5,), 1)], [Row((6,), 1)])
    for where, expected in (("all", "leaves no token"), ("completion", "prompts alone")):
        with pytest.raises(SteerError) as error:
            from_contrast(tiny_llama, tiny_tokenizer, alone, tokens=where)
        assert expected in message(error)
    with pytest.raises(SteerError) as error:
        from_contrast(tiny_llama, tiny_tokenizer, Contrast([Row((5,) * 129, 1)], [Row((6,), 1)]))
    assert "129 tokens, the model reads 128" in message(error)
    for sides in (([Row((5,), 1)], []), ([], [Row((5,), 1)])):
        with pytest.raises(SteerError) as error:
            Contrast(*sides)
        assert "needs both" in message(error)


PLUS = ("great", "wonderful", "lovely", "excellent", "delightful", "beautiful", "perfect", "brilliant")
MINUS = ("awful", "terrible", "horrible", "dreadful", "disgusting", "ugly", "bad", "miserable")


@pytest.mark.real
def test_a_mean_difference_moves_a_real_model(smollm2: PreTrainedModel) -> None:
    """
    On prompts that it was not made from, the vectors raise positive continuations over negative ones; random
    directions of the same length do not.
    """
    from steer.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")

    def row(text: str) -> Row:
        ids = tokenizer(text)["input_ids"]
        return Row(tuple(ids), len(ids))

    about = ("The meal was", "My day has been", "The garden looks", "This hotel is")
    sides = [[row(f"{text} {word}") for text in about for word in words] for words in (PLUS, MINUS)]
    made = from_contrast(smollm2, tokenizer, Contrast(*sides), layers="12-18", share=1.4)

    prompts = ["I watched the film. It was", "The concert yesterday was", "Her new book is"]
    # words in none of the texts above
    words = (
        [tokenizer(w)["input_ids"][0] for w in (" amazing", " good", " fantastic")],
        [tokenizer(w)["input_ids"][0] for w in (" boring", " poor", " disappointing")],
    )

    @torch.no_grad()
    def margin() -> float:
        found = []
        for prompt in prompts:
            log_probs = smollm2(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(0)
            found.append((log_probs[words[0]].mean() - log_probs[words[1]].mean()).item())
        return sum(found) / len(found)

    def with_vectors(vectors: dict[int, torch.Tensor]) -> float:
        steer.load(from_vectors(vectors, smollm2), smollm2)
        try:
            return margin() - base
        finally:
            steer.detach(smollm2)

    base = margin()
    gain = with_vectors(made.by_layer())
    randoms = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = {i: torch.randn(v.shape, generator=generator) for i, v in made.by_layer().items()}
        randoms.append(with_vectors({i: v / v.norm() * made.by_layer()[i].norm() for i, v in drawn.items()}))
    assert gain > 1.0, (gain, randoms)
    assert with_vectors({i: -v for i, v in made.by_layer().items()}) < -0.5
    assert max(map(abs, randoms)) < gain / 2, (gain, randoms)

"""Explained variance at any l0, loss recovered, absorption, and what is said of an SAE that does not fit."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.steering import message
from torch.nn.functional import cross_entropy

from steer.errors import SteerError
from steer.sae import SAE, SAEConfig
from steer.sae.activations import Reader, Window
from steer.sae.evaluate import loss_recovered, nearest_cosines, quality, reconstruct
from steer.sae.letters import Words, absorption


def rows(count: int, width: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def make(**changes: object) -> SAE:
    sae = SAE(SAEConfig(**{"d_in": 32, "d_sae": 64, "k": 6, **changes}))
    sae.start_from(rows(200))
    return sae.eval()


def test_explained_variance_at_every_l0_is_that_of_a_lower_k():
    """Against dense features cut to the n largest, over batches of different size and mean."""
    sae, batches = make(), [rows(100), rows(37, seed=4) + 3]
    found = quality(sae, batches, [1, 2, 6])
    x = torch.cat(batches)
    variance = (x - x.mean(0)).square().sum()
    for n, value in found.explained.items():
        z = sae.encode(x)
        z = z * torch.zeros_like(z).scatter(1, z.topk(n).indices, 1.0)
        assert value == pytest.approx(1 - ((x - sae.decode(z)).square().sum() / variance).item(), abs=1e-5)
        torch.testing.assert_close(reconstruct(sae, x, n), sae.decode(z), rtol=1e-4, atol=1e-4)
    assert list(found.explained) == [1, 2, 6]
    assert found.tokens == 137
    fires = sae.encode(x) > 0
    assert found.l0 == pytest.approx(fires.sum(1).float().mean().item())
    assert found.dead == pytest.approx((~fires.any(0)).float().mean().item())
    assert found.firing == pytest.approx(fires.double().mean(0).tolist())
    assert found.dense == pytest.approx((fires.float().mean(0) > 0.1).float().mean().item())


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_threshold_saes_have_one_l0(activation):
    sae, x = make(activation=activation), rows(300)
    sae.train().active(x)
    found = quality(sae.eval(), [x])
    expected = 1 - ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert list(found.explained.values()) == pytest.approx([expected], abs=1e-5)
    assert found.l0 == pytest.approx((sae.encode(x) > 0).sum(1).float().mean().item())
    with pytest.raises(SteerError) as error:
        quality(sae, [x], [3])
    assert "topk" in message(error)


def test_evaluations_that_cannot_be_are_refused():
    with pytest.raises(SteerError) as error:
        quality(make(), [rows(10)], [7])
    assert "l0=7 is more than the SAE's k=6" in message(error)
    with pytest.raises(SteerError) as error:
        quality(make(), [])
    assert "no activations" in message(error)


def windows() -> list[Window]:
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return [Window(row, [False, *[True] * 11]) for row in ids]


def test_loss_recovered_is_that_of_a_model_cut_open(tiny_llama):
    """The same splice by replacing the layer's forward method."""
    sae = make()
    found = loss_recovered(sae, tiny_llama, windows(), 1)
    assert loss_recovered(sae, tiny_llama, windows(), 1, known=found) == found
    layer = tiny_llama.model.layers[1]
    original, expected = layer.forward, {}
    for mode in ("clean", "spliced", "zeroed"):

        def forward(hidden, *args, mode=mode, **kwargs):
            out = original(hidden, *args, **kwargs).clone()
            if mode == "spliced":
                out[:, 1:] = sae(out[:, 1:])
            if mode == "zeroed":
                out[:, 1:] = 0
            return out

        layer.forward = forward
        with torch.no_grad():
            losses = []
            for window in windows():
                ids = torch.tensor([window.ids])
                logits = tiny_llama(ids).logits[0, 1:-1]
                losses.append(cross_entropy(logits, ids[0, 2:]))
            expected[mode] = torch.stack(losses).mean().item()
    layer.forward = original
    for mode, value in expected.items():
        assert getattr(found, mode) == pytest.approx(value, abs=1e-5), mode
    share = (expected["zeroed"] - expected["spliced"]) / (expected["zeroed"] - expected["clean"])
    assert found.recovered == pytest.approx(share, abs=1e-3)
    assert not layer._forward_hooks


def test_a_perfect_reconstruction_recovers_everything(tiny_llama, monkeypatch):
    monkeypatch.setattr("steer.sae.evaluate.reconstruct", lambda sae, x, k: x)
    for site in ("resid_post", "resid_pre", "mlp_out"):
        assert loss_recovered(make(), tiny_llama, windows(), 1, site).recovered == pytest.approx(1, abs=1e-5)


def test_loss_recovered_refuses_another_width(tiny_llama):
    with pytest.raises(SteerError) as error:
        loss_recovered(SAE(SAEConfig(33, 64, 6)), tiny_llama, windows(), 1)
    assert "d_in=33, the model hidden_size=32" in message(error)


def test_other_weights_than_those_trained_on_are_told(tiny_llama, build_tiny):
    source = {**Reader(tiny_llama, 1).describe(), "model": "base", "base_adapter": "lora"}
    sae = SAE(SAEConfig(32, 64, 6, source=source), seed=1)
    with warnings.catch_warnings(action="error"):
        loss_recovered(sae, tiny_llama, windows(), 1)
    with pytest.warns(UserWarning, match=r"trained on base with adapter lora .*but other weights"):
        loss_recovered(sae, build_tiny("llama", seed=1), windows(), 1)


def test_nearest_cosines():
    table = rows(50)
    table[7] = 2 * table[3]
    unit = table / table.norm(dim=1, keepdim=True)
    expected = (unit @ unit.T - 3 * torch.eye(50)).amax(1)
    torch.testing.assert_close(nearest_cosines(table, chunk=16), expected)
    assert nearest_cosines(table)[3] == pytest.approx(1, abs=1e-5)


# --- absorption


def worded(absorbing: bool) -> tuple[SAE, Words]:
    """
    Words of two letters, one direction each, and features 0 and 1 that read them. An absorbing SAE has a
    feature 2 for one in 25 of the words with letter 0, too few to be its own, on which feature 0 is silent.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(800).repeat(3)
    letters = (tokens % 2).long()
    special = tokens % 50 == 0  # all of letter 0
    x = 0.02 * torch.randn(2400, 8, generator=generator)
    x[torch.arange(2400), letters] += 1
    x[special, 2] += 1
    sae = SAE(SAEConfig(d_in=8, d_sae=8, k=1, bias="free")).eval()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(8))
        sae.encoder.bias.zero_()
        sae.W_dec.copy_(torch.eye(8))
        if absorbing:
            sae.encoder.weight[2] = 3 * torch.eye(8)[2]
            sae.W_dec[2] = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0]) / 2**0.5
        sae.encoder.bias[2] = 0.0 if absorbing else -9.0
    return sae, Words(x, letters, tokens)


def test_absorption_is_found_where_it_is():
    sae, words = worded(absorbing=True)
    found = absorption(sae, words)
    assert found.letters == 2
    assert found.probe_accuracy > 0.98
    # silent on the absorbed words, so the letter's features tell it less well than the probe
    assert found.f1 < found.probe_f1 and found.probe_f1 > 0.98
    # one in 25 of one letter's words and none of the other's; which tokens are tested is drawn
    assert 0.01 < found.rate < 0.03


def test_absorption_is_not_found_where_it_is_not():
    sae, words = worded(absorbing=False)
    found = absorption(sae, words)
    assert found.rate == 0
    assert found.f1 > 0.98 and found.probe_f1 > 0.98


def test_absorption_needs_words():
    sae, words = worded(absorbing=False)
    few = Words(words.rows[:10], words.letters[:10], words.tokens[:10])
    with pytest.raises(SteerError) as error:
        absorption(sae, few)
    assert "read more text" in message(error)


def test_first_letters_are_those_of_words(tiny_llama, monkeypatch):
    from steer.sae.activations import Reader
    from steer.sae.letters import first_letters

    pieces = {3: " apple", 4: "pple", 5: " Zoo", 6: " 12", 7: " b", 8: " über"}

    class Tokenizer:
        def decode(self, ids):
            return pieces[ids[0]]

    window = Window([3, 4, 5, 6, 7, 8, 3], [True, True, True, True, True, True, False])
    words = first_letters(Reader(tiny_llama, 1), Tokenizer(), [window])
    assert words.tokens.tolist() == [3, 5]
    assert words.letters.tolist() == [0, 25]
    assert words.rows.shape == (2, 32)

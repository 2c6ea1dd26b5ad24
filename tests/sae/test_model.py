"""The SAE module: encoders, activations, their gradients and costs, against plain formulas."""

from __future__ import annotations

import pytest
import torch
from helpers.steering import message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from steer.errors import SteerError
from steer.sae import SAE, SAEConfig
from steer.sae.config import encoder_flops, encoder_parameters, forward_flops
from steer.sae.model import geometric_median
from steer.sae.sparse import Selection, combine, mand, top_k


def rows(count: int, width: int = 12, seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(**settings: object) -> SAE:
    sae = SAE(SAEConfig(**{"d_in": 12, "d_sae": 48, "k": 5, **settings})).double()
    with torch.no_grad():
        sae.b_dec.copy_(rows(1, seed=8)[0])
        sae.encoder.bias.copy_(rows(1, sae.cfg.rows, seed=9)[0] / 10)
    return sae


def pre_activations(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Features before the activation chooses, from the papers' formulas; KronSAE by explicit loops."""
    z = (x - sae.b_dec if sae.cfg.bias == "tied" else x) @ sae.encoder.weight.T + sae.encoder.bias
    if sae.cfg.encoder == "dense":
        return z
    m, n = sae.cfg.m, sae.cfg.n
    features = []
    for head in range(sae.cfg.heads):
        for i in range(m):
            for j in range(n):
                p, q = z[:, i * sae.cfg.heads + head], z[:, (m + j) * sae.cfg.heads + head]
                both = (p > 0) & (q > 0)
                if sae.cfg.interaction == "mand":
                    features.append(torch.where(both, (p * q).abs().clamp(min=1e-300).sqrt(), 0))
                else:
                    features.append(torch.where(both, p * q, 0) if "relu" in sae.cfg.interaction else p * q)
    return torch.stack(features, 1)


def dense_top_k(z: torch.Tensor, k: int) -> torch.Tensor:
    z = z.relu()
    return z * torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)


# --- encoders


@pytest.mark.parametrize("bias", ["tied", "free"])
@pytest.mark.parametrize(
    "shape",
    [
        {"encoder": "dense"},
        {"encoder": "kron"},
        {"encoder": "kron", "m": 3, "n": 4},
        {"encoder": "kron", "k": 20},  # more than there are P_i
        {"encoder": "kron", "k": 48},
        {"encoder": "kron", "interaction": "relu_product"},
        {"encoder": "kron", "interaction": "product"},
        {"encoder": "kron", "interaction": "product", "m": 3, "n": 4, "k": 20},
    ],
)
def test_topk_features_and_gradients_are_those_of_the_formula(shape, bias):
    """float64; 1e-10 leaves five digits for the other order of summation."""
    sae, x = make(bias=bias, **shape), rows(40)
    expected = dense_top_k(pre_activations(sae, x), sae.cfg.k)
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-10, atol=1e-12)
    plain = (x - (expected @ sae.W_dec + sae.b_dec)).square().sum()
    ours = (x - sae(x)).square().sum()
    parameters = list(sae.parameters())
    wanted = torch.autograd.grad(plain, parameters)
    for a, b in zip(torch.autograd.grad(ours, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert b.abs().max() > 1e-3


def test_gradient_reaches_the_input():
    sae, x = make(), rows(10).requires_grad_()
    (ours,) = torch.autograd.grad(sae(x).square().sum(), x)
    plain = dense_top_k(pre_activations(sae, x), sae.cfg.k) @ sae.W_dec + sae.b_dec
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_mand_is_the_root_of_the_product_of_positives():
    p = torch.tensor([4.0, 4.0, -4.0, -4.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([9.0, -9.0, 9.0, -9.0, 9.0, 0.0], dtype=torch.float64, requires_grad=True)
    z = mand(p, q)
    assert z.tolist() == [6, 0, 0, 0, 0, 0]
    dp, dq = torch.autograd.grad(z.sum(), (p, q))
    assert dp.tolist() == [9 / 12, 0, 0, 0, 0, 0]
    assert dq.tolist() == [4 / 12, 0, 0, 0, 0, 0]


def test_mand_passes_gradcheck():
    p, q = rows(6).requires_grad_(), rows(6, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(mand, (p, q))


def test_kron_decoder_starts_as_the_sum_of_its_factors():
    sae = SAE(SAEConfig(d_in=12, d_sae=48, k=5, encoder="kron", m=3, n=4))
    places = sae.encoder.weight.view(7, 4, 12)
    for head, i, j in ((0, 0, 0), (1, 2, 3), (3, 1, 0)):
        row = places[i, head] + places[3 + j, head]
        torch.testing.assert_close(sae.W_dec[head * 12 + i * 4 + j], row / row.norm())
    # N(0, 1/(2F)): 336 numbers, so the deviation is known to about 4 %
    assert sae.encoder.weight.std().item() == pytest.approx((2 * 48) ** -0.5, rel=0.15)


def test_dense_start_ties_encoder_and_decoder():
    sae = SAE(SAEConfig(d_in=12, d_sae=48, k=5))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert torch.equal(sae.W_dec, sae.encoder.weight)
    assert sae.W_enc.shape == (12, 48)
    assert sae.b_enc.shape == (48,)


def test_seeds_decide_the_start():
    config = SAEConfig(d_in=12, d_sae=48, k=5)
    assert torch.equal(SAE(config, seed=1).W_dec, SAE(config, seed=1).W_dec)
    assert not torch.equal(SAE(config, seed=1).W_dec, SAE(config, seed=2).W_dec)


@pytest.mark.parametrize(
    ("m", "n", "ratio"), [(2, 4, 0.75), (4, 4, 0.5), (4, 8, 0.375), (8, 8, 0.25), (16, 16, 0.125)]
)
def test_kron_costs_what_the_paper_says(m, n, ratio):
    """
    Section 3: h(m + n) d encoder weights against F d, and d h(m + n) + m n h + k d multiply-adds a token.
    """
    dense = SAEConfig(d_in=64, d_sae=4096, k=32)
    kron = SAEConfig(d_in=64, d_sae=4096, k=32, encoder="kron", m=m, n=n)
    heads = 4096 // (m * n)
    assert encoder_parameters(kron) == heads * (m + n) * 64 == ratio * encoder_parameters(dense)
    assert encoder_flops(kron) == 64 * heads * (m + n) + m * n * heads
    assert forward_flops(dense) == 64 * 4096 + 32 * 64
    assert forward_flops(kron) == encoder_flops(kron) + 32 * 64
    for config in (dense, kron):
        sae = SAE(config)
        assert sae.encoder.weight.numel() == encoder_parameters(config)
        assert sae.W_dec.numel() == 64 * 4096


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"encoder": "kron"},
        {"encoder": "kron", "m": 4, "n": 4},
        {"loss": "hierarchical"},
        {"loss": "matryoshka", "activation": "batchtopk"},
        {"loss": "matryoshka", "encoder": "kron"},
    ],
    ids=str,
)
def test_the_flops_of_the_formula_are_those_that_torch_counts(settings):
    """A dense re-computation whose every product is a matmul; torch counts 2 FLOPs a multiply-add."""
    tokens, config = 7, SAEConfig(d_in=24, d_sae=64, k=5, **settings)
    sae, x = SAE(config), rows(7, 24, dtype=torch.float32)
    active = sae.eval().strongest(x, config.k)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        z = sae.encoder(x - sae.b_dec).relu()
        if config.encoder == "kron":
            p, q = sae.kron.factors(z.T)  # (heads, m, tokens), (heads, n, tokens)
            z = (p.permute(0, 2, 1)[..., None] @ q.permute(0, 2, 1)[..., None, :]).sqrt()
            z = z.permute(1, 0, 2, 3).flatten(1)
        x_hat = (active.values[:, None] @ sae.W_dec[active.indices])[:, 0] + sae.b_dec
    assert counter.get_total_flops() == 2 * tokens * forward_flops(config)
    torch.testing.assert_close(z.gather(1, active.indices), active.values)
    torch.testing.assert_close(x_hat, sae.decode_active(active).detach())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sae.train().active(x)  # the module itself: its only matrix product is the encoder's
    assert counter.get_total_flops() == 2 * tokens * encoder_parameters(config)


# --- activations


def test_batchtopk_keeps_k_a_token_on_average():
    sae, x = make(activation="batchtopk"), rows(40)
    z = pre_activations(sae, x).relu()
    least = z.flatten().topk(40 * 5).values[-1]
    active = sae.train().active(x)
    got = torch.zeros_like(z).scatter(1, active.indices, active.values)
    torch.testing.assert_close(got, z * (z >= least), rtol=1e-10, atol=1e-12)
    assert (got > 0).sum() == 40 * 5


def test_batchtopk_looks_further_where_one_token_takes_all():
    sae, x = make(activation="batchtopk", k=1), rows(40)
    x[0] *= 100  # more features of this token than k * CANDIDATES belong to the largest of the batch
    z = pre_activations(sae, x).relu()
    active = sae.train().active(x)
    got = torch.zeros_like(z).scatter(1, active.indices, active.values)
    torch.testing.assert_close(got, z * (z >= z.flatten().topk(40).values[-1]), rtol=1e-10, atol=1e-12)
    assert (got[0] > 0).sum() > 4


def test_batchtopk_uses_its_threshold_after_training():
    sae, x = make(activation="batchtopk"), rows(40)
    with pytest.raises(SteerError) as error:
        sae.eval().encode(x)
    assert "no threshold" in message(error)
    sae.train().active(x)
    least = sae.threshold.item()
    z = pre_activations(sae, x).relu()
    torch.testing.assert_close(sae.eval().encode(x), z * (z >= least), rtol=1e-10, atol=1e-12)
    active = sae.active(x)
    torch.testing.assert_close(sae.decode_active(active), sae(x), rtol=1e-10, atol=1e-12)


def test_jumprelu_is_zero_up_to_its_threshold():
    sae, x = make(activation="jumprelu"), rows(40)
    with torch.no_grad():
        sae.log_threshold.copy_(rows(1, 48, seed=1)[0] / 2)
    z = pre_activations(sae, x)
    torch.testing.assert_close(sae.encode(x), z * (z > sae.log_threshold.exp()), rtol=1e-10, atol=1e-12)


def test_jumprelu_starts_at_its_target():
    sae, x = make(activation="jumprelu"), rows(400)
    sae.start_from(x)
    assert (sae.encode(x) > 0).sum(1).double().mean().item() == pytest.approx(5, abs=0.02)


def test_jumprelu_threshold_gradients_are_those_of_the_paper():
    """arXiv 2407.14435, equations 11 and 12, with a rectangle kernel."""
    from steer.sae.jumprelu import BANDWIDTH, count_active, jump

    z, grad = rows(500, 4), rows(500, 4, seed=1)
    threshold = torch.tensor([0.1, 0.2, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    kernel = ((z - threshold) / BANDWIDTH).abs() < 0.5
    assert kernel.sum() > 20
    (got,) = torch.autograd.grad(jump(z, threshold), threshold, grad)
    torch.testing.assert_close(got, -(threshold / BANDWIDTH * kernel * grad).sum(0))
    (got,) = torch.autograd.grad(count_active(z, threshold).sum(), threshold)
    torch.testing.assert_close(got, -(kernel.double() / BANDWIDTH).sum(0))


def test_low_precision_picks_nearly_the_same():
    """bfloat16 has 8 bits: values within 1 %, and nine of ten choices alike."""
    sae = SAE(SAEConfig(d_in=64, d_sae=256, k=16))
    x = rows(200, 64, dtype=torch.float32)
    full, low = sae.active(x), sae.active(x, low_precision=True)
    assert low.values.dtype == torch.float32
    torch.testing.assert_close(low.values, full.values, rtol=0.02, atol=0.02)
    same = [len(set(a) & set(b)) for a, b in zip(full.indices.tolist(), low.indices.tolist(), strict=True)]
    assert sum(same) > 0.9 * 200 * 16


# --- parts


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    features=st.integers(1, 300),
    share=st.floats(0, 1),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_top_k_is_torch_topk(rows, features, share, ties, seed):
    k = max(1, round(share * features))
    scores = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = scores.round()
    values, indices = top_k(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_top_k_by_groups_is_exact():
    scores = torch.randn(30, 4096, generator=torch.Generator().manual_seed(0))
    values, indices = top_k(scores, 20)
    expected = scores.topk(20)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_selection_is_a_sparse_matrix():
    indices = torch.tensor([[0, 3], [3, 1], [3, 3]])  # the last token uses feature 3 twice
    weights, where = rows(3, 2), Selection(indices, 5)
    dense = torch.zeros(3, 5, dtype=torch.float64).scatter_add(1, indices, weights)
    table, tokens = rows(5, 4), rows(3, 4, seed=1)
    torch.testing.assert_close(where.gather(weights, table), dense @ table)
    torch.testing.assert_close(where.scatter(weights, tokens), dense.T @ tokens)
    torch.testing.assert_close(where.total(weights), dense.sum(0))


def test_combine_passes_gradcheck():
    where = Selection(torch.tensor([[0, 3], [3, 1], [2, 3]]), 5)
    weights, table = rows(3, 2).requires_grad_(), rows(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, t: combine(w, t, where), (weights, table))


def test_geometric_median_is_least_distant():
    points = rows(200, 3)
    points[:20] += 50  # a mean would follow these
    median = geometric_median(points)
    away = (points - median).norm(dim=1).mean()
    for step in torch.eye(3, dtype=torch.float64):
        for sign in (-1, 1):
            assert (points - median - sign * 1e-3 * step).norm(dim=1).mean() > away
    assert (median.abs() < 1).all()


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("encoder", ["dense", "kron", "relu_product", "product"])
@pytest.mark.parametrize("bias", ["tied", "free"])
def test_rescaling_folds_a_factor_on_the_input(activation, encoder, bias):
    shape = {"encoder": "kron", "interaction": encoder} if "product" in encoder else {"encoder": encoder}
    sae, x = make(activation=activation, bias=bias, **shape), rows(40)
    sae.start_from(x)
    sae.train().active(x)
    sae.threshold.mul_(0.999)  # no feature stands exactly at it, where rounding decides
    if activation == "jumprelu":
        sae.log_threshold.data.sub_(1e-3)
    expected = sae.eval()(x)
    sae.rescale(7.0)
    torch.testing.assert_close(sae(7 * x), 7 * expected, rtol=1e-9, atol=1e-9)


# --- mistakes


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"k": 49}, "k=49 is more than the dictionary's d_sae=48"),
        ({"k": 0}, "k=0 is not a whole number"),
        ({"encoder": "sparse"}, "encoder='sparse' is unknown; choose one of dense, kron"),
        ({"activation": "relu"}, "topk, batchtopk, jumprelu"),
        ({"encoder": "kron", "m": 4, "n": 2}, "m=4 is more than n=2"),
        ({"encoder": "kron", "m": 5, "n": 5}, "d_sae=48 is not a multiple of m*n=5*5=25; try d_sae=50"),
        ({"encoder": "kron", "m": 1, "n": 12}, "n=12 is not far below the width d_in=12"),
        ({"encoder": "kron", "heads": 5}, "heads=5 with m=2, n=4 makes 40 features"),
        ({"heads": 5}, "heads=5 with a dense encoder"),
        ({"loss": "hierarchical", "activation": "batchtopk"}, "needs activation='topk'"),
        ({"loss": "hierarchical", "prefixes": [1, 6]}, "whole numbers from 1 to k=5"),
        ({"prefixes": [1]}, "loss='hierarchical' or 'matryoshka'"),
        ({"loss": "matryoshka", "activation": "jumprelu"}, "needs activation='batchtopk' or 'topk'"),
        ({"loss": "matryoshka", "prefixes": [4, 24]}, "must be the whole dictionary, d_sae=48"),
        ({"loss": "matryoshka", "prefixes": [4, 49]}, "whole numbers from 1 to d_sae=48"),
        ({"loss": "matryoshka", "encoder": "kron", "prefixes": [12, 48]}, "multiples of m*n=2*4=8"),
        ({"interaction": "product"}, "interaction='product' with a dense encoder"),
        ({"encoder": "kron", "interaction": "sum"}, "mand, relu_product, product"),
        ({"bias": "none"}, "tied, free"),
    ],
)
def test_configs_that_cannot_be_are_refused(settings, part):
    with pytest.raises(SteerError) as error:
        SAEConfig(**{"d_in": 12, "d_sae": 48, "k": 5, **settings})
    assert part in message(error)


def test_config_survives_a_dictionary():
    config = SAEConfig(d_in=12, d_sae=48, k=5, loss="hierarchical", prefixes=[5, 1, 1])
    assert SAEConfig.from_dict(config.to_dict()) == config
    assert config.prefixes == [1, 5]
    nested = SAEConfig(12, 64, 5, encoder="kron", loss="matryoshka", activation="batchtopk")
    assert nested.prefixes == [8, 24, 64]  # whole heads of 2 x 4 below 2, 6, 14, 30 and 64
    assert SAEConfig.from_dict(nested.to_dict()) == nested
    with pytest.raises(SteerError) as error:
        SAEConfig.from_dict({"d_in": 1, "d_sae": 2, "depth": 3})
    assert "depth" in message(error)
    with pytest.raises(SteerError) as error:
        SAEConfig.from_dict({"d_in": 1})
    assert "lacks d_sae" in message(error)


@pytest.mark.parametrize("shape", [(3, 13), (12,), (2, 3, 12)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(SteerError) as error:
        make().active(torch.zeros(shape, dtype=torch.float64))
    assert "d_in=12" in message(error)

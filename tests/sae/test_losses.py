"""HierarchicalTopK in three implementations against a loop written from the paper, and the auxiliary loss."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.gpu import DEVICE, needs_cuda
from helpers.steering import message

from steer.errors import SteerError
from steer.sae import SAE, SAEConfig
from steer.sae.losses import (
    auxiliary_loss,
    hierarchical_loss,
    matryoshka_loss,
    prefix_weights,
    reconstruction_loss,
)

K = 7


def make(encoder: str = "dense", dtype: torch.dtype = torch.float64, bias: str = "tied") -> SAE:
    config = SAEConfig(d_in=12, d_sae=32, k=K, encoder=encoder, bias=bias, loss="hierarchical")
    sae = SAE(config).to(dtype)
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        sae.encoder.bias.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return sae


def inputs(count: int = 50, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(3), dtype=dtype)


def by_hand(sae: SAE, x: torch.Tensor, prefixes: list[int]) -> torch.Tensor:
    """The paper's formula, token by token: dense features, the j largest, the decoder's matrix."""
    losses = []
    for token in x:
        shifted = token - sae.b_dec if sae.cfg.bias == "tied" else token
        z = (sae.encoder.weight @ shifted + sae.encoder.bias).relu()
        if sae.cfg.encoder == "kron":
            p, q = z.view(-1, sae.cfg.heads).T.split([sae.cfg.m, sae.cfg.n], 1)
            pq = torch.einsum("hi,hj->hij", p, q).flatten()
            z = torch.where(pq > 0, pq, 1).sqrt() * (pq > 0)
        order = z.argsort(descending=True)
        for j in prefixes:
            kept = torch.zeros_like(z).scatter(0, order[:j], 1.0)
            losses.append((token - (sae.W_dec.T @ (z * kept) + sae.b_dec)).square().sum())
    return torch.stack(losses).mean()


def value_and_gradients(sae: SAE, loss: torch.Tensor) -> list[torch.Tensor]:
    names = [p for _, p in sorted(sae.named_parameters())]
    return [loss.detach(), *torch.autograd.grad(loss, names)]


@pytest.mark.parametrize("encoder", ["dense", "kron"])
@pytest.mark.parametrize("bias", ["tied", "free"])
@pytest.mark.parametrize("prefixes", [None, [1, 2, 4, 7], [7], [3]])
@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_value_and_gradients_are_those_of_the_formula(encoder, bias, prefixes, implementation):
    """float64; 1e-10 leaves five digits for the other order of summation."""
    sae, x = make(encoder, bias=bias), inputs()
    expected = value_and_gradients(sae, by_hand(sae, x, prefixes or list(range(1, K + 1))))
    got = value_and_gradients(sae, hierarchical_loss(sae, x, sae.active(x), prefixes, implementation))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert b.abs().max() > 1e-3


def test_the_prefix_of_all_is_the_plain_reconstruction_loss():
    sae, x = make(), inputs()
    whole = value_and_gradients(sae, hierarchical_loss(sae, x, sae.active(x), [K], "chunked"))
    plain = value_and_gradients(sae, reconstruction_loss(x, sae.decode_active(sae.active(x))))
    for a, b in zip(whole, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_chunks_of_tokens_change_nothing(monkeypatch):
    sae, x = make(), inputs(200)
    whole = value_and_gradients(sae, hierarchical_loss(sae, x, sae.active(x), None, "chunked"))
    monkeypatch.setattr("steer.sae.losses.CHUNK", 1)  # 64 tokens at a time, the last part shorter
    parts = value_and_gradients(sae, hierarchical_loss(sae, x, sae.active(x), None, "chunked"))
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_factor_on_the_loss_reaches_every_gradient():
    sae, x = make(), inputs()
    once = value_and_gradients(sae, hierarchical_loss(sae, x, sae.active(x), None, "chunked"))
    thrice = value_and_gradients(sae, 3 * hierarchical_loss(sae, x, sae.active(x), None, "chunked"))
    for a, b in zip(thrice, once, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-12, atol=1e-14)


def test_memory_does_not_grow_with_k():
    """The largest tensor that autograd or the walk allocates, counted by the profiler, at two k."""
    peaks = {}
    for implementation in ("plain", "chunked"):
        for k in (8, 64):
            sae = SAE(SAEConfig(d_in=64, d_sae=128, k=k))
            x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
            active = sae.active(x)
            with torch.profiler.profile(profile_memory=True) as profile:
                hierarchical_loss(sae, x, active, None, implementation).backward()
            sizes = [e.cpu_memory_usage for e in profile.events() if e.name.startswith("aten::")]
            peaks[implementation, k] = max(sizes)
    assert peaks["plain", 64] >= 8 * peaks["plain", 8]
    # indices and values, (tokens, k), are the input's own; nothing of (tokens, k, width) is made
    assert peaks["chunked", 64] <= max(2 * 512 * 64 * 8, 2 * peaks["chunked", 8])


def test_unknown_implementations_are_refused():
    sae, x = make(), inputs()
    with pytest.raises(SteerError) as error:
        hierarchical_loss(sae, x, sae.active(x), None, "fused")
    assert "plain, chunked, triton" in message(error)


def test_prefix_weights_add_up_to_one():
    weights = prefix_weights([1, 4], 6, torch.float64, torch.device("cpu"))
    assert weights.tolist() == [0.5, 0, 0, 0.5, 0, 0]
    assert prefix_weights(None, 4, torch.float64, torch.device("cpu")).tolist() == [0.25] * 4


@pytest.mark.parametrize("encoder", ["dense", "kron"])
def test_auxiliary_loss_is_that_of_the_formula(encoder):
    sae, x = make(encoder), inputs()
    dead = torch.tensor([1, 5, 6, 9, 20, 31])
    residual = x - sae(x)
    got = value_and_gradients(sae, auxiliary_loss(sae, x, residual, dead, k=4))
    z = (x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
    if encoder == "kron":
        p, q = z.relu().view(len(x), -1, sae.cfg.heads).split([sae.cfg.m, sae.cfg.n], 1)
        pq = torch.einsum("tih,tjh->thij", p, q).flatten(1)
        z = torch.where(pq > 0, pq, 1).sqrt() * (pq > 0)
    living = torch.ones(32, dtype=torch.bool).scatter(0, dead, False)
    z = z.relu().masked_fill(living, 0)
    z = z * (z >= z.topk(4).values[:, -1:])
    expected = value_and_gradients(sae, (residual.detach() - z @ sae.W_dec).square().sum(1).mean())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_auxiliary_loss_shrinks_with_few_dead_features():
    sae, x = make(), inputs()
    residual, dead = x - sae(x), torch.tensor([3])
    full = auxiliary_loss(sae, x, residual, dead, k=1)
    torch.testing.assert_close(auxiliary_loss(sae, x, residual, dead, k=4), full / 4)
    assert auxiliary_loss(sae, x, residual, dead[:0]).item() == 0


# --- Matryoshka


def latents_by_hand(sae: SAE, token: torch.Tensor) -> torch.Tensor:
    """All features of one token, feature by feature, from the rows of its head."""
    cfg, weight, bias = sae.cfg, sae.encoder.weight, sae.encoder.bias
    shifted = token - sae.b_dec if cfg.bias == "tied" else token
    if cfg.encoder == "dense":
        return torch.stack([row @ shifted + b for row, b in zip(weight, bias, strict=True)]).relu()
    features = []
    for head in range(cfg.heads):
        rows = [part * cfg.heads + head for part in range(cfg.m + cfg.n)]
        values = [weight[row] @ shifted + bias[row] for row in rows]
        for p in values[: cfg.m]:
            for q in values[cfg.m :]:
                both = bool(p > 0 and q > 0)
                product = {"mand": both, "relu_product": both, "product": bool(p * q > 0)}[cfg.interaction]
                z = (p * q if product else 0 * p).clone()
                features.append(z.sqrt() if cfg.interaction == "mand" and product else z)
    return torch.stack(features)


def matryoshka_by_hand(sae: SAE, x: torch.Tensor, prefixes: list[int]) -> torch.Tensor:
    """arXiv 2503.17547, section 3: BatchTopK or TopK, then token by token and feature by feature."""
    z = torch.stack([latents_by_hand(sae, token) for token in x])
    if sae.cfg.activation == "batchtopk":
        least = z.detach().flatten().sort(descending=True).values[sae.cfg.k * len(x) - 1]
        kept = z.detach() >= least
    else:
        kept = z.detach() >= z.detach().sort(1, descending=True).values[:, sae.cfg.k - 1 : sae.cfg.k]
    total = 0.0
    for size in prefixes:
        for token, features, keep in zip(x, z, kept, strict=True):
            x_hat = sae.b_dec
            for index in range(size):
                if keep[index]:
                    x_hat = x_hat + features[index] * sae.W_dec[index]
            total = total + (token - x_hat).square().sum() / len(x)
    return total


@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
@pytest.mark.parametrize(
    ("encoder", "interaction"),
    [("dense", "mand"), ("kron", "mand"), ("kron", "relu_product"), ("kron", "product")],
)
@pytest.mark.parametrize("prefixes", [None, [32], [8, 16, 32]])
def test_matryoshka_is_the_sum_of_nested_dictionaries(activation, encoder, interaction, prefixes):
    """Value and gradients in float64; 1e-10 leaves five digits for the other order of summation."""
    bias = "tied" if prefixes else "free"
    settings = {"encoder": encoder, "interaction": interaction, "bias": bias, "prefixes": prefixes}
    config = SAEConfig(12, 32, k=4, activation=activation, loss="matryoshka", **settings)
    sae = SAE(config).double().train()
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        sae.encoder.weight.normal_(generator=torch.Generator().manual_seed(2))
        sae.encoder.bias.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    assert config.prefixes == (prefixes or {"dense": [1, 3, 7, 15, 32], "kron": [8, 32]}[encoder])
    x = inputs(20)
    active = sae.active(x)
    expected = value_and_gradients(sae, matryoshka_by_hand(sae, x, config.prefixes))
    loss, x_hat = matryoshka_loss(sae, x, active, config.prefixes)
    torch.testing.assert_close(x_hat, sae.decode_active(active).detach(), rtol=1e-10, atol=1e-10)
    for a, b in zip(value_and_gradients(sae, loss), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert b.abs().max() > 1e-3
    if prefixes == [32]:
        torch.testing.assert_close(loss, reconstruction_loss(x, x_hat), rtol=1e-12, atol=0)


# --- the Triton kernel, in Triton's own interpreter where there is no GPU

COMPARE = """
import torch
from steer.sae import SAE, SAEConfig
from steer.sae.losses import hierarchical_loss

device = {device!r}
worst = 0.0
for width, features, k, prefixes in ((600, 96, 9, None), (24, 64, 16, [1, 4, 16]), (512, 40, 3, [3])):
    sae = SAE(SAEConfig(d_in=width, d_sae=features, k=k)).to(device)
    x = torch.randn(21, width, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for implementation in ("plain", "triton"):
        loss = hierarchical_loss(sae, x, sae.active(x), prefixes, implementation)
        gradients = torch.autograd.grad(2 * loss, [p for _, p in sorted(sae.named_parameters())])
        found.append([loss.detach(), *gradients])
    for a, b in zip(*found):
        worst = max(worst, ((a - b).norm() / a.norm()).item())
print(worst)
"""


def compare(device: str) -> float:
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if device == "cpu" else {})}
    code = textwrap.dedent(COMPARE.format(device=device))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_triton_kernel_in_the_interpreter():
    """float32 sums in another order: 1e-5 relative."""
    pytest.importorskip("triton")
    assert compare("cpu") < 1e-5


@pytest.mark.gpu
@needs_cuda
def test_triton_kernel_on_a_gpu():
    """float32 sums in another order, the table's added up atomically: 1e-5 relative."""
    pytest.importorskip("triton")
    assert compare(DEVICE) < 1e-5


def test_triton_says_what_it_needs():
    sae, x = make(), inputs()
    with pytest.raises(SteerError) as error:
        hierarchical_loss(sae, x, sae.active(x), None, "triton")
    assert "chunked" in message(error)

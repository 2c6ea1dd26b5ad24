"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

import pytest
import torch
from helpers.training import SPREAD, config, far, make_trainer

import steer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_steered_logits_equal_those_of_the_cpu(build_tiny):
    """float32 on both; 1e-4 covers the other order of summation."""
    ids = torch.arange(3, 60).view(3, 19)
    logits = []
    for device in ("cpu", "cuda"):
        model = build_tiny("llama").to(device)
        vectors = steer.attach(model)
        vectors.set_tensors({n: torch.linspace(-1, 1, t.numel()) for n, t in vectors.tensors().items()})
        assert all(p.device.type == device for p in vectors.parameters())
        with torch.no_grad():
            logits.append(model(ids.to(device)).logits.cpu())
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_two_updates_equal_those_of_the_cpu(build_tiny, tiny_tokenizer, tmp_path):
    """The sampler's noise does not depend on the device, so both runs see the same completions."""
    runs = []
    for use_cpu in (True, False):
        args = config(tmp_path / str(use_cpu), use_cpu=use_cpu)
        trainer = make_trainer(build_tiny("llama", initializer_range=SPREAD), tiny_tokenizer, args)
        trainer.train()
        runs.append(trainer.vectors.tensors())
    assert far(runs[1], runs[0]) < 1e-2


def test_trains_a_bfloat16_base(build_tiny, tiny_tokenizer, tmp_path):
    model = build_tiny("llama", initializer_range=SPREAD).to(torch.bfloat16)
    trainer = make_trainer(model, tiny_tokenizer, config(tmp_path, use_cpu=False))
    trainer.train()
    assert all(p.dtype == torch.float32 and p.norm() > 0 for p in trainer.vectors.parameters())

"""
The device of the tests marked `gpu`. They are skipped where there is no CUDA device; with
STEER_GPU_TESTS_ON=cpu they run on the CPU instead, which shows that their code works.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("STEER_GPU_TESTS_ON", "cuda")
needs_cuda = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)
on_gpu = [pytest.mark.gpu, needs_cuda]

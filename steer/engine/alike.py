"""
Models that vLLM computes otherwise than transformers, without vectors too: vectors trained in one would mean
something else in the other. Found with tiny random models of all architectures (docs/models.md).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from steer.engine.compat import CHECKED
from steer.errors import SteerError

# By model type: what vLLM does, everywhere and on CPUs.
UNLIKE = {
    "doge": "leaves out the mask that its attention learns",
    "zaya": "keeps no state for the convolutions of its attention",
}
UNLIKE_ON_CPU = {"ernie4_5_moe": "chooses experts without e_score_correction_bias"}
# Setting of the groups that vLLM's mixer of Mamba2 normalises one by one, and transformers all at once.
GROUPS = {"mamba2": "n_groups", "granitemoehybrid": "mamba_n_groups"}


def check_alike(model: nn.Module, config: Any, cpu: bool) -> None:
    """
    SteerError where this vLLM is known to compute another function than transformers.

    Args:
        model: vLLM's.
        config: the configuration of its text part.
        cpu: whether it runs on a CPU.
    """
    kind = getattr(config, "model_type", "")
    difference, where = UNLIKE.get(kind), ""
    if difference is None and cpu:
        difference, where = UNLIKE_ON_CPU.get(kind), " on a CPU"
    if kind in GROUPS and (groups := getattr(config, GROUPS[kind])) > 1:
        difference = f"normalises each of {GROUPS[kind]}={groups} groups by itself"
    if difference is not None:
        raise SteerError(
            f"the engine cannot steer {type(model).__name__} ({kind}): vLLM {CHECKED}{where} {difference}, "
            "unlike transformers, also without vectors; use transformers (--engine hf, use_vllm=false)"
        )

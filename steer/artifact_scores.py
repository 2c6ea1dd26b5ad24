"""
The scores that an artifact's provenance holds are those of the vectors they were measured with: its entry
`measured` is a checksum of these vectors, and scores of others are left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from steer.config import SteeringConfig

if TYPE_CHECKING:
    import torch

log = logging.getLogger("steer")

MEASURED = "measured"
# What provenance says of one set of vectors and of no other.
SCORES = ("results", "controls", "calibration", MEASURED)

_PLACE = re.compile(r"(?:\d+\.)?steering\.\w+$", re.ASCII)


def with_scores(config: SteeringConfig, tensors: Mapping[str, torch.Tensor]) -> SteeringConfig:
    """
    A config whose scores are those of `tensors` and of its scale.

    Args:
        config: of the artifact. Scores that do not say which vectors they are of are taken to be of these.
        tensors: of the artifact.

    Returns:
        The config with a checksum beside its scores; without scores where they are of other vectors or of
        another scale, which is logged.
    """
    made = config.provenance or {}
    if not any(made.get(name) for name in SCORES if name != MEASURED):
        return config
    now = vectors_checksum(config, tensors)
    if made.get(MEASURED, now) == now:
        return replace(config, provenance={**made, MEASURED: now})
    log.warning(
        "warning: the recorded scores are of other vectors or of another scale; they are left out, "
        "measure again with `steer eval`"
    )
    return replace(config, provenance=without_scores(made))


def for_export(config: SteeringConfig, tensors: Mapping[str, torch.Tensor]) -> SteeringConfig:
    """
    The same for a file of another tool, which holds the same vectors in another form: without the checksum.
    """
    config = with_scores(config, tensors)
    made = {name: part for name, part in (config.provenance or {}).items() if name != MEASURED}
    return replace(config, provenance=made or None)


def without_scores(made: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance without what holds for one set of vectors alone."""
    return {name: part for name, part in made.items() if name not in SCORES}


def vectors_checksum(config: SteeringConfig, tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits of all that decides what the vectors add."""
    import torch

    what: dict[str, Any] = {name: getattr(config, name) for name in ("kind", "site", "positions", "scale")}
    if config.condition is not None:
        what["condition"] = asdict(config.condition)
    digest = hashlib.sha256(json.dumps(what).encode())
    for name, tensor in sorted(tensors.items()):
        place = _PLACE.search(name)
        digest.update((place[0] if place else name).encode())  # the decoder has several names in one model
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

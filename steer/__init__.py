"""steer: train, move, serve and understand steering vectors."""

from importlib import import_module
from typing import TYPE_CHECKING

from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.artifact import Artifact, mean, read
    from steer.config import SteeringConfig
    from steer.prompt import PromptSpec
    from steer.training import (
        SteeringDPOConfig,
        SteeringDPOTrainer,
        SteeringGRPOConfig,
        SteeringGRPOTrainer,
        SteeringSFTConfig,
        SteeringSFTTrainer,
        SteeringTrainerConfig,
        SteeringTrainerMixin,
    )
    from steer.vectors import SteeringVectors, attach, attached, detach, load

__version__ = "0.2.0"

__all__ = [
    "Artifact",
    "PromptSpec",
    "SteerError",
    "SteeringConfig",
    "SteeringDPOConfig",
    "SteeringDPOTrainer",
    "SteeringGRPOConfig",
    "SteeringGRPOTrainer",
    "SteeringSFTConfig",
    "SteeringSFTTrainer",
    "SteeringTrainerConfig",
    "SteeringTrainerMixin",
    "SteeringVectors",
    "attach",
    "attached",
    "detach",
    "load",
    "mean",
    "read",
]

_HOMES = (
    {"SteeringConfig": "steer.config", "PromptSpec": "steer.prompt"}
    | dict.fromkeys(("SteeringVectors", "attach", "attached", "detach", "load"), "steer.vectors")
    | dict.fromkeys(("Artifact", "mean", "read"), "steer.artifact")
    | dict.fromkeys(
        (
            *("SteeringGRPOConfig", "SteeringSFTConfig", "SteeringDPOConfig", "SteeringTrainerConfig"),
            *("SteeringGRPOTrainer", "SteeringSFTTrainer", "SteeringDPOTrainer", "SteeringTrainerMixin"),
        ),
        "steer.training",
    )
)
_PACKAGES = (
    "engine",
    "evaluation",
    "export",
    "extract",
    "generation",
    "lens",
    "sae",
    "tasks",
    "training",
    "transfer",
)


def __getattr__(name: str) -> object:
    # Torch is imported at the first use, so that the command line and the graders' workers start fast.
    if name in _PACKAGES:
        return import_module(f"steer.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

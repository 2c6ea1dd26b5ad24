"""Training: trl's trainers for vectors, GRPO's sampler and update, and the run on disk."""

import warnings

from steer.extras import require

require("training", "train")
# trl warns in six places, vLLM used or not; `steer.engine.compat.warn_version` warns once, where it is used.
warnings.filterwarnings("ignore", "TRL currently supports vLLM versions")

from steer.training.answer_configs import SteeringDPOConfig, SteeringSFTConfig
from steer.training.answer_trainers import SteeringDPOTrainer, SteeringSFTTrainer
from steer.training.config import SteeringGRPOConfig
from steer.training.steering_mixin import SteeringTrainerMixin
from steer.training.steering_trainer import SteeringGRPOTrainer
from steer.training.trainer_config import SteeringTrainerConfig

__all__ = [
    "SteeringDPOConfig",
    "SteeringDPOTrainer",
    "SteeringGRPOConfig",
    "SteeringGRPOTrainer",
    "SteeringSFTConfig",
    "SteeringSFTTrainer",
    "SteeringTrainerConfig",
    "SteeringTrainerMixin",
]

"""Training: trl's GRPO for vectors, its sampler, its update, and the run on disk."""

import warnings

from steer.extras import require

require("training", "train")
# trl warns in six places, vLLM used or not; `steer.engine.compat.warn_version` warns once, where it is used.
warnings.filterwarnings("ignore", "TRL currently supports vLLM versions")

from steer.training.config import SteeringGRPOConfig
from steer.training.steering_trainer import SteeringGRPOTrainer

__all__ = ["SteeringGRPOConfig", "SteeringGRPOTrainer"]

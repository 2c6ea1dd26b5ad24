"""Training: trl's GRPO for vectors, its sampler, its update, and the run on disk."""

from steer.extras import require

require("training", "train")

from steer.training.config import SteeringGRPOConfig
from steer.training.steering_trainer import SteeringGRPOTrainer

__all__ = ["SteeringGRPOConfig", "SteeringGRPOTrainer"]

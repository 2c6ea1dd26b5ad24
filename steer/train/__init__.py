"""Training: trl's GRPO for vectors, its sampler, its update, and the run on disk."""

from steer.train.config import SteeringGRPOConfig
from steer.train.trainer import SteeringGRPOTrainer

__all__ = ["SteeringGRPOConfig", "SteeringGRPOTrainer"]

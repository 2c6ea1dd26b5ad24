"""Sampling completions with PyTorch, and scoring them: the fast paths, each checked on the model itself."""

from steer.extras import require

require("steer.generation", "train")

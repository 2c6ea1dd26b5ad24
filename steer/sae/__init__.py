"""
Sparse autoencoders: TopK, BatchTopK, JumpReLU, KronSAE and HierarchicalTopK, and what they find in steering.
"""

from steer.extras import require

require("steer.sae", "sae")

from steer.sae.config import SAEConfig
from steer.sae.files import load_sae, save_sae
from steer.sae.model import SAE

__all__ = ["SAE", "SAEConfig", "load_sae", "save_sae"]

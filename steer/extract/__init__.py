"""
Vectors that need no training: from contrasts of texts, from the right and wrong answers of a run, from a
feature of a sparse autoencoder, from a token's unembedding. Each becomes an ordinary artifact, whose card
says how it was made.

- `rows`: texts as token ids, each with its prompt's length
- `activations`: means of a model's activations over chosen tokens of texts
- `contrast`: contrast pairs from a file, or made in Python
- `completions`: the right and wrong answers that a run of `steer train` or `steer eval` left
- `directions`: mean difference, principal component, linear SVM, SAE feature, token; how long a vector is
- `make`: artifacts from these
- `condition`: after which prompts a set of vectors acts
"""

from steer.extract.completions import read_completions
from steer.extract.contrast import Contrast, read_contrast
from steer.extract.directions import (
    mean_difference,
    principal_component,
    sae_direction,
    support_vector,
    token_direction,
)
from steer.extract.make import from_contrast, from_direction

__all__ = [
    "Contrast",
    "from_contrast",
    "from_direction",
    "mean_difference",
    "principal_component",
    "read_completions",
    "read_contrast",
    "sae_direction",
    "support_vector",
    "token_direction",
]

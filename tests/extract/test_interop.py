"""
The same vectors as repeng and steering-vectors, where they are installed (`make interop-extract`).

Tolerances: all read float32 activations of one model, in batches that pad and sum in another order; principal
components of these are compared by their cosine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.steering import relative

from steer.extract import Contrast, from_contrast
from steer.extract.activations import read_activations
from steer.extract.directions import mean_difference
from steer.extract.rows import Row

# numpy 2 lacks a name that repeng 0.4 uses in an annotation
if not hasattr(np, "float_"):
    np.float_ = np.float64

WORDS = ("rain", "snow", "the sea", "a long day", "7 + 5", "music at night", "bread", "old trains")
PAIRS = [(f"I really love {word}!", f"I do not like {word}.") for word in WORDS]


def rows(tokenizer: Any, side: int) -> list[Row]:
    found = [tokenizer(pair[side])["input_ids"] for pair in PAIRS]
    return [Row(tuple(ids), len(ids)) for ids in found]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_steering_vectors(build_tiny: Any, tiny_tokenizer: Any, kind: str) -> None:
    tool = pytest.importorskip("steering_vectors", exc_type=ImportError)
    aggregators = pytest.importorskip("steering_vectors.aggregators", exc_type=ImportError)
    model = build_tiny(kind)
    theirs = tool.train_steering_vector(model, tiny_tokenizer, PAIRS, batch_size=1).layer_activations
    positive, negative = (
        read_activations(model, rows(tiny_tokenizer, side), range(3), batch_size=3) for side in (0, 1)
    )
    mine = mean_difference(positive, negative)
    assert theirs.keys() == mine.keys()
    for layer, vector in mine.items():
        assert relative(vector.float(), theirs[layer]) < 1e-4
    components = tool.train_steering_vector(
        model, tiny_tokenizer, PAIRS, batch_size=1, aggregator=aggregators.pca_aggregator()
    ).layer_activations
    contrast = Contrast(*(rows(tiny_tokenizer, side) for side in (0, 1)), [(i, i) for i in range(len(PAIRS))])
    for layer, vector in from_contrast(model, tiny_tokenizer, contrast, method="pca").by_layer().items():
        assert torch.cosine_similarity(vector, components[layer], dim=0) > 1 - 1e-5


def test_repeng(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    tool = pytest.importorskip("repeng", exc_type=ImportError)
    entries = [tool.DatasetEntry(*pair) for pair in PAIRS]
    theirs = tool.ControlVector.train(
        tiny_llama, tiny_tokenizer, entries, method="pca_center", batch_size=4, hidden_layers=[0, 1, 2]
    ).directions
    contrast = Contrast(*(rows(tiny_tokenizer, side) for side in (0, 1)), [(i, i) for i in range(len(PAIRS))])
    made = from_contrast(tiny_llama, tiny_tokenizer, contrast, method="pca").by_layer()
    for layer in (0, 1):  # it reads the last layer after the final norm
        assert torch.cosine_similarity(made[layer], torch.tensor(theirs[layer]), dim=0) > 1 - 1e-5

"""How much memory a run takes, by calculation: weights, the cache of sampling, the graph of an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Bytes of a trained number: itself, its gradient and the two moments of Adam, in float32.
STATE = 16


@dataclass(frozen=True)
class Shape:
    """A dense decoder of Llama's type, in the names of its config."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def parameters(self) -> int:
        q, kv = self.heads * self.head, self.kv_heads * self.head
        attention = self.width * (2 * q + 2 * kv) + (q + 2 * kv) * self.qkv_bias
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + self.vocabulary * self.width * (2 - self.tied) + self.width

    @property
    def matrices(self) -> int:
        """Numbers that a token is multiplied with: all but the input embeddings, norms and biases."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        layer = self.width * (2 * q + 2 * kv) + 3 * self.width * self.inner
        return self.layers * layer + self.vocabulary * self.width

    def cache(self, size: int = 2) -> int:
        """Bytes of keys and values that a token leaves, `size` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head * size

    def graph(self, size: int = 2) -> int:
        """
        Bytes that a token leaves for the backward pass when the graph begins after layer 0. A product with a
        frozen matrix keeps nothing; each norm keeps its input in float32, attention its four operands, the
        MLP three inner activations.
        """
        q, kv = self.heads * self.head, self.kv_heads * self.head
        layer = 2 * 4 * self.width + size * (2 * q + 2 * kv) + size * 3 * self.inner
        return (self.layers - 1) * layer + 4 * self.width

    @property
    def vectors(self) -> int:
        """Trained numbers, a vector at every layer."""
        return self.layers * self.width


def shape_of(config: PreTrainedConfig) -> Shape | None:
    """The shape of a model by its config; None where the config lacks one of the sizes."""
    text = config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    numbers = [getattr(text, name, None) for name in names]
    sizes = [size for size in numbers if isinstance(size, int)]
    if len(sizes) < len(numbers):
        return None
    layers, width, inner, heads, vocabulary = sizes
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head = getattr(text, "head_dim", None) or width // heads
    return Shape(layers, width, inner, heads, kv_heads, head, vocabulary)


def memory(shape: Shape, weights: int, trained: int, size: int, sampled: int, scored: int) -> dict[str, int]:
    """
    Bytes on one device.

    Args:
        shape: sizes of the model.
        weights: bytes of its weights.
        trained: trainable parameters.
        size: bytes of a number in the model's precision.
        sampled: tokens in the cache at once, prompts included.
        scored: tokens in the graph of an update at once.
    """
    return {
        "weights": weights,
        "optimizer": STATE * trained,
        "sampling": shape.cache(size) * sampled,
        "update": shape.graph(size) * scored,
    }

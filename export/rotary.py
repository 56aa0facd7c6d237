"""Partial rotary embeddings of sizes that onnxruntime's attention cannot do by itself, such as 8 of 32 dimensions.

GroupQueryAttention rotates a multiple of 16 leading dimensions of a head. The scores stay what they are when q and k
are reordered alike: so the dimensions are spread over the whole head, all of it rotates, and those that should not do
so at a frequency of zero, which is exact.

    rotary_dim 4 of head_dim 8:   a a b b . . . .   (a pairs with b)   ->   a a . . b b . .
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gptedge.config import ModelConfig
from gptedge.safetensors import FloatArray, Tensor

MULTIPLE = 16
"""What the sizes that the kernel rotates are multiples of."""


def is_spread(c: ModelConfig, multiple: int = MULTIPLE) -> bool:
    """Whether the kernel, which rotates multiples of `multiple`, needs the dimensions in another order."""
    return c.position == "rope" and c.rope_dim % multiple != 0


def spread_frequencies(c: ModelConfig, frequencies: list[float]) -> list[float]:
    """Frequencies for the whole head, [head_dim / 2]."""
    return frequencies + [0.0] * (c.head_dim // 2 - len(frequencies))


def rotary_scale(c: ModelConfig, spread: bool) -> list[float]:
    """Factor of each column of cosines and sines; those that do not rotate are not scaled."""
    scaled = [c.rope_attention_factor] * (c.rope_dim // 2)
    return scaled + [1.0] * (c.head_dim // 2 - len(scaled)) if spread else scaled


def spread_weights(c: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, with each head of q and k, and of their norms, in the order that goes with the frequencies."""
    return {name: _reordered(c, t) if _is_query_or_key(name) else t for name, t in weights.items()}


def _is_query_or_key(name: str) -> bool:
    return name.partition(".attn.")[2].startswith(("q", "k"))


def _reordered(c: ModelConfig, tensor: Tensor) -> Tensor:
    half, rest = c.rope_dim // 2, (c.head_dim - c.rope_dim) // 2
    a, b, c1, c2 = np.split(np.arange(c.head_dim), [half, 2 * half, 2 * half + rest])
    order = np.concatenate([a, c1, b, c2])

    def read() -> FloatArray:
        heads = tensor.read().reshape(-1, c.head_dim, *tensor.shape[1:])  # [H | K, E, …]
        return heads[:, order].reshape(tensor.shape)

    return Tensor(tensor.shape, tensor.dtype, read)

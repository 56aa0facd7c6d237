"""The decoder in plain numpy: slow, without a KV cache, and short enough to be checked by eye.

Every export is compared with it, so that a wrong graph is found where it is made, on a machine without torch. It reads
the checkpoint's tensors piece by piece. Shapes: T tokens, D n_embd, H n_head, K n_kv_head, E head_dim, F n_ff.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from gptedge.config import ModelConfig, rope_frequencies
from gptedge.safetensors import FloatArray, Tensor

_erf = np.vectorize(math.erf, otypes=[np.float32])

ACTIVATIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.float32(math.sqrt(2)))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


class Reference:
    """`logits(ids)` of a model whose tensors have gptedge's names."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.c = config
        self.w = weights

    def logits(self, ids: list[int]) -> FloatArray:
        """[T] -> [T, vocab_size]"""
        x = self.embed(ids)
        for i in range(self.c.n_layer):
            x = self.block(x, i)
        logits = self.product(self.norm(x, "norm"), "embed.weight" if self.c.tie_embeddings else "head.weight")
        cap = self.c.logit_softcap
        return logits if cap is None else np.float32(cap) * np.tanh(logits / np.float32(cap))

    def embed(self, ids: list[int]) -> FloatArray:
        x = self.w["embed.weight"].take(ids)
        if self.c.position == "learned":
            x += self.w["position.weight"].take(range(len(ids)))
        return self.norm(x * np.float32(self.c.embed_scale), "embed_norm")

    def norm(self, x: FloatArray, name: str) -> FloatArray:
        """RMSNorm or LayerNorm over the last axis; x itself where the family has no such norm."""
        if f"{name}.weight" not in self.w:
            return x
        if self.c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.c.norm_eps)) * self.w[f"{name}.weight"].read()
        return y + self.w[f"{name}.bias"].read() if f"{name}.bias" in self.w else y

    def attention(self, x: FloatArray, i: int) -> FloatArray:
        c, block, n = self.c, f"blocks.{i}.attn", len(x)
        q, k, v = (self.linear(x, f"{block}.{part}") for part in "qkv")
        if c.qk_norm_joint:
            q, k = self.norm(q, f"{block}.q_norm"), self.norm(k, f"{block}.k_norm")
        q, k, v = (part.reshape(n, -1, c.head_dim) for part in (q, k, v))  # [T, H | K, E]
        if c.qk_norm and not c.qk_norm_joint:
            q, k = self.norm(q, f"{block}.q_norm"), self.norm(k, f"{block}.k_norm")
        if c.position == "rope":
            q, k = self.rotate(q, c.rope_of(i)), self.rotate(k, c.rope_of(i))
        q, k, v = (part.swapaxes(0, 1) for part in (q, k, v))  # [H | K, T, E]
        weights = attention_weights(q, k, window=c.window(i), scale=c.attn_scale, softcap=c.attn_softcap)
        y = (weights @ np.repeat(v, len(q) // len(v), 0)).swapaxes(0, 1)  # [T, H, E]
        return self.linear(y.reshape(n, -1), f"{block}.o")

    def rotate(self, x: FloatArray, c: ModelConfig) -> FloatArray:
        """RoPE over the first rope_dim of each head, in two halves."""
        dim = c.rope_dim
        angles = np.outer(np.arange(len(x), dtype=np.float32), np.array(rope_frequencies(c), np.float32))[:, None]
        cos, sin = (f(angles) * np.float32(c.rope_attention_factor) for f in (np.cos, np.sin))
        a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def mlp(self, x: FloatArray, i: int) -> FloatArray:
        block, act = f"blocks.{i}.mlp", ACTIVATIONS[self.c.activation]
        if not self.c.gated:
            return self.linear(act(self.linear(x, f"{block}.up")), f"{block}.down")
        return self.linear(act(self.linear(x, f"{block}.gate")) * self.linear(x, f"{block}.up"), f"{block}.down")

    def block(self, x: FloatArray, i: int) -> FloatArray:
        block = f"blocks.{i}"
        after = x + self.norm(self.attention(self.norm(x, f"{block}.attn_norm"), i), f"{block}.attn_post_norm")
        seen = x if self.c.parallel else after
        return after + self.norm(self.mlp(self.norm(seen, f"{block}.mlp_norm"), i), f"{block}.mlp_post_norm")

    def linear(self, x: FloatArray, name: str) -> FloatArray:
        y = self.product(x, f"{name}.weight")
        return y + self.w[f"{name}.bias"].read() if f"{name}.bias" in self.w else y

    def product(self, x: FloatArray, name: str) -> FloatArray:
        """x @ W.T, a few MB of W at a time."""
        return np.concatenate([x @ piece.T for piece in self.w[name].pieces()], axis=-1)


def attention_weights(
    q: FloatArray, k: FloatArray, *, window: int = 0, scale: float | None = None, softcap: float | None = None
) -> FloatArray:
    """How each of T queries [H, T, E] spreads its attention over the keys [K, T, E] up to its own, [H, T, T].

    With a window, position t sees t - window + 1 … t.
    """
    k = np.repeat(k, len(q) // len(k), 0)  # [H, T, E]
    scores = q @ k.swapaxes(1, 2) * np.float32(scale or 1 / math.sqrt(q.shape[-1]))
    if softcap is not None:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    seen = np.tril(np.ones(scores.shape[1:], bool))
    if window:
        seen &= ~np.tril(seen, -window)
    scores[:, ~seen] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    weights: FloatArray = scores / scores.sum(-1, keepdims=True)
    return weights

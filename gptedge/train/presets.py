"""Models to train, as rows of one table: Llama-shaped, with widths that quantize in whole blocks of 64.

A preset is a starting point: every number of it can be set by itself in a `TrainConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptedge.config import ModelConfig
from gptedge.errors import UsageError
from gptedge.families import tensor_shapes


@dataclass(frozen=True, kw_only=True)
class Preset:
    """RoPE, RMSNorm, SwiGLU, grouped-query attention and tied embeddings, in one size."""

    expected_time: str
    """Of `max_steps`, on two cores, in float32."""
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_ff: int
    vocab_size: int
    context_length: int
    batch_size: int
    learning_rate: float
    max_steps: int

    @property
    def parameters(self) -> int:
        """With the whole vocabulary."""
        return sum(math.prod(shape) for shape in tensor_shapes(self.model(vocab_size=self.vocab_size)).values())

    def model(self, *, vocab_size: int) -> ModelConfig:
        """The model of this size, its vocabulary being what the tokenizer came to."""
        if self.n_embd % self.n_head:
            raise UsageError(f"n_embd is {self.n_embd}; it must be a multiple of n_head, {self.n_head}")
        return ModelConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
            n_embd=self.n_embd,
            head_dim=self.n_embd // self.n_head,
            n_ff=self.n_ff,
            vocab_size=vocab_size,
            context_length=self.context_length,
            tie_embeddings=True,
        )


PRESETS: dict[str, Preset] = {
    # Of 2 minutes' worth of tokens, 4.0M parameters learn less than 2.4M; 5 times the learning rate for the embeddings
    # is worth twice the tokens.
    "nano": Preset(
        expected_time="2 minutes",
        n_layer=4,
        n_head=3,
        n_kv_head=1,
        n_embd=192,
        n_ff=512,
        vocab_size=4096,
        context_length=256,
        batch_size=4,
        learning_rate=2e-3,
        max_steps=700,
    ),
    "micro": Preset(
        expected_time="a night",
        n_layer=6,
        n_head=6,
        n_kv_head=2,
        n_embd=384,
        n_ff=1024,
        vocab_size=8192,
        context_length=512,
        batch_size=8,
        learning_rate=1.2e-3,
        max_steps=10_000,
    ),
    "small": Preset(
        expected_time="a week",
        n_layer=10,
        n_head=8,
        n_kv_head=2,
        n_embd=512,
        n_ff=1408,
        vocab_size=16384,
        context_length=1024,
        batch_size=8,
        learning_rate=8e-4,
        max_steps=20_000,
    ),
    "base": Preset(
        expected_time="a month",
        n_layer=12,
        n_head=12,
        n_kv_head=4,
        n_embd=768,
        n_ff=2048,
        vocab_size=32768,
        context_length=1024,
        batch_size=16,
        learning_rate=5e-4,
        max_steps=20_000,
    ),
}

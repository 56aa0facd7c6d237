"""How much of the machine training uses: model FLOPs utilisation (arXiv:2204.02311, appendix B)."""

from __future__ import annotations

import time

import torch

from gptedge.config import ModelConfig

_TRIES = 6


def flops_per_token(c: ModelConfig, parameters: int) -> int:
    """Of a training step, forward and backward, attention counted as if every token saw the whole context."""
    products = parameters if c.tie_embeddings else parameters - c.vocab_size * c.n_embd  # a lookup multiplies nothing
    return 6 * products + 12 * c.n_layer * c.q_size * c.context_length


def peak_flops(dtype: torch.dtype, device: torch.device, side: int = 1024) -> float:
    """What this process reaches in products of square matrices, a second: the quickest of a few, 0.2 s in all."""
    a = torch.ones(side, side, device=device, dtype=dtype)
    quickest = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        quickest = min(quickest, time.perf_counter() - began)
    return 2 * side**3 / quickest

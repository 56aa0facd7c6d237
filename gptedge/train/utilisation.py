"""How much of the machine training uses: model FLOPs utilisation (arXiv:2204.02311, appendix B)."""

from __future__ import annotations

import time

import torch

from gptedge.config import ModelConfig
from gptedge.train.parts import Precision

_SIDE, _TRIES = 1024, 6


def flops_per_token(c: ModelConfig, parameters: int) -> int:
    """Of a training step, forward and backward, attention counted as if every token saw the whole context."""
    products = parameters if c.tie_embeddings else parameters - c.vocab_size * c.n_embd  # a lookup multiplies nothing
    return 6 * products + 12 * c.n_layer * c.q_size * c.context_length


def peak_flops(precision: Precision, device: torch.device) -> float:
    """What this process reaches in products of square matrices, a second: the quickest of a few, 0.2 s in all."""
    a = torch.ones(_SIDE, _SIDE, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    quickest = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        quickest = min(quickest, time.perf_counter() - began)
    return 2 * _SIDE**3 / quickest

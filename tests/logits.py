"""Logits of a text, ours however it is cut and a PyTorch model's, and when they count as the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gptedge.runtime.session import Session

VOCAB_SIZE = 347


def ids_of(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, VOCAB_SIZE, n)]


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    """Of a transformers model or of one of ours, [T, vocab_size]."""
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    return (out if isinstance(out, torch.Tensor) else out.logits)[0].numpy()


def logits_in_pieces(session: Session, ids: list[int], sizes: Sequence[int]) -> np.ndarray:
    """Of pieces of these sizes run one after the other over one KV cache, [sum(sizes), vocab_size]."""
    cache, rows, start = session.new_cache(), [], 0
    for size in sizes:
        rows.append(session.run(ids[start : start + size], cache, every_row=True))
        start += size
    return np.concatenate(rows)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= 1e-3 * expected.std()

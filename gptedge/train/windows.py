"""Batches of plain text: windows of a flat array of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gptedge.train.batches import Batch
from gptedge.train.data import TokenArray, TokenData

_EVAL_BATCH = 8  # windows at a time when the validation loss is measured


class RandomWindows:
    """Windows of tokens that start anywhere in a text."""

    def __init__(self, data: TokenData, *, batch_size: int, context: int, eval_windows: int, seed: int) -> None:
        """`batch_size` windows of `context` tokens in a batch; `eval_windows` of the held-out text."""
        self._data, self._seed = data, seed
        self._batch_size, self._context, self._eval_windows = batch_size, context, eval_windows

    def batch(self, step: int) -> Batch:
        draw = np.random.default_rng((self._seed, step))
        starts = draw.integers(len(self._data.train) - self._context, size=self._batch_size)
        return _batch(self._data.train, starts.tolist(), self._context)

    def held_out(self) -> Sequence[Batch]:
        return spread_windows(self._data.validation, count=self._eval_windows, context=self._context)


def spread_windows(tokens: TokenArray, *, count: int, context: int) -> list[Batch]:
    """At most `count` windows, spread evenly and not overlapping; one shorter one of a short text, none of none."""
    if len(tokens) < 2:
        return []
    context = min(context, len(tokens) - 1)
    count = min(count, (len(tokens) - 1) // context)
    starts = [i * ((len(tokens) - 1) // count) for i in range(count)]
    return [_batch(tokens, starts[i : i + _EVAL_BATCH], context) for i in range(0, count, _EVAL_BATCH)]


def _batch(tokens: TokenArray, starts: Sequence[int], context: int) -> Batch:
    rows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)  # [B, T + 1]
    windows = torch.from_numpy(rows)
    return Batch(windows[:, :-1], windows[:, 1:])

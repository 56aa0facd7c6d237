"""Short examples side by side in rows, so that little is padding; `segments` keep them from seeing each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gptedge.train.batches import IGNORED, Batch
from gptedge.train.chat_examples import Example

_ROW = 256
"""Tokens of a row, or those of the longest example: attention looks at every pair of a row's tokens."""
_EVAL_BATCH = 16  # examples at a time when the validation loss is measured


class PackedExamples:
    """Batches of examples, each seen once in an epoch, in an order drawn anew for every epoch."""

    def __init__(
        self, examples: Sequence[Example], held_out: Sequence[Example], *, batch_size: int, context: int, seed: int
    ) -> None:
        """`batch_size` examples in a batch, fewer where there are not so many; rows of at most `context` tokens."""
        self._examples, self._held_out = examples, held_out
        self._context, self._seed = context, seed
        self.per_epoch = -(-len(examples) // batch_size)
        """Batches of an epoch, all of nearly the same size."""

    def batch(self, step: int) -> Batch:
        epoch, index = divmod(step, self.per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._examples))
        return pack([self._examples[i] for i in np.array_split(order, self.per_epoch)[index]], self._context)

    def held_out(self) -> Sequence[Batch]:
        parts = range(0, len(self._held_out), _EVAL_BATCH)
        return [pack(self._held_out[i : i + _EVAL_BATCH], self._context) for i in parts]


def pack(examples: Sequence[Example], context: int) -> Batch:
    """The examples in rows of at most `context` tokens each, found by first-fit decreasing."""
    rows = _rows(sorted(examples, key=lambda e: -len(e.ids)), context)
    width = max(map(_size, rows))
    shape = (len(rows), width)
    ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    segments = np.full(shape, max(map(len, rows)), np.int64)  # padding is a sequence of its own
    for r, row in enumerate(rows):
        at = 0
        for number, e in enumerate(row):
            part = np.s_[r, at : at + len(e.ids) - 1]
            ids[part], segments[part] = e.ids[:-1], number
            targets[part] = np.where(e.learned[1:], e.ids[1:], IGNORED)
            at += len(e.ids) - 1
    return Batch(*map(_tensor, (ids, targets, segments)))


def _rows(examples: Sequence[Example], context: int) -> list[list[Example]]:
    """Rows as wide as they may be; or narrower ones, where that leaves the last less empty."""
    longest = len(examples[0].ids) - 1
    assert longest <= context, "examples are cut to the context before"
    wide = _first_fit(examples, min(context, max(longest, _ROW)))
    even = _first_fit(examples, max(longest, -(-_size(examples) // len(wide))))
    return min(wide, even, key=lambda rows: len(rows) * max(map(_size, rows)))


def _size(examples: Sequence[Example]) -> int:
    return sum(len(e.ids) - 1 for e in examples)


def _first_fit(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """Each example goes into the first row that has room."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for e in examples:
        size = len(e.ids) - 1
        i = next((i for i, left in enumerate(room) if left >= size), len(rows))
        if i == len(rows):
            rows.append([])
            room.append(capacity)
        rows[i].append(e)
        room[i] -= size
    return rows


def _tensor(array: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(array)

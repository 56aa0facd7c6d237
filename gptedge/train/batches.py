"""What a training loop learns from: batches, and where they come from.

A source gives the whole batch of any step by the step's number, the same each time it is asked. So a resumed run needs
no position in the data, and each of several processes takes its own rows of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100
"""A target that is not scored."""


@dataclass(frozen=True)
class Batch:
    """Rows to learn from, int64 [B, T] each.

        ids        7 8 9 0 5 6 0
        targets    8 9 0 . 6 0 .     the token after each; IGNORED where none is scored
        segments   0 0 0 0 1 1 1     None: each row is one sequence

    Each run of one number in `segments` is a sequence of its own, that sees nothing of the others.
    """

    ids: Tensor
    targets: Tensor
    segments: Tensor | None = None

    @property
    def scored(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED).sum())

    def rows(self, start: int, stop: int) -> Batch:
        segments = None if self.segments is None else self.segments[start:stop]
        return Batch(self.ids[start:stop], self.targets[start:stop], segments)

    def to(self, device: torch.device) -> Batch:
        segments = None if self.segments is None else self.segments.to(device)
        return Batch(self.ids.to(device), self.targets.to(device), segments)


class BatchSource(Protocol):
    """Where a trainer's batches come from."""

    def batch(self, step: int) -> Batch:
        """What the weights are updated from after `step` updates: a function of the number alone."""

    def held_out(self) -> Sequence[Batch]:
        """What the validation loss is measured on, always the same; empty when nothing is held out."""

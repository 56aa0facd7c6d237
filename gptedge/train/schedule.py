"""How far a run has come, and what follows from it: the learning rate, the time left, the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptedge.train.settings import LoopConfig


@dataclass(frozen=True)
class Budget:
    """Bounds in steps, in time, or both; the run follows whichever it will reach first."""

    max_steps: int | None
    max_seconds: float | None

    def progress(self, step: int, elapsed_s: float) -> float:
        """0 at the start, 1 where the run ends."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = elapsed_s / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def eta_s(self, step: int, elapsed_s: float) -> float:
        progress = self.progress(step, elapsed_s)
        return elapsed_s * (1 - progress) / progress if progress else math.inf


def learning_rate(config: LoopConfig, progress: float) -> float:
    """Rises in a line over `warmup`, then falls along half a cosine to its last fraction."""
    peak, floor = config.peak_learning_rate, config.final_learning_rate
    if progress < config.warmup:
        return peak * progress / config.warmup
    turn = (progress - config.warmup) / (1 - config.warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * turn)) / 2)

"""How far a run has come, and what follows from it: the learning rate, the time left, the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gptedge.train.settings import LoopConfig, Schedule


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
    """Rises in a line over `warmup`, then falls to its last fraction as `schedule` says."""
    peak, floor = config.peak_learning_rate, config.final_learning_rate
    if progress < config.warmup:
        return peak * progress / config.warmup
    return peak * (floor + (1 - floor) * _HEIGHTS[config.schedule](config, progress))


def _cosine(config: LoopConfig, progress: float) -> float:
    """1 after the warmup, 0 at the end."""
    turn = (progress - config.warmup) / (1 - config.warmup)
    return (1 + math.cos(math.pi * turn)) / 2


def _trapezoid(config: LoopConfig, progress: float) -> float:
    """1 until the last `decay` of the run, then a line to 0: warmup-stable-decay (arXiv:2404.06395)."""
    return min(1.0, (1 - progress) / min(config.decay, 1 - config.warmup))


_HEIGHTS: dict[Schedule, Callable[[LoopConfig, float], float]] = {"cosine": _cosine, "trapezoid": _trapezoid}

"""The learning rate over a run, by steps and by time."""

from __future__ import annotations

import math

import pytest

from gptedge.train.config import TrainConfig
from gptedge.train.schedule import Budget, learning_rate


def test_the_learning_rate_rises_in_a_line_then_falls_along_a_cosine() -> None:
    config = TrainConfig(learning_rate=0.1, warmup=0.2, final_learning_rate=0.1)
    at = {p: learning_rate(config, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)}
    assert at == pytest.approx({0.0: 0.0, 0.1: 0.05, 0.2: 0.1, 0.6: 0.055, 1.0: 0.01})
    falling = [learning_rate(config, 0.2 + 0.8 * i / 50) for i in range(51)]
    assert falling == sorted(falling, reverse=True)


def test_a_trapezoid_stays_high_and_falls_in_a_line_at_the_end() -> None:
    config = TrainConfig(learning_rate=0.1, warmup=0.2, decay=0.4, final_learning_rate=0.1, schedule="trapezoid")
    at = {p: learning_rate(config, p) for p in (0.1, 0.2, 0.5, 0.6, 0.8, 1.0)}
    assert at == pytest.approx({0.1: 0.05, 0.2: 0.1, 0.5: 0.1, 0.6: 0.1, 0.8: 0.055, 1.0: 0.01})
    long = TrainConfig(learning_rate=0.1, warmup=0.5, decay=1.0, final_learning_rate=0.0, schedule="trapezoid")
    assert [learning_rate(long, p) for p in (0.5, 0.75, 1.0)] == pytest.approx([0.1, 0.05, 0.0])


def test_without_warmup_it_starts_at_the_top() -> None:
    assert learning_rate(TrainConfig(learning_rate=0.1, warmup=0.0), 0.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("max_steps", "max_seconds", "progress"),
    [(100, None, 0.5), (None, 40.0, 0.25), (100, 40.0, 0.5), (100, 16.0, 0.625), (50, 10.0, 1.0)],
)
def test_progress_follows_the_bound_that_comes_first(
    max_steps: int | None, max_seconds: float | None, progress: float
) -> None:
    budget = Budget(max_steps, max_seconds)
    assert budget.progress(50, 10.0) == pytest.approx(progress)
    assert budget.eta_s(50, 10.0) == pytest.approx(10.0 / progress - 10.0)


def test_no_progress_no_estimate() -> None:
    assert Budget(10, None).eta_s(0, 0.0) == math.inf

"""Training runs in a report: what `gptedge train` and `finetune` wrote of every step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptedge.errors import DataError
from gptedge.text import read_text

METRICS = "metrics.jsonl"
MEASURES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens/s",
}
"""What a run's metrics hold beside its losses, and what it is called."""
_POINTS = 400  # of a curve


@dataclass(frozen=True)
class RunReport:
    """A training run: points of a step and what was measured there, means where there are many steps."""

    name: str
    path: str
    steps: int
    loss: float
    val_loss: float | None
    points: list[tuple[int, float]]
    val_points: list[tuple[int, float]]
    measures: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Points of those of MEASURES that the metrics hold."""


def read_run(folder: Path, name: str) -> RunReport:
    """The metrics that a trainer wrote. Raises DataError naming the line that is something else."""
    losses, held_out = [], []
    measures: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(read_text(folder / METRICS).splitlines(keepends=True), 1):
        try:
            entry = json.loads(line)
            losses.append((int(entry["step"]), _finite(entry["loss"])))
            if entry.get("val_loss") is not None:
                held_out.append((int(entry["step"]), _finite(entry["val_loss"])))
            for measure in MEASURES:
                if entry.get(measure) is not None:
                    measures.setdefault(measure, []).append((int(entry["step"]), _finite(entry[measure])))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            if isinstance(e, json.JSONDecodeError) and losses and not line.endswith("\n"):
                break  # the last line was cut off while it was written
            raise DataError(
                f"{folder / METRICS}, line {number}, has no step and loss, or a value that is not a number"
            ) from None
    if not losses:
        raise DataError(f"{folder / METRICS} is empty: the run has made no step")
    return RunReport(
        name=name,
        path=str(folder),
        steps=losses[-1][0],
        loss=losses[-1][1],
        val_loss=held_out[-1][1] if held_out else None,
        points=_thin(losses),
        val_points=_thin(held_out),
        measures={name: _thin(points) for name, points in measures.items()},
    )


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError
    return float(value)


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most _POINTS, each the mean of its neighbours."""
    parts = np.array_split(np.array(points, np.float64).reshape(-1, 2), min(len(points), _POINTS) or 1)
    means = [part.mean(0) for part in parts if len(part)]
    return [(round(step), float(value)) for step, value in means]

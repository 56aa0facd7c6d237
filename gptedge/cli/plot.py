"""Curves drawn with characters: a braille plot, whose cells are two dots wide and four high, and sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.text import Text

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a cell [row, column], from U+2800
_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST = 4096  # points kept of a series; older ones are averaged in pairs

Points = npt.NDArray[np.float64]
"""[N, 2]: x and y."""


class Series:
    """Points as they come, of any number: once there are too many, each two become their mean."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._waiting: list[tuple[float, float]] = []
        self._stride = 1

    def add(self, x: float, y: float) -> None:
        self._waiting.append((x, y))
        if len(self._waiting) < self._stride:
            return
        self._points.append(_mean(self._waiting))
        self._waiting = []
        if len(self._points) == _MOST:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_mean(pair) for pair in pairs]
            self._stride *= 2

    def points(self) -> Points:
        """[N, 2]; the latest are there even where they are fewer than a mean is made of."""
        tail = [_mean(self._waiting)] if self._waiting else []
        return np.array(self._points + tail, np.float64).reshape(-1, 2)


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(x for x, _ in points) / len(points), math.fsum(y for _, y in points) / len(points)


def plot(line: Points, marks: Points, *, width: int, height: int, line_style: str = "", mark_style: str = "") -> Text:
    """A line, and marks ● over it, with an axis on the left and one below; `width` by `height` characters in all.

    The highest fiftieth of the line may be cut off at the top, so that a steep beginning leaves room for the rest.
    """
    ys = np.concatenate([line[:, 1], marks[:, 1]])
    low, high = float(ys.min()), max(float(np.quantile(line[:, 1], 0.98)), float(marks[:, 1].max(initial=ys.min())))
    high = high if high > low else low + max(1e-3, abs(low) * 1e-3)
    labels = [f"{v:.{_digits(high - low)}f}" for v in np.linspace(high, low, height - 1)]
    margin = max(map(len, labels)) + 1
    columns, rows = max(2, width - margin - 1), height - 1
    left = float(min(line[0, 0], *marks[:, 0], line[0, 0]))
    right = max(float(line[-1, 0]), left + 1)
    grid = _braille(line, columns, rows, (left, right), (low, high))
    cells = [[(chr(0x2800 + int(c)) if c else " ", line_style) for c in row] for row in grid]
    for x, y in marks:
        column = min(columns - 1, int((x - left) / (right - left) * columns))
        cells[min(rows - 1, max(0, int((high - y) / (high - low) * rows)))][column] = ("●", mark_style)
    text = Text(no_wrap=True, overflow="crop")
    for i, row in enumerate(cells):
        shown = labels[i] if i in (0, rows // 2, rows - 1) else ""
        text.append(f"{shown:>{margin - 1}} ┤" if shown else f"{'':>{margin - 1}} │", "dim")
        for character, style in row:
            text.append(character, style)
        text.append("\n")
    ends = (f"{left:,.0f}", f"{right:,.0f}")
    text.append(" " * (margin + 1) + ends[0] + ends[1].rjust(columns - len(ends[0])), "dim")
    return text


def _digits(span: float) -> int:
    """Decimals that tell a twentieth of the span."""
    return min(4, max(0, 2 - math.floor(math.log10(span)) - 1)) if span > 0 else 2


def _braille(
    line: Points, columns: int, rows: int, x_range: tuple[float, float], y_range: tuple[float, float]
) -> npt.NDArray[np.int64]:
    """Codes of the cells [rows, columns]: each column of dots is filled between the lowest and highest of its points,
    and joined to the column before."""
    grid = np.zeros((rows, columns), np.int64)
    wide, high = 2 * columns, 4 * rows
    xs = ((line[:, 0] - x_range[0]) / (x_range[1] - x_range[0]) * (wide - 1)).astype(int).clip(0, wide - 1)
    ys = ((y_range[1] - line[:, 1]) / (y_range[1] - y_range[0]) * (high - 1)).round().astype(int).clip(0, high - 1)
    before = int(ys[0])
    for x in np.unique(xs).tolist():
        here = ys[xs == x]
        for y in range(min(int(here.min()), before), max(int(here.max()), before) + 1):
            grid[y // 4, x // 2] |= _DOTS[y % 4, x % 2]
        before = int(here[-1])
    return grid


def sparkline(values: Sequence[float] | npt.NDArray[np.float64], width: int) -> str:
    """The values from their lowest to their highest, in at most `width` characters, each the mean of its part."""
    parts = np.array_split(np.asarray(values, np.float64), min(width, len(values)) or 1)
    means = np.array([part.mean() for part in parts if len(part)])
    if not len(means):
        return ""
    low, high = means.min(), means.max()
    heights = (means - low) / (high - low) * (len(_BLOCKS) - 1) if high > low else np.zeros(len(means))
    return "".join(_BLOCKS[round(float(h))] for h in heights)

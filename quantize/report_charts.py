"""Charts of a report, as SVG inside the page. Horizontal places are percentages, so that a chart is as wide as its
page and its letters keep their size on a phone; vertical ones are pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

HEIGHT = 300  # pixels of the area that is drawn on
_LARGEST = 24.0  # pixels, the radius of the fastest bundle
_LABEL_GAP = 38.0  # pixels between labels of two lines that stand one above the other
_NAME_GAP = 18.0  # pixels between names of curves


@dataclass(frozen=True)
class Point:
    name: str
    note: str
    x: float
    y: float | None
    """None stands for zero, which a logarithmic axis does not have."""
    area: float
    colour: str
    """A CSS class."""


def scatter(points: Sequence[Point], *, title: str, description: str, x_label: str, y_label: str) -> str:
    """Circles over a linear and a logarithmic axis, each with its name beside it."""
    right = 1.08 * max(p.x for p in points)
    log = [math.log10(p.y) for p in points if p.y]
    low, high = (min(log), max(log)) if log else (0.0, 0.0)
    low, high = low - 0.35, high + 0.25

    def at_y(value: float | None) -> float:
        return HEIGHT * 0.86 * (high - math.log10(value)) / (high - low) if value else HEIGHT * 0.93

    largest = max(p.area for p in points)
    parts = [
        *(_horizontal(at_y(t), f"{t:g}") for t in log_ticks(10**low, 10**high)),
        _horizontal(at_y(None), "0"),
        *(_vertical(100 * t / right, f"{t:g}") for t in ticks(right)),
    ]
    heights = _spread([(100 * p.x / right, at_y(p.y)) for p in points])
    for point, label_y in zip(points, heights, strict=True):
        radius = max(4.0, _LARGEST * math.sqrt(point.area / largest)) if largest else 4.0
        parts.append(_circle(point, 100 * point.x / right, at_y(point.y), radius, label_y))
    return _frame("".join(parts), title, description, x_label, y_label)


def _circle(point: Point, x: float, y: float, radius: float, label_y: float) -> str:
    is_left = x > 55
    shift, anchor = (-radius - 8, "end") if is_left else (radius + 8, "start")
    return (
        f'<circle class="{point.colour}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius:.1f}">'
        f"<title>{escape(point.name)}: {escape(point.note)}</title></circle>"
        f'<text x="{x:.2f}%" y="{label_y:.1f}" dx="{shift:.1f}" text-anchor="{anchor}" class="name">'
        f"{escape(point.name)}</text>"
        f'<text x="{x:.2f}%" y="{label_y + 16:.1f}" dx="{shift:.1f}" text-anchor="{anchor}" class="note">'
        f"{escape(point.note)}</text>"
    )


def _spread(places: Sequence[tuple[float, float]], gap: float = _LABEL_GAP) -> list[float]:
    """Heights of the labels' first lines: beside their points, or lower where another label is already there."""
    heights = [0.0] * len(places)
    done: list[tuple[float, float]] = []
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[i]
        for other_x, other_y in done:
            if abs(x - other_x) < 45 and abs(y - other_y) < gap:
                y = other_y + gap
        done.append((x, y))
        heights[i] = y - 2
    return heights


def curve(
    lines: Sequence[tuple[str, str, Sequence[tuple[int, float]]]],
    *,
    title: str,
    description: str,
    y_label: str,
    height: int = HEIGHT,
) -> str:
    """Values over steps; each line is its name, a CSS class and its points. A single point is a dot."""
    xs = [x for _, _, points in lines for x, _ in points]
    ys = [y for _, _, points in lines for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    bottom, top = _padded(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return 100 * (x - left) / (right - left), height * (top - y) / (top - bottom)

    parts = [_horizontal(at(left, t)[1], f"{t:g}") for t in ticks(top, bottom)]
    parts += [_vertical(at(t, top)[0], f"{t:g}", height) for t in ticks(right, left)]
    heights = _spread([at(*points[-1]) for _, _, points in lines], _NAME_GAP)
    for (name, colour, points), name_y in zip(lines, heights, strict=True):
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x:.2f},{y:.1f}" for x, y in places)
        parts.append(
            f'<svg viewBox="0 0 100 {height}" preserveAspectRatio="none" width="100%" height="{height}">'
            f'<polyline class="{colour}" points="{path}"/></svg>'
        )
        if len(places) < 12:
            parts += [f'<circle class="{colour}" cx="{x:.2f}%" cy="{y:.1f}" r="4"/>' for x, y in places]
        parts.append(
            f'<text class="name" x="{places[-1][0]:.2f}%" y="{name_y:.1f}" dx="-8" dy="-8" text-anchor="end">'
            f"{escape(name)}</text>"
        )
    return _frame("".join(parts), title, description, "step", y_label, height)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.5
    return low - room, high + room


def _frame(inside: str, title: str, description: str, x_label: str, y_label: str, height: int = HEIGHT) -> str:
    return (
        f'<p class="axis">{escape(y_label)}</p>'
        f'<svg class="chart" role="img" height="{height}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f'<line class="base" x1="0" x2="100%" y1="{height}" y2="{height}"/>{inside}</svg>'
        f'<p class="axis end">{escape(x_label)}</p>'
    )


def _horizontal(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="-10" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _vertical(x: float, label: str, height: int = HEIGHT) -> str:
    return f'<text class="tick" x="{x:.2f}%" y="{height + 20}" text-anchor="middle">{label}</text>'


def ticks(high: float, low: float = 0.0) -> list[float]:
    """About five round numbers between `low` and `high`."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 between them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def within(multiples: Sequence[int]) -> list[float]:
        return [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]

    choose: Callable[[], list[float]] = lambda: within((1, 2, 5))  # noqa: E731
    return within((1,)) if len(choose()) > 8 else choose()

"""A scatter plot as an SVG file, without a plotting library: size against divergence, one label a point.

Readable on light and dark pages. Both axes are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 46, 52
_CHARACTER, _LINE = 6.6, 14.0  # of the labels' font, in pixels
_GAP = 9.0  # from a point's middle to its label
_MARKERS = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{kind}"/>',
    '<rect x="{left:.1f}" y="{top:.1f}" width="9" height="9" class="{kind}"/>',
    '<path d="M{x:.1f} {top:.1f}l5.5 9.5h-11z" class="{kind}"/>',
)
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.axis { fill: #59636e } .grid { stroke: #d1d9e0 } .k0 { fill: #0969da } .k1 { fill: #bc4c00 } .k2 { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .axis { fill: #9198a1 } .grid { stroke: #3d444d }
.k0 { fill: #4493f8 } .k1 { fill: #f0883e } .k2 { fill: #3fb950 } }
"""
_STEPS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Point:
    label: str
    kind: int
    """Index into the names of the kinds: its colour and marker."""
    x: float
    y: float


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    """Pixels at `low` and `high`."""

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round values within the axis."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in (_STEPS, (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            values = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
            if len(values) <= most:
                break
        return values


def scatter(points: Sequence[Point], kinds: Sequence[str], *, x_title: str, y_title: str) -> str:
    """The SVG document. Coordinates must be positive; there are at most three kinds."""
    xs, ys = [p.x for p in points], [p.y for p in points]
    x = _Axis(min(xs) / 1.08, max(xs) * 1.12, _LEFT, WIDTH - _RIGHT)
    y = _Axis(min(ys) / 1.3, max(ys) * 1.3, HEIGHT - _BOTTOM, _TOP)
    body = [*_frame(x, y, x_title, y_title), *_legend(kinds), *_points(points, x, y)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = f"<title>{escape(y_title)} against {escape(x_title)}</title>"
    return "\n".join([head, title, f"<style>{_STYLE}</style>", *body, "</svg>", ""])


def _frame(x: _Axis, y: _Axis, x_title: str, y_title: str) -> Iterator[str]:
    for value in x.ticks(9):
        at = x.at(value)
        yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.start}" y2="{y.end}" class="grid"/>'
        yield _text(at, y.start + 18, f"{value:g}", "axis", "middle")
    for value in y.ticks(10):
        at = y.at(value)
        yield f'<line x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
        yield _text(x.start - 8, at + 4, f"{value:g}", "axis", "end")
    yield _text((x.start + x.end) / 2, HEIGHT - 12, x_title, "axis", "middle")
    upward = _text(0, 0, y_title, "axis", "middle")
    yield f'<g transform="translate(16 {(y.start + y.end) / 2}) rotate(-90)">{upward}</g>'


def _legend(kinds: Sequence[str]) -> Iterator[str]:
    at = float(_LEFT)
    for kind, name in enumerate(kinds):
        yield _marker(at + 6, 22, kind)
        yield _text(at + 18, 26, name)
        at += 42 + len(name) * _CHARACTER


def _points(points: Sequence[Point], x: _Axis, y: _Axis) -> Iterator[str]:
    """Markers, and each label where it covers neither a marker nor an earlier label, if there is such a place."""
    middles = [(x.at(p.x), y.at(p.y)) for p in points]
    taken = [(a - 6, b - 6, a + 6, b + 6) for a, b in middles]
    for point, (a, b) in zip(points, middles, strict=True):
        yield _marker(a, b, point.kind)
        left, top = _place(a, b, len(point.label) * _CHARACTER, taken)
        taken.append((left, top, left + len(point.label) * _CHARACTER, top + _LINE))
        yield _text(left, top + 11, point.label)


Box = tuple[float, float, float, float]


def _place(a: float, b: float, width: float, taken: Sequence[Box]) -> tuple[float, float]:
    """The left and top of a label of the point (a, b): to its right, its left, above, below, or the corners."""
    right, left, middle = a + _GAP, a - _GAP - width, a - width / 2
    level, above, below = b - _LINE / 2, b - _GAP - _LINE, b + _GAP
    places = [(right, level), (left, level), (middle, above), (middle, below)]
    places += [(h, v) for v in (above, below) for h in (right, left)]
    inside = [(h, v) for h, v in places if h >= _LEFT and h + width <= WIDTH - 2]

    def covered(place: tuple[float, float]) -> float:
        return sum(_overlap((*place, place[0] + width, place[1] + _LINE), box) for box in taken)

    return min(inside or places, key=covered)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _marker(x: float, y: float, kind: int) -> str:
    return _MARKERS[kind].format(x=x, y=y, left=x - 4.5, top=y - 4.5, kind=f"k{kind}")


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(content)}</text>'

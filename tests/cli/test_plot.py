"""Curves of characters say what their numbers are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptedge.cli.plot import Series, plot, sparkline


def test_few_points_are_kept_as_they_are() -> None:
    series = Series()
    for i in range(100):
        series.add(i, i * i)
    assert series.points().tolist() == [[i, i * i] for i in range(100)]


def test_many_points_become_means_of_all_of_them() -> None:
    """However many come, memory is bounded, nothing is lost, and the latest is there."""
    series, n = Series(), 50_001
    for i in range(n):
        series.add(i, math.sin(i / 5000))
    points = series.points()
    assert 2048 <= len(points) <= 4097
    assert np.all(np.diff(points[:, 0]) > 0)
    assert np.abs(points[:, 1] - np.sin(points[:, 0] / 5000)).max() < 1e-3
    assert points[-1, 0] > n - 1 - n / 2048


def dots(line: str) -> list[int]:
    """How many dots each braille character has."""
    return [(ord(c) - 0x2800).bit_count() if "\u2800" <= c <= "\u28ff" else 0 for c in line]


@pytest.mark.parametrize(("width", "height"), [(20, 5), (77, 12), (200, 30)])
def test_plot_fills_its_place_and_falls_with_its_line(width: int, height: int) -> None:
    line = np.array([[x, 10 - x / 10] for x in range(101)], float)
    rows = str(plot(line, np.empty((0, 2)), width=width, height=height)).split("\n")
    assert len(rows) == height
    assert max(map(len, rows)) <= width
    assert rows[0].split()[0].startswith("9.") or rows[0].split()[0].startswith("10")
    assert rows[-2].split()[0].rstrip("┤").startswith("0")
    assert rows[-1].split() == ["0", "100"]
    centres = [np.average(range(len(row)), weights=dots(row)) for row in rows[:-1]]
    assert centres == sorted(centres), "further down is further right"


def test_the_line_has_no_gaps() -> None:
    line = np.array([[0, 0.0], [1, 5.0], [2, 1.0], [300, 1.0], [301, 4.0]])
    rows = str(plot(line[:3], np.empty((0, 2)), width=30, height=8)).split("\n")[:-1]
    assert all(sum(dots(row)) for row in rows), "a jump is drawn through every row between"


def test_marks_stand_where_their_values_are() -> None:
    line = np.array([[x, 10.0 - x] for x in range(11)])
    rows = str(plot(line, np.array([[0, 0.0], [10, 9.0]]), width=40, height=11)).split("\n")
    assert rows[9].index("●") < 6
    assert "●" in rows[0][-3:] + rows[1][-3:]


def test_one_point_and_equal_points_can_be_drawn() -> None:
    for line in ([[5, 2.0]], [[1, 2.0], [2, 2.0]], [[1, 0.0], [2, 0.0]]):
        assert "nan" not in str(plot(np.array(line, float), np.empty((0, 2)), width=30, height=6))


def test_sparkline() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3, 3], 8) == "▁▁"
    assert sparkline([], 8) == ""

"""Evening out the columns of weights without data, so that a block's one scale suits all of its columns.

Where factors can be moved from what makes a product's input into its weight (see seams), a channel's factor is
spread^alpha / weight^(1 - alpha). Here `weight` is the root mean square of the weight's column, and `spread` what the
graph itself tells of the channel's size: after a norm that is its gain; a channel that another product makes is as
large as that product's row, each of its inputs weighed by its own spread. It is cross-layer equalization (Nagel et al.
2019, arXiv:1906.04721) with a share alpha left to the activations, as in AWQ (Lin et al. 2023, arXiv:2306.00978).
However gains and columns were scaled against each other before, what is rounded comes out the same.

The spreads that remain say how much a column's error counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx

from gptedge.quantize.passes import Target
from gptedge.quantize.rounding import dequantize, quantize_rows
from gptedge.quantize.seams import Rescaling, Seam, balanced, find_seams
from gptedge.quantize.walk import Read

FloatArray = npt.NDArray[np.float32]

ALPHA = 0.25
"""How much of a channel's spread goes into the weights: 0 none, 1 all."""
_SMALLEST = 1e-4  # of the largest channel: one that is never used keeps a factor
_SAMPLE = 8  # rows that tell whether a weight lies on a grid


@dataclass
class Equalized:
    """A model read with its columns evened out."""

    rescaling: Rescaling
    spreads: dict[str, FloatArray] = field(default_factory=dict)
    """By weight, what remains of its input channels' spread, [K]."""

    @property
    def importance(self) -> Mapping[str, FloatArray]:
        """By weight, how much a squared error in each column counts, [K]."""
        return {name: np.square(spread) for name, spread in self.spreads.items()}


def equalize(model: onnx.ModelProto, read: Read, targets: Iterable[Target], *, chosen: Iterable[Target]) -> Equalized:
    """Even out the columns of `chosen`; spreads are found of all `targets` that are not looked up.

    A model with weights on a grid already, such as trained ones, stays as it is: other factors would move them off it.
    """
    made, targets = Equalized(Rescaling(model, read)), list(targets)
    names = {t.weight for t in chosen}
    if not names and not any(t.group.method == "rtn" and t.scheme.steps > 1 for t in targets):
        return made  # nothing is searched for that importance could change
    on_grid = any(_on_grid(made.rescaling.matrix(t.weight)[:_SAMPLE], t) for t in targets if t.weight in names)
    for seam in find_seams(model, [t for t in targets if not t.lookups]):
        spread = _at_least(_spread(seam, made))
        factors = np.ones_like(spread)
        if seam.target.weight in names and not on_grid:
            factors = balanced(spread, _at_least(_column_sizes(seam, made.rescaling)), ALPHA)
            made.rescaling.add(seam, factors)
        made.spreads[seam.target.weight] = (spread / factors)[seam.channels]
    return made


def _spread(seam: Seam, made: Equalized) -> FloatArray:
    """Of each channel [n]: what its givers add up to, were their own inputs independent."""
    total = np.zeros(int(seam.channels.max()) + 1, np.float32)
    for name, rows in seam.givers:
        values = made.rescaling.matrix(name)[rows]
        if values.ndim == 2:
            values = np.sqrt(np.square(values * made.spreads.get(name, np.float32(1))).sum(1))
        total += np.square(values)
    return np.sqrt(total)


def _column_sizes(seam: Seam, rescaling: Rescaling) -> FloatArray:
    """Root mean square of each channel's columns [n], of the largest where several share a channel."""
    sizes = np.zeros(int(seam.channels.max()) + 1, np.float32)
    weight = rescaling.matrix(seam.target.weight)
    np.maximum.at(sizes, seam.channels, np.sqrt(np.square(weight).mean(0)))
    return sizes


def _at_least(sizes: FloatArray) -> FloatArray:
    return np.maximum(sizes, max(float(sizes.max()) * _SMALLEST, 1e-12)).astype(np.float32)


def _on_grid(rows: FloatArray, target: Target) -> bool:
    rounded = dequantize(quantize_rows(rows, target.scheme), target.scheme, target.width)
    return bool(rows.any() and np.array_equal(rounded, rows))

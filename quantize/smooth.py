"""Moving the spread of activations into the weights, where rounding takes it better, without changing the function.

The kernels round activations to 8 bits. A channel much larger than its neighbours costs them precision; dividing it by
a factor, and multiplying the next weight's column by the same, leaves every product what it was (see seams). As in
SmoothQuant (Xiao et al. 2022, arXiv:2211.10438), a channel's factor is max|x|^alpha / max|w|^(1 - alpha). Where whole
rows and whole tokens share a scale, those factors are where `least_noise` begins. A table that is looked up too is
multiplied in both uses, and the rows that were looked up are divided again.

What has passed a norm, or was averaged by attention, is of much the same size in all tokens. Where a recipe lets them
be `static`, such activations share one step, which takes less time and, there, costs little precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from gptedge.errors import DataError
from gptedge.quantize.integer_products import LARGEST
from gptedge.quantize.passes import Target
from gptedge.quantize.seams import Rescaling, Seam, balanced, find_seams
from gptedge.quantize.walk import Read, Walk

FloatArray = npt.NDArray[np.float32]

WINDOWS, WINDOW = 16, 128
"""Calibration text whose largest activations are taken; as many tokens of longer windows, where there are such."""
ALPHA = 0.5
"""How much of a channel's spread goes into the weights: 0 none, 1 all."""
TOKENS, ROWS = 512, 256
"""Of the calibration text and of a weight, that `least_noise` looks at."""
STEPS = 40
"""That it takes; 25 leave 2 to 5% more noise, 60 take 1 to 2% off."""
_RATE = 0.3
_NORM = 8  # a power of two; the largest value counts as this norm of all, which has a gradient for each of them
_STATIC = 4
"""Times the noise of a step for each token that one step for all of them may leave."""
_SMALLEST = 1e-5  # of a channel's spread and its weights: one that is never used keeps a factor


class Smoothing(Rescaling):
    """A rescaling, and how activations are rounded behind it."""

    def __init__(self, model: onnx.ModelProto, read: Read) -> None:
        super().__init__(model, read)
        self.steps: dict[str, float] = {}
        """By weight, where all tokens share one."""


def smoothed(
    model: onnx.ModelProto, read: Read, walk: Walk, targets: Iterable[Target], *, keep_values: bool = False
) -> Smoothing:
    """Reads initializers with all factors multiplied in.

    Measures activations with `walk`, which goes through `model` as it is; then adapts `model`'s lookups. `keep_values`
    leaves attention's values alone, which a KV cache may share with another graph. Raises DataError when activations
    are not finite.
    """
    smoothing, targets = Smoothing(model, read), list(targets)
    for seam in find_seams(model, targets, keep_values=keep_values):
        factors, step = _factors(seam, smoothing, walk)
        smoothing.add(seam, factors)
        if step:
            smoothing.steps[seam.target.weight] = step
    for target in targets:
        if target.lookups and target.weight in smoothing.columns:
            _divide_lookups(model, target, smoothing.columns[target.weight])
    return smoothing


def _factors(seam: Seam, rescaling: Rescaling, walk: Walk) -> tuple[FloatArray, float]:
    """Of the seam's channels; and the step that all tokens share, 0 where each has its own."""
    n = int(seam.channels.max()) + 1
    spread, weight = np.full(n, _SMALLEST, np.float32), np.full(n, _SMALLEST, np.float32)
    inputs, rows = walk.inputs_of(seam.product), rescaling.matrix(seam.target.weight)
    largest = np.max([np.abs(x).max(0) for x in inputs], axis=0)
    if not np.isfinite(largest).all():
        raise DataError(f"the activations that reach {seam.product} are not finite on the calibration text")
    np.maximum.at(spread, seam.channels, largest)
    np.maximum.at(weight, seam.channels, np.abs(rows).max(0))
    factors = balanced(spread, weight, ALPHA)
    if not seam.target.scheme.whole_rows:
        return factors, 0
    x, channels = np.concatenate(inputs), seam.channels
    own = least_noise(x, rows, channels, factors)
    if not seam.target.group.static or walk.window == 1:
        return own, 0
    later = np.delete(x, np.s_[:: walk.window], axis=0)  # a text's first token may be unlike all others
    shared = least_noise(later, rows, channels, factors, static=True)
    step = float(np.abs(later / shared[channels]).max()) / LARGEST
    most = _STATIC * _noise(x, rows, own[channels])
    return (shared, step) if step and _noise(x, rows, shared[channels], step) <= most else (own, 0)


def _noise(x: FloatArray, w: FloatArray, f: FloatArray, step: float = 0) -> float:
    """What rounding to 8 bits changes of x / f @ (w * f).T, its square over a token's length; activations by `step`, or
    by one for each token."""
    w = w[_evenly(len(w), ROWS)]
    wanted, got = x @ w.T, _rounded(x / f, step) @ _rounded(w * f).T
    lengths = np.linalg.norm(wanted, axis=1) + np.float32(1e-12)
    return float((np.square(got - wanted).sum(1) / lengths).mean())


def _rounded(rows: FloatArray, step: float = 0) -> FloatArray:
    """By `step`, or by one for each row."""
    largest = np.maximum(np.abs(rows).max(1, keepdims=True), np.float32(1e-30))
    steps = np.full_like(largest, step) if step else largest / np.float32(LARGEST)
    return np.clip(np.rint(rows / steps), -LARGEST, LARGEST) * steps


def least_noise(
    x: FloatArray, w: FloatArray, channels: npt.NDArray[Any], start: FloatArray, *, static: bool = False
) -> FloatArray:
    """Factors f, from `start` on, that leave least noise in x / f @ (w * f).T when both are rounded to 8 bits; x
    [tokens, K], w [N, K]; column c has the factor of `channels[c]`. Their geometric mean is 1.

    A token is rounded to steps of its largest |x / f|, a row to steps of its largest |w f|, and the error of a step is
    spread evenly over it. So the noise is, but for a constant,

        mean_t max_c(|x| / f)^2 * sum_c f^2 mean_r w^2  +  mean_r max_c(|w| f)^2 * sum_c mean_t x^2 / f^2

    which steps along the logarithms of f bring down. A token counts by the inverse of its output's length: were all to
    count alike, the few that are a hundred times as large as others would settle it (SmolLM2: KL 0.0076 for 0.0067),
    and by the inverse of its square those would be lost (0.0078). Where tokens share one step (`static`), the largest
    |x / f| of all of them takes the place of their mean.
    """
    x, w = _sample(x, TOKENS), _sample(w, ROWS)
    w2 = np.square(w).mean(0, dtype=np.float64)
    counts = 1 / np.sqrt(np.square(x) @ w2)
    counts /= counts.mean()
    x2 = counts @ np.square(x) / len(x)
    log_f, best, least = np.log(start, dtype=np.float64), start, np.inf
    for _ in range(STEPS):
        f = np.exp(log_f)[channels]
        sizes = x / f.astype(np.float32)
        token, of_token = _largest_of_all(sizes) if static else _largest(sizes, counts)
        row, of_row = _largest(w * f.astype(np.float32), np.ones(len(w)))
        of_x, of_w = x2 / f**2, w2 * f**2
        by_token, by_row = token * of_w.sum(), row * of_x.sum()
        if by_token + by_row < least:
            least, best = by_token + by_row, np.exp(log_f - log_f.mean()).astype(np.float32)
        rising = by_token * of_w / of_w.sum() + by_row * of_row
        falling = by_token * of_token + by_row * of_x / of_x.sum()
        up, down = (np.bincount(channels, part, len(start)) for part in (rising, falling))
        log_f -= _RATE * (up - down) / np.maximum(up + down, _SMALLEST * least / len(start))
    return best


def _sample(rows: FloatArray, most: int) -> FloatArray:
    """Sizes of at most so many rows, evenly from all of them; none is zero."""
    return np.maximum(np.abs(rows[_evenly(len(rows), most)]), np.float32(1e-12))


def _evenly(n: int, most: int) -> npt.NDArray[np.int64]:
    """At most so many of the indices below n."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)


def _largest(sizes: FloatArray, counts: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
    """The mean square of the rows' largest values, and what part of it hangs on each column; rows count by `counts`."""
    top = sizes.max(1, keepdims=True)
    powers = sizes / top
    for _ in range(_NORM.bit_length() - 1):
        powers *= powers
    total = powers.sum(1, keepdims=True)
    squares = np.square(top, dtype=np.float64) * counts[:, None]
    weights = squares * total ** (2 / _NORM)
    return float(squares.mean()), (powers / total * weights).sum(0) / weights.sum()


def _largest_of_all(sizes: FloatArray) -> tuple[float, npt.NDArray[np.float64]]:
    """The square of the largest value, and what part of it hangs on each column."""
    square, parts = _largest(sizes.reshape(1, -1), np.ones(1))
    return square, parts.reshape(sizes.shape).sum(0)


def _divide_lookups(model: onnx.ModelProto, target: Target, factors: FloatArray) -> None:
    """Rows of a table whose columns were multiplied are divided after they were looked up."""
    name = f"{target.weight}.smoothing"
    model.graph.initializer.append(onnx.numpy_helper.from_array(factors, name))
    nodes = list(model.graph.node)
    for lookup in target.lookups:
        index = next(i for i, node in enumerate(nodes) if node.name == lookup)
        value = nodes[index].output[0]
        nodes[index].output[0] = f"{value}.multiplied"
        divide = helper.make_node("Div", [nodes[index].output[0], name], [value], name=f"{lookup}.divided")
        nodes.insert(index + 1, divide)
    del model.graph.node[:]
    model.graph.node.extend(nodes)

"""Rounding weights so that a product's outputs change least, given the inputs that it sees.

GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after the other, the hardest-working first, and
each one's error is made up for by the columns still to come. Blocks and zero points are fixed beforehand. Then cyclic
coordinate descent (as in QuantEase, Behdin et al. 2023, arXiv:2309.01885) revisits the integers, and least squares the
scales. For a weight W [N, K] all of it lowers tr((W - Q) H (W - Q)'), where H [K, K] is X'X of the inputs X.

Where the model before this product is quantized already, its inputs X differ from the float model's X0. The weight that
best maps X to the outputs that W gave for X0 is W + W (X0 - X)'X inv(H): it makes up for errors that were made before
(compare GPTAQ, Li et al. 2025, arXiv:2504.02692).
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptedge.quantize.integer_products import row_scales
from gptedge.quantize.recipes import Scheme
from gptedge.quantize.rounding import Blocks, as_blocks, search_scales, storable

FloatArray = npt.NDArray[np.float32]

DAMPING = 0.2
"""Of H's mean diagonal, added to it: what the text shows is not all that the product will see. On text that was not
calibrated on, 0.1 to 0.4 lost least, and 10% less than the customary 0.01."""
DESCENTS = 3
"""Rounds of coordinate descent, with scales fitted in between; more gained less than 1% of the error."""
_ROWS = 8192  # of a table rounded at once: its copies take a dozen times the memory
_COLUMNS = 128  # rounded before the rest of the matrix is brought up to date
_SYSTEMS = 1 << 22  # coefficients of the scales' equations solved at once


def quantize_calibrated(weight: FloatArray, h: FloatArray, cross: FloatArray, scheme: Scheme, pool: Executor) -> Blocks:
    """Quantize `weight` [N, K] for inputs with `h` = X'X and `cross` = (X0 - X)'X, both [K, K]."""
    h = damped(h)
    if cross.any():
        weight = compensated(weight, h, cross)
    return round_rows(weight, h, Order.of(h), scheme, pool, DESCENTS)


def round_rows(
    weight: FloatArray, h: FloatArray, order: Order, scheme: Scheme, pool: Executor, descents: int = 0
) -> Blocks:
    """GPTQ, then `descents` rounds of coordinate descent; `h` is damped. Rows do not depend on each other."""
    parts = [weight[i : i + _ROWS] for i in range(0, len(weight), _ROWS)]
    return Blocks.joined([_round_rows(part, h, order, scheme, pool, descents) for part in parts])


def _round_rows(
    weight: FloatArray, h: FloatArray, order: Order, scheme: Scheme, pool: Executor, descents: int
) -> Blocks:
    # The square root: between the error of a column alone, and one that later columns make up for entirely.
    scale, zero = search_scales(weight, scheme, np.sqrt(np.diag(h)), pool)
    integers = round_columns(weight, order, scale, zero, scheme)
    for i in range(descents):
        if i:
            scale = storable(fit_scales(weight, h, integers, scale, zero, scheme), scheme)
        integers = descend(weight, h, integers, scale, zero, scheme)
    return as_blocks(integers, scale, zero, scheme)


def round_whole_rows(weight: FloatArray, h: FloatArray, scheme: Scheme) -> tuple[FloatArray, FloatArray]:
    """GPTQ for rows that have one scale each: integers [N, K] around zero, and scales [N]. Descents gained nothing."""
    scale, zero = row_scales(weight), np.full((len(weight), 1), 2 ** (scheme.bits - 1), np.float32)
    return round_columns(weight, Order.of(damped(h)), scale[:, None], zero, scheme) - zero, scale


def damped(h: FloatArray) -> FloatArray:
    """H with a little added to its diagonal, so that it can be inverted."""
    h = np.array(h, np.float32)
    h[np.diag_indices_from(h)] += np.float32(DAMPING * max(float(np.diag(h).mean()), 1e-12))
    return h


def compensated(weight: FloatArray, h: FloatArray, cross: FloatArray) -> FloatArray:
    """W + W (X0 - X)'X inv(H); `h` is damped."""
    shift = np.linalg.solve(h.astype(np.float64), cross.T.astype(np.float64)).T  # H is symmetric
    return weight + weight @ shift.astype(np.float32)


@dataclass(frozen=True)
class Order:
    """The order in which columns are rounded, and what each one's error asks of those to come."""

    columns: npt.NDArray[np.intp]
    upper: FloatArray
    """Triangular U [K, K] with U'U = inv(H), both in this order."""

    @classmethod
    def of(cls, h: FloatArray) -> Order:
        """`h` is damped."""
        columns = np.argsort(-np.diag(h), kind="stable")
        inverse = np.linalg.inv(h[np.ix_(columns, columns)].astype(np.float64))
        upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
        return cls(columns, np.ascontiguousarray(upper).astype(np.float32))


def round_columns(weight: FloatArray, order: Order, scale: FloatArray, zero: FloatArray, scheme: Scheme) -> FloatArray:
    """GPTQ. Scales and zero points are [N, blocks]; the integers are returned as float32 [N, K]."""
    upper = order.upper
    columns = np.ascontiguousarray(weight.T[order.columns])  # [K, N]: a column is contiguous
    scales, zeros = (np.ascontiguousarray(a.T)[order.columns // scheme.size_in(weight.shape[1])] for a in (scale, zero))
    integers = np.empty_like(columns)
    top, k = np.float32(2**scheme.bits - 1), len(columns)
    for first in range(0, k, _COLUMNS):
        last = min(first + _COLUMNS, k)
        errors = np.empty((last - first, columns.shape[1]), np.float32)
        for j in range(first, last):
            if j > first:  # what the columns before it in this group left to make up for
                columns[j] -= upper[first:j, j] @ errors[: j - first]
            integers[j] = np.clip(np.rint(columns[j] / scales[j]) + zeros[j], 0, top)
            errors[j - first] = (columns[j] - (integers[j] - zeros[j]) * scales[j]) / upper[j, j]
        columns[last:] -= upper[first:last, last:].T @ errors
    result = np.empty_like(integers)
    result[order.columns] = integers
    return np.ascontiguousarray(result.T)


def descend(
    weight: FloatArray, h: FloatArray, integers: FloatArray, scale: FloatArray, zero: FloatArray, scheme: Scheme
) -> FloatArray:
    """One round of coordinate descent: each integer in turn takes its best value, all others given."""
    scales, zeros = (np.repeat(a.T, scheme.block_size, 0)[: weight.shape[1]] for a in (scale, zero))
    now = np.ascontiguousarray(integers.T)
    slope = h @ (weight.T - (now - zeros) * scales)  # [K, N]
    top, k = np.float32(2**scheme.bits - 1), len(now)
    for first in range(0, k, _COLUMNS):
        last = min(first + _COLUMNS, k)
        moved = np.empty((last - first, now.shape[1]), np.float32)
        for j in range(first, last):
            if j > first:
                slope[j] -= h[j, first:j] @ moved[: j - first]
            best = np.clip(now[j] + np.rint(slope[j] / (h[j, j] * scales[j])), 0, top)
            moved[j - first] = (best - now[j]) * scales[j]
            now[j] = best
        slope[last:] -= h[last:, first:last] @ moved
    return np.ascontiguousarray(now.T)


def fit_scales(
    weight: FloatArray, h: FloatArray, integers: FloatArray, scale: FloatArray, zero: FloatArray, scheme: Scheme
) -> FloatArray:
    """Scales [N, blocks] of least error, the integers given: one small system of equations a row."""
    blocks = scale.shape[1]
    rows = max(1, _SYSTEMS // blocks**2)
    parts = [slice(i, i + rows) for i in range(0, len(weight), rows)]
    return np.concatenate([_fit(weight[p], h, integers[p], scale[p], zero[p], scheme.block_size) for p in parts])


def _fit(
    weight: FloatArray, h: FloatArray, integers: FloatArray, scale: FloatArray, zero: FloatArray, size: int
) -> FloatArray:
    (n, k), blocks = weight.shape, scale.shape[1]
    steps = integers - np.repeat(zero, size, 1)[:, :k]
    starts = np.arange(0, k, size)
    left = np.empty((n, blocks, blocks), np.float32)
    for b in range(blocks):
        part = slice(b * size, (b + 1) * size)
        left[:, b] = np.add.reduceat(steps * (steps[:, part] @ h[part]), starts, axis=1)
    right = np.add.reduceat(steps * (weight @ h), starts, axis=1)
    ridge = 1e-4 * np.einsum("nbb->nb", left) + 1e-12  # a block without steps keeps its scale
    left[:, np.arange(blocks), np.arange(blocks)] += ridge
    right += ridge * scale
    fitted = np.linalg.solve(left.astype(np.float64), right[..., None].astype(np.float64))[..., 0]
    return np.where(fitted > 0, fitted, scale).astype(np.float32)

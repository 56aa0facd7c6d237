"""Rounding weights to blocks of integers: the scale and zero point of each block that lose least, and the integers.

Data-free: a column's error counts by an importance that the caller knows from the weights alone (see `quantizer`). The
bytes are laid out as onnxruntime's MatMulNBits reads them (contrib operators, com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.quantize.recipes import Scheme

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
Candidates = Iterator[tuple[FloatArray, FloatArray]]
"""Scales and zero points to try, each [N, blocks]."""

_SMALLEST_SHRINK = 0.75  # of a block's range; narrower ones never won in the search
_CHUNK_VALUES = 1 << 19  # weights rounded at once by a thread; larger chunks fall out of the processor's cache
_TINY = np.float32(
    2**-24
)  # float16 has smaller numbers than its normal ones: with these alone, small weights lose bits
TOP_PART = 255.0
"""The largest scale of a 4-bit weight, in its row's units."""
_SMALLEST_UNIT = np.float32(2**-24)  # above zero in float16


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix of N rows, as a file holds it. Scales have two forms, see `storable`."""

    packed: ByteArray
    """Integers, [N, blocks, bytes of a block]."""
    scales: npt.NDArray[np.float16] | ByteArray
    """[N, blocks]: float16 for weights of 8 bits, uint8 parts of the row's unit for those of 4."""
    units: npt.NDArray[np.float16] | None
    """[N, 1], powers of two; None beside float16 scales."""
    zero_points: ByteArray | None
    """Packed like the integers, [N, ceil(blocks * bits / 8)]; None when symmetric."""

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Blocks:
        """What `arrays` gave."""
        found: Mapping[str, Any] = dict.fromkeys(ROLES) | dict(arrays)
        return cls(**found)

    @classmethod
    def joined(cls, parts: Sequence[Blocks]) -> Blocks:
        """One matrix of the rows of several."""
        arrays = [p.arrays() for p in parts]
        return cls.of({role: np.concatenate([a[role] for a in arrays]) for role in arrays[0]})

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By role, which is the field's name; those that there are."""
        return {role: array for role in ROLES if (array := getattr(self, role)) is not None}

    def float_scales(self) -> FloatArray:
        """[N, blocks], as the kernels take them."""
        scales = self.scales.astype(np.float32)
        return scales if self.units is None else scales * self.units.astype(np.float32)


ROLES = tuple(f.name for f in fields(Blocks))


def quantize_rows(weight: FloatArray, scheme: Scheme, importance: FloatArray | None = None) -> Blocks:
    """Quantize [N, K]; `importance` [K] weighs each column's squared error. K need not be a multiple of the block."""
    blocks = _in_blocks(weight, scheme.block_size)
    weights = None if importance is None else _in_blocks(importance[None], scheme.block_size)
    scale, zero = _search(blocks, scheme, weights)
    return _stored(_round(blocks, scale, zero, scheme), scale, zero, scheme)


def quantize_matrix(rows: npt.NDArray[Any], scheme: Scheme, importance: FloatArray | None, pool: Executor) -> Blocks:
    """`quantize_rows` of a whole matrix, chunks of rows in parallel: numpy releases the interpreter's lock."""
    parts = list(pool.map(lambda c: quantize_rows(np.asarray(c, np.float32), scheme, importance), _row_chunks(rows)))
    return Blocks.joined(parts)


def search_scales(
    weight: FloatArray, scheme: Scheme, importance: FloatArray | None, pool: Executor
) -> tuple[FloatArray, FloatArray]:
    """Scales and zero points [N, blocks] that `quantize_rows` would take."""
    weights = None if importance is None else _in_blocks(importance[None], scheme.block_size)
    found = pool.map(lambda c: _search(_in_blocks(c, scheme.block_size), scheme, weights), _row_chunks(weight))
    scales, zeros = zip(*found, strict=True)
    return np.concatenate(scales), np.concatenate(zeros)


def as_blocks(integers: FloatArray, scale: FloatArray, zero: FloatArray, scheme: Scheme) -> Blocks:
    """What was found otherwise, in the kernels' layout: integers [N, K], scales and zero points [N, blocks]."""
    n, k = integers.shape
    filled = np.repeat(zero, scheme.block_size, 1).astype(np.uint8)  # past a row's end: values of zero
    filled[:, :k] = integers
    return _stored(filled.reshape(n, -1, scheme.block_size), scale, zero, scheme)


def _stored(integers: ByteArray, scale: FloatArray, zero: FloatArray, scheme: Scheme) -> Blocks:
    zero_points = None if scheme.symmetric else pack(zero.astype(np.uint8), scheme.bits)
    packed = pack(integers, scheme.bits)
    if scheme.bits == 8:
        return Blocks(packed, scale.astype(np.float16), None, zero_points)
    units = row_units(scale)
    return Blocks(packed, _parts(scale, units).astype(np.uint8), units.astype(np.float16), zero_points)


def _row_chunks(rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    step = max(1, _CHUNK_VALUES // rows.shape[1])
    return [rows[i : i + step] for i in range(0, len(rows), step)]


def dequantize(blocks: Blocks, scheme: Scheme, width: int) -> FloatArray:
    """The [N, width] matrix that the kernels compute with."""
    integers = unpack(blocks.packed, scheme.bits).astype(np.float32)
    if blocks.zero_points is None:
        zero: Any = np.float32(2 ** (scheme.bits - 1))
    else:
        zero = unpack(blocks.zero_points, scheme.bits)[:, : integers.shape[1], None].astype(np.float32)
    values: FloatArray = (integers - zero) * blocks.float_scales()[..., None]
    return values.reshape(len(values), -1)[:, :width]


def pack(integers: ByteArray, bits: int) -> ByteArray:
    """Pack along the last axis; of two 4-bit values the first takes the low half, an odd last one is alone."""
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros((*integers.shape[:-1], 1), np.uint8)], -1)
    return np.bitwise_or(integers[..., 0::2], np.left_shift(integers[..., 1::2], 4))


def unpack(packed: ByteArray, bits: int) -> ByteArray:
    """What `pack` packed, empty half included."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def _in_blocks(rows: FloatArray, block_size: int) -> FloatArray:
    """[N, K] -> [N, blocks, block_size], the last block filled up with zeros."""
    n, width = rows.shape
    missing = -width % block_size
    if missing:
        rows = np.concatenate([rows, np.zeros((n, missing), np.float32)], 1)
    return rows.reshape(n, -1, block_size)


def _round(blocks: FloatArray, scale: FloatArray, zero: FloatArray, scheme: Scheme) -> ByteArray:
    integers = np.rint(blocks / scale[..., None])
    integers += zero[..., None]
    clipped: ByteArray = np.clip(integers, 0, 2**scheme.bits - 1, out=integers).astype(np.uint8)
    return clipped


def _search(blocks: FloatArray, scheme: Scheme, importance: FloatArray | None) -> tuple[FloatArray, FloatArray]:
    """Per block the scale (as it can be stored) and zero point of least squared error, float32 [N, blocks]."""
    candidates = (_symmetric_candidates if scheme.symmetric else _asymmetric_candidates)(blocks, scheme)
    best_scale, best_zero = next(candidates)
    best_error = _error(blocks, best_scale, best_zero, scheme, importance)
    for scale, zero in candidates:
        error = _error(blocks, scale, zero, scheme, importance)
        better = error < best_error
        for best, new in ((best_scale, scale), (best_zero, zero), (best_error, error)):
            np.copyto(best, new, where=better)
    _take_grid(blocks, best_scale, best_zero, scheme)
    return best_scale, best_zero


def _take_grid(blocks: FloatArray, scale: FloatArray, zero: FloatArray, scheme: Scheme) -> None:
    """Put the scales and zero points of blocks that lie on a grid already, such as trained ones, in place.

    A grid's step is its range over a whole number of steps, and a float16: few blocks pass that test by chance. A row
    all of whose blocks have steps in parts of one unit keeps them to the last bit.
    """
    low, high = _ends(blocks)
    step = _grid_steps(blocks, scheme, _as_half)
    found = step > 0
    if not found.any():
        return
    if scheme.bits == 4:
        rows = np.nonzero((found == (high > low)).all(1))[0]
        step[rows] = _in_one_unit(blocks[rows], step[rows], scheme)
    middle = np.float32(2 ** (scheme.bits - 1)) if scheme.symmetric else -low / np.where(found, step, 1)
    np.copyto(zero, middle, where=found)
    scale[:] = storable(np.where(found, step, scale), scheme)


def _in_one_unit(blocks: FloatArray, step: FloatArray, scheme: Scheme) -> FloatArray:
    """Of rows of blocks on grids: steps in parts of one unit, where a row has such; `step` as it is elsewhere."""
    low, high = _ends(blocks)
    units = row_units(_widest_step(low, high, scheme)) / np.float32(2)
    for _ in range(scheme.bits + 2):  # the widest block may use all of its range, or one step of it
        whole = _grid_steps(blocks, scheme, partial(storable, scheme=scheme, units=units))
        step = np.where(((whole > 0) == (high > low)).all(1, keepdims=True), whole, step)
        units = units * np.float32(2)
    return step


def _grid_steps(blocks: FloatArray, scheme: Scheme, stored: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """Per block the finest step of a grid that it lies on and `stored` leaves as it is, [N, blocks]; 0 without one."""
    low, high = _ends(blocks)
    top, half = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    range_: FloatArray = np.maximum(-low, high) if scheme.symmetric else high - low
    most = half if scheme.symmetric else top
    found = np.zeros_like(range_)
    for steps in range(most, 0, -1):
        step = range_ / np.float32(steps)
        at = np.nonzero((found == 0) & (range_ > 0) & (step == stored(step)))
        if not len(at[0]):
            continue
        step = step[at]
        integers = blocks[at] / step[:, None]
        middle = np.full_like(step, half) if scheme.symmetric else -low[at] / step
        fits = (integers == np.rint(integers)).all(-1) & (integers.max(-1) + middle <= top)
        found[tuple(a[fits] for a in at)] = step[fits]
    return found


def _ends(blocks: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Of each block's range, which includes zero."""
    return np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)


def _widest_step(low: FloatArray, high: FloatArray, scheme: Scheme) -> FloatArray:
    """The step at which a block's range is just held, [N, blocks]."""
    if scheme.symmetric:
        low, high = np.zeros_like(low), np.maximum(-low, high)
    steps = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1
    step: FloatArray = (high - low) / np.float32(steps)
    return step


def _shrinks(steps: int) -> list[np.float32]:
    return [np.float32(s) for s in np.linspace(1.0, _SMALLEST_SHRINK, steps)] if steps > 1 else [np.float32(1)]


def _symmetric_candidates(blocks: FloatArray, scheme: Scheme) -> Candidates:
    step = _widest_step(*_ends(blocks), scheme)
    units, zero = row_units(step), np.full_like(step, 2 ** (scheme.bits - 1))
    for shrink in _shrinks(scheme.steps):
        yield storable(step * shrink, scheme, units), zero


def _asymmetric_candidates(blocks: FloatArray, scheme: Scheme) -> Candidates:
    """Ranges that include zero, each end shrunk alone and both together."""
    low, high = _ends(blocks)
    units, top = row_units(_widest_step(low, high, scheme)), 2**scheme.bits - 1
    for shrink in _shrinks(scheme.steps):
        for a, b in dict.fromkeys(((shrink, shrink), (shrink, np.float32(1)), (np.float32(1), shrink))):
            scale = storable(_widest_step(low * a, high * b, scheme), scheme, units)
            yield scale, np.clip(np.rint(-low * a / scale), 0, top)


def storable(scale: FloatArray, scheme: Scheme, units: FloatArray | None = None) -> FloatArray:
    """Scales [N, blocks] as a file will hold them; never zero, so that a block of zeros has a scale.

    Beside weights of 8 bits they are float16. Beside 4 bits, where they weigh twice as much, they are 1 to 255 times
    the row's unit, a power of two (`row_units` where none are given): half the bytes, and within 0.4% where a block's
    scale is half the row's largest or more. Compare double quantization (Dettmers et al. 2023, arXiv:2305.14314).
    """
    if scheme.bits == 8:
        return _as_half(scale)
    units = row_units(scale) if units is None else units
    return _parts(scale, units) * units


def _as_half(scale: FloatArray) -> FloatArray:
    return np.maximum(scale.astype(np.float16).astype(np.float32), _TINY)


def row_units(scale: FloatArray) -> FloatArray:
    """Per row the smallest power of two of which its largest scale is at most 255 times, [N, 1]."""
    fraction, exponent = np.frexp(scale.max(1, keepdims=True) / np.float32(TOP_PART))
    return np.maximum(np.ldexp(np.float32(1), exponent - (fraction == 0.5)), _SMALLEST_UNIT)


def _parts(scale: FloatArray, units: FloatArray) -> FloatArray:
    return np.clip(np.rint(scale / units), np.float32(1), np.float32(TOP_PART))


def _error(
    blocks: FloatArray, scale: FloatArray, zero: FloatArray, scheme: Scheme, importance: FloatArray | None
) -> FloatArray:
    """Weighted squared error of each block, [N, blocks]."""
    scaled = blocks / scale[..., None]
    scaled -= np.clip(np.rint(scaled), -zero[..., None], 2**scheme.bits - 1 - zero[..., None])
    np.square(scaled, out=scaled)
    if importance is not None:
        scaled *= importance
    return np.multiply(scaled.sum(-1), np.square(scale))

"""Rounding weights to blocks of integers: the scale and zero point of each block that lose least, and the integers.

Data-free: a column's error counts by an importance that the caller knows from the weights alone (see `quantizer`). The
bytes are laid out as onnxruntime's MatMulNBits reads them (contrib operators, com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
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
_TINY = np.float32(np.finfo(np.float16).tiny)


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix of N rows: integers [N, blocks, bytes of a block], scales float16 [N, blocks], zero points."""

    packed: ByteArray
    scales: npt.NDArray[np.float16]
    zero_points: ByteArray | None
    """Packed like the integers, [N, ceil(blocks * bits / 8)]; None when symmetric."""


def quantize_rows(weight: FloatArray, scheme: Scheme, importance: FloatArray | None = None) -> Blocks:
    """Quantize [N, K]; `importance` [K] weighs each column's squared error. K need not be a multiple of the block."""
    blocks = _in_blocks(weight, scheme.block_size)
    weights = None if importance is None else _in_blocks(importance[None], scheme.block_size)
    scale, zero = _search(blocks, scheme, weights)
    return _stored(_round(blocks, scale, zero, scheme), scale, zero, scheme)


def quantize_matrix(rows: npt.NDArray[Any], scheme: Scheme, importance: FloatArray | None, pool: Executor) -> Blocks:
    """`quantize_rows` of a whole matrix, chunks of rows in parallel: numpy releases the interpreter's lock."""
    parts = list(pool.map(lambda c: quantize_rows(np.asarray(c, np.float32), scheme, importance), _row_chunks(rows)))
    zero_points = [p.zero_points for p in parts if p.zero_points is not None]
    return Blocks(
        np.concatenate([p.packed for p in parts]),
        np.concatenate([p.scales for p in parts]),
        np.concatenate(zero_points) if zero_points else None,
    )


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
    return Blocks(pack(integers, scheme.bits), scale.astype(np.float16), zero_points)


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
    values: FloatArray = (integers - zero) * blocks.scales.astype(np.float32)[..., None]
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
    """Per block the scale (as float16 holds it) and zero point of least squared error, float32 [N, blocks]."""
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

    A grid's step is its range over a whole number of steps, and a float16: few blocks pass that test by chance.
    """
    top = 2**scheme.bits - 1
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    half = 2 ** (scheme.bits - 1)
    range_, most = (np.maximum(-low, high), half) if scheme.symmetric else (high - low, top)
    open_ = range_ > 0
    for steps in range(most, 0, -1):
        step = range_ / np.float32(steps)
        at = np.nonzero(open_ & (step == storable(step)))
        if not len(at[0]):
            continue
        step = step[at]
        integers = blocks[at] / step[:, None]
        middle = np.full_like(step, half) if scheme.symmetric else -low[at] / step
        fits = (integers == np.rint(integers)).all(-1) & (integers.max(-1) + middle <= top)
        at = tuple(a[fits] for a in at)
        scale[at], zero[at], open_[at] = step[fits], middle[fits], False


def _shrinks(steps: int) -> list[np.float32]:
    return [np.float32(s) for s in np.linspace(1.0, _SMALLEST_SHRINK, steps)] if steps > 1 else [np.float32(1)]


def _symmetric_candidates(blocks: FloatArray, scheme: Scheme) -> Candidates:
    half = 2 ** (scheme.bits - 1)
    largest = np.abs(blocks).max(-1)
    zero = np.full_like(largest, half)
    for shrink in _shrinks(scheme.steps):
        yield storable(largest * (shrink / (half - 1))), zero


def _asymmetric_candidates(blocks: FloatArray, scheme: Scheme) -> Candidates:
    """Ranges that include zero, each end shrunk alone and both together."""
    top = 2**scheme.bits - 1
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    for shrink in _shrinks(scheme.steps):
        for a, b in dict.fromkeys(((shrink, shrink), (shrink, np.float32(1)), (np.float32(1), shrink))):
            scale = storable((high * b - low * a) / top)
            yield scale, np.clip(np.rint(-low * a / scale), 0, top)


def storable(scale: FloatArray) -> FloatArray:
    """As float16 will hold it; never zero, so that a block of zeros has a scale."""
    return np.maximum(scale.astype(np.float16).astype(np.float32), _TINY)


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

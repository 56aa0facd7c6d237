"""How far each weight of a bundle lies from the reference's: ||Wq - W|| / ||W||, Frobenius norms, a chunk at a time.

Recipes may rescale rows and columns before they round, in ways that cancel out between weights (see `smooth`). Such
scales are fitted first, and what is left over is the error. A weight whose layout is not one that `passes` writes has
none. What an error does to the model's output is for `gptedge.evaluate.divergence` to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto

from gptedge.bundle import GRAPH, OUTPUT_ERRORS, open_bundle
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.quantize.integer_products import HALVES
from gptedge.quantize.passes import plain_name
from gptedge.quantize.recipes import Scheme
from gptedge.quantize.rounding import ROLES, Blocks, FloatArray, dequantize
from gptedge.quantize.split_table import PARTS

_CHUNK_VALUES = 1 << 20
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_RESCALED = 0.05
"""A tenth of the rows' or columns' scales stray this far from their median only when they were rescaled: the scales
that fit rounding errors of 8% (4 bits) over 84 values stray by 1.4%, over 576 by 0.6%. Where none were, fitting changes
little."""
_FITS = 2  # of the columns, then the rows; a third changes nothing in the first three digits
_BITS = (4, 8)
Scales = npt.NDArray[np.float64]
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class WeightError:
    name: str
    layer: int | None
    """None of what stands outside the layers, such as the embedding table."""
    kind: str
    """The name without its layer: attn.qkv, mlp.down, …"""
    stored: str
    """How the bundle holds it: "4-bit, blocks of 32", "float16", …"""
    error: float | None
    """None where it cannot be compared."""
    rescaled: bool
    """Whether scales were fitted."""
    output_error: float | None = None
    """||X (W - Wq)'|| / ||X W'|| on calibration text, where it was measured when the bundle was made."""


class _Stored(Protocol):
    """A matrix of a bundle, read by rows as float32."""

    shape: tuple[int, int]
    label: str

    def rows(self, start: int, stop: int) -> FloatArray: ...


class _Float:
    def __init__(self, tensor: TensorProto, folder: Path) -> None:
        self._values = read_initializer(tensor, folder)
        self.shape = (int(tensor.dims[0]), int(tensor.dims[1]))
        self.label = str(self._values.dtype)

    def rows(self, start: int, stop: int) -> FloatArray:
        return np.asarray(self._values[start:stop], np.float32)


class _Quantized:
    """What MatMulNBits or GatherBlockQuantized reads."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], bits: int, block_size: int, width: int) -> None:
        self._arrays = arrays
        self._scheme = Scheme(bits, block_size, symmetric="zero_points" not in arrays, steps=1)
        self.shape = (len(arrays["packed"]), width)
        self.label = f"{bits}-bit, blocks of {block_size}"

    def rows(self, start: int, stop: int) -> FloatArray:
        part = Blocks.of({role: array[start:stop] for role, array in self._arrays.items()})
        return dequantize(part, self._scheme, self.shape[1])


class _Parts:
    """A matrix in parts, one after the other."""

    def __init__(self, parts: Sequence[_Stored]) -> None:
        self._parts = parts
        self.shape = (sum(p.shape[0] for p in parts), parts[0].shape[1])
        self.label = "; ".join(dict.fromkeys(p.label for p in parts))

    def rows(self, start: int, stop: int) -> FloatArray:
        found, first = [], 0
        for part in self._parts:
            begin, end = max(0, start - first), min(stop - first, part.shape[0])
            if begin < end:
                found.append(part.rows(begin, end))
            first += part.shape[0]
        return np.concatenate(found)


class _Integers:
    """What a product of integers reads, transposed there."""

    label = "8-bit, whole rows"

    def __init__(self, columns: npt.NDArray[Any], scales: npt.NDArray[Any]) -> None:
        self._columns, self._scales = columns, scales
        self.shape = (columns.shape[1], columns.shape[0])

    def rows(self, start: int, stop: int) -> FloatArray:
        return np.asarray(self._columns[:, start:stop].T * self._scales[start:stop, None], np.float32)


def weight_errors(bundle: Path, reference: Path) -> list[WeightError]:
    """Of every weight of the reference that is a matrix, in its graph's order."""
    originals, stored = _matrices(reference), _matrices(bundle)
    measured = {plain_name(name): e for name, e in _output_errors(bundle).items()}
    return [
        WeightError(
            name, *_place(name), other.label if other else "unknown", *_error(other, original), measured.get(name)
        )
        for name, original in originals.items()
        if isinstance(original, _Float)
        for other in [stored.get(name)]
    ]


def _output_errors(bundle: Path) -> Mapping[str, float]:
    found = (open_bundle(bundle).manifest or {}).get(OUTPUT_ERRORS)
    return found if isinstance(found, dict) else {}


def _matrices(folder: Path) -> dict[str, _Stored]:
    """By name, without the marks of how they are stored."""
    model = load_graph(folder / GRAPH)
    tensors = {t.name: t for t in model.graph.initializer}
    found: dict[str, _Stored] = {}
    made: _Stored | None
    for name, tensor in tensors.items():
        base, _, role = name.rpartition(".")
        plain = plain_name(name)
        if role == "packed":
            made = _quantized(model, tensors, base, folder)
        elif role == "columns":
            made = _integers(tensor, tensors.get(f"{base}.scales"), folder)
        else:
            made = None
        if made is not None:
            found[plain_name(base)] = made
        elif plain.endswith(".weight") and len(tensor.dims) == 2 and tensor.data_type in _FLOATS:
            found[plain] = _Float(tensor, folder)
    return _joined(found)


def _joined(found: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """With what is stored in parts as wholes again."""
    parts: dict[str, list[_Stored]] = {}
    for name in (*PARTS, *(part.removesuffix(".") for part in HALVES)):
        for key, stored in found.items():
            if key.endswith(f".weight.{name}"):
                parts.setdefault(key.removesuffix(f".{name}"), []).append(stored)
    return {**found, **{table: _Parts(rows) for table, rows in parts.items()}}


def _quantized(model: ModelProto, tensors: Mapping[str, TensorProto], base: str, folder: Path) -> _Quantized | None:
    """None where the operator that reads it, or its layout, is another than ours."""
    reader = next((n for n in model.graph.node if f"{base}.packed" in n.input), None)
    roles = [role for role in ROLES if f"{base}.{role}" in tensors]
    if reader is None or "scales" not in roles:
        return None
    arrays = {role: read_initializer(tensors[f"{base}.{role}"], folder) for role in roles}
    packed, scales, zero = arrays["packed"], arrays["scales"], arrays.get("zero_points")
    numbers = {a.name: int(a.i) for a in reader.attribute}
    if reader.op_type == "Cast":  # bytes that are widened when the model is loaded
        numbers = {"bits": 8, "block_size": packed.shape[-1]}
    bits, block = numbers.get("bits"), numbers.get("block_size", 0)
    fits = (
        bits in _BITS
        and packed.dtype == np.uint8
        and packed.shape[1:] == (*scales.shape[1:], block * bits // 8)
        and scales.dtype in ((np.float16, np.float32) if "units" not in arrays else (np.uint8,))
        and (zero is None or (zero.dtype == np.uint8 and zero.shape == (len(scales), -(-scales.shape[1] * bits // 8))))
    )
    return _Quantized(arrays, bits, block, numbers.get("K", scales.shape[1] * block)) if fits and bits else None


def _integers(columns: TensorProto, scales: TensorProto | None, folder: Path) -> _Integers | None:
    """None where the layout is another than ours."""
    if columns.data_type != TensorProto.INT8 or scales is None or list(scales.dims) != list(columns.dims[1:]):
        return None
    return _Integers(read_initializer(columns, folder), read_initializer(scales, folder))


def _place(name: str) -> tuple[int | None, str]:
    """Layer and kind of `blocks.3.attn.qkv.weight`."""
    match = _LAYER.fullmatch(name.removesuffix(".weight"))
    return (int(match[1]), match[2]) if match else (None, name.removesuffix(".weight"))


@dataclass(frozen=True)
class _Fit:
    """What one pass over two matrices finds: sums of squares, and the scales that would bring W nearer to Wq."""

    difference: float
    norm: float
    rows: Scales
    columns: Scales

    @property
    def error(self) -> float | None:
        value = np.sqrt(self.difference / self.norm) if self.norm > 0 else np.nan
        return float(value) if np.isfinite(value) else None


def _error(stored: _Stored | None, original: _Stored) -> tuple[float | None, bool]:
    """The error, and whether scales were fitted first."""
    if stored is None or stored.shape[0] != original.shape[0] or stored.shape[1] < original.shape[1]:
        return None, False
    rows, columns = np.ones(original.shape[0]), np.ones(original.shape[1])
    fit = _pass(stored, original, rows, columns)
    if fit.error is None or np.median(fit.columns) <= 0:
        return None, False
    if not (_stray(fit.rows) or _stray(fit.columns)):
        return fit.error, False
    for _ in range(_FITS):
        columns = columns * fit.columns
        rows = rows * _pass(stored, original, rows, columns).rows
        fit = _pass(stored, original, rows, columns)
    return fit.error, True


def _pass(stored: _Stored, original: _Stored, rows: Scales, columns: Scales) -> _Fit:
    """Compare Wq with diag(rows) W diag(columns)."""
    width = original.shape[1]
    step = max(1, _CHUNK_VALUES // width)
    difference = norm = 0.0
    both, square = np.zeros(width), np.zeros(width)  # sums over rows of Wq W, and of W W
    row_fits = []
    for start in range(0, original.shape[0], step):
        w = original.rows(start, start + step) * rows[start : start + step, None] * columns
        q = stored.rows(start, start + step)[:, :width]
        both += (q * w).sum(0)
        square += (w * w).sum(0)
        row_fits.append(_scales((q * w).sum(1), (w * w).sum(1)))
        difference += float(np.square(q - w).sum())
        norm += float(np.square(w).sum())
    return _Fit(difference, norm, np.concatenate(row_fits), _scales(both, square))


def _scales(both: Scales, square: Scales) -> Scales:
    """Least-squares scales from W to Wq; 1 for rows or columns that are empty."""
    return np.divide(both, square, out=np.ones_like(both), where=square > 0)


def _stray(scales: Scales) -> bool:
    return bool(np.quantile(np.abs(scales / np.median(scales) - 1), 0.9) > _RESCALED)

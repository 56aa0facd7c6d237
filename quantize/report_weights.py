"""How far each weight of a bundle lies from the reference's: ||Wq - W|| / ||W||, Frobenius norms, a chunk at a time.

A weight says nothing where its layout is not one that `passes` writes, or where columns or rows were rescaled (as when
a norm's gain, or activations' ranges, were folded into it: then it computes the same in another scale). Such an error
is None. What the error does to the model's output is for `gptedge.evaluate.divergence` to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto

from gptedge.bundle import GRAPH
from gptedge.onnx_file import load_graph, read_initializer
from gptedge.quantize.recipes import Scheme
from gptedge.quantize.rounding import Blocks, FloatArray, dequantize

_CHUNK_VALUES = 1 << 20
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_RESCALED = 0.05
"""Rows' or columns' best scales typically stray this far from their median only when something was folded in: rounding
errors of 10% (4 bits) over 100 values stray by 1%."""
_BITS = (4, 8)
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
        self._packed, self._scales = arrays["packed"], arrays["scales"]
        self._zero_points = arrays.get("zero_points")
        self._scheme = Scheme(bits, block_size, symmetric=self._zero_points is None, steps=1)
        self.shape = (len(self._packed), width)
        self.label = f"{bits}-bit, blocks of {block_size}"

    def rows(self, start: int, stop: int) -> FloatArray:
        zero_points = None if self._zero_points is None else self._zero_points[start:stop]
        part = Blocks(self._packed[start:stop], self._scales[start:stop], zero_points)
        return dequantize(part, self._scheme, self.shape[1])


def weight_errors(bundle: Path, reference: Path) -> list[WeightError]:
    """Of every weight of the reference that is a matrix, in its graph's order."""
    originals, stored = _matrices(reference), _matrices(bundle)
    return [
        WeightError(
            name, *_place(name), other.label if (other := stored.get(name)) else "unknown", _error(other, original)
        )
        for name, original in originals.items()
        if isinstance(original, _Float)
    ]


def _matrices(folder: Path) -> dict[str, _Stored]:
    """By name, without the marks of how they are stored."""
    model = load_graph(folder / GRAPH)
    tensors = {t.name: t for t in model.graph.initializer}
    found: dict[str, _Stored] = {}
    for name, tensor in tensors.items():
        base, _, role = name.rpartition(".")
        plain = name.removesuffix(".half")
        if role == "packed" and (made := _quantized(model, tensors, base, folder)):
            found[base.removesuffix(".half")] = made
        elif plain.endswith(".weight") and len(tensor.dims) == 2 and tensor.data_type in _FLOATS:
            found[plain] = _Float(tensor, folder)
    return found


def _quantized(model: ModelProto, tensors: Mapping[str, TensorProto], base: str, folder: Path) -> _Quantized | None:
    """None where the operator that reads it, or its layout, is another than ours."""
    numbers = next((_numbers(n) for n in model.graph.node if f"{base}.packed" in n.input), {})
    roles = [role for role in ("packed", "scales", "zero_points") if f"{base}.{role}" in tensors]
    if not {"bits", "block_size"} <= set(numbers) or numbers["bits"] not in _BITS or "scales" not in roles:
        return None
    arrays = {role: read_initializer(tensors[f"{base}.{role}"], folder) for role in roles}
    bits, block = numbers["bits"], numbers["block_size"]
    packed, scales, zero = arrays["packed"], arrays["scales"], arrays.get("zero_points")
    fits = (
        packed.dtype == np.uint8
        and packed.shape[1:] == (*scales.shape[1:], block * bits // 8)
        and scales.dtype in (np.float16, np.float32)
        and (zero is None or (zero.dtype == np.uint8 and zero.shape == (len(scales), -(-scales.shape[1] * bits // 8))))
    )
    return _Quantized(arrays, bits, block, numbers.get("K", scales.shape[1] * block)) if fits else None


def _numbers(node: NodeProto) -> dict[str, int]:
    return {a.name: int(a.i) for a in node.attribute}


def _place(name: str) -> tuple[int | None, str]:
    """Layer and kind of `blocks.3.attn.qkv.weight`."""
    match = _LAYER.fullmatch(name.removesuffix(".weight"))
    return (int(match[1]), match[2]) if match else (None, name.removesuffix(".weight"))


def _error(stored: _Stored | None, original: _Stored) -> float | None:
    if stored is None or stored.shape[0] != original.shape[0] or stored.shape[1] < original.shape[1]:
        return None
    rows, width = original.shape
    step = max(1, _CHUNK_VALUES // width)
    difference = norm = 0.0
    both, columns = np.zeros(width), np.zeros(width)  # sums over rows of Wq W, and of W W
    row_scales = []
    for start in range(0, rows, step):
        w = original.rows(start, start + step)
        q = stored.rows(start, start + step)[:, :width]
        product, square = q * w, w * w
        both += product.sum(0, dtype=np.float64)
        columns += square.sum(0, dtype=np.float64)
        row_scales.append(_scales(product.sum(1, dtype=np.float64), square.sum(1, dtype=np.float64)))
        difference += float(np.square(q - w).sum(dtype=np.float64))
        norm += float(square.sum(dtype=np.float64))
    if norm == 0 or _is_rescaled(np.concatenate(row_scales)) or _is_rescaled(_scales(both, columns)):
        return None
    error = float(np.sqrt(difference / norm))
    return error if np.isfinite(error) else None


def _scales(both: npt.NDArray[np.float64], square: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least-squares scales from W to Wq; those of empty rows or columns are left out."""
    return both[square > 0] / square[square > 0]


def _is_rescaled(scales: npt.NDArray[np.float64]) -> bool:
    middle = np.median(scales)
    return not middle > 0 or bool(np.median(np.abs(scales / middle - 1)) > _RESCALED)

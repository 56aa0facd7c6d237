"""Seams of a graph: where factors can be moved from what makes a product's input into the product's weight.

Dividing a channel by a factor and multiplying the next weight's column by it leaves every product what it was. What
comes before must be able to take the division: a norm's gain, the ungated half of an MLP, or attention's values.
`smooth` and `equalize` choose the factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto

from gptedge.quantize.passes import Target
from gptedge.quantize.walk import Read

FloatArray = npt.NDArray[np.float32]
Givers = tuple[tuple[tuple[str, slice], ...], npt.NDArray[np.int64]]

_NORM_WEIGHTS = {  # where a norm's gain and bias stand among its inputs
    "SimplifiedLayerNormalization": slice(1, 2),
    "SkipSimplifiedLayerNormalization": slice(2, 3),
    "LayerNormalization": slice(1, 3),
    "SkipLayerNormalization": slice(2, 4),
}


@dataclass(frozen=True)
class Seam:
    """A product, and what before it can be divided by factors of its input's channels."""

    target: Target
    product: str
    givers: tuple[tuple[str, slice], ...]
    """Initializers, and which of their rows make the channels."""
    channels: npt.NDArray[np.int64]
    """For each of the product's columns the row it comes from, [K]: query heads share a head of values."""


class Rescaling:
    """Reads a model's initializers with the factors of its seams multiplied in."""

    def __init__(self, model: onnx.ModelProto, read: Read) -> None:
        self._read = read
        self._initializers = {t.name: t for t in model.graph.initializer}
        self.columns: dict[str, FloatArray] = {}
        """By weight, what its columns were multiplied by, [K]."""
        self._rows: dict[str, list[tuple[slice, FloatArray]]] = {}

    def add(self, seam: Seam, factors: FloatArray) -> None:
        """Multiply the weight's columns by `factors` [n_channels], and divide what makes its channels."""
        for name, rows in seam.givers:
            self._rows.setdefault(name, []).append((rows, factors))
        self.columns[seam.target.weight] = factors[seam.channels]

    def changed(self, targets: Iterable[Target]) -> set[str]:
        """Initializers other than the targets' that are not what they were."""
        return (self.columns.keys() | self._rows.keys()) - {t.weight for t in targets}

    def matrix(self, name: str) -> FloatArray:
        """An initializer by name, as it is now, in float32."""
        return np.asarray(self.read(self._initializers[name]), np.float32)

    def read(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """An initializer's values, as they are to be quantized or stored."""
        values = self._read(tensor)
        columns, rows = self.columns.get(tensor.name), self._rows.get(tensor.name, [])
        if columns is None and not rows:
            return values
        changed = np.array(values, np.float32)
        if columns is not None:
            changed *= columns
        for part, factors in rows:
            changed[part] = (changed[part].T / factors).T
        return changed.astype(values.dtype)


def balanced(spread: FloatArray, weight: FloatArray, alpha: float) -> FloatArray:
    """Factors spread^alpha / weight^(1 - alpha), whose geometric mean is 1."""
    factors = spread**alpha / weight ** (1 - alpha)
    made: FloatArray = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return made


def find_seams(model: onnx.ModelProto, targets: Iterable[Target], *, keep_values: bool = False) -> Iterator[Seam]:
    """Where activations can be smoothed, in the graph's order. A weight of several products is left alone."""
    graph = _Reader(model)
    by_product = {t.products[0]: t for t in targets if len(t.products) == 1}
    for node in model.graph.node:
        if target := by_product.get(node.name):
            if keep_values and graph.is_attention(node.input[0]):
                continue
            found = graph.givers(node.input[0], target.width)
            if found:
                yield Seam(target, node.name, *found)


class _Reader:
    """Finds what made a value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._maker = {o: node for node in model.graph.node for o in node.output if o}
        self._shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
        self._readers = Counter(i for node in model.graph.node for i in node.input if i)

    def givers(self, value: str, width: int) -> Givers | None:
        """Rows that make the channels of `value`; None where dividing them would change something else."""
        value = self._uncut(value)
        node = self._maker.get(value)
        if node is None or not self._is_alone(value):
            return None
        if node.op_type in _NORM_WEIGHTS:
            names = [i for i in node.input[_NORM_WEIGHTS[node.op_type]] if i]
            is_free = all(self._readers[i] == 1 and self._shapes.get(i) == (width,) for i in names)
            return (tuple((i, slice(0, width)) for i in names), np.arange(width)) if is_free else None
        if node.op_type == "Mul":
            return self._gain(node, width) or self._ungated(node, width)
        return self._values(node, width) if node.op_type == "GroupQueryAttention" else None

    def is_attention(self, value: str) -> bool:
        value = self._uncut(value)
        return value in self._maker and self._maker[value].op_type == "GroupQueryAttention"

    def _uncut(self, value: str) -> str:
        """What `value` is some tokens of, where nothing else reads that."""
        while value in self._maker and self._maker[value].op_type == "Slice" and self._is_alone(value):
            value = self._maker[value].input[0]
        return value

    def _gain(self, node: NodeProto, width: int) -> Givers | None:
        """A vector that multiplies what a part of a table reads (see split_table)."""
        name = node.input[1]
        is_gain = self._shapes.get(name) == (width,) and self._readers[name] == 1
        return (((name, slice(0, width)),), np.arange(width)) if is_gain else None

    def _ungated(self, node: NodeProto, width: int) -> Givers | None:
        """The second half of a split product that multiplies the activated first half."""
        split = self._maker.get(node.input[1])
        if split is None or split.op_type != "Split" or split.output[1] != node.input[1] or len(split.output) != 2:
            return None
        rows = self._product_rows(split.input[0], slice(width, 2 * width), 2 * width)
        return (rows, np.arange(width)) if rows else None

    def _values(self, node: NodeProto, width: int) -> Givers | None:
        """The last rows of the product that makes queries, keys and values."""
        heads, kv_heads = (next(a.i for a in node.attribute if a.name == n) for n in ("num_heads", "kv_num_heads"))
        head_dim = width // heads
        total = (heads + 2 * kv_heads) * head_dim
        source = node.input[0]
        if node.input[2]:
            split = self._maker.get(node.input[2])
            if split is None or split.op_type != "Split" or split.output[-1] != node.input[2]:
                return None
            source = split.input[0]
        rows = self._product_rows(source, slice(total - kv_heads * head_dim, total), total)
        channels = np.arange(kv_heads * head_dim).reshape(kv_heads, 1, head_dim).repeat(heads // kv_heads, 1)
        return (rows, channels.reshape(-1)) if rows else None

    def _product_rows(self, value: str, rows: slice, n: int) -> tuple[tuple[str, slice], ...]:
        """Those rows of the weight, and of the bias, of the product with `n` rows that makes `value`."""
        node, names = self._maker.get(value), []
        if node is not None and node.op_type == "Add" and self._shapes.get(node.input[1]) == (n,):
            names, node = [node.input[1]], self._maker.get(node.input[0])
        if node is None or node.op_type != "FusedMatMul":
            return ()
        weight = node.input[1]
        if weight not in self._shapes and weight in self._maker:  # stored as float16
            weight = self._maker[weight].input[0]
        names.append(weight)
        is_free = self._shapes.get(weight, ())[:1] == (n,) and all(self._readers[i] == 1 for i in names)
        return tuple((name, rows) for name in names) if is_free else ()

    def _is_alone(self, value: str) -> bool:
        """Whether one node alone reads `value`."""
        return self._readers[value] == 1

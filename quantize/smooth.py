"""Moving the spread of activations into the weights, where rounding takes it better, without changing the function.

The kernels round activations to 8 bits. A channel much larger than its neighbours costs them precision; dividing it by
a factor, and multiplying the next weight's column by the same, leaves every product what it was. As in SmoothQuant
(Xiao et al. 2022, arXiv:2211.10438), a channel's factor is max|x|^alpha / max|w|^(1 - alpha). What comes before must be
able to take the division: a norm's gain, the ungated half of an MLP, or attention's values. A table that is looked up
too is multiplied in both uses, and the rows that were looked up are divided again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.quantize.passes import Target
from gptedge.quantize.walk import Read, Walk

FloatArray = npt.NDArray[np.float32]

WINDOWS, WINDOW = 16, 128
"""Calibration text whose largest activations are taken; as many tokens of longer windows, where there are such."""
ALPHA = 0.5
"""How much of a channel's spread goes into the weights: 0 none, 1 all."""
_SMALLEST = 1e-5  # of a channel's spread and its weights: one that is never used keeps a factor
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


class Smoothing:
    """Reads a model's initializers with the factors of all its seams multiplied in."""

    def __init__(
        self, model: onnx.ModelProto, read: Read, walk: Walk, targets: Iterable[Target], *, keep_values: bool = False
    ) -> None:
        """Measures activations with `walk`, which goes through `model` as it is; then adapts `model`'s lookups.

        `keep_values` leaves attention's values alone, which a KV cache may share with another graph.
        """
        self._read = read
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._columns: dict[str, FloatArray] = {}
        self._rows: dict[str, list[tuple[slice, FloatArray]]] = {}
        targets = list(targets)
        for seam in find_seams(model, targets, keep_values=keep_values):
            self._add(seam, np.max([np.abs(x).max(0) for x in walk.inputs_of(seam.product)], axis=0))
        for target in targets:
            if target.lookups and target.weight in self._columns:
                _divide_lookups(model, target, self._columns[target.weight])

    def read(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """An initializer's values, as they are to be quantized or stored."""
        values = self._read(tensor)
        columns, rows = self._columns.get(tensor.name), self._rows.get(tensor.name, [])
        if columns is None and not rows:
            return values
        changed = np.array(values, np.float32)
        if columns is not None:
            changed *= columns
        for part, factors in rows:
            changed[part] = (changed[part].T / factors).T
        return changed.astype(values.dtype)

    def changed(self, targets: Iterable[Target]) -> set[str]:
        """Initializers other than the targets' that are not what they were."""
        return (self._columns.keys() | self._rows.keys()) - {t.weight for t in targets}

    def _add(self, seam: Seam, largest: FloatArray) -> None:
        heaviest = np.abs(np.asarray(self.read(self._initializers[seam.target.weight]), np.float32)).max(0)
        n = int(seam.channels.max()) + 1
        spread, weight = np.full(n, _SMALLEST, np.float32), np.full(n, _SMALLEST, np.float32)
        np.maximum.at(spread, seam.channels, largest)
        np.maximum.at(weight, seam.channels, heaviest)
        factors = spread**ALPHA / weight ** (1 - ALPHA)
        factors = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
        for name, rows in seam.givers:
            self._rows.setdefault(name, []).append((rows, factors))
        self._columns[seam.target.weight] = factors[seam.channels]


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


Givers = tuple[tuple[tuple[str, slice], ...], npt.NDArray[np.int64]]


class _Reader:
    """Finds what made a value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._maker = {o: node for node in model.graph.node for o in node.output if o}
        self._shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
        self._readers = Counter(i for node in model.graph.node for i in node.input if i)

    def givers(self, value: str, width: int) -> Givers | None:
        """Rows that make the channels of `value`; None where dividing them would change something else."""
        node = self._maker.get(value)
        while node is not None and node.op_type == "Slice" and self._is_alone(value):
            value = node.input[0]
            node = self._maker.get(value)
        if node is None or not self._is_alone(value):
            return None
        if node.op_type in _NORM_WEIGHTS:
            names = [i for i in node.input[_NORM_WEIGHTS[node.op_type]] if i]
            is_free = all(self._readers[i] == 1 and self._shapes.get(i) == (width,) for i in names)
            return (tuple((i, slice(0, width)) for i in names), np.arange(width)) if is_free else None
        if node.op_type == "Mul":
            return self._ungated(node, width)
        return self._values(node, width) if node.op_type == "GroupQueryAttention" else None

    def is_attention(self, value: str) -> bool:
        return value in self._maker and self._maker[value].op_type == "GroupQueryAttention"

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

"""A small vocabulary for writing ONNX graphs by hand: `g.op("Add", x, y)` returns the name of the result.

It knows nothing of transformers. Weights are streamed to the data file as they are named, and never held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, ValueInfoProto, helper

from gptedge.onnx_file import IR_VERSION, OPSETS, WeightFile

# Operators that onnxruntime defines beyond the standard set, by the domain they are registered under.
_DOMAINS = dict.fromkeys(
    (
        "FusedMatMul",
        "GroupQueryAttention",
        "SkipSimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "QuickGelu",
        "FastGelu",
    ),
    "com.microsoft",
)


class Graph:
    opsets: Sequence[onnx.OperatorSetIdProto] = OPSETS
    ir_version = IR_VERSION

    def __init__(self, weights: WeightFile) -> None:
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        self._inputs.append(_value(name, dtype, shape))
        return name

    def optional_input(self, name: str, default: npt.NDArray[Any], shape: Sequence[int | str] | None = None) -> str:
        """An input that may be left out: an initializer of the same name stands in for it.

        `shape` is what may be given, where that is not only the default's.
        """
        self._initializers[name] = onnx.numpy_helper.from_array(default, name)
        return self.input(name, default.dtype, default.shape if shape is None else shape)

    def output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        self._outputs.append(_value(name, dtype, shape))

    def weight(self, name: str, chunks: Iterable[npt.NDArray[Any]]) -> str:
        """A weight of the model; chunks are joined along the first axis. Naming one twice reads and stores it once."""
        if name not in self._initializers:
            self._initializers[name] = self._weights.add(name, chunks)
        return name

    def constant(self, name: str, value: Any, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant; the same name is the same constant."""
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def op(self, kind: str, *inputs: str, name: str, out: Sequence[str] | str = "", **attributes: Any) -> str:
        """Add a node called `name`; `out` names its outputs where they are not just `name`. Returns the first."""
        outputs = [out] if isinstance(out, str) else list(out)
        outputs[0] = outputs[0] or name
        domain = _DOMAINS.get(kind, "")
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def once(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Like `op`, but a second call with the same name adds nothing."""
        if not any(node.name == name for node in self._nodes):
            self.op(kind, *inputs, name=name, **attributes)
        return name

    def model(self, name: str) -> onnx.ModelProto:
        nodes, used = self._used()
        initializers = [t for n, t in self._initializers.items() if n in used]
        graph = helper.make_graph(nodes, name, self._inputs, self._outputs, initializers)
        return helper.make_model(graph, producer_name="gptedge", opset_imports=self.opsets, ir_version=self.ir_version)

    def _used(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that the outputs hang on, and the names of all that is read."""
        wanted = {o.name for o in self._outputs}
        kept = []
        for node in reversed(self._nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1], wanted


def _value(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))

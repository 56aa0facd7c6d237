"""Running a decoder graph piece by piece over a calibration text, products being replaced as the walk goes on.

At a product the walk stops: the caller sees the activations that reach it, quantizes its weight, and the walk goes on
through the very operator that will ship, activation rounding included. What is held is what later nodes still read:
a few tensors [n_windows, T, width], whatever the model's depth. Nothing here depends on a family: the cuts are found
from the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.errors import BundleError
from gptedge.graph_io import ATTENTION_MASK, INPUT_IDS, PAST_PREFIX, POSITION_IDS
from gptedge.runtime.onnx_runtime import import_onnxruntime

Array = npt.NDArray[Any]
Read = Callable[[TensorProto], Array]
_SEGMENT_BYTES = 1 << 26  # of weights that a part of the graph has, as a rule
_BATCH = 4  # windows run at once: enough rows to keep the cores busy, and attention's scores stay small


class Walk:
    """A walk through `model` with the token ids `windows` [n_windows, T]; `read` gives an initializer's values.

    Nodes must be in topological order.
    """

    def __init__(self, model: onnx.ModelProto, read: Read, windows: npt.NDArray[np.int64], *, threads: int) -> None:
        self._nodes = list(model.graph.node)
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._read = read
        self._threads = threads
        self._opsets = list(model.opset_import)
        self._ir_version = model.ir_version
        self._batches = [windows[i : i + _BATCH] for i in range(0, len(windows), _BATCH)]
        self._fixed = _fixed_inputs(model)
        self._values: list[dict[str, Array]] = [{INPUT_IDS: ids} for ids in self._batches]
        self._dynamic = {INPUT_IDS}
        self._at = 0
        self._mark_dynamic(self._nodes)

    @property
    def window(self) -> int:
        """Tokens of each window."""
        return int(self._batches[0].shape[1])

    def inputs_of(self, node_name: str) -> list[Array]:
        """Activations that reach a node's first input, a few windows each: [tokens, width]. Earlier nodes have run."""
        index = next(i for i, n in enumerate(self._nodes) if n.name == node_name)
        value = self._nodes[index].input[0]
        while self._at < index:
            self._advance(self._next_stop(index))
        return [v[value].reshape(-1, v[value].shape[-1]) for v in self._values]

    def replace(self, node_name: str, nodes: Sequence[NodeProto], initializers: Iterable[TensorProto]) -> None:
        """Let `nodes` stand where one node stood that has not run yet."""
        index = next(i for i, n in enumerate(self._nodes) if n.name == node_name)
        assert index >= self._at, f"{node_name} has run already"
        self._nodes[index : index + 1] = nodes
        self._initializers.update((t.name, t) for t in initializers)
        self._mark_dynamic(nodes)

    def _mark_dynamic(self, nodes: Iterable[NodeProto]) -> None:
        """What depends on the tokens is carried along; all else is cheap, and computed again where it is needed."""
        for node in nodes:
            if any(i in self._dynamic for i in node.input):
                self._dynamic.update(o for o in node.output if o)

    def _next_stop(self, until: int) -> int:
        """The furthest node up to `until` that can be reached without loading many weights at once."""
        size = 0
        for i in range(self._at, until):
            weights = (self._initializers[n] for n in self._nodes[i].input if n in self._initializers)
            size += sum(4 * int(np.prod(t.dims)) for t in weights)
            if size > _SEGMENT_BYTES and i > self._at:
                return i
        return until

    def _advance(self, until: int) -> None:
        """Run the nodes up to index `until`, and keep what it and later nodes read."""
        wanted = {i for node in self._nodes[until:] for i in node.input if i in self._dynamic}
        outputs = sorted(o for node in self._nodes[self._at : until] for o in node.output if o in wanted)
        if outputs:
            self._run(outputs, wanted)
        self._at = until

    def _run(self, outputs: list[str], wanted: set[str]) -> None:
        """Add `outputs` to the values held, and drop those that are not wanted any more."""
        session, inputs, fixed = self._segment(outputs, set(self._values[0]))
        for i, values in enumerate(self._values):
            feeds = {name: values[name] for name in inputs}
            feeds |= {name: make(*self._batches[i].shape) for name, make in fixed.items()}
            made = dict(zip(outputs, session.run(outputs, feeds), strict=True))
            kept = {name: value for name, value in values.items() if name in wanted}
            self._values[i] = {**kept, **made}

    def _segment(self, outputs: list[str], held: set[str]) -> tuple[Any, list[str], dict[str, Any]]:
        """A session that computes `outputs` from held values: with their names, and the fixed inputs it takes."""
        producers = {o: node for node in self._nodes for o in node.output if o}
        inputs, fixed, weights = set[str](), set[str](), set[str]()
        needed, stack = set[int](), list(outputs)
        while stack:
            name = stack.pop()
            if name in held:
                inputs.add(name)
            elif name in self._fixed:
                fixed.add(name)
            elif name in self._initializers:
                weights.add(name)
            elif id(producers[name]) not in needed:
                needed.add(id(producers[name]))
                stack += [i for i in producers[name].input if i]
        graph = helper.make_graph(
            [node for node in self._nodes if id(node) in needed],
            "segment",
            [_value(n, self._values[0][n].dtype) for n in sorted(inputs)]
            + [_value(n, self._fixed[n](1, 1).dtype) for n in sorted(fixed)],
            [onnx.ValueInfoProto(name=n) for n in outputs],  # whose types onnxruntime finds
            [self._inline(self._initializers[n]) for n in sorted(weights)],
        )
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's exceptions share no public base
            raise BundleError(f"a part of the graph cannot be run: {str(e).splitlines()[0]}") from None
        return session, sorted(inputs), {n: self._fixed[n] for n in sorted(fixed)}

    def _inline(self, tensor: TensorProto) -> TensorProto:
        return onnx.numpy_helper.from_array(self._read(tensor), tensor.name)


def _fixed_inputs(model: onnx.ModelProto) -> Mapping[str, Any]:
    """Inputs that are the same for every text: functions of (batch, T)."""
    fixed: dict[str, Any] = {
        ATTENTION_MASK: lambda b, t: np.ones((b, t), np.int64),
        POSITION_IDS: lambda b, t: np.tile(np.arange(t, dtype=np.int64), (b, 1)),
    }
    for value in model.graph.input:
        if value.name.startswith(PAST_PREFIX):
            kind = value.type.tensor_type
            heads, width = kind.shape.dim[1].dim_value, kind.shape.dim[3].dim_value
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            fixed[value.name] = lambda b, t, h=heads, w=width, d=dtype: np.zeros((b, h, 0, w), d)
    return fixed


def _value(name: str, dtype: np.dtype[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), None)

"""Products of integers: 8-bit weights with a scale for each row, times 8-bit activations with one for each token.

    x [B, T, K] ── / largest |x| of its token ── steps of 1/127 around 128, uint8 ── product ── * largest ── y [B, T, N]

From a few rows on they overtake MatMulNBits, most of all on processors with dot products of bytes (see
benchmarks/LOG.md). A token's scale depends on nothing but that token, as in SmoothQuant (Xiao et al. 2022,
arXiv:2211.10438), so a text gives the same numbers however it is cut into runs.

Weights rest as signed bytes, which such processors multiply fastest with unsigned activations. All others of the x86
family add two such products in saturating 16 bits, which is wrong, and those of two unsigned bytes exactly. So each
graph is written twice over the same bytes: X.onnx makes its weights unsigned when it is loaded and is right everywhere,
X.signed.onnx takes them as they are. The session finds out which of them suits its processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.bundle import signed
from gptedge.onnx_file import MICROSOFT, save_graph

_MIDDLE, _LARGEST = 128, 127
_TINY = np.finfo(np.float32).tiny
_AXIS, _STEP, _ZERO_POINT = "integers.axis", "integers.step", "integers.middle"
_UNSIGNED = ".unsigned"
_OPERATOR = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class Columns:
    """A quantized matrix of N rows as the product takes it, transposed."""

    columns: npt.NDArray[np.int8]
    """[K, N]."""
    scales: npt.NDArray[np.float32]
    """[N]."""

    @classmethod
    def of(cls, weight: npt.NDArray[Any]) -> Columns:
        """Round [N, K] to the nearest; cutting off a range of 255 steps never paid."""
        rows = np.asarray(weight, np.float32)
        scales = np.maximum(np.abs(rows).max(1), _TINY) / _LARGEST
        integers = np.clip(np.rint(rows / scales[:, None]), -_LARGEST, _LARGEST)
        return cls(np.ascontiguousarray(integers.T.astype(np.int8)), scales)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By role, which is the field's name."""
        return {role: getattr(self, role) for role in ROLES}


ROLES = tuple(f.name for f in fields(Columns))


def constants() -> list[TensorProto]:
    """What every product of a graph reads."""
    values: dict[str, npt.NDArray[Any]] = {
        _AXIS: np.array([-1]),
        _STEP: np.array(1 / _LARGEST, np.float32),
        _ZERO_POINT: np.array(_MIDDLE, np.uint8),
    }
    return [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]


def unsigned(columns: str) -> Iterator[NodeProto]:
    """Signed bytes as unsigned ones around 128; onnxruntime folds this once, when it loads."""
    name = f"{columns}.bytes"
    yield helper.make_node("Cast", [columns], [name], name=name, to=TensorProto.UINT8)  # modulo 256
    yield helper.make_node("BitwiseXor", [name, _ZERO_POINT], [columns + _UNSIGNED], name=columns + _UNSIGNED)


def product(node: NodeProto, columns: str, scales: str) -> Iterator[NodeProto]:
    """What stands in for a float product `node`, whose name the last node has. A token of zeros gives zeros, because
    what 0 / 0 is rounded to is multiplied by 0."""
    x, y, name = node.input[0], node.output[0], node.name
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Abs", [x], "abs", {}),
        ("ReduceMax", [f"{name}.abs", _AXIS], "largest", {"keepdims": 1}),
        ("Div", [x, f"{name}.largest"], "part", {}),
        ("QuantizeLinear", [f"{name}.part", _STEP, _ZERO_POINT], "rounded", {}),
    )
    for kind, inputs, output, attributes in steps:
        yield helper.make_node(kind, inputs, [f"{name}.{output}"], name=f"{name}.{output}", **attributes)
    factors = [f"{name}.rounded", columns + _UNSIGNED, _STEP, scales, _ZERO_POINT, _ZERO_POINT]
    yield helper.make_node(_OPERATOR, factors, [f"{name}.product"], name=f"{name}.product", domain=MICROSOFT)
    yield helper.make_node("Mul", [f"{name}.product", f"{name}.largest"], [y], name=name)


def save(path: Path, model: onnx.ModelProto) -> None:
    """Write a graph, and its signed twin where it has products of integers."""
    save_graph(path, model)
    if any(node.op_type == _OPERATOR for node in model.graph.node):
        save_graph(path.with_name(signed(path.name)), _signed(model))


def _signed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with the signed bytes themselves as factors, whose zero point is 0."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    weights = {node.input[1].removesuffix(_UNSIGNED) for node in model.graph.node if node.op_type == _OPERATOR}
    dropped = {node.name for weight in weights for node in unsigned(weight)}
    del twin.graph.node[:]
    twin.graph.node.extend(_as_signed(node) for node in model.graph.node if node.name not in dropped)
    return twin


def _as_signed(node: NodeProto) -> NodeProto:
    if node.op_type != _OPERATOR:
        return node
    made = NodeProto()
    made.CopyFrom(node)
    made.input[1] = node.input[1].removesuffix(_UNSIGNED)
    del made.input[-1]
    return made

"""Products of integers: 8-bit weights with a scale for each row, times 8-bit activations with one for each token.

    x [B, T, K] ── / largest |x| of its token ── steps of 1/127 around 128, uint8 ── product ── * largest ── y [B, T, N]

From a few rows on they overtake MatMulNBits, most of all on processors with dot products of bytes (see
benchmarks/LOG.md). A token's scale depends on nothing but that token, as in SmoothQuant (Xiao et al. 2022,
arXiv:2211.10438), so a text gives the same numbers however it is cut into runs. So it does with one step for all
tokens, measured beforehand (static quantization), which takes no pass over activations but the rounding:

    x ── steps around 128, uint8 ── product ── y

Weights rest as signed bytes, which such processors multiply fastest with unsigned activations. All others of the x86
family add two such products in saturating 16 bits, which is wrong, and those of two unsigned bytes exactly. So each
graph is written twice over the same bytes: X.onnx makes its weights unsigned when it is loaded and is right everywhere,
X.signed.onnx takes them as they are. The session finds out which of them suits its processor.

Between products as little is written as can be. What an MLP splits into gate and up is made by a product each. And a
factor of a token need not be multiplied in where the next product's rounding divides it out again:

    gate * largest ── activation ──┐
                               up ── * ── / largest of it ── … ── product ── * both of its token's factors ── y
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.bundle import signed
from gptedge.onnx_file import MICROSOFT, save_graph

_MIDDLE = 128
LARGEST = 127
"""Steps from the middle to the largest value."""
_TINY = np.finfo(np.float32).tiny
_AXIS, _STEP, _ZERO_POINT = "integers.axis", "integers.step", "integers.middle"
_LARGEST_OF, _FACTOR_OF = ".largest", ".factor"
_STEP_ROLE = "step"
"""Of the initializer that holds the one step of all tokens."""
_UNSIGNED = ".unsigned"
_OPERATOR = "MatMulIntegerToFloat"

WHOLE, HALVES = ("",), ("gate.", "up.")
"""What roles begin with, for each part of a matrix's rows that has a product of its own."""


@dataclass(frozen=True)
class Columns:
    """A quantized matrix of N rows as the product takes it, transposed."""

    columns: npt.NDArray[np.int8]
    """[K, N]."""
    scales: npt.NDArray[np.float32]
    """[N]."""
    step: float | None = None
    """That all activations are rounded by; None where each token has its own."""

    @classmethod
    def of(cls, weight: npt.NDArray[Any], step: float | None = None) -> Columns:
        """Round [N, K] to the nearest; cutting off a range of 255 steps never paid."""
        rows = np.asarray(weight, np.float32)
        scales = row_scales(rows)
        return cls.of_integers(np.clip(np.rint(rows / scales[:, None]), -LARGEST, LARGEST), scales, step)

    @classmethod
    def of_integers(
        cls, integers: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], step: float | None = None
    ) -> Columns:
        """What was found otherwise: integers [N, K] around zero."""
        return cls(np.ascontiguousarray(integers.T.astype(np.int8)), scales, step)

    def dequantized(self) -> npt.NDArray[np.float32]:
        """The [N, K] matrix that the kernels compute with."""
        return np.ascontiguousarray((self.columns * self.scales).T)

    def arrays(self, parts: Sequence[str] = WHOLE) -> dict[str, npt.NDArray[Any]]:
        """By role: `roles` of such parts, and a step's where there is one."""
        columns, scales = np.split(self.columns, len(parts), axis=1), np.split(self.scales, len(parts))
        arrays = (np.ascontiguousarray(a) for pair in zip(columns, scales, strict=True) for a in pair)
        made = dict(zip(roles(parts), arrays, strict=True))
        return made if self.step is None else made | {_STEP_ROLE: np.array([self.step], np.float32)}


def row_scales(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """At which the range of each row is just held, [N]."""
    scales: npt.NDArray[np.float32] = np.maximum(np.abs(rows).max(1), _TINY) / LARGEST
    return scales


def roles(parts: Sequence[str] = WHOLE) -> list[str]:
    """Of the initializers that a product has for each of such parts: its columns and their scales."""
    return [part + kind for part in parts for kind in ("columns", "scales")]


def constants() -> list[TensorProto]:
    """What every product of a graph reads."""
    values: dict[str, npt.NDArray[Any]] = {
        _AXIS: np.array([-1]),
        _STEP: np.array(1 / LARGEST, np.float32),
        _ZERO_POINT: np.array(_MIDDLE, np.uint8),
    }
    return [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]


def unsigned(columns: str) -> Iterator[NodeProto]:
    """Signed bytes as unsigned ones around 128; onnxruntime folds this once, when it loads."""
    name = f"{columns}.bytes"
    yield helper.make_node("Cast", [columns], [name], name=name, to=TensorProto.UINT8)  # modulo 256
    yield helper.make_node("BitwiseXor", [name, _ZERO_POINT], [columns + _UNSIGNED], name=columns + _UNSIGNED)


def product(node: NodeProto, names: Mapping[str, str], outputs: Mapping[str, str]) -> Iterator[NodeProto]:
    """What stands in for a float product `node`: `outputs` has what each part of it makes, `names` by role what it
    reads. A token of zeros gives zeros, because what 0 / 0 is rounded to is multiplied by 0."""
    x, name, static = node.input[0], node.name, names.get(_STEP_ROLE)
    step = static or _STEP
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Abs", [x], "abs", {}),
        ("ReduceMax", [f"{name}.abs", _AXIS], "largest", {"keepdims": 1}),
        ("Div", [x, f"{name}{_LARGEST_OF}"], "part", {}),
        ("QuantizeLinear", [x if static else f"{name}.part", step, _ZERO_POINT], "rounded", {}),
    )
    for kind, inputs, output, attributes in steps[-1:] if static else steps:
        yield helper.make_node(kind, inputs, [f"{name}.{output}"], name=f"{name}.{output}", **attributes)
    for part, output in outputs.items():
        columns, scales = (names[role] for role in roles([part]))
        factors = [f"{name}.rounded", columns + _UNSIGNED, step, scales, _ZERO_POINT, _ZERO_POINT]
        made, last = f"{name}.{part}product", f"{name}.{part}".removesuffix(".")
        yield helper.make_node(_OPERATOR, factors, [output if static else made], name=made, domain=MICROSOFT)
        if not static:
            yield helper.make_node("Mul", [made, f"{name}{_LARGEST_OF}"], [output], name=last)


def nodes_of(name: str) -> list[str]:
    """Names of all nodes that may stand in for the product `name`, the first of them first, before any is saved."""
    parts = (part + kind for part in (*WHOLE, *HALVES) for kind in ("product", ""))
    made = ["abs", "largest", "part", "rounded", *parts]
    return [f"{name}.{suffix}".removesuffix(".") for suffix in made]


def save(path: Path, model: onnx.ModelProto) -> None:
    """Write a graph, and its signed twin where it has products of integers; `model` is left as it is."""
    written = onnx.ModelProto()
    written.CopyFrom(model)
    _defer_factors(written.graph)
    save_graph(path, written)
    if any(node.op_type == _OPERATOR for node in written.graph.node):
        save_graph(path.with_name(signed(path.name)), _signed(written))


def _defer_factors(graph: onnx.GraphProto) -> None:
    """Take the factors of tokens from where only the rounding of another product reads on, to behind that one."""
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    late: dict[str, list[NodeProto]] = {}
    for rounded in dict.fromkeys(node.input[0] for node in graph.node if node.op_type == _OPERATOR):
        name = rounded.removesuffix(".rounded")
        divided = makers.get(f"{name}.part")
        gated = makers.get(divided.input[0]) if divided else None
        scaled = _right_factor(gated, makers) if gated is not None and len(readers[gated.output[0]]) == 2 else None
        if gated is None or scaled is None or not _is_scaling(scaled) or len(readers[scaled.output[0]]) > 1:
            continue
        factor, largest = name + _FACTOR_OF, name + _LARGEST_OF
        gated.input[1] = scaled.input[0]
        late[largest] = [helper.make_node("Mul", [largest, scaled.input[1]], [factor], name=factor)]
        for last in filter(_is_scaling, readers[largest]):
            last.input[1] = factor
        graph.node.remove(scaled)
    nodes = [new for node in graph.node for new in (node, *late.get(node.output[0], ()))]
    del graph.node[:]
    graph.node.extend(nodes)


def _right_factor(node: NodeProto, makers: Mapping[str, NodeProto]) -> NodeProto | None:
    return makers.get(node.input[1]) if node.op_type == "Mul" else None


def _is_scaling(node: NodeProto) -> bool:
    """Whether it multiplies a product of integers by its token's factor."""
    return node.op_type == "Mul" and node.input[1].endswith(_LARGEST_OF)


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

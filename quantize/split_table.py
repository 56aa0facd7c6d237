"""Tables in parts, so that the rows of common tokens can have more bits than the rest.

A tokenizer learns what is frequent first, so a vocabulary begins with what texts are made of: the first 8,192 of
SmolLM2's 49,152 tokens get 85% of the probability. Errors of a row cost as much divergence as its token is likely, and
the other 40,960 rows are most of the bytes, and of the last product's time. Special tokens count as common where they
stand at the end. The idea is that of adaptive softmax (Grave et al. 2016, arXiv:1609.04309), with bits for widths.

What reaches the parts of more bits is multiplied by a gain of ones, where activations can be smoothed (see seams) for
these alone: factors that suit the activations of 8-bit weights cost 4-bit ones more than they save.

    logits:    Concat((x * gain) @ common.T, x @ rare.T, (x * gain) @ special.T)
    lookups:   Where(id >= first of a part, its row, the row of the part before)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.quantize.passes import Table, find_tables, plain_name
from gptedge.quantize.walk import Read

COMMON, RARE, SPECIAL = "common", "rare", "special"
PARTS = (COMMON, RARE, SPECIAL)
"""What a part's weight is called after its table's, in the order of their rows."""
_LEAST = 2
"""How many times as many rows as common ones a table must have to be split."""


@dataclass(frozen=True)
class Part:
    name: str
    start: int
    stop: int


def parts_of(rows: int, common: int, special: Collection[int]) -> list[Part]:
    """The parts of a table, in order; none where it stays whole: `common` is 0, or too much of it.

    From the first id in `special` behind the common ones on, rows are a part of their own, if they are not more than
    those.
    """
    if not 0 < common <= rows // _LEAST:
        return []
    first = min((i for i in special if common <= i < rows), default=rows)
    rest = first if rows - first <= common else rows
    found = (Part(COMMON, 0, common), Part(RARE, common, rest), Part(SPECIAL, rest, rows))
    return [part for part in found if part.start < part.stop]


def split_tables(model: onnx.ModelProto, read: Read, common: int, special: Collection[int]) -> Read:
    """Split the float graph's tables in place; what reads its initializers from now on, the parts among them."""
    initializers = {t.name: t for t in model.graph.initializer}
    cut: dict[str, tuple[TensorProto, Part]] = {}
    for table in find_tables(model):
        whole = initializers[table.weight]
        if parts := parts_of(table.rows, common, special):
            cut |= {_part_name(table.weight, part): (whole, part) for part in parts}
            _split(model.graph, whole, table, parts)

    def read_part(tensor: TensorProto) -> npt.NDArray[Any]:
        if tensor.name not in cut:
            return read(tensor)
        whole, part = cut[tensor.name]
        return read(whole)[part.start : part.stop]

    return read_part


def table_of(weight: str) -> str:
    """The name of the table that a weight is, or is a part of."""
    plain = plain_name(weight)
    name, _, part = plain.rpartition(".")
    return name if part in PARTS else plain


def _part_name(weight: str, part: Part) -> str:
    plain = plain_name(weight)
    return f"{plain}.{part.name}{weight.removeprefix(plain)}"


def _split(graph: onnx.GraphProto, whole: TensorProto, table: Table, parts: list[Part]) -> None:
    nodes = list(_nodes(graph.node, table, parts))
    tensors = [t for t in graph.initializer if t.name != table.weight]
    for part in parts:
        tensor = TensorProto()
        tensor.CopyFrom(whole)
        tensor.name, tensor.dims[0] = _part_name(table.weight, part), part.stop - part.start
        tensors.append(tensor)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*tensors, *_constants(table, parts)])


def _nodes(nodes: Iterable[NodeProto], table: Table, parts: list[Part]) -> Iterator[NodeProto]:
    for node in nodes:
        if node.name in table.products:
            yield from _products(node, table, parts)
        elif node.name in table.lookups:
            yield from _lookups(node, table, parts)
        elif node.op_type == "Cast" and node.input[0] == table.weight:  # stored as float16
            for part in parts:
                yield _changed(node, part, [_part_name(table.weight, part)], f"{node.output[0]}.{part.name}")
        else:
            yield node


def _products(node: NodeProto, table: Table, parts: list[Part]) -> Iterator[NodeProto]:
    made = [f"{node.output[0]}.{part.name}" for part in parts]
    for part, output in zip(parts, made, strict=True):
        rows = node.input[0]
        if part.name != RARE:
            rows = f"{node.name}.{part.name}.gained"
            yield helper.make_node("Mul", [node.input[0], _constant(table, part, "gain")], [rows], name=rows)
        yield _changed(node, part, [rows, f"{node.input[1]}.{part.name}"], output)
    yield helper.make_node("Concat", made, list(node.output), name=f"{node.name}.parts", axis=-1)


def _lookups(node: NodeProto, table: Table, parts: list[Part]) -> Iterator[NodeProto]:
    """A part's rows for all ids, each kept where the id is the part's or a later one's."""
    weight, ids = node.input
    output, found = node.output[0], ""
    for part in parts:
        name = f"{output}.{part.name}"
        within, row = f"{name}.within", f"{name}.row"
        steps = (
            ("Sub", [ids, _constant(table, part, "start")], within),
            ("Clip", [within, _constant(table, parts[0], "start"), _constant(table, part, "last")], f"{name}.id"),
        )
        yield from (helper.make_node(kind, inputs, [o], name=o) for kind, inputs, o in steps)
        yield _changed(node, part, [f"{weight}.{part.name}", f"{name}.id"], row)
        if found:
            reached, column = f"{name}.reached", f"{name}.column"
            chosen = output if part is parts[-1] else f"{name}.chosen"
            yield helper.make_node("GreaterOrEqual", [ids, _constant(table, part, "start")], [reached], name=reached)
            yield helper.make_node("Unsqueeze", [reached, f"{plain_name(table.weight)}.axis"], [column], name=column)
            yield helper.make_node("Where", [column, row, found], [chosen], name=chosen)
            row = chosen
        found = row


def _changed(node: NodeProto, part: Part, inputs: list[str], output: str) -> NodeProto:
    """The node for one part of its weight."""
    made = NodeProto()
    made.CopyFrom(node)
    made.name = f"{node.name}.{part.name}"
    del made.input[:], made.output[:]
    made.input.extend(inputs)
    made.output.append(output)
    return made


def _constant(table: Table, part: Part, what: str) -> str:
    return f"{plain_name(table.weight)}.{part.name}.{what}"


def _constants(table: Table, parts: list[Part]) -> Iterator[TensorProto]:
    """What lookups compare ids with, and what products multiply their inputs by."""
    for part in parts:
        if table.products and part.name != RARE:
            yield onnx.numpy_helper.from_array(np.ones(table.width, np.float32), _constant(table, part, "gain"))
    if not table.lookups:
        return
    yield onnx.numpy_helper.from_array(np.array([-1]), f"{plain_name(table.weight)}.axis")
    for part in parts:
        yield onnx.numpy_helper.from_array(np.array(part.start), _constant(table, part, "start"))
        yield onnx.numpy_helper.from_array(np.array(part.stop - part.start - 1), _constant(table, part, "last"))

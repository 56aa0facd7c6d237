"""Rewriting a float graph's products and lookups for quantized weights: one pass, which says what it changed.

FusedMatMul(x, W) with transB becomes MatMulNBits; the Gather from a table becomes GatherBlockQuantized. A table that is
also the output projection is stored once, for both operators read the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.onnx_file import MICROSOFT
from gptedge.quantize.recipes import Recipe, Scheme

ACCURACY_LEVEL = 4
"""MatMulNBits with 8-bit activations; at lower levels, 8-bit weights would be widened at each call."""


@dataclass(frozen=True)
class Target:
    """A matrix to quantize, and where it is used."""

    weight: str
    """The initializer's name."""
    rows: int
    width: int
    scheme: Scheme
    products: tuple[str, ...]
    """Names of the FusedMatMul nodes."""
    lookups: tuple[str, ...]
    """Names of the Gather nodes."""


def find_targets(model: onnx.ModelProto, recipe: Recipe) -> list[Target]:
    """Matrices that products and token lookups use, in the graph's order."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 2}
    sources = {
        node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in shapes
    }
    products: dict[str, list[str]] = {}
    lookups: dict[str, list[str]] = {}
    for node in model.graph.node:
        operand = _weight_operand(node)
        name = sources.get(operand, operand)
        if name in shapes:
            (lookups if node.op_type == "Gather" else products).setdefault(name, []).append(node.name)
    tables = set(lookups) | {name for name, nodes in products.items() if "head" in nodes}
    return [
        Target(
            name,
            rows,
            width,
            recipe.table if name in tables else recipe.linear,
            tuple(products.get(name, ())),
            tuple(lookups.get(name, ())),
        )
        for name, (rows, width) in shapes.items()
        if name in products or (name in lookups and "embed" in lookups[name])
    ]


def _weight_operand(node: NodeProto) -> str:
    """The input that holds weights, or an empty name."""
    if node.op_type == "FusedMatMul" and any(a.name == "transB" and a.i for a in node.attribute):
        return str(node.input[1])
    return str(node.input[0]) if node.op_type == "Gather" else ""


def rewrite(
    model: onnx.ModelProto,
    targets: list[Target],
    store: Callable[[Target], dict[str, TensorProto]],
    keep: Callable[[TensorProto], TensorProto],
) -> None:
    """Rewrite in place. `store` quantizes one target and gives its initializers by role (packed, scales, zero_points);
    `keep` copies an initializer that stays as it is."""
    graph = model.graph
    quantized = {t.weight for t in targets}
    initializers = [keep(tensor) for tensor in graph.initializer if tensor.name not in quantized]
    roles: dict[str, dict[str, str]] = {}
    for target in targets:
        made = store(target)
        initializers += made.values()
        roles[target.weight] = {role: tensor.name for role, tensor in made.items()}
    nodes = list(_rewritten(graph.node, targets, roles))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*initializers, *_shape_constants(targets)])


def _rewritten(
    nodes: Iterable[NodeProto], targets: list[Target], roles: dict[str, dict[str, str]]
) -> Iterator[NodeProto]:
    """The nodes in their order, those of `targets` replaced; a weight's scales are widened before its first use."""
    by_node = {node: t for t in targets for node in (*t.products, *t.lookups)}
    widened: set[str] = set()
    for node in nodes:
        target = by_node.get(node.name)
        if node.op_type == "Cast" and node.input[0] in roles:
            continue  # it widened the float16 weight that is no more
        if target is None:
            yield node
            continue
        if target.weight not in widened:
            widened.add(target.weight)
            yield _widen_scales(target, roles[target.weight])
        if node.name in target.lookups:
            yield from _lookup(node, target, roles[target.weight])
        else:
            yield _product(node, target, roles[target.weight])


def _widen_scales(target: Target, roles: dict[str, str]) -> NodeProto:
    """Scales rest as float16; onnxruntime folds this once, when it loads."""
    name = f"{target.weight}.scales.float"
    return helper.make_node("Cast", [roles["scales"]], [name], name=name, to=TensorProto.FLOAT)


def _product(node: NodeProto, target: Target, roles: dict[str, str]) -> NodeProto:
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], roles["packed"], f"{target.weight}.scales.float", *_zero_points(roles)],
        list(node.output),
        name=node.name,
        domain=MICROSOFT,
        K=target.width,
        N=target.rows,
        bits=target.scheme.bits,
        block_size=target.scheme.block_size,
        accuracy_level=ACCURACY_LEVEL,
    )


def _lookup(node: NodeProto, target: Target, roles: dict[str, str]) -> Iterator[NodeProto]:
    """Rows of the very bytes that the product reads, [rows, blocks, bytes of a block]; then back to [..., width]."""
    name, weight = node.name, target.weight
    scales, blocks = f"{name}.scales", f"{name}.blocks"
    yield helper.make_node("Reshape", [f"{weight}.scales.float", f"{weight}.scales.shape"], [scales], name=scales)
    inputs = [roles["packed"], node.input[1], scales]
    assert "zero_points" not in roles, "the two operators lay zero points out differently: tables are symmetric"
    yield helper.make_node(
        "GatherBlockQuantized",
        inputs,
        [blocks],
        name=blocks,
        domain=MICROSOFT,
        bits=target.scheme.bits,
        block_size=target.scheme.block_size,
        gather_axis=0,
        quantize_axis=2,
    )
    flat = f"{name}.flat" if target.width % target.scheme.block_size else node.output[0]
    yield helper.make_node("Reshape", [blocks, f"{weight}.rows.shape"], [flat], name=f"{name}.flat")
    if flat != node.output[0]:
        yield helper.make_node("Slice", [flat, "zero", f"{weight}.width", "minus_one"], list(node.output), name=name)


def _zero_points(roles: dict[str, str]) -> list[str]:
    return [roles["zero_points"]] if "zero_points" in roles else []


def _shape_constants(targets: list[Target]) -> list[TensorProto]:
    values: dict[str, list[int]] = {}
    for t in targets:
        if t.lookups:
            blocks = -(-t.width // t.scheme.block_size)
            values[f"{t.weight}.scales.shape"] = [t.rows, blocks, 1]
            values[f"{t.weight}.rows.shape"] = [0, 0, blocks * t.scheme.block_size]
            if t.width % t.scheme.block_size:
                values |= {f"{t.weight}.width": [t.width], "zero": [0], "minus_one": [-1]}
    return [onnx.numpy_helper.from_array(np.array(v, np.int64), name) for name, v in values.items()]

"""Rewriting a float graph's products and lookups for quantized weights: one pass, which says what it changed.

FusedMatMul(x, W) with transB becomes MatMulNBits, or a product of integers; the Gather from a table becomes
GatherBlockQuantized. A table that is also the output projection is stored once, for both operators read the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.errors import UnsupportedModelError, UsageError
from gptedge.onnx_file import MICROSOFT
from gptedge.quantize import integer_products
from gptedge.quantize.integer_products import Columns
from gptedge.quantize.recipes import WHOLE_ROWS, Group, Recipe, Scheme
from gptedge.quantize.rounding import Blocks

ACCURACY_LEVEL = 4
"""MatMulNBits with 8-bit activations; at lower levels, 8-bit weights would be widened at each call."""

_TABLES = ("embed.weight", "head.weight")
_EMBED = "embed"
"""The node that looks up tokens, or the beginning of the names of those that look them up in parts of a table."""


@dataclass(frozen=True)
class Target:
    """A matrix to quantize, and where it is used."""

    weight: str
    """The initializer's name."""
    rows: int
    width: int
    group: Group
    products: tuple[str, ...]
    """Names of the FusedMatMul nodes."""
    lookups: tuple[str, ...]
    """Names of the Gather nodes."""
    split: str = ""
    """Name of the Split into halves which alone reads what the product makes, where there is one."""

    @property
    def scheme(self) -> Scheme:
        return self.group.scheme

    @property
    def is_calibrated(self) -> bool:
        """What is only looked up has no inputs to be calibrated on, and is rounded to nearest."""
        return self.group.method == "gptq" and bool(self.products)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes that something else stands in for."""
        return (*self.products, *self.lookups, *((self.split,) if self.split and self.scheme.whole_rows else ()))

    @property
    def roles(self) -> list[str]:
        """Of the initializers of a product of integers."""
        return integer_products.roles(self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        return integer_products.HALVES if self.split else integer_products.WHOLE


def find_targets(model: onnx.ModelProto, recipe: Recipe) -> list[Target]:
    """Matrices that products and token lookups use and the recipe covers, in the order in which the graph uses them."""
    found, splits = [], _splits(model)
    for (name, rows, width), (products, lookups) in _matrices(model):
        if group := recipe.group_of(plain_name(name)):
            split = splits.get(products[0], "") if len(products) == 1 else ""
            found.append(Target(name, rows, width, group, products, lookups, split))
            _check(found[-1])
    order = {node.name: i for i, node in enumerate(model.graph.node)}
    return sorted(found, key=lambda t: min(order[node] for node in (*t.products, *t.lookups)))


def _splits(model: onnx.ModelProto) -> dict[str, str]:
    """For each node whose output a Split into halves alone reads, the name of that one."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return {
        node.name: only.name
        for node in model.graph.node
        for only, *others in [readers.get(node.output[0], [node])]
        if only.op_type == "Split" and not others and any(a.name == "num_outputs" and a.i == 2 for a in only.attribute)
    }


def find_matrices(model: onnx.ModelProto) -> list[str]:
    """Names, as recipes match them, of all matrices that could be targets."""
    return [plain_name(name) for (name, *_), _ in _matrices(model)]


@dataclass(frozen=True)
class Table:
    """A matrix with a row for each token: what is looked up, the last product's weight, or both."""

    weight: str
    rows: int
    width: int
    products: tuple[str, ...]
    lookups: tuple[str, ...]


def find_tables(model: onnx.ModelProto) -> list[Table]:
    return [Table(*matrix, *uses) for matrix, uses in _matrices(model) if plain_name(matrix[0]) in _TABLES]


def plain_name(weight: str) -> str:
    """A weight's name, whether it is stored in float16 or not."""
    return weight.removesuffix(".half")


def _matrices(model: onnx.ModelProto) -> Iterator[tuple[tuple[str, int, int], tuple[tuple[str, ...], tuple[str, ...]]]]:
    """Name and shape of each matrix, and the nodes of its products and of its lookups."""
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
    for name, (rows, width) in shapes.items():
        if name in products or any(node.partition(".")[0] == _EMBED for node in lookups.get(name, ())):
            yield (name, rows, width), (tuple(products.get(name, ())), tuple(lookups.get(name, ())))


def _check(target: Target) -> None:
    if target.lookups and not target.scheme.symmetric:
        raise UsageError(f"{target.weight} is looked up by rows: its scheme must be symmetric")
    if target.lookups and target.scheme.whole_rows:
        raise UsageError(f"{target.weight} is looked up by rows: its block_size must not be {WHOLE_ROWS}")


def _weight_operand(node: NodeProto) -> str:
    """The input that holds weights, or an empty name.

    Raises UnsupportedModelError for a product with options that quantized products lack.
    """
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "FusedMatMul" and options.pop("transB", 0):
        for name, value in options.items():
            if value != (1.0 if name == "alpha" else 0):
                raise UnsupportedModelError(
                    f"{node.name} has {name} = {value:g}, which quantized products do not have; "
                    "multiply it into the weights before quantizing"
                )
        return str(node.input[1])
    return str(node.input[0]) if node.op_type == "Gather" else ""


def arrays_of(target: Target, blocks: Blocks | Columns) -> dict[str, npt.NDArray[Any]]:
    """What is stored of a quantized matrix, by role."""
    return blocks.arrays(target.parts) if isinstance(blocks, Columns) else blocks.arrays()


def rewrite(
    model: onnx.ModelProto,
    targets: list[Target],
    store: Callable[[Target], dict[str, TensorProto]],
    keep: Callable[[TensorProto], TensorProto],
) -> None:
    """Rewrite in place. `store` quantizes one target and gives its initializers by role (see rounding.Blocks, and
    integer_products.Columns); `keep` copies an initializer that stays as it is."""
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
    graph.initializer.extend([*initializers, *constants(targets)])


def _rewritten(
    nodes: Iterable[NodeProto], targets: list[Target], roles: dict[str, dict[str, str]]
) -> Iterator[NodeProto]:
    """The nodes in their order, those of `targets` replaced; a weight's scales are widened before its first use."""
    replaced = {node for t in targets for node in t.nodes}
    made: dict[str, list[NodeProto]] = {}
    nodes = list(nodes)
    by_name = {node.name: node for node in nodes if node.name in replaced}
    for target in targets:
        made |= replacements(target, roles[target.weight], by_name)
    for node in nodes:
        if node.op_type == "Cast" and node.input[0] in roles:
            continue  # it widened the float16 weight that is no more
        yield from made.get(node.name, [node])


def replacements(target: Target, roles: dict[str, str], nodes: Mapping[str, NodeProto]) -> dict[str, list[NodeProto]]:
    """What stands in for each node of `target`; what several of them read comes before the first.
    `roles` names the new initializers, `nodes` has the old nodes by name, in the graph's order."""
    order = [name for name in nodes if name in target.nodes]
    if target.scheme.whole_rows:
        return _integer_products(target, roles, {name: nodes[name] for name in order})
    product = _float_product if target.group.widen else _product
    made = {
        name: list(_lookup(nodes[name], target, roles))
        if name in target.lookups
        else [product(nodes[name], target, roles)]
        for name in order
    }
    shared = [*_widen_scales(target, roles), *(_widen_weights(target, roles) if target.group.widen else ())]
    made[order[0]] = [*shared, *made[order[0]]]
    return made


def _integer_products(
    target: Target, roles: dict[str, str], nodes: Mapping[str, NodeProto]
) -> dict[str, list[NodeProto]]:
    columns = [roles[role] for role in target.roles if role.endswith("columns")]
    made: dict[str, list[NodeProto]] = {name: [] for name in nodes}
    for name in target.products:
        outputs = nodes[target.split or name].output
        made[name] += integer_products.product(nodes[name], roles, dict(zip(target.parts, outputs, strict=True)))
    first = next(iter(nodes))
    made[first] = [*(n for name in columns for n in integer_products.unsigned(name)), *made[first]]
    return made


def _widen_scales(target: Target, roles: dict[str, str]) -> Iterator[NodeProto]:
    """float32 scales of what rests in a smaller form; onnxruntime folds this once, when it loads."""
    name = f"{target.weight}.scales.float"
    if "units" not in roles:
        yield _cast(roles["scales"], name)
        return
    parts, units = f"{target.weight}.scales.parts", f"{target.weight}.units.float"
    yield from (_cast(roles["scales"], parts), _cast(roles["units"], units))
    yield helper.make_node("Mul", [parts, units], [name], name=name)


def _cast(source: str, name: str) -> NodeProto:
    return helper.make_node("Cast", [source], [name], name=name, to=TensorProto.FLOAT)


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


def _float_product(node: NodeProto, target: Target, roles: dict[str, str]) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    made.input[1] = f"{target.weight}.float"
    return made


def _widen_weights(target: Target, roles: dict[str, str]) -> Iterator[NodeProto]:
    """The float matrix [rows, width] again; onnxruntime folds all of it once, when it loads."""
    weight = target.weight
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Cast", [roles["packed"]], "integers", {"to": TensorProto.FLOAT}),
        ("Sub", [f"{weight}.integers", f"{weight}.middle"], "steps", {}),
        ("Reshape", [f"{weight}.scales.float", f"{weight}.scales.shape"], "scales.blocks", {}),
        ("Mul", [f"{weight}.steps", f"{weight}.scales.blocks"], "blocks", {}),
        ("Reshape", [f"{weight}.blocks", f"{weight}.matrix.shape"], "matrix", {}),
        ("Slice", [f"{weight}.{i}" for i in ("matrix", "zero", "width", "minus_one")], "float", {}),
    )
    for kind, inputs, name, attributes in steps:
        yield helper.make_node(kind, inputs, [f"{weight}.{name}"], name=f"{weight}.{name}", **attributes)


def _lookup(node: NodeProto, target: Target, roles: dict[str, str]) -> Iterator[NodeProto]:
    """Rows of the very bytes that the product reads, [rows, blocks, bytes of a block]; then back to [..., width]."""
    name, weight = node.name, target.weight
    scales, blocks = f"{name}.scales", f"{name}.blocks"
    yield helper.make_node("Reshape", [f"{weight}.scales.float", f"{weight}.scales.shape"], [scales], name=scales)
    inputs = [roles["packed"], node.input[1], scales]
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
        bounds = [f"{weight}.{bound}" for bound in ("zero", "width", "minus_one")]
        yield helper.make_node("Slice", [flat, *bounds], list(node.output), name=name)


def _zero_points(roles: dict[str, str]) -> list[str]:
    return [roles["zero_points"]] if "zero_points" in roles else []


def constants(targets: Iterable[Target]) -> list[TensorProto]:
    """Small initializers that what stands in for the targets' nodes reads."""
    targets = list(targets)
    shared = integer_products.constants() if any(t.scheme.whole_rows for t in targets) else []
    return [*shared, *(c for t in targets if not t.scheme.whole_rows for c in _shape_constants(t))]


def _shape_constants(target: Target) -> list[TensorProto]:
    """What lookups and widened weights need."""
    weight, size = target.weight, target.scheme.block_size
    blocks = -(-target.width // size)
    values: dict[str, npt.NDArray[Any]] = {}
    if target.lookups or target.group.widen:
        values["scales.shape"] = np.array([target.rows, blocks, 1])
    if target.group.widen or (target.lookups and target.width % size):  # what fills up the last block is cut off
        values |= {"zero": np.array([0]), "width": np.array([target.width]), "minus_one": np.array([-1])}
    if target.lookups:
        values["rows.shape"] = np.array([0, 0, blocks * size])
    if target.group.widen:
        values["matrix.shape"] = np.array([target.rows, blocks * size])
        values["middle"] = np.array(2 ** (target.scheme.bits - 1), np.float32)
    return [onnx.numpy_helper.from_array(v, f"{weight}.{name}") for name, v in values.items()]

"""A second graph for reading prompts: products of integers (see integer_products.py) over the same KV cache.

They overtake MatMulNBits from a few rows on. So `prefill.onnx` runs all of a prompt but its last two tokens, and gives
keys and values alone; those two go through the bundle's own graph, which therefore makes every logit. The table is
the bundle's, whose bytes both graphs read from one file; gains and biases are the float model's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto

from gptedge.bundle import PREFILL, PREFILL_DATA
from gptedge.graph_io import LOGITS
from gptedge.onnx_file import WeightFile
from gptedge.quantize import integer_products
from gptedge.quantize.integer_products import Columns
from gptedge.quantize.passes import Target, find_targets, replacements
from gptedge.quantize.recipes import INTEGER_LAYERS, Recipe
from gptedge.quantize.smooth import smoothed
from gptedge.quantize.walk import Read, Walk

PREFILLS = ("int8",)
"""What `quantize --prefill` takes."""

_LAYERS = Recipe("the layers' products", tuple(replace(g, match=f"blocks.{g.match}") for g in INTEGER_LAYERS))


def gains(targets: Iterable[Target]) -> bool:
    """Whether a graph for prompts reads them faster than the bundle's own, whose `targets` these are: not where all of
    its layers multiply integers already."""
    return not all(t.scheme.whole_rows for t in targets if _LAYERS.group_of(t.weight))


def write_prefill(
    folder: Path,
    source: onnx.ModelProto,
    model: onnx.ModelProto,
    read: Read,
    windows: npt.NDArray[np.int64],
    threads: int,
) -> None:
    """Add the prefill graph to the bundle in `folder`.

    `source` is the float graph and `read` gives its initializers as the bundle has them, before they were rounded;
    `model` is the bundle's graph. Activations are smoothed by what the token ids `windows` [n_windows, T] show.
    """
    targets = find_targets(source, _LAYERS)
    smoothing = smoothed(source, read, Walk(source, read, windows, threads=threads), targets, keep_values=True)
    initializers = {t.name: t for t in source.graph.initializer}
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    with WeightFile(folder / PREFILL_DATA) as file:
        vectors = {t.name for t in source.graph.initializer if len(t.dims) == 1}  # of which training may change some
        own = sorted(smoothing.changed(targets) | vectors)
        made = [file.add(name, [smoothing.read(initializers[name])]) for name in own]
        names: dict[str, dict[str, str]] = {}
        for target in targets:
            weight = smoothing.read(initializers[target.weight])
            arrays = Columns.of(weight, smoothing.steps.get(target.weight)).arrays(target.parts)
            names[target.weight] = {role: f"{target.weight}.prefill.{role}" for role in arrays}
            made += [file.add(names[target.weight][role], [array]) for role, array in arrays.items()]
    products = {node.name: node for node in source.graph.node}
    _replace(graph.graph, targets, names, products, {t.name: t for t in (*made, *integer_products.constants())})
    _cut_off_logits(graph.graph)
    integer_products.save(folder / PREFILL, graph)


def write_own(folder: Path, model: onnx.ModelProto) -> None:
    """Add the bundle's own graph, over its own weights, as the one for prompts: without logits."""
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    _cut_off_logits(graph.graph)
    integer_products.save(folder / PREFILL, graph)


def _replace(
    graph: onnx.GraphProto,
    targets: Iterable[Target],
    names: dict[str, dict[str, str]],
    products: dict[str, NodeProto],
    made: dict[str, TensorProto],
) -> None:
    """Put integer products in the place of the targets', which `products` has as they were in the float graph, and
    `made` initializers beside or in the place of others; `names` has them by weight and role. Some of them may be such
    products already."""
    instead: dict[str, list[NodeProto]] = {}
    present = {node.name for node in graph.node}
    for target in targets:
        instead |= replacements(target, names[target.weight], products)
        for name in target.products:
            found = [node for node in integer_products.nodes_of(name) if node in present]
            if found and found[0] != name:
                instead |= {node: [] for node in found} | {found[0]: instead[name]}
    nodes = [new for node in graph.node for new in instead.get(node.name, [node])]
    kept = [t for t in graph.initializer if t.name not in made]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *made.values()])


def _cut_off_logits(graph: onnx.GraphProto) -> None:
    """Leave what the keys and values need, which of the last layer is little."""
    outputs = [o for o in graph.output if o.name != LOGITS]
    needed, nodes = {o.name for o in outputs}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    initializers = [t for t in graph.initializer if t.name in needed]
    # Without their defaults, optional inputs that nothing reads would be asked for: rows of logits, adapters' matrices.
    optional = {t.name for t in graph.initializer} - needed
    inputs = [i for i in graph.input if i.name not in optional]
    del graph.node[:], graph.initializer[:], graph.input[:], graph.output[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(initializers)
    graph.input.extend(inputs)
    graph.output.extend(outputs)

"""A second graph for reading prompts: 8-bit weights times 8-bit activations, over the same KV cache.

Products of integers overtake MatMulNBits from a few rows on. So `prefill.onnx` runs all of a prompt but its last token,
and gives keys and values alone; the last token goes through the bundle's own graph, which therefore makes every logit.
The table is the bundle's, whose bytes both graphs read from one file; gains and biases are the float model's.

A weight has one scale for each output channel, an activation one for each token (as in SmoothQuant, arXiv:2211.10438).
Both are unsigned around 128: processors without VNNI add products of unsigned and signed bytes in saturating 16 bits,
and of two unsigned ones exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.bundle import PREFILL, PREFILL_DATA
from gptedge.graph_io import LOGITS
from gptedge.onnx_file import MICROSOFT, WeightFile, save_graph
from gptedge.quantize.passes import Target, find_targets
from gptedge.quantize.recipes import Group, Recipe, Scheme
from gptedge.quantize.smooth import smoothed
from gptedge.quantize.walk import Read, Walk

PREFILLS = ("int8",)
"""What `quantize --prefill` takes."""

_LAYERS = Recipe("the layers' products", (Group("blocks.*", Scheme(8, 64, symmetric=True, steps=1), smooth=True),))
_MIDDLE, _LARGEST = 128, 127
_TINY = np.finfo(np.float32).tiny


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
        for target in targets:
            made += _integers(target, smoothing.read(initializers[target.weight]), file)
    _replace(graph.graph, targets, {t.name: t for t in (*made, *constants())})
    _cut_off_logits(graph.graph)
    save_graph(folder / PREFILL, graph)


def _integers(target: Target, rows: npt.NDArray[Any], file: WeightFile) -> Iterator[TensorProto]:
    """The weight as onnxruntime multiplies it: [K, N], and a scale for each of its N columns."""
    rows = np.asarray(rows, np.float32)
    scales = np.maximum(np.abs(rows).max(1), _TINY) / _LARGEST  # cutting off a range of 255 steps never paid
    integers = np.clip(np.rint(rows / scales[:, None]), -_LARGEST, _LARGEST) + _MIDDLE
    yield file.add(f"{target.weight}.prefill", [np.ascontiguousarray(integers.T.astype(np.uint8))])
    yield file.add(f"{target.weight}.prefill.scales", [scales])


def constants() -> list[TensorProto]:
    """What every `integer_product` reads."""
    values = {
        "prefill.axis": np.array([-1]),
        "prefill.tiny": np.array(_TINY, np.float32),
        "prefill.step": np.array(1 / _LARGEST, np.float32),
        "prefill.one": np.array(1, np.float32),
        "prefill.middle": np.array(_MIDDLE, np.uint8),
    }
    return [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]


def integer_product(node: NodeProto, weight: str) -> Iterator[NodeProto]:
    """What stands in for a product `node`: x [B, T, K] in steps of its rows' largest values / 127, times integers."""
    x, y, name = node.input[0], node.output[0], node.name
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Abs", [x], "abs", {}),
        ("ReduceMax", [f"{name}.abs", "prefill.axis"], "largest", {"keepdims": 1}),
        ("Max", [f"{name}.largest", "prefill.tiny"], "range", {}),
        ("Mul", [f"{name}.range", "prefill.step"], "step", {}),
        ("Div", [x, f"{name}.step"], "steps", {}),
        ("QuantizeLinear", [f"{name}.steps", "prefill.one", "prefill.middle"], "rounded", {}),
    )
    for kind, inputs, output, attributes in steps:
        yield helper.make_node(kind, inputs, [f"{name}.{output}"], name=f"{name}.{output}", **attributes)
    factors = [f"{name}.rounded", f"{weight}.prefill", "prefill.one", f"{weight}.prefill.scales"]
    inputs, product = [*factors, "prefill.middle", "prefill.middle"], f"{name}.product"
    yield helper.make_node("MatMulIntegerToFloat", inputs, [product], name=product, domain=MICROSOFT)
    yield helper.make_node("Mul", [product, f"{name}.step"], [y], name=name)


def _replace(graph: onnx.GraphProto, targets: Iterable[Target], made: dict[str, TensorProto]) -> None:
    """Put integer products in the place of the targets', and `made` initializers beside or in the place of others."""
    weights = {product: target.weight for target in targets for product in target.products}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += integer_product(node, weights[node.name]) if node.name in weights else [node]
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

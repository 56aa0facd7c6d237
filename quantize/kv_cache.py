"""A KV cache of 8 bits: scales of keys and values, measured on text and written into a bundle's graphs.

    key, value ≈ scale * integer        scale = the largest that a channel had on the text / 127

GroupQueryAttention rounds keys and values as it appends them and attends to what it rounded, within a prompt too, so a
text gives the same however it is cut into runs. For many rows that is slow (see benchmarks/LOG.md), so the graph for
prompts widens the cache around attention of floats, and rounds what it gives. Every channel of every head of a layer
has its scale (keys have channels far larger than the rest: KVQuant, arXiv:2401.18079). Scales are fixed when the
bundle is made: later values beyond them are cut off. Keys are kept rotated (arXiv:2104.09864), and at other positions
a pair of channels points elsewhere: so both get the scale of the pair's length, which no rotation changes. Both graphs
append to one cache, and have the same scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from gptedge.bundle import GRAPH, PREFILL, open_bundle
from gptedge.errors import DataError
from gptedge.graph_io import PAST_PREFIX, PRESENT_PREFIX, past_names
from gptedge.onnx_file import load_graph
from gptedge.quantize import integer_products
from gptedge.runtime.session import Session

CACHES = ("int8",)
"""What `quantize --kv` takes."""

_LARGEST = 127
_SMALLEST = 1e-5  # of a channel that is never used: it keeps a scale
_COS, _K_SCALE = 7, 12  # where attention takes them; sines, and the values' scales, come next
_PAST, _PRESENT = slice(3, 5), slice(1, 3)
_ONE, _ZERO = "kv.one", "kv.zero"
_ATTENTION = "GroupQueryAttention"

Floats = npt.NDArray[np.float32]


def quantize_cache(folder: Path, windows: npt.NDArray[np.int64], threads: int) -> None:
    """Rewrite the graphs of the bundle in `folder`, whose cache is of floats, for one of int8.

    Scales are those that the token ids `windows` [n_windows, T] need. Raises DataError when they are not finite.
    """
    scales = _scales(folder, windows, threads)
    for name, rewrite in ((GRAPH, _attend_to_integers), (PREFILL, _attend_to_floats)):
        if (folder / name).exists():
            model = load_graph(folder / name)
            _declare(model.graph, scales)
            rewrite(model.graph)
            integer_products.save(folder / name, model)


def _scales(folder: Path, windows: npt.NDArray[np.int64], threads: int) -> dict[str, Floats]:
    """By the name of its input, the scales of each of the cache's tensors, [1, n_kv_head, 1, head_dim]."""
    pairs = _pairs(load_graph(folder / GRAPH).graph)
    session = Session(open_bundle(folder), threads=threads, provider="cpu", check=False)
    names = past_names(session.n_layer)
    largest: dict[str, Floats] = {}
    for ids in windows:
        cache = session.new_cache()
        session.run(ids.tolist(), cache)
        for name, tensor in zip(names, cache.tensors(), strict=True):
            reach = _reach(tensor, pairs.get(name, 0))
            if not np.isfinite(reach).all():
                raise DataError(f"{name} is not finite on the calibration text; give another one (--calibration)")
            largest[name] = np.maximum(reach, largest.get(name, _SMALLEST))
    session.close()
    return {name: (top / _LARGEST)[None, :, None].astype(np.float32) for name, top in largest.items()}


def _reach(tensor: Floats, pairs: int) -> Floats:
    """The largest values of keys or values [n_kv_head, T, head_dim] at any position, [n_kv_head, head_dim].

    Channel j turns with channel j + pairs, where j < pairs.
    """
    top = np.abs(tensor).max(1)
    if pairs:
        top[:, : 2 * pairs] = np.tile(np.hypot(tensor[..., :pairs], tensor[..., pairs : 2 * pairs]).max(1), 2)
    return top


def _pairs(graph: onnx.GraphProto) -> dict[str, int]:
    """How many pairs of channels each layer's attention rotates, by the name of its keys: the width of its cosines."""
    maker = {output: node for node in graph.node for output in node.output}
    width = {t.name: t.dims[-1] if t.dims else 1 for t in graph.initializer}

    def widest(name: str) -> int:
        inputs = maker[name].input if name in maker else ()
        return max(width.get(name, 1), *map(widest, inputs), 1)

    attentions = [node for node in graph.node if node.op_type == _ATTENTION]
    return {node.input[_PAST.start]: widest(node.input[_COS]) for node in attentions if node.input[_COS:]}


def _scale_of(past: str) -> str:
    return f"kv.{past.removeprefix(PAST_PREFIX)}.scale"


def _declare(graph: onnx.GraphProto, scales: Mapping[str, Floats]) -> None:
    """Make the cache's inputs and outputs int8, and have its scales."""
    for value in (*graph.input, *graph.output):
        if value.name.startswith((PAST_PREFIX, PRESENT_PREFIX)):
            value.type.tensor_type.elem_type = TensorProto.INT8
    graph.initializer.extend(onnx.numpy_helper.from_array(a, _scale_of(name)) for name, a in scales.items())


def _attend_to_integers(graph: onnx.GraphProto) -> None:
    """Let attention itself round and read the cache."""
    options: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    for node in graph.node:
        if node.op_type == _ATTENTION:
            scales = [_scale_of(past) for past in node.input[_PAST]]
            node.input.extend([*[""] * (_K_SCALE - len(node.input)), *scales])
            node.attribute.extend(helper.make_attribute(name, value) for name, value in options.items())


def _attend_to_floats(graph: onnx.GraphProto) -> None:
    """Widen the cache before attention, and round all of it again after; what was rounded before stays as it was."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _widened(node) if node.op_type == _ATTENTION else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    constants: dict[str, npt.NDArray[Any]] = {_ONE: np.array(1, np.float32), _ZERO: np.array(0, np.int8)}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())


def _widened(node: NodeProto) -> Iterator[NodeProto]:
    rounded = []
    for i, (past, present) in enumerate(zip(node.input[_PAST], node.output[_PRESENT], strict=True)):
        integers, wide, made, steps = f"{past}.integers", f"{past}.wide", f"{present}.wide", f"{present}.steps"
        yield helper.make_node("Cast", [past], [integers], name=integers, to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [integers, _scale_of(past)], [wide], name=wide)
        rounded.append(helper.make_node("Div", [made, _scale_of(past)], [steps], name=steps))
        rounded.append(helper.make_node("QuantizeLinear", [steps, _ONE, _ZERO], [present], name=present))
        node.input[_PAST.start + i], node.output[_PRESENT.start + i] = wide, made
    yield from (node, *rounded)

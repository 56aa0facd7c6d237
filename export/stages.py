"""A saved decoder graph run stage by stage, so that the weights of one layer at a time are in memory.

    ids ─▶ [ embedding … q, k, v of layer 0 ] ─▶ [ attention 0 … q, k, v of layer 1 ] ─▶ … ─▶ [ attention n-1 … logits ]

A layer's output for one token needs the layers below for that token and those before, and nothing else. So each stage
can take all of a known text, a few tokens or one at a time through its own KV cache, before the next stage is loaded.
The stages are the file's own nodes and weights; only the names in `graph_io` are presumed, so any decoder will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from gptedge.errors import BundleError
from gptedge.graph_io import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    PAST_PREFIX,
    POSITION_IDS,
    PRESENT_PREFIX,
    past_key,
    past_value,
)
from gptedge.onnx_file import load_graph
from gptedge.runtime.onnx_runtime import import_onnxruntime

Array = npt.NDArray[Any]
Rows = dict[str, list[Array]]
"""Values by name: an array for each step."""


@dataclass
class Stage:
    nodes: list[onnx.NodeProto]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def run_stages(path: Path, ids: Sequence[int], sizes: Sequence[int], *, threads: int) -> npt.NDArray[np.float32]:
    """Logits [T, vocab_size] of `ids`, given to the graph `sizes[0]` tokens at first, then `sizes[1]`, ….

    Raises BundleError when onnxruntime cannot load the graph, or a part of it.
    """
    model = load_graph(path)
    _open(model, path.parent, threads, whole=True)
    ends = np.cumsum(sizes).tolist()
    values: Rows = {
        INPUT_IDS: [np.array([ids[end - n : end]]) for n, end in zip(sizes, ends, strict=True)],
        ATTENTION_MASK: [np.ones((1, end), np.int64) for end in ends],
        POSITION_IDS: [np.arange(end - n, end)[None] for n, end in zip(sizes, ends, strict=True)],
    }
    always = set(values)
    stages = cut(model)
    for i, stage in enumerate(stages):
        values |= _run(model, stage, path.parent, values, threads)
        needed = always.union(*(s.inputs for s in stages[i + 1 :]), [LOGITS])
        values = {name: rows for name, rows in values.items() if name in needed}
    return np.concatenate(values[LOGITS], axis=1)[0].astype(np.float32, copy=False)


def cut(model: onnx.ModelProto) -> list[Stage]:
    """The stages, in order: what comes before the first KV cache, then what comes after each layer's.

    Nodes that need no cache, and not both weights and inputs (masks, lengths, rotary tables, weights that are widened),
    are repeated wherever they are used. A graph with branches or loops, whose bodies may use any value, is one stage.
    """
    graph = model.graph
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for n in graph.node for a in n.attribute):
        return _with_edges(graph, [Stage(list(graph.node))])
    layers = sum(i.name.startswith(PAST_PREFIX) for i in graph.input) // 2
    depth = {name(i): i + 1 for i in range(layers) for name in (past_key, past_value)}
    weighted = {i.name for i in graph.initializer if i.data_location == TensorProto.EXTERNAL}
    fed = {i.name for i in graph.input} - {i.name for i in graph.initializer}
    stages = [Stage([]) for _ in range(layers + 1)]
    producers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        outputs = [name for name in node.output if name]
        for kind in (weighted, fed):
            if not kind.isdisjoint(node.input):
                kind.update(outputs)
        if depth.keys().isdisjoint(node.input) and not (outputs[0] in weighted and outputs[0] in fed):
            producers |= dict.fromkeys(outputs, node)
            continue
        at = max((depth.get(name, 0) for name in node.input), default=0)
        depth |= dict.fromkeys(outputs, at)
        stages[at].nodes.append(node)
    for stage in stages:
        stage.nodes = _ancestors(stage.nodes, producers) + stage.nodes
    return _with_edges(graph, [stage for stage in stages if stage.nodes])


def _ancestors(nodes: Iterable[onnx.NodeProto], producers: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes among `producers` that these need, each after what it needs itself."""
    found: dict[str, onnx.NodeProto] = {}

    def visit(name: str) -> None:
        node = producers.get(name)
        if node is None or node.output[0] in found:
            return
        for needed in node.input:
            visit(needed)
        found[node.output[0]] = node

    for node in nodes:
        for name in node.input:
            visit(name)
    return list(found.values())


def _with_edges(graph: onnx.GraphProto, stages: list[Stage]) -> list[Stage]:
    """Fill in what each stage takes from the stages before and gives to those after."""
    stored = {i.name for i in graph.initializer}
    wanted = {o.name for o in graph.output}
    for stage in reversed(stages):
        made = {name for node in stage.nodes for name in node.output if name}
        used = {name for node in stage.nodes for name in node.input if name}
        stage.inputs = sorted(used - made - stored)
        stage.outputs = sorted(made & wanted)
        wanted |= used - made
    return stages


def _run(model: onnx.ModelProto, stage: Stage, folder: Path, values: Rows, threads: int) -> Rows:
    """What the stage gives at each step; its KV cache is fed back and forgotten."""
    pasts = {i.name: i.type.tensor_type for i in model.graph.input if i.name.startswith(PAST_PREFIX)}
    cache = {name: _empty(pasts[name]) for name in stage.inputs if name in pasts}
    kinds = {name: (cache.get(name) if name in cache else values[name][0]) for name in stage.inputs}
    session = _open(_submodel(model, stage, kinds), folder, threads)
    out: Rows = {name: [] for name in stage.outputs if not name.startswith(PRESENT_PREFIX)}
    for step in range(len(values[INPUT_IDS])):
        feeds = {name: cache[name] if name in cache else values[name][step] for name in stage.inputs}
        for name, value in zip(stage.outputs, session.run(stage.outputs, feeds), strict=True):
            if name in out:
                out[name].append(value)
            else:
                cache[PAST_PREFIX + name.removeprefix(PRESENT_PREFIX)] = value
    return out


def _empty(kind: onnx.TypeProto.Tensor) -> Array:
    """A past of no tokens, [1, n_kv_head, 0, head_dim]."""
    heads, width = (kind.shape.dim[i].dim_value for i in (1, 3))
    return np.zeros((1, heads, 0, width), helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _submodel(model: onnx.ModelProto, stage: Stage, kinds: dict[str, Any]) -> onnx.ModelProto:
    used = {name for node in stage.nodes for name in node.input}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in kinds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in stage.outputs]  # onnxruntime infers their types
    weights = [i for i in model.graph.initializer if i.name in used]
    graph = helper.make_graph(stage.nodes, "stage", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _open(model: onnx.ModelProto, folder: Path, threads: int, *, whole: bool = False) -> Any:
    """A session whose weights stay mapped files: packing them for speed would take their size again, and longer than
    the few steps here. `whole` only asks whether the graph loads: nothing is folded, so no weight is read."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if whole:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions share no public base
        raise BundleError(f"onnxruntime cannot load the graph that was written: {str(e).splitlines()[0]}") from None

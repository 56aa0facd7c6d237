"""Moving the spread of activations into the weights, where rounding takes it better, without changing the function.

The kernels round activations to 8 bits. A channel much larger than its neighbours costs them precision; dividing it by
a factor, and multiplying the next weight's column by the same, leaves every product what it was (see seams). As in
SmoothQuant (Xiao et al. 2022, arXiv:2211.10438), a channel's factor is max|x|^alpha / max|w|^(1 - alpha). A table that
is looked up too is multiplied in both uses, and the rows that were looked up are divided again.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from gptedge.quantize.passes import Target
from gptedge.quantize.seams import Rescaling, Seam, balanced, find_seams
from gptedge.quantize.walk import Read, Walk

FloatArray = npt.NDArray[np.float32]

WINDOWS, WINDOW = 16, 128
"""Calibration text whose largest activations are taken; as many tokens of longer windows, where there are such."""
ALPHA = 0.5
"""How much of a channel's spread goes into the weights: 0 none, 1 all."""
_SMALLEST = 1e-5  # of a channel's spread and its weights: one that is never used keeps a factor


def smoothed(
    model: onnx.ModelProto, read: Read, walk: Walk, targets: Iterable[Target], *, keep_values: bool = False
) -> Rescaling:
    """Reads initializers with all factors multiplied in.

    Measures activations with `walk`, which goes through `model` as it is; then adapts `model`'s lookups. `keep_values`
    leaves attention's values alone, which a KV cache may share with another graph.
    """
    rescaling, targets = Rescaling(model, read), list(targets)
    for seam in find_seams(model, targets, keep_values=keep_values):
        rescaling.add(seam, _factors(seam, rescaling, walk))
    for target in targets:
        if target.lookups and target.weight in rescaling.columns:
            _divide_lookups(model, target, rescaling.columns[target.weight])
    return rescaling


def _factors(seam: Seam, rescaling: Rescaling, walk: Walk) -> FloatArray:
    n = int(seam.channels.max()) + 1
    spread, weight = np.full(n, _SMALLEST, np.float32), np.full(n, _SMALLEST, np.float32)
    largest = np.max([np.abs(x).max(0) for x in walk.inputs_of(seam.product)], axis=0)
    np.maximum.at(spread, seam.channels, largest)
    np.maximum.at(weight, seam.channels, np.abs(rescaling.matrix(seam.target.weight)).max(0))
    return balanced(spread, weight, ALPHA)


def _divide_lookups(model: onnx.ModelProto, target: Target, factors: FloatArray) -> None:
    """Rows of a table whose columns were multiplied are divided after they were looked up."""
    name = f"{target.weight}.smoothing"
    model.graph.initializer.append(onnx.numpy_helper.from_array(factors, name))
    nodes = list(model.graph.node)
    for lookup in target.lookups:
        index = next(i for i, node in enumerate(nodes) if node.name == lookup)
        value = nodes[index].output[0]
        nodes[index].output[0] = f"{value}.multiplied"
        divide = helper.make_node("Div", [nodes[index].output[0], name], [value], name=f"{lookup}.divided")
        nodes.insert(index + 1, divide)
    del model.graph.node[:]
    model.graph.node.extend(nodes)

"""Quantizing one weight after the other on what reaches it, the weights before it being quantized already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from gptedge.errors import DataError
from gptedge.quantize.gptq import quantize_calibrated, round_whole_rows
from gptedge.quantize.integer_products import Columns
from gptedge.quantize.passes import Target, arrays_of, constants, replacements
from gptedge.quantize.rounding import Blocks, dequantize
from gptedge.quantize.walk import Read, Walk

FloatArray = npt.NDArray[np.float32]

TABLE_WINDOWS = 8
"""Of the text, for a table that is the head, too; they are run through the whole float model once more."""


class Calibrator:
    """Two walks side by side: through the float graph, and through the graph as quantized so far."""

    def __init__(
        self,
        model: onnx.ModelProto,
        read: Read,
        windows: npt.NDArray[np.int64],
        *,
        token_weights: Mapping[str, FloatArray],
        threads: int,
        pool: Executor,
    ) -> None:
        """`windows` are token ids [n_windows, T]; `read` gives an initializer's values.

        `token_weights` [n_windows, T] say, by name of a product's node, how much each token counts there; where there
        are none, all count alike but the first of a window (see recipes.Group).
        """
        self._walk = partial(Walk, model, read, threads=threads)
        self._float, self._quantized = self._walk(windows), self._walk(windows)
        self._for_tables = windows[:TABLE_WINDOWS]
        self._nodes = {node.name: node for node in model.graph.node}
        self._token_weights = token_weights
        self._shape = windows.shape
        self._pool = pool
        self.output_errors: dict[str, float] = {}
        """By weight: what rounding it changes of its product's outputs on the text, ||X (W - Q)'|| / ||X W'||."""

    def quantize(self, target: Target, rows: npt.NDArray[Any], step: float | None = None) -> Blocks | Columns:
        """Quantize `rows` [N, K]; `step` is that of whole rows' activations. Raises DataError when activations that
        reach it are not finite."""
        node = next(name for name in self._nodes if name in target.products)
        weights = weights_of(target, self._shape, self._token_weights.get(node))
        inputs, expected = self._inputs(node, target)
        h, cross = _moments(inputs, expected, weights)
        if not (np.isfinite(h).all() and np.isfinite(cross).all()):
            raise DataError(f"the activations that reach {node} are not finite on the calibration text")
        weight = np.asarray(rows, np.float32)
        made: Blocks | Columns
        if target.scheme.whole_rows:
            made = Columns.of_integers(*round_whole_rows(weight, h, target.scheme), step)
            rounded = made.dequantized()
        else:
            made = quantize_calibrated(weight, h, cross, target.scheme, self._pool)
            rounded = dequantize(made, target.scheme, target.width)
        of_all = max(_energy(weight, h), 1e-30)
        self.output_errors[target.weight] = round(float(np.sqrt(_energy(weight - rounded, h) / of_all)), 6)
        return made

    def _inputs(self, node: str, target: Target) -> tuple[list[FloatArray], list[FloatArray]]:
        """Of a product, as the quantized model gives them, and the float model.

        Those of the float model alone for a table that is looked up, which comes before all else; and for whole rows:
        what the rounding of activations adds to their inputs is noise, which a weight that makes up for it learns.
        """
        if target.lookups:
            inputs = self._walk(self._for_tables).inputs_of(node)
        elif target.scheme.whole_rows:
            inputs = self._float.inputs_of(node)
        else:
            return self._quantized.inputs_of(node), self._float.inputs_of(node)
        return inputs, inputs

    def put_in_place(self, target: Target, blocks: Blocks | Columns) -> None:
        """Later activations come through the quantized weight."""
        arrays = arrays_of(target, blocks)
        made = {role: onnx.numpy_helper.from_array(a, f"{target.weight}.{role}") for role, a in arrays.items()}
        initializers: Iterable[TensorProto] = [*made.values(), *constants([target])]
        for node, nodes in replacements(target, {role: t.name for role, t in made.items()}, self._nodes).items():
            self._quantized.replace(node, nodes, initializers)


def _moments(
    inputs: Sequence[FloatArray], expected: Sequence[FloatArray], weights: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """X'X and (X0 - X)'X of the inputs X and those of the float model X0, tokens weighed, [width, width].

    The second is zero, without being computed, where `expected` is `inputs`.
    """
    width = inputs[0].shape[-1]
    h, cross = np.zeros((width, width), np.float32), np.zeros((width, width), np.float32)
    at = 0
    for x, x0 in zip(inputs, expected, strict=True):
        root = np.sqrt(weights[at : at + len(x)])
        weighed, at = x * root, at + len(x)
        h += weighed.T @ weighed
        if x0 is not x:
            cross += (x0 * root - weighed).T @ weighed
    return h, cross


def weights_of(target: Target, shape: tuple[int, ...], token_weights: FloatArray | None = None) -> FloatArray:
    """How much each token of windows [n_windows, T] counts for a weight, [tokens, 1]."""
    weights = np.ones(shape, np.float32) if token_weights is None else token_weights[: shape[0]].copy()
    weights[:, 0] *= target.group.first_token
    return weights.reshape(-1, 1)


def _energy(weight: FloatArray, h: FloatArray) -> float:
    """||X W'||^2 for h = X'X."""
    return float(np.vdot(weight @ h, weight))

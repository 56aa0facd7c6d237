"""Evening out columns: the function stays, and what is rounded does not depend on how columns were scaled before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from gptedge.onnx_file import load_graph, read_initializer
from gptedge.quantize.equalize import equalize
from gptedge.quantize.passes import Target, find_targets
from gptedge.quantize.recipes import RECIPES
from gptedge.quantize.rounding import dequantize, quantize_rows
from gptedge.quantize.seams import Rescaling, Seam, find_seams
from gptedge.quantize.walk import Read
from tests.conftest import tiny_config
from tests.quantize.test_smooth import VARIANTS, logits, make

RECIPE = RECIPES["int4-rtn"]


def parts(model: onnx.ModelProto) -> tuple[list[Target], list[Target]]:
    """All targets, and those whose columns are evened out."""
    targets = find_targets(model, RECIPE)
    return targets, [t for t in targets if not t.lookups and t.group.equalize]


def directions(matrix: np.ndarray) -> np.ndarray:
    """Rows brought to one length, for a row's scales follow its size."""
    rows: np.ndarray = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return rows


def follows_norm(seam: Seam) -> bool:
    return all("norm" in name for name, _ in seam.givers)


def scaled(model: onnx.ModelProto, read: Read, targets: list[Target]) -> Read:
    """The same function with the norms' gains and the columns after them scaled at random."""
    rng, rescaling = np.random.default_rng(7), Rescaling(model, read)
    for seam in filter(follows_norm, find_seams(model, targets)):
        rescaling.add(seam, np.exp(rng.uniform(-0.7, 0.7, int(seam.channels.max()) + 1)).astype(np.float32))
    return rescaling.read


@pytest.mark.parametrize("name", VARIANTS)
def test_the_function_stays_and_earlier_scales_are_undone(name: str, tmp_path: Path) -> None:
    model, read = make(tiny_config(333, **VARIANTS[name][0]), tmp_path)
    ids = np.random.default_rng(1).integers(0, 333, (4, 40))
    targets, chosen = parts(model)
    other = scaled(model, read, chosen)
    made, again = (equalize(model, r, targets, chosen=chosen) for r in (read, other))
    before, after = logits(model, read, ids), logits(model, made.rescaling.read, ids)
    np.testing.assert_allclose(after, before, atol=2e-4 * before.std())
    tensors = {t.name: t for t in model.graph.initializer}
    for seam in find_seams(model, chosen):
        weight = seam.target.weight
        even, also = (directions(m.rescaling.matrix(weight)) for m in (made, again))
        np.testing.assert_allclose(also, even, rtol=2e-3, atol=2e-3 * np.abs(even).mean())
        first, second = (m.importance[weight] / m.importance[weight].mean() for m in (made, again))
        np.testing.assert_allclose(second, first, rtol=5e-3)
        if follows_norm(seam):
            assert not np.allclose(other(tensors[weight]), read(tensors[weight]), rtol=0.05)


def test_it_rounds_scaled_columns_better(tmp_path: Path) -> None:
    """By the product's outputs for inputs as the norm's gain makes them."""
    model, read = make(tiny_config(333), tmp_path)
    targets, chosen = parts(model)
    target = next(t for t in chosen if t.weight == "blocks.1.mlp.gate_up.weight")
    tensors = {t.name: t for t in model.graph.initializer}
    x = np.random.default_rng(2).standard_normal((500, target.width)).astype(np.float32)

    def error(read: Read, importance: np.ndarray) -> float:
        weight, gain = (np.array(read(tensors[n]), np.float32) for n in (target.weight, "blocks.1.mlp_norm.weight"))
        rounded = dequantize(quantize_rows(weight, target.scheme, importance), target.scheme, target.width)
        return float(np.square((x * gain) @ (weight - rounded).T).sum())

    made = equalize(model, read, targets, chosen=chosen)
    plain = error(read, np.square(np.array(read(tensors["blocks.1.mlp_norm.weight"]))))
    assert error(made.rescaling.read, made.importance[target.weight]) < 0.92 * plain


def test_weights_on_a_grid_keep_their_columns(tiny_bundle: Path) -> None:
    model = load_graph(tiny_bundle / "model.onnx")
    targets, chosen = parts(model)
    grids = {t.weight: t for t in chosen if "down" in t.weight}

    def read(tensor: onnx.TensorProto) -> np.ndarray:
        values = read_initializer(tensor, tiny_bundle)
        target = grids.get(tensor.name)
        if target is None:
            return values
        return dequantize(quantize_rows(np.array(values), target.scheme), target.scheme, target.width)

    made = equalize(model, read, targets, chosen=chosen)
    assert made.rescaling.columns == {}
    assert len(made.importance) == len(chosen)

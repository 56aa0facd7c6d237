"""Smoothing moves factors between weights: the function stays what it was, and activations become more even."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gptedge.config import ModelConfig
from gptedge.export.decoder import build
from gptedge.onnx_file import WeightFile, read_initializer
from gptedge.quantize.passes import find_targets
from gptedge.quantize.recipes import Group, Recipe, Scheme
from gptedge.quantize.seams import find_seams
from gptedge.quantize.smooth import smoothed
from gptedge.quantize.walk import Read, Walk
from gptedge.safetensors import Tensor
from tests.conftest import random_weights, tiny_config

EVERYTHING = Recipe("", (Group("*", Scheme(8, 64, True, 1), smooth=True),))
# Options of the model, and how many of its products have something before them that can be divided.
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "tied": ({}, 3 * 4 + 1),
    "untied": ({"tie_embeddings": False}, 3 * 4 + 1),
    "head norms and biases": ({"qk_norm": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True}, 3 * 4 + 1),
    "layer norms, plain MLP": ({"norm": "layer", "gated": False, "activation": "gelu"}, 3 * 3 + 1),
    "parallel": ({"parallel": True}, 3 * 4 + 1),
    "norms after": ({"pre_norm": False, "post_norm": True}, 3 * 2 + 1),
}


def make(config: ModelConfig, folder: Path, *, half: bool = False) -> tuple[onnx.ModelProto, Read]:
    """A graph with uneven norm gains, and a function that reads its weights."""
    rng = np.random.default_rng(5)
    arrays = {
        name: a * np.exp(rng.uniform(-1.5, 1.5, a.shape)).astype(np.float32) if a.ndim == 1 else a
        for name, a in random_weights(config).items()
    }
    weights = {name: Tensor(a.shape, "F32", lambda a=a: a) for name, a in arrays.items()}
    with WeightFile(folder / "model.onnx.data") as file:
        model = build(config, weights, file, half=half)
    return model, partial(read_initializer, folder=folder)


def logits(model: onnx.ModelProto, read: Read, ids: np.ndarray) -> np.ndarray:
    """By the walk, and so through the very graph and weights that would be quantized."""
    head = next(n for n in model.graph.node if n.name == "head")
    table = next(t for t in model.graph.initializer if t.name == head.input[1].removesuffix(".half"))
    return np.concatenate(Walk(model, read, ids, threads=1).inputs_of("head")) @ read(table).T


@pytest.mark.parametrize("name", VARIANTS)
def test_the_function_stays_and_activations_become_even(name: str, tmp_path: Path) -> None:
    changes, n_seams = VARIANTS[name]
    config = tiny_config(333, **changes)
    model, read = make(config, tmp_path)
    ids = np.random.default_rng(1).integers(0, 333, (6, 40))
    before = logits(model, read, ids)
    targets = find_targets(model, EVERYTHING)
    products = [seam.product for seam in find_seams(model, targets)]
    assert len(products) == n_seams
    uneven = spread(model, read, ids, products)
    smooth_read = smoothed(model, read, Walk(model, read, ids, threads=1), targets).read
    after = logits(model, smooth_read, ids)
    np.testing.assert_allclose(after, before, atol=2e-4 * before.std())
    assert spread(model, smooth_read, ids, products) < 0.8 * uneven


def spread(model: onnx.ModelProto, read: Read, ids: np.ndarray, products: list[str]) -> float:
    """How uneven the largest values of a product's channels are: the mean deviation of their logarithms."""
    walk = Walk(model, read, ids, threads=1)
    largest = [np.max([np.abs(x).max(0) for x in walk.inputs_of(p)], axis=0) for p in products]
    return float(np.mean([np.log(a + 1e-6).std() for a in largest]))


def test_weights_stored_in_half_precision_are_smoothed_too(tmp_path: Path) -> None:
    model, read = make(tiny_config(333, qkv_bias=True), tmp_path, half=True)
    ids = np.random.default_rng(1).integers(0, 333, (2, 40))
    targets = find_targets(model, EVERYTHING)
    assert len(list(find_seams(model, targets))) == 3 * 4 + 1
    smooth_read = smoothed(model, read, Walk(model, read, ids, threads=1), targets).read
    weight = next(t for t in model.graph.initializer if t.name == "blocks.1.mlp.down.weight.half")
    assert smooth_read(weight).dtype == np.float16
    assert not np.array_equal(smooth_read(weight), read(weight))

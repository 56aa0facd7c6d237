"""Rounding to blocks: the bytes are those the kernels read, and searching never loses to taking the range as it is."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gptedge.quantize.recipes import Scheme
from gptedge.quantize.rounding import Blocks, as_blocks, dequantize, pack, quantize_rows, row_units, storable, unpack

SCHEMES = {
    "4-bit": Scheme(bits=4, block_size=32, symmetric=False, steps=6),
    "4-bit block 16": Scheme(bits=4, block_size=16, symmetric=False, steps=1),
    "4-bit symmetric": Scheme(bits=4, block_size=32, symmetric=True, steps=6),
    "8-bit": Scheme(bits=8, block_size=64, symmetric=True, steps=1),
    "8-bit asymmetric": Scheme(bits=8, block_size=32, symmetric=False, steps=1),
}


def matrix(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def product(x: np.ndarray, blocks: Blocks, scheme: Scheme, width: int) -> np.ndarray:
    """x @ W.T by onnxruntime's kernel, at full precision of the activations."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    arrays = {"packed": blocks.packed, "scales": blocks.float_scales()}
    if blocks.zero_points is not None:
        arrays["zero_points"] = blocks.zero_points
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=width, N=len(blocks.packed),
        bits=scheme.bits, block_size=scheme.block_size, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("width", [64, 96, 100, 31])
def test_kernel_reads_what_was_packed(name: str, width: int) -> None:
    scheme = SCHEMES[name]
    blocks = quantize_rows(matrix(24, width), scheme)
    x = matrix(3, width, seed=1)
    expected = x @ dequantize(blocks, scheme, width).T
    np.testing.assert_allclose(product(x, blocks, scheme, width), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", SCHEMES)
def test_error_is_within_half_a_step(name: str) -> None:
    scheme = SCHEMES[name]
    w = matrix(16, 128)
    plain = Scheme(bits=scheme.bits, block_size=scheme.block_size, symmetric=scheme.symmetric, steps=1)
    blocks = quantize_rows(w, plain)
    step = np.repeat(blocks.float_scales(), scheme.block_size, 1)
    # The zero point is an integer and the scale has few digits, so the ends of the range may lie up to a step outside.
    assert np.all(np.abs(dequantize(blocks, plain, 128) - w) <= step * 1.01)
    assert np.mean(np.abs(dequantize(blocks, plain, 128) - w) <= step * 0.51) > 0.95


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_helps_in_every_block(symmetric: bool) -> None:
    w = matrix(64, 256)

    def error(steps: int) -> np.ndarray:
        scheme = Scheme(bits=4, block_size=32, symmetric=symmetric, steps=steps)
        return ((dequantize(quantize_rows(w, scheme), scheme, 256) - w) ** 2).reshape(-1, 32).sum(1)

    assert np.all(error(12) <= error(1) * (1 + 1e-5))
    assert error(12).mean() < 0.95 * error(1).mean()


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    w = matrix(128, 128)
    importance = np.where(np.arange(128) % 2, 25.0, 0.04).astype(np.float32)
    scheme = SCHEMES["4-bit"]
    plain = (dequantize(quantize_rows(w, scheme), scheme, 128) - w) ** 2
    weighted = (dequantize(quantize_rows(w, scheme, importance), scheme, 128) - w) ** 2
    assert (weighted * importance).sum() < (plain * importance).sum()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("width", [64, 100])
def test_weights_on_a_grid_stay_on_it(name: str, width: int) -> None:
    scheme, rng = SCHEMES[name], np.random.default_rng(3)
    first = quantize_rows(matrix(64, width), scheme)
    narrow = rng.integers(5, 9, first.packed.shape) if scheme.bits == 8 else 17 * rng.integers(5, 9, first.packed.shape)
    for blocks in (first, dataclasses.replace(first, packed=narrow.astype(np.uint8))):
        values = dequantize(blocks, scheme, width)
        importance = rng.uniform(0.1, 10, width).astype(np.float32)
        again = dequantize(quantize_rows(values, scheme, importance), scheme, width)
        np.testing.assert_array_equal(again, values)


def test_scales_beside_4_bits_are_a_byte_each() -> None:
    scale = np.exp2(np.random.default_rng(0).uniform(-1, 0, (64, 20)) - np.arange(64)[:, None] % 13).astype(np.float32)
    scheme = SCHEMES["4-bit"]
    stored = storable(scale, scheme)
    np.testing.assert_allclose(stored, scale, rtol=0.5 / 64)  # parts from 64 on, where all are within a factor of two
    np.testing.assert_array_equal(storable(stored, scheme), stored)
    blocks = as_blocks(np.zeros((64, 20 * scheme.block_size), np.float32), stored, np.full_like(stored, 8), scheme)
    np.testing.assert_array_equal(blocks.float_scales(), stored)
    assert blocks.units is not None
    assert (blocks.scales.nbytes, blocks.units.nbytes) == (64 * 20, 64 * 2)
    assert set(np.frexp(blocks.units)[0].ravel()) == {0.5}, "products with powers of two are exact"


@pytest.mark.parametrize("largest", [255.0, 254.9, 256.0, 2**-20, 1e-9, 0.0])
def test_the_largest_scale_fits_its_unit(largest: float) -> None:
    scale = np.array([[largest, largest / 300, 0]], np.float32)
    units = row_units(scale)
    parts = np.rint(scale / units)
    assert parts.max() <= 255
    assert parts[0, 0] >= 127 or units[0, 0] == 2**-24 or largest == 0
    assert (storable(scale, SCHEMES["4-bit"]) > 0).all()


@pytest.mark.parametrize("value", [0.0, 1e-8, -3.0, 6e4])
def test_blocks_of_one_value(value: float) -> None:
    for scheme in SCHEMES.values():
        w = np.full((2, 64), value, np.float32)
        got = dequantize(quantize_rows(w, scheme), scheme, 64)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, w, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 32), (5, 7), (1, 1)])
def test_packing_round_trip(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, 4), 4)[..., : shape[-1]], values)
    first = np.array([[3, 10]], np.uint8)
    assert pack(first, 4)[0, 0] == 3 + 16 * 10  # the first value takes the low half


def test_small_weights_keep_their_bits() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32) * np.float32(1e-4)
    scheme = Scheme(8, 64, True, 1)
    left = dequantize(quantize_rows(weight, scheme), scheme, 64) - weight
    assert np.linalg.norm(left) < 0.01 * np.linalg.norm(weight)

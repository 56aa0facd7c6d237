"""Calibrated rounding: each step lowers the error of the product's outputs, on inputs whose columns go together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gptedge.quantize import gptq
from gptedge.quantize.integer_products import Columns
from gptedge.quantize.recipes import WHOLE_ROWS, Scheme
from gptedge.quantize.rounding import dequantize, quantize_rows, search_scales

SCHEMES = [Scheme(4, 32, False, 6), Scheme(4, 16, True, 6), Scheme(8, 64, True, 1)]
N, K = 24, 150  # no block divides 150


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((900, 20)) @ rng.standard_normal((20, K)) + 0.3 * rng.standard_normal((900, K))).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)


def output_error(weight: np.ndarray, rounded: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (weight - rounded).T).sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_calibrated_rounding_beats_nearest(weight: np.ndarray, inputs: np.ndarray, scheme: Scheme) -> None:
    none = np.zeros((K, K), np.float32)
    with ThreadPoolExecutor(2) as pool:
        blocks = gptq.quantize_calibrated(weight, inputs.T @ inputs, none, scheme, pool)
    calibrated = output_error(weight, dequantize(blocks, scheme, K), inputs)
    nearest = output_error(weight, dequantize(quantize_rows(weight, scheme), scheme, K), inputs)
    assert calibrated < 0.5 * nearest


def test_whole_rows_beat_nearest_too(weight: np.ndarray, inputs: np.ndarray) -> None:
    scheme = Scheme(8, WHOLE_ROWS, True, 1)
    integers, scales = gptq.round_whole_rows(weight, inputs.T @ inputs, scheme)
    np.testing.assert_array_equal(integers, np.clip(np.rint(integers), -128, 127))
    nearest = Columns.of(weight).dequantized()
    assert output_error(weight, integers * scales[:, None], inputs) < 0.5 * output_error(weight, nearest, inputs)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_step_lowers_the_error(weight: np.ndarray, inputs: np.ndarray, scheme: Scheme) -> None:
    h = gptq.damped(inputs.T @ inputs)
    with ThreadPoolExecutor(2) as pool:
        scale, zero = search_scales(weight, scheme, np.ones(K, np.float32), pool)

    def error(integers: np.ndarray, scale: np.ndarray) -> float:
        """tr((W - Q) H (W - Q)'), what each step is to lower."""
        zeros, scales = (np.repeat(a, scheme.block_size, 1)[:, :K] for a in (zero, scale))
        difference = weight - (integers - zeros) * scales
        return float(((difference @ h) * difference).sum())

    rounded = gptq.round_columns(weight, gptq.Order.of(h), scale, zero, scheme)
    descended = gptq.descend(weight, h, rounded, scale, zero, scheme)
    fitted = gptq.fit_scales(weight, h, descended, scale, zero, scheme)
    errors = [error(rounded, scale), error(descended, scale), error(descended, fitted)]
    assert errors[0] > errors[1] > errors[2]
    assert descended.min() >= 0
    assert descended.max() <= 2**scheme.bits - 1
    np.testing.assert_array_equal(descended, np.rint(descended))


def test_columns_that_have_nothing_in_common_are_rounded_to_nearest(weight: np.ndarray) -> None:
    scheme, h = SCHEMES[0], np.eye(K, dtype=np.float32)
    with ThreadPoolExecutor(2) as pool:
        scale, zero = search_scales(weight, scheme, np.ones(K, np.float32), pool)
    integers = gptq.round_columns(weight, gptq.Order.of(h), scale, zero, scheme)
    wide = (np.repeat(a, scheme.block_size, 1)[:, :K] for a in (scale, zero))
    scales, zeros = wide
    np.testing.assert_array_equal(integers, np.clip(np.rint(weight / scales) + zeros, 0, 15))
    np.testing.assert_array_equal(gptq.descend(weight, h, integers, scale, zero, scheme), integers)


def test_errors_made_before_are_made_up_for(weight: np.ndarray, inputs: np.ndarray) -> None:
    changed = inputs * 0.9 + 0.05 * np.roll(inputs, 1, axis=1)  # as if earlier products had been rounded badly
    h, cross = gptq.damped(changed.T @ changed), (inputs - changed).T @ changed
    better = gptq.compensated(weight, h, cross)
    wanted = inputs @ weight.T
    before, after = (float(np.square(changed @ w.T - wanted).sum()) for w in (weight, better))
    assert after < 0.5 * before


def test_columns_that_are_never_used_do_no_harm(weight: np.ndarray, inputs: np.ndarray) -> None:
    scheme, unused = SCHEMES[0], inputs * (np.arange(K) % 3 > 0)
    with ThreadPoolExecutor(2) as pool:
        blocks = gptq.quantize_calibrated(weight, unused.T @ unused, np.zeros((K, K), np.float32), scheme, pool)
    assert np.abs(dequantize(blocks, scheme, K) - weight).max() < 1.5

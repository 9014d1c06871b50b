"""The vector instructions and functions that the kernels are made of, one by one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from numbaflash.cpu import emit, functions, micro, vector
from numbaflash.cpu.emit import LANES
from numbaflash.cpu.rows import narrow_row, widen_row

EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def over(function: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply a function of one vector to all elements."""

    @njit
    def loop(source, target, count):
        for at in range(0, 4 * count, 4 * LANES):
            vector.store(target + at, function(vector.load(source + at)))

    padded = np.zeros(-(-len(x) // LANES) * LANES, np.float32)
    padded[: len(x)] = x
    result = np.empty_like(padded)
    loop(padded.ctypes.data, result.ctypes.data, len(padded))
    return result[: len(x)]


@njit
def widen(target, source, dim, dtype):
    widen_row(target, source, dim, dtype)


@njit
def narrow(target, source, dim, dtype):
    narrow_row(target, source, dim, dtype, np.float32(1))


@njit
def score(dtype, rows, k, k_row, count, q, q_row, steps, scores, scores_row):
    micro.score_keys(dtype, rows, k, k_row, count, 0, q, q_row, steps, scores, scores_row)


@njit
def transpose(source, source_row, target, target_row):
    micro.transpose_block(source, source_row, target, target_row)


def units_in_the_last_place(got: NDArray[np.float32], exact: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)))


def test_exp2_is_within_two_ulp() -> None:
    x = np.random.default_rng(0).uniform(-100, 127, 1_000_000).astype(np.float32)
    assert units_in_the_last_place(over(functions.exp2, x), np.exp2(x.astype(np.float64))) < 2.2


def test_exp2_at_its_corners() -> None:
    x = np.float32([0, -0.0, 1, 127, -100, -100.5, -126, -1e30, -np.inf])
    np.testing.assert_array_equal(over(functions.exp2, x), np.float32([1, 1, 2, 2.0**127, 2.0**-100, 0, 0, 0, 0]))
    assert np.isnan(over(functions.exp2, np.float32([np.nan]))).all()


def test_tanh_is_within_three_ulp() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        (rng.uniform(-12, 12, 500_000), rng.uniform(-0.7, 0.7, 500_000), 10 ** rng.uniform(-30, 0, 1000))
    )
    x = x.astype(np.float32)
    assert units_in_the_last_place(over(functions.tanh, x), np.tanh(x.astype(np.float64))) < 3


def test_tanh_at_its_corners() -> None:
    x = np.float32([0, 100, -100, np.inf, -np.inf])
    np.testing.assert_array_equal(over(functions.tanh, x), np.float32([0, 1, -1, 1, -1]))
    assert np.isnan(over(functions.tanh, np.float32([np.nan]))).all()


@pytest.mark.parametrize(("dtype", "code"), [(np.float16, emit.FLOAT16), (ml_dtypes.bfloat16, emit.BFLOAT16)])
@pytest.mark.parametrize("dim", [1 << 16, 7])
def test_widening_is_exact(dtype: Any, code: int, dim: int) -> None:
    stored = EVERY_16_BITS[-dim:].view(dtype)
    wide = np.empty(dim + LANES, np.float32)
    widen(wide.ctypes.data, stored.ctypes.data, dim, code)
    np.testing.assert_array_equal(wide[:dim], stored.astype(np.float32))


@pytest.mark.parametrize(("dtype", "code"), [(np.float16, emit.FLOAT16), (ml_dtypes.bfloat16, emit.BFLOAT16)])
@pytest.mark.parametrize("dim", [400_000, 7])
def test_narrowing_rounds_to_nearest_even(dtype: Any, code: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):  # NaNs with a payload, and numbers that overflow
        exact = EVERY_16_BITS.view(dtype).astype(np.float32)
        exact = exact[np.isfinite(exact)]
        ties = ((exact[:-1].astype(np.float64) + exact[1:]) / 2).astype(np.float32)
        anything = rng.integers(0, 1 << 32, 300_000, np.uint32).view(np.float32)
        corners = np.float32([np.inf, -np.inf, np.nan, 65504, 65519, 65520, 1e-8, -1e-8])
        values = np.concatenate((exact, ties, anything, corners))[-dim:]
        expected = values.astype(dtype)
    rounded = np.empty(len(values) + LANES, dtype)
    narrow(rounded.ctypes.data, values.ctypes.data, len(values), code)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(rounded[: len(values)].astype(np.float32), expected.astype(np.float32))


def test_a_block_is_transposed() -> None:
    source = np.arange(LANES * LANES, dtype=np.float32).reshape(LANES, LANES)
    target = np.zeros((LANES, LANES + 3), np.float32)
    transpose(source.ctypes.data, 4 * LANES, target.ctypes.data, target.strides[0])
    np.testing.assert_array_equal(target[:, :LANES], source.T)
    np.testing.assert_array_equal(target[:, LANES:], 0)


@pytest.mark.parametrize("count", [1, 3, LANES, 50])
@pytest.mark.parametrize("rows", [1, 2, micro.ROWS_TOGETHER])
def test_decode_scores_are_inner_products(rows: int, count: int) -> None:
    rng = np.random.default_rng(0)
    steps = 2
    q = rng.standard_normal((rows, steps * LANES)).astype(np.float32)
    k = rng.standard_normal((count, steps * LANES)).astype(np.float32)
    scores = np.zeros((rows, count + LANES), np.float32)
    score(
        *(emit.FLOAT32, rows, k.ctypes.data, k.strides[0], count),
        *(q.ctypes.data, q.strides[0], steps, scores.ctypes.data, scores.strides[0]),
    )
    np.testing.assert_allclose(scores[:, :count], q.astype(np.float64) @ k.T, atol=1e-5)

"""Biases of any dtype, shape and place in memory, and what one row's must not do to another's."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from numbaflash import cpu, problem, reference

from .inputs import BFLOAT16, FLOAT16, FLOAT32, ROUNDING, assert_solves, normal, qkv, solve

BOOL = np.dtype(np.bool_)
ALGORITHMS = ("standard", "v1", "v2")


def bias_of(dtype: np.dtype[Any], *shape: int) -> NDArray[Any]:
    """Numbers of which every fifth or so forbids its key."""
    values = normal(11, *shape)
    if dtype == BOOL:
        return values > -0.8
    return np.where(values > -0.8, values, -np.inf).astype(dtype)


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "keys reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "every other key": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "rows side by side": lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "heads side by side": lambda x: x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
    "a part of more": lambda x: np.pad(x, ((0, 0), (0, 0), (0, 1), (3, 2)))[:, :, : x.shape[2], 3:-2],
}


@settings(max_examples=100)
@given(data=st.data())
def test_any_bias_means_what_the_oracle_says(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([FLOAT32, FLOAT16, BFLOAT16]))
    bias_dtype = draw(st.sampled_from([FLOAT32, dtype, BOOL]))
    group, kv_heads = draw(st.sampled_from([1, 3, 4])), draw(st.integers(1, 2))
    q_tokens, kv_tokens = draw(st.sampled_from([1, 5, 9, 40, 60])), draw(st.integers(1, 300))
    q, k, v = qkv(2, q_tokens, kv_tokens, (group * kv_heads, kv_heads), (16, 8), dtype)
    whole = (2, group * kv_heads, q_tokens, kv_tokens)
    bias = bias_of(bias_dtype, *(draw(st.sampled_from([1, size])) for size in whole))
    bias = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](bias)
    described = problem.describe(q, k, v, bias=bias, causal=draw(st.booleans()))
    assert_solves(described, q, k, v, draw(st.sampled_from(ALGORITHMS)))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16, BOOL], ids=str)
def test_a_row_has_the_same_bits_whichever_rows_stand_beside_it(dtype: np.dtype[Any]) -> None:
    q, k, v = qkv(1, 60, 150, (6, 2), (32, 16), dtype if dtype != BOOL else FLOAT32)
    bias = bias_of(dtype, 1, 6, 60, 150)
    whole, whole_lse = solve(q, k, v, bias=bias)
    for rows in (slice(0, 10), slice(10, 27), slice(27, 60)):
        out, lse = solve(q[:, rows], k, v, bias=bias[:, :, rows])
        np.testing.assert_array_equal(out, whole[:, rows])
        np.testing.assert_array_equal(lse, whole_lse[:, :, rows])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [FLOAT32, BOOL], ids=str)
@pytest.mark.parametrize("q_tokens", [4, 60])
def test_a_poisoned_key_reaches_only_rows_whose_bias_allows_it(
    q_tokens: int, dtype: np.dtype[Any], algorithm: str
) -> None:
    q, k, v = qkv(1, q_tokens, 150, (4, 2), (32, 40))
    bias = bias_of(dtype, 1, 4, q_tokens, 150)
    described = problem.describe(q, k, v, bias=bias)
    clean, clean_lse = cpu.attention(described, q, k, v, algorithm)
    k[0, 77] = v[0, 77] = np.nan
    out, lse = cpu.attention(described, q, k, v, algorithm)
    allowed = bias[0, :, :, 77] if dtype == BOOL else bias[0, :, :, 77] != -np.inf
    np.testing.assert_array_equal(lse, np.where(allowed, np.nan, clean_lse[0])[None])
    np.testing.assert_array_equal(out, np.where(allowed.T[None, :, :, None], np.nan, clean))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("q_tokens", [4, 60])
def test_a_poisoned_bias_spoils_its_row_alone(q_tokens: int, poison: float, algorithm: str) -> None:
    q, k, v = qkv(1, q_tokens, 150, (4, 2), (32, 40))
    bias = bias_of(FLOAT32, 1, 4, q_tokens, 150)
    clean, _ = cpu.attention(problem.describe(q, k, v, bias=bias), q, k, v, algorithm)
    bias[0, 1, 2, 77] = poison
    out, _ = cpu.attention(problem.describe(q, k, v, bias=bias), q, k, v, algorithm)
    assert np.isnan(out[0, 2, 1]).all()
    out[0, 2, 1] = clean[0, 2, 1]
    np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("q_tokens", [2, 30])
def test_the_lowest_finite_bias_forbids_no_key(q_tokens: int, dtype: np.dtype[Any], algorithm: str) -> None:
    q, k, v = qkv(1, q_tokens, 200, (2, 1), (16, 24), dtype)
    bias = np.zeros((1, 1, q_tokens, 200), dtype)
    bias[..., 0, :] = bias[..., 1, 5:] = ml_dtypes.finfo(dtype).min
    described = problem.describe(q, k, v, bias=bias)
    out, lse = cpu.attention(described, q, k, v, algorithm)
    expected, _ = reference.attention(described, q, k, v)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=1.1 * ROUNDING[dtype], atol=4e-6)
    assert (lse[..., 0] < -2e38).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16, BOOL], ids=str)
@pytest.mark.parametrize("q_tokens", [3, 20])
def test_nothing_behind_the_bias_is_read(q_tokens: int, dtype: np.dtype[Any]) -> None:
    q, k, v = qkv(1, q_tokens, 150, (4, 2), (16, 16), FLOAT32 if dtype == BOOL else dtype)
    bias = bias_of(dtype, 1, 4, q_tokens, 150)
    pages = -(-bias.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    nothing_allowed = 0
    libc = ctypes.CDLL(None, use_errno=True)
    end = pages * mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(start + end), ctypes.c_size_t(mmap.PAGESIZE), nothing_allowed) == 0
    at_the_end = np.frombuffer(memory, dtype, bias.size, end - bias.nbytes).reshape(bias.shape)
    at_the_end[:] = bias
    np.testing.assert_array_equal(solve(q, k, v, bias=at_the_end)[0], solve(q, k, v, bias=bias)[0])

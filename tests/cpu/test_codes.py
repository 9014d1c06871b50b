"""Decode from codes in integers: where sums are largest, where numbers are far apart, and where they are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDING, expected_of_cache, random_tokens
from quantized_oracle import expected_of_quantized

import numbaflash
from numbaflash import GroupQuantizer

PAGE = 256


def assert_close(got, want, more=0.0):
    tolerance = ROUNDING[got.dtype.name]
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2 * tolerance, atol=max(2e-5, tolerance) + more)


def decoded(cache, q, k, v, dtype):
    """The last token's row, all others in the cache; and what it must be."""
    q = q.astype(dtype)
    cache.append(0, k[:-1], v[:-1])
    return cache.step(0, *(x[-1:].astype(dtype) for x in (q, k, v))), expected_of_quantized(
        cache, q.astype(np.float32), k, v
    )[-1:]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_the_largest_head_and_page_do_not_overflow(bits, keys, dtype, sign):
    """All codes but one token's are the largest, so are all words of the query, and all of the weights."""
    quantizer = GroupQuantizer(symmetric=True, keys=keys)
    cache = numbaflash.RingKVCache(1, 1, 256, capacity=300, dtype=bits, quantizer=quantizer, page_size=PAGE)
    k, v = (np.full((PAGE + 1, 1, 256), 0.25, np.float32) for _ in range(2))
    q = np.full((PAGE + 1, 4, 256), sign / 16, np.float32)

    out, want = decoded(cache, q, k, v, dtype)

    assert_close(out, want)


@given(
    st.sampled_from(["int8", "int4"]),
    st.sampled_from(["group", "group:keys=token", "hqq"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(-14, 4),
    st.integers(0, 10),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100)
def test_what_integers_round_is_nothing_beside_what_codes_do(bits, quantizer, dtype, exponent, spread, tokens, seed):
    """Channels of keys differ by factors up to 2^20, and those of queries by their inverses, so that each counts."""
    rng = np.random.default_rng(seed)
    scales = np.exp2(np.clip(exponent + spread * rng.standard_normal((1, 1, 64)), -14, 6)).astype(np.float32)
    cache = numbaflash.RingKVCache(1, 1, 64, capacity=60, dtype=bits, quantizer=quantizer, page_size=8)
    q, k, v = (random_tokens(rng, tokens, heads, 64) for heads in (4, 1, 1))
    q /= scales
    q /= np.maximum(np.abs(q).max(), 1) / 8  # within float16
    q, k, v = (x.astype(dtype).astype(np.float32) for x in (q, k * scales, v))

    out, want = decoded(cache, q, k, v, dtype)

    codes_error = np.abs(want - expected_of_cache(q, k, v, capacity=60)[-1:]).max()
    assert_close(out, want, codes_error / (1000 if dtype == "float32" else 10))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("quantizer", ["group", "group:symmetric", "group:keys=token", "group:symmetric,keys=token"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_a_query_stays_in_its_own_row(quantizer, bad, dtype):
    rng = np.random.default_rng(0)
    cache = numbaflash.RingKVCache(1, 2, 32, capacity=90, dtype="int8", quantizer=quantizer, page_size=8)
    cache.append(0, *(random_tokens(rng, 60, 2, 32) for _ in range(2)))
    q = random_tokens(rng, 3, 8, 32).astype(dtype)
    clean = cache.attend(0, q)
    q[1, 2, 5] = bad

    out = cache.attend(0, q)

    assert not np.isfinite(out[1, 2]).any()
    out[1, 2] = clean[1, 2]
    np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-38, 1e-30])
def test_a_query_of_almost_nothing_gives_the_mean(factor, dtype):
    rng = np.random.default_rng(0)
    cache = numbaflash.RingKVCache(1, 1, 32, capacity=90, dtype="int8", page_size=8)
    q, k, v = (random_tokens(rng, 41, 1, 32) for _ in range(3))

    out, want = decoded(cache, q * np.float32(factor), k, v, dtype)

    assert_close(out, want)

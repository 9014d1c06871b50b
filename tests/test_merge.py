"""Merging attention over disjoint sets of keys gives attention over their union."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, expected, random_tokens

import numbaflash

B, SQ, HQ, HKV, D = 2, 3, 4, 2, 8


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_two_parts_merge_into_the_whole(left, right, dtype):
    rng = np.random.default_rng(left)
    q = random_tokens(rng, B, SQ, HQ, D, dtype=dtype)
    k, v = (random_tokens(rng, B, left + right, HKV, D, dtype=dtype) for _ in range(2))
    parts = [
        numbaflash.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, left), slice(left, None))
    ]

    out, lse = numbaflash.merge(*parts[0], *parts[1])

    want, want_lse = expected(q, k, v)
    assert out.dtype == np.dtype(dtype)
    np.testing.assert_allclose(
        out.astype(np.float64), want, atol=4 * {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    )
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_merging_with_nothing_changes_nothing():
    rng = np.random.default_rng(0)
    out = random_tokens(rng, B, SQ, HQ, D)
    lse = random_tokens(rng, B, HQ, SQ)
    nothing, no_lse = np.zeros_like(out), np.full_like(lse, -np.inf)
    for merged, merged_lse in (
        numbaflash.merge(out, lse, nothing, no_lse),
        numbaflash.merge(nothing, no_lse, out, lse),
    ):
        np.testing.assert_array_equal(merged, out)
        np.testing.assert_array_equal(merged_lse, lse)


def test_nothing_merged_with_nothing_is_nothing():
    nothing, no_lse = np.zeros((B, SQ, HQ, D), np.float32), np.full((B, HQ, SQ), -np.inf, np.float32)
    out, lse = numbaflash.merge(nothing, no_lse, nothing, no_lse)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_scores_that_overflow_an_exponential_merge_all_the_same():
    out = np.ones((1, 1, 1, 2), np.float32)
    merged, lse = numbaflash.merge(out, np.float32([[[900.0]]]), 3 * out, np.float32([[[900.0]]]))
    assert_close(merged, 2 * out)
    np.testing.assert_allclose(lse, 900 + np.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out_a": np.zeros((3, 4, 8), np.float32)}, ValueError, "out_a must have 4 axes"),
        ({"out_b": np.zeros((2, 3, 4, 7), np.float32)}, ValueError, r"out_b must have out_a's shape \(2, 3, 4, 8\)"),
        (
            {"out_b": np.zeros((2, 3, 4, 8), np.float16)},
            TypeError,
            "out_b must have out_a's dtype float32, got float16",
        ),
        ({"lse_a": np.zeros((2, 3, 4), np.float32)}, ValueError, r"lse_a must have shape \(2, 4, 3\), got \(2, 3, 4\)"),
        ({"lse_b": np.zeros((2, 4, 3))}, TypeError, "lse_b must be float32, got float64"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(changes, error, message):
    out, lse = np.zeros((B, SQ, HQ, D), np.float32), np.zeros((B, HQ, SQ), np.float32)
    with pytest.raises(error, match=message):
        numbaflash.merge(**{"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | changes)

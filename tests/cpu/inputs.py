"""Inputs and comparisons that the tests of the CPU backend share."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from numbaflash import cpu, problem, reference
from numbaflash.problem import AttentionProblem

FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
# Half the distance of 1 to the next number: the error of one rounding.
ROUNDING = {FLOAT32: 2.0**-24, FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}


def normal(seed: int, *shape: int, dtype: np.dtype[Any] = FLOAT32) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def qkv(
    batch: int,
    q_tokens: int,
    kv_tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: np.dtype[Any] = FLOAT32,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return (
        normal(1, batch, q_tokens, heads[0], dims[0], dtype=dtype),
        normal(2, batch, kv_tokens, heads[1], dims[0], dtype=dtype),
        normal(3, batch, kv_tokens, heads[1], dims[1], dtype=dtype),
    )


def assert_solves(
    described: AttentionProblem, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], algorithm: str = "v2"
) -> None:
    """The result is the oracle's, but for the roundings of float32 sums and of the output's dtype."""
    out, lse = cpu.attention(described, q, k, v, algorithm)
    assert out.dtype == q.dtype
    assert lse.dtype == FLOAT32
    assert_close(out, lse, *reference.attention(described, q, k, v))


def assert_close(out: NDArray[Any], lse: NDArray[Any], expected: NDArray[Any], expected_lse: NDArray[Any]) -> None:
    rounding = ROUNDING[out.dtype]
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=1.1 * rounding, atol=4e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=2e-6)


def solve(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    return cpu.attention(problem.describe(q, k, v, **options), q, k, v, "v2")

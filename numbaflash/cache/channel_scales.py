"""The search of AWQ: which factors of a key's channels change attention least once keys are quantized.

Quantization moves the scores of a query by q . (dequantized k - k). What they all have in common, softmax does not
see; so what is minimised is the variance of that error under the query's own attention, summed over sample queries: to
second order twice the Kullback-Leibler divergence between attention before and after. The candidates are AWQ's
(section 3.2), magnitude of the queries^a over magnitude of the keys^b by channel, and a and b are searched by grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["search_channel_scales"]

_EXPONENTS = np.linspace(0.0, 1.0, 6)
_SAMPLE_QUERIES = 96


def search_channel_scales(
    q: NDArray[np.float32], k: NDArray[np.float32], dequantize: Callable[[NDArray[Any]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return the scales (Hkv, D) of one layer.

    Args:
        q: (T, Hq, D).
        k: (T, Hkv, D).
        dequantize: What keys like k are once they were quantized.
    """
    tokens, kv_heads, head_dim = k.shape
    # The first quarter's queries see few keys.
    positions = np.unique(np.linspace(tokens // 4, tokens - 1, _SAMPLE_QUERIES).astype(int))
    grouped = q[positions].reshape(len(positions), kv_heads, -1, head_dim)
    queries = grouped.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim) * np.float32(head_dim**-0.5)
    attention = _attention(queries, k, positions)

    squares: NDArray[np.float32] = np.square(q)
    of_queries = np.sqrt(squares.reshape(tokens, kv_heads, -1, head_dim).mean(axis=(0, 2)))
    of_keys = np.abs(k).max(axis=0)
    best = np.full(kv_heads, np.inf)
    scales = np.ones((kv_heads, head_dim), np.float32)
    for a in _EXPONENTS:
        for b in _EXPONENTS:
            candidate = np.maximum(of_queries, 1e-6) ** a / np.maximum(of_keys, 1e-6) ** b
            candidate = (candidate / np.exp(np.log(candidate).mean(axis=1, keepdims=True))).astype(np.float32)
            error = dequantize(k * candidate) / candidate - k
            moved = np.einsum("hnd,thd->hnt", queries, error)
            moved -= (attention * moved).sum(axis=2, keepdims=True)
            divergence = (attention * np.square(moved)).sum(axis=(1, 2))
            better = divergence < best
            best[better], scales[better] = divergence[better], candidate[better]
    return scales


def _attention(queries: NDArray[np.float32], k: NDArray[np.float32], positions: NDArray[Any]) -> NDArray[np.float32]:
    """Causal attention (Hkv, group * positions, T) of scaled queries (Hkv, group * positions, D)."""
    scores = np.einsum("hnd,thd->hnt", queries, k)
    of_rows = np.tile(positions, scores.shape[1] // len(positions))
    scores = np.where(np.arange(len(k)) <= of_rows[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    attention: NDArray[np.float32] = weights / weights.sum(axis=2, keepdims=True)
    return attention

"""The search of AWQ: which factors of a key's channels change attention least once keys are quantized.

Quantization moves the scores of a query by q . (dequantized k - k). What they all have in common, softmax does not
see; so what is minimised is the variance of that error under the query's own attention, summed over sample queries: to
second order twice the Kullback-Leibler divergence between attention before and after. The candidates are AWQ's
(section 3.2), magnitude of the queries^a over magnitude of the keys^b by channel, and a and b are searched by grid.

Rotary positions turn a pair of channels as positions go on: what is large in one of them among the samples is large in
the other some thousand tokens later. Factors of rotated channels must be shared by the pair, or they hold for the
samples' positions alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROTARY", "Seen", "search_channel_scales"]

# Which channels rotary positions turn together: 2j and 2j + 1, or j and j + D / 2; None: none.
ROTARY = (None, "adjacent", "halves")

_EXPONENTS = np.linspace(0.0, 1.0, 6)
_SAMPLE_QUERIES = 96


@dataclass(frozen=True)
class Seen:
    """What of the samples a cache would hold as codes.

    Attributes:
        sink_tokens: First tokens, which stay in float16.
        page_size: Tokens of a page; a query sees its own in float16.
    """

    sink_tokens: int
    page_size: int

    def as_codes(self, queries: NDArray[Any], tokens: int) -> NDArray[np.bool_]:
        """Which of so many keys the queries at some positions see as codes, (queries, tokens)."""
        page = (np.arange(tokens) - self.sink_tokens) // self.page_size
        own = (queries - self.sink_tokens) // self.page_size
        return (np.arange(tokens) >= self.sink_tokens) & (page < own[:, None])


def search_channel_scales(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    dequantize: Callable[[NDArray[Any]], NDArray[np.float32]],
    seen: Seen,
    rotary: str | None,
) -> NDArray[np.float32]:
    """Return the scales (Hkv, D) of one layer.

    Args:
        q: (T, Hq, D).
        k: (T, Hkv, D).
        dequantize: What keys like k are once they were quantized.
        seen: Which of them are.
        rotary: One of `ROTARY`.
    """
    tokens, kv_heads, head_dim = k.shape
    # The first quarter's queries see few keys.
    positions = np.unique(np.linspace(tokens // 4, tokens - 1, _SAMPLE_QUERIES).astype(int))
    grouped = q[positions].reshape(len(positions), kv_heads, -1, head_dim)
    queries = grouped.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim) * np.float32(head_dim**-0.5)
    of_rows = np.tile(positions, queries.shape[1] // len(positions))
    attention = _attention(queries, k, of_rows)
    as_codes = seen.as_codes(of_rows, tokens)

    by_group = q.reshape(tokens, kv_heads, -1, head_dim)
    of_queries = np.sqrt(np.square(_magnitudes(by_group, rotary)).mean(axis=(0, 2)))
    of_keys = _magnitudes(k[seen.sink_tokens :], rotary).max(axis=0)
    best = np.full(kv_heads, np.inf)
    scales = np.ones((kv_heads, head_dim), np.float32)
    for a in _EXPONENTS:
        for b in _EXPONENTS:
            shared = np.maximum(of_queries, 1e-6) ** a / np.maximum(of_keys, 1e-6) ** b
            candidate = _by_channel(shared / np.exp(np.log(shared).mean(axis=1, keepdims=True)), rotary)
            error = dequantize(k * candidate) / candidate - k
            moved = np.einsum("hnd,thd->hnt", queries, error) * as_codes
            moved -= (attention * moved).sum(axis=2, keepdims=True)
            divergence = (attention * np.square(moved)).sum(axis=(1, 2))
            better = divergence < best
            best[better], scales[better] = divergence[better], candidate[better]
    return scales


def _magnitudes(x: NDArray[np.float32], rotary: str | None) -> NDArray[np.float32]:
    """Magnitudes of the channels (..., D), or of the pairs (..., D / 2)."""
    if rotary is None:
        return np.abs(x)
    halves = (x[..., 0::2], x[..., 1::2]) if rotary == "adjacent" else np.split(x, 2, axis=-1)
    return np.hypot(*halves)


def _by_channel(scales: NDArray[Any], rotary: str | None) -> NDArray[np.float32]:
    """Scales of channels, or of pairs, as scales of channels (..., D)."""
    if rotary == "adjacent":
        scales = np.repeat(scales, 2, axis=-1)
    elif rotary == "halves":
        scales = np.concatenate((scales, scales), axis=-1)
    return scales.astype(np.float32)


def _attention(queries: NDArray[np.float32], k: NDArray[np.float32], of_rows: NDArray[Any]) -> NDArray[np.float32]:
    """Causal attention (Hkv, rows, T) of scaled queries (Hkv, rows, D) at positions (rows,)."""
    scores = np.einsum("hnd,thd->hnt", queries, k)
    scores = np.where(np.arange(len(k)) <= of_rows[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    attention: NDArray[np.float32] = weights / weights.sum(axis=2, keepdims=True)
    return attention

"""Steps and attention of caches of floats, of one or of many at once: all their queries and runs go into one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import attend_runs, readable
from ..problem import Scoring
from .layer import FloatLayer
from .token_ring import RingBatch

__all__ = ["append", "attend", "step"]


def step(
    layers: Sequence[FloatLayer], q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scoring: Scoring
) -> NDArray[Any]:
    """Attend to what the layers hold and to the new tokens, then write those.

    Args:
        layers: One of each cache, N of them, alike in heads, head_dim and dtype.
        q: (N, T, Hq, D).
        k: (N, T, Hkv, D).
        v: (N, T, Hkv, D).
        scoring: As in `cpu.attend_runs`.

    Returns:
        (N, T, Hq, D), q's dtype.

    Raises:
        MemoryError: A layer has no pages left; no layer has changed.
    """
    batch = _batch(layers, k, v)
    out, _ = attend_runs(q, *batch.seen_by_last(q.shape[1]), scoring)
    batch.write(batch.reserve())
    return out


def append(layers: Sequence[FloatLayer], k: NDArray[Any], v: NDArray[Any]) -> None:
    """Write new tokens, (N, T, Hkv, D) each.

    Raises:
        MemoryError: A layer has no pages left; no layer has changed.
    """
    batch = _batch(layers, k, v)
    batch.write(batch.reserve())


def attend(layers: Sequence[FloatLayer], q: NDArray[Any], scoring: Scoring) -> NDArray[Any]:
    """Attend with the queries (N, T, Hq, D) of the last T tokens of each layer."""
    ring = layers[0].ring
    none = np.empty((len(layers), 0, ring.kv_heads, ring.head_dim), ring.dtype)
    out, _ = attend_runs(q, *_batch(layers, none, none).seen_by_last(q.shape[1]), scoring)
    return out


def _batch(layers: Sequence[FloatLayer], k: NDArray[Any], v: NDArray[Any]) -> RingBatch:
    rings = [layer.ring for layer in layers]
    return RingBatch(rings, _stored(k, rings[0].dtype), _stored(v, rings[0].dtype))


def _stored(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round to the storage dtype; what is too large for it becomes infinite, as IEEE 754 has it, and NaN stays NaN."""
    if array.dtype == dtype:
        return readable(array)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array, dtype)

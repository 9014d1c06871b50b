"""Keys and values as runs of tokens: the one form in which the CPU kernels read them.

A run is a stretch of consecutive positions whose tokens lie at a constant stride. A contiguous tensor is one run, a
page of the ring is one, the tokens of the step that is being computed are one. So the same kernels serve `attention`,
the cache and a batch of caches, and nothing is ever copied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COUNT",
    "K_ADDRESS",
    "K_HEAD_STRIDE",
    "K_TOKEN_STRIDE",
    "RUN_FIELDS",
    "START",
    "UNBOUNDED",
    "V_ADDRESS",
    "V_HEAD_STRIDE",
    "V_TOKEN_STRIDE",
    "KVRuns",
    "Visibility",
    "contiguous_run",
]

# Columns of a run: addresses and strides in bytes, the position of its first token, the number of its tokens.
K_ADDRESS, V_ADDRESS, START, COUNT, K_TOKEN_STRIDE, K_HEAD_STRIDE, V_TOKEN_STRIDE, V_HEAD_STRIDE = range(8)
RUN_FIELDS = 8

Ints: TypeAlias = Sequence[int] | NDArray[np.int64]

# A window side that reaches past every position, and can be added to a position without overflow.
UNBOUNDED = 1 << 62


@dataclass(frozen=True, eq=False)
class KVRuns:
    """Keys and values of a batch of sequences.

    The arrays behind the addresses belong to the caller, who keeps them alive until the kernel returns. The last axis
    (head_dim, value_dim) has stride 1; addresses are aligned to the dtype's size.

    Attributes:
        table: (runs, 8) int64, columns as above; runs of a sequence stand in order of their positions and do not
            overlap. Positions between two runs do not exist.
        bounds: (sequences + 1,) int64; sequence b owns the rows `bounds[b]` to `bounds[b + 1]`.
        dtype: float32, float16 or bfloat16.
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key.
        value_dim: Elements of a value.
    """

    table: NDArray[np.int64]
    bounds: NDArray[np.int64]
    dtype: np.dtype[Any]
    kv_heads: int
    head_dim: int
    value_dim: int


class Visibility:
    """Which positions a query sees, for each sequence of the batch.

    Query row i of sequence b stands at position p = q_start[b] + i. It sees position j where
    p - left[b] <= j <= p + right[b], or where j < sinks[b] and j <= p + right[b].

    Args:
        q_start: (sequences,) ints: position of query row 0; negative where there are more queries than keys.
        left: (sequences,) ints: window to the left, UNBOUNDED for none.
        right: (sequences,) ints: window to the right, UNBOUNDED for none, 0 for causal.
        sinks: (sequences,) ints: the first positions that stay visible when the window has left them behind.

    Attributes:
        rows: (4, sequences) int64: the arguments side by side, of which those of the same names are views.
    """

    def __init__(self, q_start: Ints, left: Ints, right: Ints, sinks: Ints) -> None:
        self.rows = np.array((q_start, left, right, sinks), np.int64)
        self.q_start, self.left, self.right, self.sinks = self.rows


def contiguous_run(k: NDArray[Any], v: NDArray[Any], start: int) -> tuple[int, ...]:
    """Return the row of `KVRuns.table` for keys (T, Hkv, D) and values (T, Hkv, Dv) whose first token is at `start`."""
    return k.ctypes.data, v.ctypes.data, start, len(k), *k.strides[:2], *v.strides[:2]

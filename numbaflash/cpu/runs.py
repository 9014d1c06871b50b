"""Keys and values as runs of tokens: the one form in which the CPU kernels read them.

A run is a stretch of consecutive positions whose tokens lie at a constant stride. A contiguous tensor is one run, a
page of the ring is one, the tokens of the step that is being computed are one. So the same kernels serve `attention`,
the cache and a batch of caches, and nothing is ever copied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

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
    "Codes",
    "KVRuns",
    "Visibility",
    "contiguous_run",
]

# Columns of a run: addresses, which a task's `k_base` and `v_base` are added to, and strides, in bytes; the position of
# its first token, the number of its tokens.
K_ADDRESS, V_ADDRESS, START, COUNT, K_TOKEN_STRIDE, K_HEAD_STRIDE, V_TOKEN_STRIDE, V_HEAD_STRIDE = range(8)
RUN_FIELDS = 8

Ints: TypeAlias = Sequence[int] | NDArray[np.int64]

# A window side that reaches past every position, and can be added to a position without overflow.
UNBOUNDED = 1 << 62


class Codes(NamedTuple):
    """How quantized runs are stored; each lies in one page of codes.

    An element is scale * code + offset, codes being unsigned; where they are symmetric, offset = -scale * 2^(bits - 1).
    A token's row of codes goes in blocks of 32 elements: in order where they have 8 bits; of 4 bits, byte i of a block
    holds element i below and element i + 16 above. Scales, then offsets unless codes are symmetric, are float16: for
    keys by channel (head_dim,), the same for all tokens of the page; else (groups, page_size), groups being consecutive
    elements of a token. The stride between heads is that of their codes.

    Attributes:
        parameters: (runs, 2) int64: addresses of the scales of head 0's first key and value; 0 where a run is not
            quantized.
        bits: 8 or 4.
        key_group: Elements of a group of a key, a multiple of 32 that divides head_dim; 0 where keys go by channel.
        value_group: Elements of a group of a value, likewise.
        symmetric: Whether there are no offsets.
        page_size: Tokens of a page, at most 256.
    """

    parameters: NDArray[np.int64]
    bits: int
    key_group: int
    value_group: int
    symmetric: bool
    page_size: int


class KVRuns(NamedTuple):
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
        codes: What runs in it are quantized, and how; None: all are stored in `dtype`.
    """

    table: NDArray[np.int64]
    bounds: NDArray[np.int64]
    dtype: np.dtype[Any]
    kv_heads: int
    head_dim: int
    value_dim: int
    codes: Codes | None = None


class Visibility:
    """Which positions a query sees, for each sequence of the batch.

    Query row i of sequence b stands at position p = q_start[b] + i. It sees position j where
    p - left[b] <= j <= p + right[b], or where j < sinks[b] and j <= p + right[b].

    Args:
        q_start: (sequences,) ints: position of query row 0; negative where there are more queries than keys.
        left: (sequences,) ints, or one for all: window to the left, UNBOUNDED for none.
        right: As left: window to the right, UNBOUNDED for none, 0 for causal.
        sinks: As left: the first positions that stay visible when the window has left them behind.

    Attributes:
        rows: (4, sequences) int64: the arguments side by side, of which properties of the same names are views.
    """

    __slots__ = ("rows",)

    def __init__(self, q_start: Ints, left: Ints | int, right: Ints | int, sinks: Ints | int) -> None:
        self.rows: NDArray[np.int64] = np.empty((4, len(q_start)), np.int64)
        self.rows[0], self.rows[1], self.rows[2], self.rows[3] = q_start, left, right, sinks

    @classmethod
    def of_rows(cls, rows: NDArray[np.int64]) -> Visibility:
        """Return what such rows say."""
        visibility = object.__new__(cls)
        visibility.rows = rows
        return visibility

    @property
    def q_start(self) -> NDArray[np.int64]:
        """Position of query row 0."""
        return self._row(0)

    @property
    def left(self) -> NDArray[np.int64]:
        """Window to the left."""
        return self._row(1)

    @property
    def right(self) -> NDArray[np.int64]:
        """Window to the right."""
        return self._row(2)

    def _row(self, index: int) -> NDArray[np.int64]:
        row: NDArray[np.int64] = self.rows[index]
        return row


def contiguous_run(k: NDArray[Any], v: NDArray[Any], start: int) -> tuple[int, ...]:
    """Return the row of `KVRuns.table` for keys (T, Hkv, D) and values (T, Hkv, Dv) whose first token is at `start`."""
    return k.ctypes.data, v.ctypes.data, start, len(k), *k.strides[:2], *v.strides[:2]

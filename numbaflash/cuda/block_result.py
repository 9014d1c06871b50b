"""The end of a decode block: what its warps found about the same rows becomes one, and leaves.

Warps that share rows ("holders") have an online softmax each, over keys of their own. They meet in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import cuda, float32, int64

from . import ptx
from .row_elements import IN_ORDER, PIECE, halved, itemsize, store_elements
from .softmax import LOG2_E
from .tile import CHUNK

__all__ = ["BlockPlace", "BlockResult"]


class BlockPlace(NamedTuple):
    """Which rows a block has computed, on the device, and where they go."""

    sequence: Any
    partial: Any  # -1 where the block has seen all keys
    kv_head: Any
    group: Any
    first_row: Any
    last_row: Any
    tokens: Any
    q_heads: Any


@dataclass(frozen=True)
class BlockResult:
    """How the holders' results lie in shared memory, as floats.

    O of row r of holder h begins at `(h * rows + r) * pitch`; its row maximum in log2 units lies at
    `sums + 2 * (h * rows + r)`, the sum of its weights behind it.

    Attributes:
        holders: Warps, or groups of warps, that have all rows.
        rows: Rows of each.
        head_dim: Elements of O, a multiple of 8.
    """

    holders: int
    rows: int
    head_dim: int

    @property
    def pitch(self) -> int:
        """Floats from row to row: 8 more than it has, so that the rows of a fragment lie in different banks."""
        return self.head_dim + 8

    @property
    def sums(self) -> int:
        """Where maxima and sums begin."""
        return self.holders * self.rows * self.pitch

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory."""
        return 4 * (self.sums + 2 * self.holders * self.rows)

    def write(self, threads: int, dtype: str, *, sinks: bool) -> Any:
        """Return a device function that writes the rows; all threads of the block call it, after a barrier.

        Its arguments: the shared array of floats, a `BlockPlace`, the output with its three strides in bytes, partial
        results, their maxima and sums, and the sink logits.
        """
        H, R, D, PITCH, SUMS, THREADS, SINKS = (
            self.holders, self.rows, self.head_dim, self.pitch, self.sums, threads, sinks
        )  # fmt: skip
        PIECES, ROW_PIECES, ITEMSIZE, LOG2 = R * D // PIECE, D // PIECE, itemsize(dtype), float32(LOG2_E)
        store_out, store_partial = store_elements(IN_ORDER, dtype), store_elements(halved(D), "float32")

        @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
        def write(shared, place, out, out_batch, out_token, out_head, partials, partial_sums, sink_logits):
            O = cuda.local.array(PIECE, float32)
            piece = ptx.thread_x()
            while piece < PIECES:
                r = piece // ROW_PIECES
                piece_of_row = piece - r * ROW_PIECES
                row = place.first_row + r
                if row <= place.last_row:
                    token = row // place.group
                    head = place.kv_head * place.group + row - token * place.group
                    top = shared[SUMS + 2 * r]
                    for h in range(1, H):
                        top = ptx.maximum(top, shared[SUMS + 2 * (h * R + r)])
                    total = float32(0)
                    for i in range(PIECE):
                        O[i] = float32(0)
                    for h in range(H):
                        faded = ptx.exp2(shared[SUMS + 2 * (h * R + r)] - top)
                        total += shared[SUMS + 2 * (h * R + r) + 1] * faded
                        for i in range(PIECE):
                            O[i] += shared[(h * R + r) * PITCH + piece_of_row * PIECE + i] * faded
                    if place.partial >= 0:
                        at = (place.partial * place.tokens + token) * place.q_heads + head
                        store_partial(partials + at * D * 4 + piece_of_row * CHUNK, O)
                        if piece_of_row == 0:
                            ptx.store_global_f32(partial_sums + 8 * at, top)
                            ptx.store_global_f32(partial_sums + 8 * at + 4, total)
                    else:
                        scale = float32(1)
                        if SINKS:
                            sink = ptx.load_global_f32(sink_logits + 4 * int64(head)) * LOG2
                            highest = ptx.maximum(top, sink)
                            scale = ptx.exp2(top - highest)
                            total = total * scale + ptx.exp2(sink - highest)
                        # Only a sum of nothing is 0; that of something that is no number is none either.
                        scale = scale / total if total > float32(0) or total != total else float32(0)
                        for i in range(PIECE):
                            O[i] *= scale
                        to = out + place.sequence * out_batch + token * out_token + head * out_head
                        store_out(to + piece_of_row * PIECE * ITEMSIZE, O)
                piece += THREADS

        return write

"""The end of a step in one launch: partial results are merged, and the step's keys and values go into pages.

Merging is exact up to rounding (FlashAttention-2, section 2.3.1): each split's O counts as much as its sum of weights,
all brought to the largest of their row maxima; the result of FlashAttention-2 (`own_keys`), whose O is divided by that
sum already, as much as e to the power of its log-sum-exp. Splits are merged in order, so that the bits do not depend on
which other sequences are in the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import cuda, float32, int32, int64
from numba.cuda import types

from . import ptx
from .paged_keys import RECORD_AT, RECORD_BYTES
from .row_elements import IN_ORDER, PIECE, halved, itemsize, load_elements, store_elements
from .softmax import LOG2_E, NOTHING_SEEN
from .tile import CHUNK

__all__ = ["FINISH_PARAMETERS", "FinishStep"]

FINISH_PARAMETERS = {
    # As the decode kernels' of the same names.
    **dict.fromkeys(("k", "v", "out", "records", "partials", "partial_sums", "sinks"), int64),
    # Results of `own_keys`, (number, token, head, dim) float32, and their log-sum-exps, (number, head, token).
    **dict.fromkeys(("owns", "own_sums"), int64),
    **dict.fromkeys(("k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head"), int64),
    **dict.fromkeys(("out_batch", "out_token", "out_head"), int64),
    # Pieces of output to look at and of keys and values to append: 0 where nothing is merged, or no tokens are new.
    **dict.fromkeys(("merged", "appended"), int64),
    **dict.fromkeys(("tokens", "queries", "q_heads", "kv_heads"), int32),
}
"""Name and type of the kernel's parameters, in order. `tokens` are the step's, `queries` the most of a record."""


@dataclass(frozen=True)
class FinishStep:
    """The kernel, and how it is launched: a thread for each piece, those of the output first.

    Nobody else reads or writes the pages meanwhile. `out` is written where the sequence has several results.

    Attributes:
        head_dim: Elements of a row, padded to a multiple of 8.
        dtype: Of the pages.
        step_dtype: Of out.
        token_dtype: Of k and v.
        has_sinks: Each head has a sink logit.
        has_owns: Sequences may have a result of `own_keys`.
    """

    head_dim: int
    dtype: str
    step_dtype: str
    token_dtype: str
    has_sinks: bool = False
    has_owns: bool = False

    threads = 256
    blocks = 4
    shared_bytes = 0

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*FINISH_PARAMETERS.values())

    def grid(self, pieces: int) -> int:
        """Return the blocks of a launch."""
        return -(-pieces // self.threads)

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        D, SINKS, OWNS, THREADS = self.head_dim, self.has_sinks, self.has_owns, self.threads
        PIECES, LOG2 = self.head_dim // PIECE, float32(LOG2_E)
        OUT_BYTES, TOKEN_BYTES, PAGE_BYTES = (
            itemsize(dtype) for dtype in (self.step_dtype, self.token_dtype, self.dtype)
        )
        ROW_BYTES = self.head_dim * PAGE_BYTES
        NOTHING = float32(NOTHING_SEEN)
        load_partial, load_own, load_token = (
            load_elements(halved(D), "float32"), load_elements(IN_ORDER, "float32"),
            load_elements(IN_ORDER, self.token_dtype),
        )  # fmt: skip
        store_out, store_page = (store_elements(IN_ORDER, dtype) for dtype in (self.step_dtype, self.dtype))

        @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
        def merge(first_partial, splits, at, column, partials, partial_sums, sink, own, own_sum, total_rows, O, part):
            """Weighs the results of one row; `at` is its number among `total_rows`, `own_sum` 0 where there is none."""
            top = sink
            if OWNS and own_sum:
                top = ptx.maximum(top, ptx.load_global_f32(own_sum) * LOG2)
            for split in range(splits):
                row = int64(first_partial + split) * total_rows + at
                top = ptx.maximum(top, ptx.load_global_f32(partial_sums + 8 * row))
            total = ptx.exp2(sink - top)
            for i in range(PIECE):
                O[i] = float32(0)
            if OWNS and own_sum:
                weight = ptx.exp2(ptx.load_global_f32(own_sum) * LOG2 - top)
                total += weight
                load_own(own + column * 4, part)
                for i in range(PIECE):
                    O[i] += weight * part[i]
            for split in range(splits):
                row = int64(first_partial + split) * total_rows + at
                weight = ptx.exp2(ptx.load_global_f32(partial_sums + 8 * row) - top)
                total += weight * ptx.load_global_f32(partial_sums + 8 * row + 4)
                load_partial(partials + row * D * 4 + column // PIECE * CHUNK, part)
                for i in range(PIECE):
                    O[i] += weight * part[i]
            scale = float32(1) / total if total > float32(0) or total != total else float32(0)
            for i in range(PIECE):
                O[i] *= scale

        def finish_step(
            k, v, out, records, partials, partial_sums, sinks, owns, own_sums, k_batch, k_token, k_head, v_batch,
            v_token, v_head, out_batch, out_token, out_head, merged, appended, tokens, queries, q_heads, kv_heads,
        ):  # fmt: skip
            number = int64(ptx.block_x()) * THREADS + ptx.thread_x()
            O, part = cuda.local.array(PIECE, float32), cuda.local.array(PIECE, float32)
            if number < merged:
                row = number // PIECES
                column = (number - row * PIECES) * PIECE
                rows_each = int64(queries) * q_heads
                index = row // rows_each
                at = row - index * rows_each
                token = at // q_heads
                record = records + RECORD_BYTES * index
                splits = ptx.load_global_b32(record + RECORD_AT.splits)
                number_of_own = int64(ptx.load_global_b32(record + RECORD_AT.own)) if OWNS else int64(-1)
                if (splits > 1 or number_of_own >= 0) and token < ptx.load_global_b32(record + RECORD_AT.queries):
                    head = at - token * q_heads
                    sink = ptx.load_global_f32(sinks + 4 * head) * LOG2 if SINKS else NOTHING
                    own, own_sum = int64(0), int64(0)
                    if number_of_own >= 0:
                        own = owns + (number_of_own * rows_each + at) * D * 4
                        own_sum = own_sums + 4 * ((number_of_own * q_heads + head) * queries + token)
                    first_partial = ptx.load_global_b32(record + RECORD_AT.first_partial)
                    merge(
                        first_partial, splits, at, column, partials, partial_sums, sink, own, own_sum, rows_each, O,
                        part,
                    )  # fmt: skip
                    token += ptx.load_global_b32(record + RECORD_AT.first_query)
                    entry = ptx.load_global_b32(record + RECORD_AT.entry)
                    place = out + entry * out_batch + token * out_token + head * out_head
                    store_out(place + column * OUT_BYTES, O)
            elif number - merged < appended:
                row = (number - merged) // PIECES
                column = (number - merged - row * PIECES) * PIECE
                half = row & 1  # 0: a key, 1: a value
                row >>= 1
                head = row % kv_heads
                row //= kv_heads
                token = row % tokens
                sequence = row // tokens
                record = records + RECORD_BYTES * sequence
                page_shift = ptx.load_global_b32(record + RECORD_AT.page_shift)
                sink_tokens = ptx.load_global_b32(record + RECORD_AT.sink_tokens)
                position = ptx.load_global_b32(record + RECORD_AT.length) + token
                if position < sink_tokens or position >= ptx.load_global_b32(record + RECORD_AT.kept_from):
                    slot, behind = position >> page_shift, position
                    if position >= sink_tokens:
                        behind = position - sink_tokens
                        ring_slots = ptx.load_global_b32(record + RECORD_AT.ring_slots)
                        slot = ptx.load_global_b32(record + RECORD_AT.sink_slots) + (behind >> page_shift) % ring_slots
                    source = k + sequence * k_batch + token * k_token + head * k_head
                    if half:
                        source = v + sequence * v_batch + token * v_token + head * v_head
                    load_token(source + column * TOKEN_BYTES, O)
                    page = ptx.load_global_b64(ptx.load_global_b64(record + RECORD_AT.table) + 8 * slot)
                    row_in_page = ((half * kv_heads + head) << page_shift) + (behind & ((1 << page_shift) - 1))
                    store_page(page + row_in_page * ROW_BYTES + column * PAGE_BYTES, O)

        return finish_step

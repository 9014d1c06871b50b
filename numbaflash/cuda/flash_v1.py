"""FlashAttention, forward, on tensor cores, as it was published ("FlashAttention", Dao et al., 2022, algorithm 1).

One block computes one head of one batch entry. It holds one block of K and V at a time in shared memory, and all query
tiles that see it pass by:

    for each K/V block j:
        for each query tile i:
            S = Q_i K_j^T;  m, P, l = online softmax(S);  O_i = (rescaled O_i + P V_j) / l

O, m and l of a tile are read from global memory before and written back after. They are float32 there: O rounded to 16
bits once per K/V block would lose more than attention written out does. FlashAttention-2 turns the loops around, and
keeps all of that in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int32, int64
from numba.cuda import types

from numbaflash.problem import AttentionProblem

from . import epilogue, float32_products, fragments, products, ptx, scoring, softmax
from .arguments import PARAMETERS, Arrays, arguments
from .products import WarpTile
from .shapes import TileShape, v1_tile_shape
from .softmax import LOG2_E, NOTHING_SEEN
from .tile import CHUNK, RowCopy, Rows, SharedTile, at_chunk
from .variant import Variant

__all__ = ["FlashV1"]


class State(NamedTuple):
    """Where a thread finds its shares of O, m and l of the first query tile in global memory."""

    out: Any
    row_max: Any
    row_sum: Any


@dataclass(frozen=True)
class FlashV1:
    """The kernel of one variant and how it is launched.

    Attributes:
        variant: What it is specialised for.
        shape: How a block cuts the problem.
    """

    variant: Variant
    shape: TileShape

    @classmethod
    def of(cls, variant: Variant) -> FlashV1:
        """Return the kernel of a variant, with the blocks that `v1_tile_shape` has for it."""
        wide, scored = variant.dtype == "float32", variant.scoring.in_log2_units
        return cls(variant, v1_tile_shape(variant.head_dim, variant.value_dim, wide=wide, scored=scored))

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the arrays."""
        return 4 if self.variant.dtype == "float32" else 2

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.shape.warps

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that registers must suffice for."""
        return self.shape.blocks

    @cached_property
    def warp(self) -> WarpTile:
        """What one warp computes of a query tile."""
        return WarpTile(
            row_tiles=self.shape.queries // (16 * self.shape.warps),
            keys=self.shape.keys,
            head_dim=-(-self.variant.head_dim // 16) * 16,
            value_dim=-(-self.variant.value_dim // 16) * 16,
            bfloat16=self.variant.dtype == "bfloat16",
            k_ahead=self.shape.k_ahead,
            v_ahead=self.shape.v_ahead,
            copy_after=self.shape.copy_after,
        )

    @cached_property
    def q_tile(self) -> SharedTile:
        """Q's tile in shared memory."""
        return SharedTile(0, self.shape.queries, self.variant.head_dim, self.itemsize)

    @cached_property
    def k_tile(self) -> SharedTile:
        """K's block in shared memory."""
        return SharedTile(self.q_tile.end, self.shape.keys, self.variant.head_dim, self.itemsize)

    @cached_property
    def v_tile(self) -> SharedTile:
        """V's block in shared memory."""
        return SharedTile(self.k_tile.end, self.shape.keys, self.variant.value_dim, self.itemsize)

    @cached_property
    def out_tile(self) -> SharedTile:
        """O's tile in shared memory on its way out, where the others were."""
        return SharedTile(0, self.shape.queries, self.variant.value_dim, self.itemsize)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.v_tile.end if self.itemsize == 4 else max(self.v_tile.end, self.out_tile.end)

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*PARAMETERS.values(), int64, int64, int64)

    def grid(self, problem: AttentionProblem) -> tuple[int, int, int]:
        """Return the blocks of a launch: one a head, however long the sequence; what FlashAttention-2 mended first."""
        return problem.q_heads, problem.batch, 1

    def state_bytes(self, problem: AttentionProblem) -> int:
        """Return the bytes of global memory that O, m and l take between two K/V blocks."""
        return 4 * self._rows(problem) * (self.warp.value_dim + 2)

    def arguments(self, problem: AttentionProblem, arrays: Arrays, state: int) -> list[np.generic]:
        """Return the kernel's arguments for a problem.

        Args:
            problem: What to solve.
            arrays: Where it lies.
            state: Address of `state_bytes` bytes, whatever they hold; a multiple of 32.
        """
        maxima = state + 4 * self._rows(problem) * self.warp.value_dim
        sums = maxima + 4 * self._rows(problem)
        return [*arguments(problem, arrays, 1, 1), *(np.int64(address) for address in (state, maxima, sums))]

    def _rows(self, problem: AttentionProblem) -> int:
        """Query rows of all heads, in whole tiles."""
        tiles = -(-problem.q_tokens // self.shape.queries)
        return problem.batch * problem.q_heads * tiles * self.shape.queries

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        variant, shape, threads, warp = self.variant, self.shape, self.threads, self.warp
        score = variant.scoring
        Br, Bc, BR_SHIFT, BC_SHIFT = (*(n := (shape.queries, shape.keys)), *(x.bit_length() - 1 for x in n))
        WARP_ROWS, VALUE_DIM = 16 * warp.row_tiles, warp.value_dim
        SCORES, OUTPUTS, ROWS = warp.rows * warp.keys // 4, warp.rows * warp.value_dim // 4, warp.rows
        LOG2 = float32(LOG2_E)
        LENGTHS, LSE, SINKS = variant.lengths, variant.lse, variant.sinks
        LEFT, RIGHT, ALIBI, BIAS, SCORED = score.left, score.right, score.alibi, bool(score.bias), score.in_log2_units

        multiply = float32_products if variant.dtype == "float32" else products
        Q_tile, K_tile, V_tile = self.q_tile, self.k_tile, self.v_tile
        Q_copy, K_copy, V_copy = (RowCopy(tile, threads, Rows.SOME) for tile in (Q_tile, K_tile, V_tile))
        Q_LANES, K_LANES, V_LANES = Q_copy.lanes, K_copy.lanes, V_copy.lanes
        Q_STEP, K_STEP, V_STEP = Q_copy.rows_at_once, K_copy.rows_at_once, V_copy.rows_at_once
        Q_chunk, K_chunk, V_chunk = at_chunk(Q_tile), at_chunk(K_tile), at_chunk(V_tile)
        value_fragment = fragments.value_fragment(V_tile)
        copy_Q, copy_K, copy_V = Q_copy.function(), K_copy.function(), V_copy.function()
        load_fragments = fragments.load_fragments(warp.rows, warp.value_dim)
        store_fragments = fragments.store_fragments(warp.rows, warp.value_dim)
        scale_fragments = fragments.scale_fragments(warp.rows, warp.value_dim)
        total_rows = fragments.total_rows(warp.rows)
        score_keys = multiply.score_keys(warp, Q_tile, K_tile, None, find_maxima=False)
        score_pairs, mask_scores = scoring.score_pairs(warp, score, masked=True), scoring.mask_scores(warp, score)
        lane_maxima, raise_maxima = softmax.lane_maxima(warp), softmax.raise_maxima(warp)
        add_weighted_values = multiply.add_weighted_values(warp, V_tile, Q_copy)
        finish_rows = epilogue.finish_rows(warp, sinks=SINKS, lse=LSE)
        write_tile = epilogue.write_tile(warp, self.out_tile, threads)

        @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
        def read_state(state, tile, O, m, l):
            row = int64(tile * Br)
            load_fragments(state.out + 4 * VALUE_DIM * row, int64(4 * VALUE_DIM), O)
            for r in range(ROWS):
                m[r] = ptx.load_global_f32(state.row_max + 4 * (row + 8 * r))
                l[r] = ptx.load_global_f32(state.row_sum + 4 * (row + 8 * r))

        @cuda.jit(device=True, inline="always")
        def write_state(state, tile, O, m, l, leads):
            row = int64(tile * Br)
            store_fragments(state.out + 4 * VALUE_DIM * row, int64(4 * VALUE_DIM), O)
            for r in range(ROWS):
                ptx.store_global_f32_if(leads, state.row_max + 4 * (row + 8 * r), m[r])
                ptx.store_global_f32_if(leads, state.row_sum + 4 * (row + 8 * r), l[r])

        @cuda.jit(device=True, inline="always")
        def share_among_lanes(l, leads):
            """Turn the sum of a row, which all its lanes hold, into shares of it."""
            for r in range(ROWS):
                l[r] = l[r] if leads else float32(0)

        def flash_v1(
            q, k, v, out, lse, lengths, bias, slopes, sinks,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
            bias_batch, bias_head, bias_row, bias_key, q_tokens, kv_tokens, q_heads, group, window_left, window_right,
            scale, cap, state_out, state_max, state_sum,
        ):  # fmt: skip
            head, batch = ptx.block_x(), ptx.block_y()
            kv_head = head // group
            shared = ptx.shared_memory(cuda.shared.array(0, types.int32, 128))
            thread = ptx.thread_x()
            lane = thread & 31
            warp_row = (thread >> 5) * WARP_ROWS
            tile_row, column, leads = warp_row + (lane >> 2), 2 * (lane & 3), int32((lane & 3) == 0)
            kv_length = ptx.load_global_b32(lengths + 4 * batch) if LENGTHS else kv_tokens
            shift = kv_length - q_tokens
            tiles, blocks = int32((q_tokens + Br - 1) >> BR_SHIFT), int32((kv_length + Bc - 1) >> BC_SHIFT)

            # The thread's places in the tiles of shared memory, and in the state of the first query tile.
            Q_row, Q_column = thread // Q_LANES, thread % Q_LANES
            K_row, K_column = thread // K_LANES, thread % K_LANES
            V_row, V_column = thread // V_LANES, thread % V_LANES
            Q_to, K_to, V_to = (
                Q_chunk(shared, Q_row, Q_column), K_chunk(shared, K_row, K_column), V_chunk(shared, V_row, V_column)
            )  # fmt: skip
            Q_at = Q_chunk(shared, warp_row + (lane & 15), lane >> 4)
            K_at = K_chunk(shared, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1)
            V_at = value_fragment(shared, lane)
            Q_from = q + batch * q_batch + head * q_head + (Br - Q_STEP + Q_row) * q_row + Q_column * CHUNK
            K_from = k + batch * k_batch + kv_head * k_head + (Bc - K_STEP + K_row) * k_row + K_column * CHUNK
            V_from = v + batch * v_batch + kv_head * v_head + (Bc - V_STEP + V_row) * v_row + V_column * CHUNK
            first_row = (batch * q_heads + head) * int64(tiles * Br) + tile_row
            state = State(
                out=state_out + 4 * (first_row * VALUE_DIM + column),
                row_max=state_max + 4 * first_row,
                row_sum=state_sum + 4 * first_row,
            )

            S = cuda.local.array(SCORES, float32)
            O = cuda.local.array(OUTPUTS, float32)
            m = cuda.local.array(ROWS, float32)
            l = cuda.local.array(ROWS, float32)
            top = cuda.local.array(ROWS, float32)
            inverse = cuda.local.array(ROWS, float32)
            slope = float32(ptx.load_global_f32(slopes + 4 * (batch * q_heads + head)) * LOG2) if ALIBI else float32(0)

            # Line 2: O = 0, l = 0, m = -inf.
            for x in range(OUTPUTS):
                O[x] = float32(0)
            for r in range(ROWS):
                m[r], l[r] = float32(NOTHING_SEEN), float32(0)
            for tile in range(tiles):
                write_state(state, tile, O, m, l, leads)

            # Line 5.
            for j in range(blocks):
                first_key = int32(j * Bc)
                keys = int32(kv_length - first_key)
                # The query tiles that see a key of the block.
                i, end = int32(0), tiles
                if RIGHT:
                    i = int32(max(first_key - window_right - shift, 0) >> BR_SHIFT)
                if LEFT:
                    end_row = min(first_key + Bc, kv_length) + window_left - shift
                    end = min(end, int32((max(end_row, 0) + Br - 1) >> BR_SHIFT))
                if i < end:
                    # Line 6.
                    ptx.cp_async_wait()  # for the copy of no query tile after the last one
                    cuda.syncthreads()  # nobody reads the block before
                    copy_K(K_to, K_from + int64(first_key) * k_row, K_STEP * k_row, K_column, keys - K_row)
                    copy_V(V_to, V_from + int64(first_key) * v_row, V_STEP * v_row, V_column, keys - V_row)
                    copy_Q(Q_to, Q_from + int64(i * Br) * q_row, Q_STEP * q_row, Q_column, q_tokens - i * Br - Q_row)
                # Line 7.
                while i < end:
                    # Line 8.
                    read_state(state, i, O, m, l)
                    ptx.cp_async_wait()
                    cuda.syncthreads()  # Q, and before the first one K and V, are there

                    # Line 9.
                    score_keys(Q_at, K_at, S, top)
                    row = int32(i * Br + tile_row)
                    position = int32(row + shift - first_key - column)
                    if SCORED:
                        bias_at = bias
                        if BIAS:
                            bias_at += batch * bias_batch + head * bias_head
                            bias_at += min(row, q_tokens - 1) * bias_row + (first_key + column) * bias_key
                        score_pairs(
                            S, scale, cap, slope, position, bias_at, bias_row, bias_key, q_tokens - row, keys - column
                        )
                    masked = keys < Bc
                    if RIGHT:
                        masked |= i * Br + shift + window_right < first_key + Bc - 1
                    if LEFT:
                        masked |= i * Br + Br - 1 + shift - window_left > first_key
                    if masked:
                        mask_scores(S, keys - column, position + window_right, position - window_left)

                    # Lines 10 to 12: m and l over the block's keys as well, O = (l e^(old m - m) O + P V) / new l.
                    lane_maxima(S, top)
                    scale_fragments(O, l)
                    share_among_lanes(l, leads)
                    raise_maxima(top, float32(1) if SCORED else scale, m, l, O)
                    cuda.syncthreads()  # nobody reads Q: the next one may come
                    Q_rows = q_tokens - (i + 1) * Br - Q_row if i + 1 < end else 0
                    add_weighted_values(
                        V_at, S, float32(1) if SCORED else scale, m, l, O,
                        Q_to, Q_from + int64((i + 1) * Br) * q_row, Q_STEP * q_row, Q_column, Q_rows,
                    )  # fmt: skip
                    total_rows(l)
                    for r in range(ROWS):
                        inverse[r] = ptx.reciprocal(l[r]) if l[r] != float32(0) else float32(0)
                    scale_fragments(O, inverse)

                    # Lines 12 and 13.
                    write_state(state, i, O, m, l, leads)
                    i += int32(1)

            # O in the arrays' dtype, and the log-sum-exp.
            sink = float32(ptx.load_global_f32(sinks + 4 * head) * LOG2) if SINKS else float32(0)
            for tile in range(tiles):
                ptx.cp_async_wait()
                cuda.syncthreads()  # nobody reads or writes the tiles: O may have their place
                read_state(state, tile, O, m, l)
                scale_fragments(O, l)
                share_among_lanes(l, leads)
                row = int32(tile * Br + tile_row)
                lse_at = lse + 4 * ((batch * q_heads + head) * int64(q_tokens) + row)
                finish_rows(m, l, O, sink, lse_at, q_tokens - row)
                O_to = out + batch * out_batch + head * out_head + int64(tile * Br) * out_row
                write_tile(shared, O, O_to, out_row, q_tokens - tile * Br)

        return flash_v1

"""FlashAttention-2, forward, on tensor cores ("FlashAttention-2", Dao, 2023, algorithm 1).

One block computes a tile of query rows of one head. It visits the K/V blocks that its rows may see, last to first:

    S = Q K^T;  m, P, l = online softmax(S);  O = rescaled O + P V

with S, P and O in registers all along. The kernel is generated for a `Variant`: what a variant does not use is not
in it.
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

from . import epilogue, float32_products, products, ptx, scoring, softmax
from .arguments import PARAMETERS, Arrays, arguments
from .products import WarpTile
from .shapes import TileShape, tile_shape
from .softmax import LOG2_E, NOTHING_SEEN
from .tile import CHUNK, RowCopy, Rows, SharedTile, at_chunk
from .variant import Variant

__all__ = ["FlashV2"]


class Place(NamedTuple):
    """Where a thread stands: its addresses in the tiles of shared memory, and its chunks when copying."""

    Q: Any
    K: Any
    V: Any
    K_to: Any
    V_to: Any
    K_chunk: Any
    V_chunk: Any


class Rule(NamedTuple):
    """What a block's visit takes from the problem."""

    scale: Any
    factor: Any
    cap: Any
    slope: Any
    left: Any
    right: Any
    q_tokens: Any
    kv_length: Any
    shift: Any
    first_block: Any
    K_step: Any
    V_step: Any
    bias: Any
    bias_row: Any
    bias_key: Any


@dataclass(frozen=True)
class FlashV2:
    """The kernel of one variant and how it is launched.

    Attributes:
        variant: What it is specialised for.
        shape: How a block cuts the problem.
        wide: The output is float32 whatever the dtype, for who merges it with more.
    """

    variant: Variant
    shape: TileShape
    wide: bool = False

    @classmethod
    def of(cls, variant: Variant, cc: tuple[int, int], *, wide: bool = False) -> FlashV2:
        """Return the kernel for a compute capability, in the shape that `shapes` has for it."""
        shape = tile_shape(
            variant.head_dim,
            variant.value_dim,
            cc,
            float32=variant.dtype == "float32",
            scored=variant.scoring.in_log2_units,
            biased=bool(variant.scoring.bias),
        )
        return cls(variant, shape, wide)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.shape.warps

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that registers must suffice for."""
        return self.shape.blocks

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the arrays."""
        return 4 if self.variant.dtype == "float32" else 2

    @cached_property
    def q_tile(self) -> SharedTile:
        """Q's tile in shared memory."""
        return SharedTile(0, self.shape.queries, self.variant.head_dim, self.itemsize)

    @cached_property
    def k_tile(self) -> SharedTile:
        """K's tile in shared memory."""
        return SharedTile(self.q_tile.end, self.shape.keys, self.variant.head_dim, self.itemsize)

    @cached_property
    def v_tile(self) -> SharedTile:
        """V's tile in shared memory."""
        return SharedTile(self.k_tile.end, self.shape.keys, self.variant.value_dim, self.itemsize)

    @cached_property
    def out_tile(self) -> SharedTile:
        """O's tile in shared memory, where the others were."""
        return SharedTile(0, self.shape.queries, self.variant.value_dim, self.itemsize)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.v_tile.end if self.itemsize == 4 else max(self.v_tile.end, self.out_tile.end)

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*PARAMETERS.values())

    @property
    def heaviest_first(self) -> bool:
        """Query tiles differ in cost, by their place under a causal mask, and the last ones cost most."""
        return self.variant.scoring.right

    def grid(self, problem: AttentionProblem) -> tuple[int, int, int]:
        """Return the blocks of a launch.

        Query tiles of one head run side by side where all cost the same: they read the same K and V. Under a causal
        mask the longest tiles of all heads start first, so that none is left alone at the end.
        """
        tiles = -(-problem.q_tokens // self.shape.queries)
        if self.heaviest_first:
            return problem.q_heads, problem.batch, tiles
        return tiles, problem.q_heads, problem.batch

    def arguments(self, problem: AttentionProblem, arrays: Arrays) -> list[np.generic]:
        """Return the kernel's arguments for a problem, in the order of `PARAMETERS`."""
        k_rows, v_rows = (RowCopy(tile, self.threads, Rows.ALL).rows_at_once for tile in (self.k_tile, self.v_tile))
        return arguments(problem, arrays, k_rows, v_rows)

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        variant, shape, threads = self.variant, self.shape, self.threads
        score = variant.scoring
        FLOAT32 = variant.dtype == "float32"
        multiply = float32_products if FLOAT32 else products
        warp = WarpTile(
            row_tiles=shape.queries // (16 * shape.warps),
            keys=shape.keys,
            head_dim=-(-variant.head_dim // 16) * 16,
            value_dim=-(-variant.value_dim // 16) * 16,
            bfloat16=variant.dtype == "bfloat16",
            k_ahead=shape.k_ahead,
            v_ahead=shape.v_ahead,
            copy_after=shape.copy_after,
        )
        Br, Bc, BC_SHIFT, WARP_ROWS = shape.queries, shape.keys, shape.keys.bit_length() - 1, 16 * warp.row_tiles
        SCORES, OUTPUTS, ROWS = warp.rows * warp.keys // 4, warp.rows * warp.value_dim // 4, warp.rows
        LOG2 = float32(LOG2_E)
        HEAVIEST_FIRST, LENGTHS, LSE, SINKS = self.heaviest_first, variant.lengths, variant.lse, variant.sinks
        LEFT, RIGHT, ALIBI, BIAS, SCORED = score.left, score.right, score.alibi, bool(score.bias), score.in_log2_units

        Q_tile, K_tile, V_tile, O_tile = self.q_tile, self.k_tile, self.v_tile, self.out_tile
        Q_copy, K_copy, V_copy, O_copy = (
            RowCopy(tile, threads, Rows.SOME) for tile in (Q_tile, K_tile, V_tile, O_tile)
        )
        Q_LANES, K_LANES, V_LANES, O_LANES = Q_copy.lanes, K_copy.lanes, V_copy.lanes, O_copy.lanes
        Q_STEP, K_STEP, V_STEP = Q_copy.rows_at_once, K_copy.rows_at_once, V_copy.rows_at_once
        Q_chunk, K_chunk, V_chunk, O_chunk = at_chunk(Q_tile), at_chunk(K_tile), at_chunk(V_tile), at_chunk(O_tile)
        copy_Q, copy_K = Q_copy.function(), K_copy.function()
        finish_rows = epilogue.finish_rows(warp, sinks=SINKS, lse=LSE)

        @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
        def position_in_grid():
            if HEAVIEST_FIRST:
                return ptx.blocks_z() - ptx.block_z() - 1, ptx.block_x(), ptx.block_y()
            return ptx.block_x(), ptx.block_y(), ptx.block_z()

        @cuda.jit(device=True, inline="always")
        def first_element():
            """The query row and the column of the lane's first element of the block's tile."""
            tile, _, _ = position_in_grid()
            thread = ptx.thread_x()
            return tile * Br + (thread >> 5) * WARP_ROWS + ((thread & 31) >> 2), 2 * (thread & 3)

        @cuda.jit(device=True, inline="always")
        def value_fragment(shared, lane):
            """The lane's address in V's tile, as `add_weighted_values` wants it."""
            if FLOAT32:
                return V_chunk(shared, 2 * (lane & 3), lane >> 4) + 4 * ((lane >> 2) & 3)
            return V_chunk(shared, lane & 15, lane >> 4)

        if FLOAT32 or self.wide:
            store_fragments = epilogue.store_fragments(warp, variant.value_dim)

            @cuda.jit(device=True, inline="always")
            def write_output(shared, O, out, out_row, tile_row, q_tokens):  # noqa: ARG001  it is called as the other one
                row, column = first_element()
                store_fragments(out + row * out_row + column * 4, out_row, O, q_tokens - row)
                ptx.cp_async_wait()
        else:
            stage_output = epilogue.stage_output(warp, O_tile)
            store_rows = epilogue.store_rows(O_tile, threads)

            @cuda.jit(device=True, inline="always")
            def write_output(shared, O, out, out_row, tile_row, q_tokens):
                ptx.cp_async_wait()
                cuda.syncthreads()  # nobody reads or writes the tiles: O may have their place
                row, column = first_element()
                stage_output(O_chunk(shared, row - tile_row, 0) + 2 * column, O)
                cuda.syncthreads()
                thread = ptx.thread_x()
                O_row, O_column = thread // O_LANES, thread % O_LANES
                O_to = out + (tile_row + O_row) * out_row + O_column * CHUNK
                store_rows(O_chunk(shared, O_row, O_column), O_to, out_row, O_column, q_tokens - tile_row - O_row)

        def visit(masked: bool) -> Any:
            """Return the visit of one K/V block: the body of the algorithm's inner loop."""
            find_maxima = not masked and not SCORED
            fetch_V = RowCopy(V_tile, threads, Rows.SOME if masked else Rows.ALL)
            fetch_K = RowCopy(K_tile, threads, Rows.ALL_OR_NONE)
            score_keys = multiply.score_keys(warp, Q_tile, K_tile, fetch_V, find_maxima=find_maxima)
            score_pairs = scoring.score_pairs(warp, score, masked=masked)
            mask_scores = scoring.mask_scores(warp, score)
            lane_maxima, outgrown, raise_maxima = (
                make(warp) for make in (softmax.lane_maxima, softmax.outgrown, softmax.raise_maxima)
            )
            add_weighted_values = multiply.add_weighted_values(warp, V_tile, fetch_K)
            MASKED, FIND_MAXIMA = masked, find_maxima

            @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
            def step(at, rule, S, O, m, l, top, K_next, V_next, left):
                ptx.cp_async_wait()
                cuda.syncthreads()  # K is there, and nobody reads V
                start = int32((rule.first_block + left) * Bc)
                keys = int32(rule.kv_length - start)
                V_rows = int32(keys - ptx.thread_x() // V_LANES) if MASKED else int32(0)
                V_next = score_keys(at.Q, at.K, S, top, at.V_to, V_next, rule.V_step, at.V_chunk, V_rows)
                row, column = first_element()
                keys, position = int32(keys - column), int32(row + rule.shift - start - column)
                if SCORED:
                    bias = rule.bias
                    if BIAS:
                        bias += min(row, rule.q_tokens - 1) * rule.bias_row + (start + column) * rule.bias_key
                    score_pairs(
                        S, rule.factor, rule.cap, rule.slope, position, bias, rule.bias_row, rule.bias_key,
                        rule.q_tokens - row, keys,
                    )  # fmt: skip
                if MASKED:
                    mask_scores(S, keys, position + rule.right, position - rule.left)
                if not FIND_MAXIMA:
                    lane_maxima(S, top)
                if ptx.vote_any(outgrown(top, rule.scale, m)):
                    raise_maxima(top, rule.scale, m, l, O)
                ptx.cp_async_wait()
                cuda.syncthreads()  # V is there, and nobody reads K
                K_next = add_weighted_values(
                    at.V, S, rule.scale, m, l, O, at.K_to, K_next, rule.K_step, at.K_chunk, left
                )
                return K_next, V_next

            return step

        visit_whole, visit_masked = visit(masked=False), visit(masked=True)

        def flash_v2(
            q, k, v, out, lse, lengths, bias, slopes, sinks,
            q_batch, q_head, q_row, k_batch, k_head, k_step, v_batch, v_head, v_step, out_batch, out_head, out_row,
            bias_batch, bias_head, bias_row, bias_key, q_tokens, kv_tokens, q_heads, group, window_left, window_right,
            scale, cap,
        ):  # fmt: skip
            tile, head, batch = position_in_grid()
            kv_head = head // group
            shared = ptx.shared_memory(cuda.shared.array(0, types.int32, 128))
            thread = ptx.thread_x()
            lane = thread & 31
            warp_row = (thread >> 5) * WARP_ROWS

            # The keys that the tile's rows see, and the blocks that all of its rows see whole.
            tile_row = tile * Br
            kv_length = ptx.load_global_b32(lengths + 4 * batch) if LENGTHS else kv_tokens
            shift = kv_length - q_tokens
            first_position, last_position = tile_row + shift, min(tile_row + Br, q_tokens) - 1 + shift
            whole_end, end = kv_length, kv_length
            if RIGHT:
                whole_end, end = min(end, first_position + window_right + 1), min(end, last_position + window_right + 1)
            blocks = int32((max(end, 0) + Bc - 1) >> BC_SHIFT)
            first_block, whole_until = int32(0), int32(0)
            if LEFT:
                first_block = int32(min(max(0, first_position - window_left) >> BC_SHIFT, blocks))
                whole_until = int32(max(last_position - window_left + Bc - 1, 0) >> BC_SHIFT) - first_block
            left = int32(blocks - first_block)
            masked_until = int32(max(whole_end, 0) >> BC_SHIFT) - first_block

            # Q's tile and the last K block set out.
            Q_row, Q_column = thread // Q_LANES, thread % Q_LANES
            K_row, K_column = thread // K_LANES, thread % K_LANES
            V_row, V_column = thread // V_LANES, thread % V_LANES
            K_to, V_to = K_chunk(shared, K_row, K_column), V_chunk(shared, V_row, V_column)
            Q_from = q + batch * q_batch + head * q_head + (tile_row + Br - Q_STEP + Q_row) * q_row + Q_column * CHUNK
            K_next = k + batch * k_batch + kv_head * k_head + (blocks * (Bc // K_STEP) - 1) * k_step
            V_next = v + batch * v_batch + kv_head * v_head + (blocks * (Bc // V_STEP) - 1) * v_step
            K_next += K_row * (k_step // K_STEP) + K_column * CHUNK
            V_next += V_row * (v_step // V_STEP) + V_column * CHUNK
            copy_Q(Q_chunk(shared, Q_row, Q_column), Q_from, Q_STEP * q_row, Q_column, q_tokens - tile_row - Q_row)
            K_rows = kv_length - (blocks - 1) * Bc - K_row if left > 0 else 0
            K_next = copy_K(K_to, K_next, k_step, K_column, K_rows)

            S = cuda.local.array(SCORES, float32)
            O = cuda.local.array(OUTPUTS, float32)
            m = cuda.local.array(ROWS, float32)
            l = cuda.local.array(ROWS, float32)
            top = cuda.local.array(ROWS, float32)
            for i in range(OUTPUTS):
                O[i] = float32(0)
            for i in range(ROWS):
                m[i], l[i] = float32(NOTHING_SEEN), float32(0)

            slope = float32(ptx.load_global_f32(slopes + 4 * (batch * q_heads + head)) * LOG2) if ALIBI else float32(0)
            at = Place(
                Q=Q_chunk(shared, warp_row + (lane & 15), lane >> 4),
                K=K_chunk(shared, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1),
                V=value_fragment(shared, lane),
                K_to=K_to,
                V_to=V_to,
                K_chunk=int32(K_column),
                V_chunk=int32(V_column),
            )
            rule = Rule(
                scale=float32(1) if SCORED else scale,
                factor=scale,
                cap=cap,
                slope=slope,
                left=window_left,
                right=window_right,
                q_tokens=q_tokens,
                kv_length=int32(kv_length),
                shift=int32(shift),
                first_block=first_block,
                K_step=k_step,
                V_step=v_step,
                bias=bias + batch * bias_batch + head * bias_head,
                bias_row=bias_row,
                bias_key=bias_key,
            )
            masked_until, whole_until = max(int32(masked_until), int32(whole_until)), int32(whole_until)
            while left > int32(0):
                while left > max(masked_until, int32(0)):
                    left = int32(left - int32(1))
                    K_next, V_next = visit_masked(at, rule, S, O, m, l, top, K_next, V_next, left)
                while left > max(whole_until, int32(0)):
                    left = int32(left - int32(1))
                    K_next, V_next = visit_whole(at, rule, S, O, m, l, top, K_next, V_next, left)
                masked_until = whole_until = int32(0)  # what is left lies across the window's left edge

            tile, head, batch = position_in_grid()
            row, _ = first_element()
            sink = float32(ptx.load_global_f32(sinks + 4 * head) * LOG2) if SINKS else float32(0)
            finish_rows(m, l, O, sink, lse + 4 * ((batch * q_heads + head) * int64(q_tokens) + row), q_tokens - row)
            write_output(shared, O, out + batch * out_batch + head * out_head, out_row, tile * Br, q_tokens)

        return flash_v2

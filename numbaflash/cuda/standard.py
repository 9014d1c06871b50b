"""Standard attention on tensor cores ("FlashAttention", Dao et al., 2022, algorithm 0): all scores are written out.

Three launches, each of which reads from global memory what the one before wrote there:

    S = Q K^T;  P = softmax(S);  O = P V

S and P have an element for each query and key of each head, in whole tiles: rows are padded to `STANDARD_ROWS`, keys to
`STANDARD_KEYS`. S is float32 and in log2 units, P has the arrays' dtype. Nothing is left out: what a mask hides is -inf
in S and 0 in P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, float32, int16, int32, int64
from numba.cuda import types

from numbaflash.problem import AttentionProblem

from . import epilogue, float32_products, fragments, products, ptx, scoring
from .arguments import PARAMETERS, Arrays, arguments
from .products import WarpTile
from .ptx import F32, device_intrinsic
from .scoring import Scoring
from .shapes import STANDARD_KEYS, STANDARD_ROWS
from .softmax import LN_2, LOG2_E, NOTHING_SEEN
from .tile import CHUNK, RowCopy, Rows, SharedTile, at_chunk
from .variant import Variant

__all__ = ["Matrices", "StandardScores", "StandardSoftmax", "StandardValues"]

_MATRIX_PARAMETERS = {"scores": int64, "weights": int64, "matrix_rows": int32, "matrix_keys": int32}


@dataclass(frozen=True)
class Matrices:
    """Where S and P lie: (batch, heads, rows, keys).

    Attributes:
        rows: Query rows of a head, in whole tiles.
        keys: Keys, in whole tiles; at least one.
        scores: Address of S.
        weights: Address of P.
    """

    rows: int
    keys: int
    scores: int = 0
    weights: int = 0

    @classmethod
    def of(cls, problem: AttentionProblem) -> Matrices:
        """Return the size that a problem takes, with no addresses yet."""
        rows, keys = -(-problem.q_tokens // STANDARD_ROWS), -(-max(problem.kv_tokens, 1) // STANDARD_KEYS)
        return cls(rows * STANDARD_ROWS, keys * STANDARD_KEYS)


@dataclass(frozen=True)
class _Tiles:
    """How a block cuts the matrices: Q and K of 256 elements take 96 KiB in it, which fits on 8.6 and 8.9.

    Attributes:
        rows: Query rows: 32 a warp where registers suffice, so that each fragment loaded serves two MMAs.
        keys: Keys.
        itemsize: Bytes of an element of the arrays.
    """

    rows: int
    keys: int
    itemsize: int

    @classmethod
    def of(cls, dtype: str) -> _Tiles:
        """Return the tiles for arrays of a dtype."""
        return cls(64, 32, 4) if dtype == "float32" else cls(128, 64, 2)


class _Kernel:
    """What the three kernels have in common: parameters by name, out of `PARAMETERS` and those of the matrices."""

    parameters: tuple[str, ...]

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        kinds = PARAMETERS | _MATRIX_PARAMETERS
        return types.void(*(kinds[name] for name in self.parameters))

    def arguments(self, problem: AttentionProblem, arrays: Arrays, matrices: Matrices) -> list[np.generic]:
        """Return the kernel's arguments, in the order of `parameters`."""
        values = dict(zip(PARAMETERS, arguments(problem, arrays, 1, 1), strict=True))
        values |= {name: np.int64(getattr(matrices, name)) for name in ("scores", "weights")}
        values |= {f"matrix_{name}": np.int32(getattr(matrices, name)) for name in ("rows", "keys")}
        return [values[name] for name in self.parameters]


@dataclass(frozen=True)
class StandardScores(_Kernel):
    """S = Q K^T, with all that makes a score of it, masks included.

    Attributes:
        head_dim: Elements of a query and a key, a multiple of 8.
        dtype: As `Variant` has it.
        scoring: What a score is; it is scaled here, as is every score that is written out.
        lengths: Each batch entry has its own number of keys.
    """

    head_dim: int
    dtype: str
    scoring: Scoring
    lengths: bool

    parameters = (
        *("q", "k", "lengths", "bias", "slopes", "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_step"),
        *("bias_batch", "bias_head", "bias_row", "bias_key", "q_tokens", "kv_tokens", "q_heads", "group"),
        *("window_left", "window_right", "scale", "cap", "scores", "matrix_rows", "matrix_keys"),
    )
    threads = 128
    blocks = 2

    @classmethod
    def of(cls, variant: Variant) -> StandardScores:
        """Return the kernel of a variant."""
        score = variant.scoring
        scored = Scoring(True, score.softcap, score.alibi, score.bias, score.left, score.right)
        return cls(variant.head_dim, variant.dtype, scored, variant.lengths)

    @property
    def tiles(self) -> _Tiles:
        """How a block cuts S."""
        return _Tiles.of(self.dtype)

    @cached_property
    def q_tile(self) -> SharedTile:
        """Q's tile in shared memory."""
        return SharedTile(0, self.tiles.rows, self.head_dim, self.tiles.itemsize)

    @cached_property
    def k_tile(self) -> SharedTile:
        """K's tile in shared memory."""
        return SharedTile(self.q_tile.end, self.tiles.keys, self.head_dim, self.tiles.itemsize)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.k_tile.end

    def grid(self, problem: AttentionProblem) -> tuple[int, int, int]:
        """Return the blocks of a launch: one a tile of S."""
        matrices = Matrices.of(problem)
        return matrices.rows // self.tiles.rows * (matrices.keys // self.tiles.keys), problem.q_heads, problem.batch

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        threads, score, Br, Bc = self.threads, self.scoring, self.tiles.rows, self.tiles.keys
        warp = _warp_tile(self.dtype, threads, head_dim=self.head_dim)
        multiply = _products(self.dtype)
        WARP_ROWS, SCORES, ROWS_HELD = 16 * warp.row_tiles, warp.rows * warp.keys // 4, warp.rows
        LENGTHS, ALIBI, BIAS, LOG2 = self.lengths, score.alibi, bool(score.bias), float32(LOG2_E)
        Q_copy, K_copy = (RowCopy(tile, threads, Rows.SOME) for tile in (self.q_tile, self.k_tile))
        Q_LANES, K_LANES, Q_STEP, K_STEP = Q_copy.lanes, K_copy.lanes, Q_copy.rows_at_once, K_copy.rows_at_once
        Q_chunk, K_chunk, copy_Q, copy_K = (
            at_chunk(self.q_tile), at_chunk(self.k_tile), Q_copy.function(), K_copy.function()
        )  # fmt: skip
        score_keys = multiply.score_keys(warp, self.q_tile, self.k_tile, None, find_maxima=False)
        score_pairs, mask_scores = scoring.score_pairs(warp, score, masked=True), scoring.mask_scores(warp, score)
        store_fragments = fragments.store_fragments(warp.rows, warp.keys)

        def standard_scores(
            q, k, lengths, bias, slopes, q_batch, q_head, q_row, k_batch, k_head, k_row,
            bias_batch, bias_head, bias_row, bias_key, q_tokens, kv_tokens, q_heads, group,
            window_left, window_right, scale, cap, scores, matrix_rows, matrix_keys,
        ):  # fmt: skip
            key_tiles = matrix_keys // Bc
            tile_row, first_key = ptx.block_x() // key_tiles * Br, ptx.block_x() % key_tiles * Bc
            head, batch = ptx.block_y(), ptx.block_z()
            shared = ptx.shared_memory(cuda.shared.array(0, types.int32, 128))
            thread = ptx.thread_x()
            lane = thread & 31
            warp_row = (thread >> 5) * WARP_ROWS
            row, column = int32(tile_row + warp_row + (lane >> 2)), 2 * (lane & 3)
            kv_length = ptx.load_global_b32(lengths + 4 * batch) if LENGTHS else kv_tokens
            keys = int32(kv_length - first_key)

            Q_row, Q_column, K_row, K_column = thread // Q_LANES, thread % Q_LANES, thread // K_LANES, thread % K_LANES
            Q_from = q + batch * q_batch + head * q_head + (tile_row + Br - Q_STEP + Q_row) * q_row
            K_from = k + batch * k_batch + head // group * k_head + (first_key + Bc - K_STEP + K_row) * k_row
            Q_to, K_to = Q_chunk(shared, Q_row, Q_column), K_chunk(shared, K_row, K_column)
            copy_Q(Q_to, Q_from + Q_column * CHUNK, Q_STEP * q_row, Q_column, q_tokens - tile_row - Q_row)
            copy_K(K_to, K_from + K_column * CHUNK, K_STEP * k_row, K_column, keys - K_row)
            ptx.cp_async_wait()
            cuda.syncthreads()

            S = cuda.local.array(SCORES, float32)
            unused = cuda.local.array(ROWS_HELD, float32)
            Q_at = Q_chunk(shared, warp_row + (lane & 15), lane >> 4)
            K_at = K_chunk(shared, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1)
            score_keys(Q_at, K_at, S, unused)
            position = int32(row + kv_length - q_tokens - first_key - column)
            slope = float32(ptx.load_global_f32(slopes + 4 * (batch * q_heads + head)) * LOG2) if ALIBI else float32(0)
            bias_at = bias
            if BIAS:
                bias_at += batch * bias_batch + head * bias_head
                bias_at += min(row, q_tokens - 1) * bias_row + (first_key + column) * bias_key
            score_pairs(S, scale, cap, slope, position, bias_at, bias_row, bias_key, q_tokens - row, keys - column)
            mask_scores(S, keys - column, position + window_right, position - window_left)
            S_row = (batch * q_heads + head) * int64(matrix_rows) + row
            store_fragments(scores + 4 * (S_row * matrix_keys + first_key + column), int64(4) * matrix_keys, S)

        return standard_scores


@dataclass(frozen=True)
class StandardSoftmax(_Kernel):
    """P = softmax(S), a row a warp: once along the row for its maximum and sum, and once more to weigh.

    Attributes:
        dtype: As `Variant` has it.
        sinks: Each head has a sink logit.
        lse: The log-sum-exp is written as well.
    """

    dtype: str
    sinks: bool
    lse: bool

    parameters = ("lse", "sinks", "q_tokens", "q_heads", "scores", "weights", "matrix_rows", "matrix_keys")
    threads = 128
    blocks = 8
    shared_bytes = 0

    @classmethod
    def of(cls, variant: Variant) -> StandardSoftmax:
        """Return the kernel of a variant."""
        return cls(variant.dtype, variant.sinks, variant.lse)

    def grid(self, problem: AttentionProblem) -> tuple[int, int, int]:
        """Return the blocks of a launch: one for as many rows as it has warps."""
        return -(-problem.q_tokens // (self.threads // 32)), problem.q_heads, problem.batch

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        SINKS, LSE, WARPS = self.sinks, self.lse, self.threads // 32
        LOWEST, LOG2, LN2 = float32(NOTHING_SEEN), float32(LOG2_E), float32(LN_2)
        store_weight = _store_weight(self.dtype)
        warp_max = _over_warp(ptx.maximum.emit)
        warp_sum = _over_warp(ir.IRBuilder.fadd)

        def standard_softmax(lse, sinks, q_tokens, q_heads, scores, weights, matrix_rows, matrix_keys):
            row, head, batch = ptx.block_x() * WARPS + (ptx.thread_x() >> 5), ptx.block_y(), ptx.block_z()
            if row >= q_tokens:
                return
            lane = ptx.thread_x() & 31
            first = ((batch * q_heads + head) * int64(matrix_rows) + row) * matrix_keys

            top, total = LOWEST, float32(0)
            for key in range(lane, matrix_keys, 32):
                s = ptx.load_global_f32(scores + 4 * (first + key))
                old, top = top, ptx.maximum(top, s)
                total = total * ptx.exp2(old - top) + ptx.exp2(s - top)
            row_max = warp_max(top)
            total = warp_sum(total * ptx.exp2(top - row_max))
            if SINKS:
                sink = float32(ptx.load_global_f32(sinks + 4 * head) * LOG2)
                old, row_max = row_max, ptx.maximum(row_max, sink)
                total = total * ptx.exp2(old - row_max) + ptx.exp2(sink - row_max)
            if LSE and lane == 0:
                lse_at = lse + 4 * ((batch * q_heads + head) * int64(q_tokens) + row)
                ptx.store_global_f32(lse_at, float32((row_max + ptx.log2(total)) * LN2))

            inverse = ptx.reciprocal(total) if total != float32(0) else float32(0)  # a row that sees nothing
            for key in range(lane, matrix_keys, 32):
                p = ptx.exp2(ptx.load_global_f32(scores + 4 * (first + key)) - row_max) * inverse
                store_weight(weights, first, key, p)

        return standard_softmax


@dataclass(frozen=True)
class StandardValues(_Kernel):
    """O = P V.

    Attributes:
        value_dim: Elements of a value, a multiple of 8.
        dtype: As `Variant` has it.
        lengths: Each batch entry has its own number of keys.
    """

    value_dim: int
    dtype: str
    lengths: bool

    parameters = (
        *("v", "out", "lengths", "v_batch", "v_head", "v_step", "out_batch", "out_head", "out_row"),
        *("q_tokens", "kv_tokens", "q_heads", "group", "weights", "matrix_rows", "matrix_keys"),
    )

    @classmethod
    def of(cls, variant: Variant) -> StandardValues:
        """Return the kernel of a variant."""
        return cls(variant.value_dim, variant.dtype, variant.lengths)

    @property
    def threads(self) -> int:
        """Threads of a block: above 128 elements a warp has registers for O of 16 rows, not of 32."""
        return 128 if self.value_dim <= 128 or self.dtype == "float32" else 256

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that registers must suffice for."""
        return 2 if self.value_dim <= 128 else 1

    @property
    def tiles(self) -> _Tiles:
        """How a block cuts P."""
        return _Tiles.of(self.dtype)

    @cached_property
    def p_tile(self) -> SharedTile:
        """P's tile in shared memory."""
        return SharedTile(0, self.tiles.rows, self.tiles.keys, self.tiles.itemsize)

    @cached_property
    def v_tile(self) -> SharedTile:
        """V's tile in shared memory."""
        return SharedTile(self.p_tile.end, self.tiles.keys, self.value_dim, self.tiles.itemsize)

    @cached_property
    def out_tile(self) -> SharedTile:
        """O's tile in shared memory, where the others were."""
        return SharedTile(0, self.tiles.rows, self.value_dim, self.tiles.itemsize)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.v_tile.end if self.tiles.itemsize == 4 else max(self.v_tile.end, self.out_tile.end)

    def grid(self, problem: AttentionProblem) -> tuple[int, int, int]:
        """Return the blocks of a launch: one a query tile."""
        return Matrices.of(problem).rows // self.tiles.rows, problem.q_heads, problem.batch

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        threads, LENGTHS, tiles = self.threads, self.lengths, self.tiles
        Br, Bc, ITEMSIZE = tiles.rows, tiles.keys, tiles.itemsize
        warp = _warp_tile(self.dtype, threads, value_dim=self.value_dim)
        WARP_ROWS, OUTPUTS = 16 * warp.row_tiles, warp.rows * warp.value_dim // 4
        P_copy, V_copy = (RowCopy(tile, threads, Rows.SOME) for tile in (self.p_tile, self.v_tile))
        P_LANES, V_LANES, P_STEP, V_STEP = P_copy.lanes, V_copy.lanes, P_copy.rows_at_once, V_copy.rows_at_once
        P_chunk, V_chunk, copy_P, copy_V = (
            at_chunk(self.p_tile), at_chunk(self.v_tile), P_copy.function(), V_copy.function()
        )  # fmt: skip
        value_fragment = fragments.value_fragment(self.v_tile)
        multiply_values = _products(self.dtype).multiply_values(warp, self.p_tile, self.v_tile)
        write_tile = epilogue.write_tile(warp, self.out_tile, threads)

        def standard_values(
            v, out, lengths, v_batch, v_head, v_row, out_batch, out_head, out_row,
            q_tokens, kv_tokens, q_heads, group, weights, matrix_rows, matrix_keys,
        ):  # fmt: skip
            tile_row, head, batch = ptx.block_x() * Br, ptx.block_y(), ptx.block_z()
            shared = ptx.shared_memory(cuda.shared.array(0, types.int32, 128))
            thread = ptx.thread_x()
            lane = thread & 31
            warp_row = (thread >> 5) * WARP_ROWS
            kv_length = ptx.load_global_b32(lengths + 4 * batch) if LENGTHS else kv_tokens

            P_row, P_column, V_row, V_column = thread // P_LANES, thread % P_LANES, thread // V_LANES, thread % V_LANES
            P_to, V_to = P_chunk(shared, P_row, P_column), V_chunk(shared, V_row, V_column)
            first_row = (batch * q_heads + head) * int64(matrix_rows) + tile_row + Br - P_STEP + P_row
            P_from, P_bytes = (
                weights + ITEMSIZE * first_row * matrix_keys + P_column * CHUNK,
                int64(ITEMSIZE) * matrix_keys,
            )
            V_from = v + batch * v_batch + head // group * v_head + (Bc - V_STEP + V_row) * v_row + V_column * CHUNK
            P_at, V_at = P_chunk(shared, warp_row + (lane & 15), lane >> 4), value_fragment(shared, lane)

            O = cuda.local.array(OUTPUTS, float32)
            for i in range(OUTPUTS):
                O[i] = float32(0)
            for first_key in range(0, kv_length, Bc):
                copy_P(P_to, P_from + ITEMSIZE * first_key, P_STEP * P_bytes, P_column, q_tokens - tile_row - P_row)
                copy_V(V_to, V_from + first_key * v_row, V_STEP * v_row, V_column, kv_length - first_key - V_row)
                ptx.cp_async_wait()
                cuda.syncthreads()
                multiply_values(P_at, V_at, O)
                cuda.syncthreads()  # nobody reads the tiles: the next ones, or O, may have their place

            O_to = out + batch * out_batch + head * out_head + tile_row * out_row
            write_tile(shared, O, O_to, out_row, q_tokens - tile_row)

        return standard_values


def _warp_tile(dtype: str, threads: int, *, head_dim: int = 0, value_dim: int = 0) -> WarpTile:
    tiles = _Tiles.of(dtype)
    return WarpTile(
        row_tiles=tiles.rows // (threads // 2),
        keys=tiles.keys,
        head_dim=-(-head_dim // 16) * 16,
        value_dim=-(-value_dim // 16) * 16,
        bfloat16=dtype == "bfloat16",
        k_ahead=2,
        v_ahead=2,
        copy_after=0,
    )


def _products(dtype: str) -> Any:
    return float32_products if dtype == "float32" else products


def _store_weight(dtype: str) -> Any:
    """Return a device function (address of P, index of a row's first element, key, weight) that stores a weight."""
    pack = ptx.pack_bf16 if dtype == "bfloat16" else ptx.pack_f16

    @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
    def store_half(weights, first, key, p):
        ptx.store_global_b16(weights + 2 * (first + key), int16(pack(p, float32(0))))

    @cuda.jit(device=True, inline="always")
    def store_float(weights, first, key, p):
        # Keys 0, 2, 4, 6, 1, 3, 5, 7 of each 8, as `float32_products.multiply_values` wants them.
        place = (key & ~7) | ((key & 1) << 2) | ((key >> 1) & 3)
        ptx.store_global_f32(weights + 4 * (first + place), p)

    return store_float if dtype == "float32" else store_half


def _over_warp(combine: Callable[..., Any]) -> Any:
    """Return a device function (float) -> what `combine` makes of those of all lanes; all 32 lanes call it."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        (x,) = values
        for mask in (1, 2, 4, 8, 16):
            x = combine(builder, x, ptx.shuffle_xor.emit(builder, x, mask))
        return x

    return device_intrinsic(emit, [F32.numba], F32.numba)

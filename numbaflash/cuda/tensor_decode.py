"""Split-KV decode on tensor cores: the query heads that share a KV head are the rows of one product.

A block computes 16, 32 or 64 query rows of one KV head over one share of the keys, 64 of them at a time. With 16 rows
each of its four warps takes 16 keys of a tile, with 64 each takes 16 rows: so keys and values are read once for all of
them ("Flash-Decoding", Dao et al., 2023; rows packed by group as in FlashInfer). A warp visits its part of a tile as in
FlashAttention-2:

    S = Q K^T;  m, P, l = online softmax(S);  O = rescaled O + P V

and warps that share rows merge what they have at the end.

Where pages hold codes, the tiles of these come first. Codes are loaded while the tensor cores work on the tile before,
and go to shared memory as float16, once for all rows of the block (`code_tiles`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numba import cuda, float32, int32, int64
from numba.cuda import types

from . import fragments, products, ptx, softmax
from .block_result import BlockPlace, BlockResult
from .code_tiles import CodeTiles, store_piece
from .decode_variant import DECODE_PARAMETERS, DecodeVariant
from .paged_keys import (
    ITEM_AT,
    ITEM_BYTES,
    RECORD_AT,
    RECORD_BYTES,
    Rows,
    key_address,
    key_position,
    list_keys,
    sees_key,
)
from .products import WarpTile
from .row_elements import IN_ORDER, PIECE, load_elements
from .softmax import LOG2_E, NOTHING_SEEN
from .tile import CHUNK, RowCopy, SharedTile, at_chunk
from .tile import Rows as CopiedRows

__all__ = ["TILE_KEYS", "TensorDecode"]

_WARPS = 4
TILE_KEYS = 64
"""Keys that a block has at a time."""
_WIDEST_AHEAD = 128  # head_dim up to which there are registers for codes beside O while scores are computed


@dataclass(frozen=True)
class TensorDecode:
    """The kernel, and how it is launched: grid (items, kv heads, row blocks).

    Rows of q, out and the step's k and v are aligned to 16 bytes and padded to a multiple of 8 elements, as pages are.
    Nothing that it reads is written by the launch. An item whose result is the whole one has a key for every row.

    Attributes:
        variant: What it is specialised for; pages and steps have one dtype, float16 or bfloat16, but where there are
            codes, queries may be bfloat16 beside float16. Pages of codes have `TILE_KEYS` tokens or more.
        row_warps: Warps side by side along the rows: 1, 2 or 4; the others share their rows.
    """

    variant: DecodeVariant
    row_warps: int

    threads = 32 * _WARPS
    blocks = 2

    @classmethod
    def of(cls, variant: DecodeVariant, rows: int) -> TensorDecode:
        """Return the kernel for so many query rows of a KV head."""
        if variant.codes is not None and variant.head_dim > _WIDEST_AHEAD:
            return cls(variant, 1)  # registers: scores of 16 keys and not of 64
        return cls(variant, 1 if rows <= 16 else 2 if rows <= 32 else 4)

    @property
    def rows(self) -> int:
        """Query rows of a block."""
        return 16 * self.row_warps

    @property
    def result(self) -> BlockResult:
        """How the warps' results meet."""
        return BlockResult(_WARPS // self.row_warps, self.rows, self.variant.head_dim)

    @cached_property
    def tiles(self) -> tuple[SharedTile, SharedTile, SharedTile]:
        """Tiles of Q, K and V in shared memory."""
        q = SharedTile(0, self.rows, self.variant.head_dim, 2)
        k = SharedTile(q.end, TILE_KEYS, self.variant.head_dim, 2)
        return q, k, SharedTile(k.end, TILE_KEYS, self.variant.head_dim, 2)

    @property
    def code_tiles(self) -> CodeTiles | None:
        """How tiles are made of codes, where there are any."""
        codes = self.variant.codes
        return None if codes is None else CodeTiles(codes, self.variant.head_dim, self.threads, TILE_KEYS)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: tiles, and what they are made by; then the results in their place."""
        factors = 0 if self.code_tiles is None else self.code_tiles.factors_nbytes
        return max(self.tiles[2].end + factors, self.result.nbytes)

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*DECODE_PARAMETERS.values())

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        variant = self.variant
        SOFTCAP, ALIBI, SINKS, CODED = variant.softcap, variant.alibi, variant.sinks, variant.codes is not None
        sees = sees_key(masked=variant.masked or CODED)  # a window may begin inside a page of codes
        CONVERTED, LARGEST = variant.step_dtype != variant.dtype, float32(65504)
        load_query = load_elements(IN_ORDER, variant.step_dtype)
        SCORED = variant.softcap or variant.alibi or variant.scaled
        D, ROWS, KEY_WARPS = variant.head_dim, self.rows, _WARPS // self.row_warps
        TILE, KEYS = TILE_KEYS, TILE_KEYS // KEY_WARPS
        warp = WarpTile(
            row_tiles=1,
            keys=KEYS,
            head_dim=-(-D // 16) * 16,
            value_dim=-(-D // 16) * 16,
            bfloat16=variant.dtype == "bfloat16",
            k_ahead=2,
            v_ahead=2,
            copy_after=0,
        )
        SCORES, OUTPUTS, COLUMNS = warp.keys // 2, warp.value_dim // 2, warp.keys // 4
        Q_tile, K_tile, V_tile = self.tiles
        copy = RowCopy(K_tile, self.threads, CopiedRows.SOME)
        LANES, AT_ONCE, CHUNKS, PITCH_CHUNKS = copy.lanes, copy.rows_at_once, D * 2 // CHUNK, K_tile.pitch // CHUNK
        K_STEPS, Q_STEPS = TILE // AT_ONCE, -(-ROWS // AT_ONCE)
        Q_chunk, K_chunk, V_chunk = at_chunk(Q_tile), at_chunk(K_tile), at_chunk(V_tile)
        score_keys = products.score_keys(warp, Q_tile, K_tile, None, find_maxima=False)
        add_weighted_values = products.add_weighted_values(warp, V_tile, None)
        lane_maxima, outgrown, raise_maxima = (
            make(warp) for make in (softmax.lane_maxima, softmax.outgrown, softmax.raise_maxima)
        )
        AHEAD = D <= _WIDEST_AHEAD
        PAGE, WORDS, KEY_FACTORS, VALUE_FACTORS = 1, 1, 1, 1
        if self.code_tiles is not None:
            key_moves, value_moves = self.code_tiles.keys(K_tile, V_tile.end), self.code_tiles.values(V_tile)
            load_K, store_K, load_V, store_V = key_moves.load, key_moves.store, value_moves.load, value_moves.store
            PAGE, WORDS = self.code_tiles.pages.page_size, max(key_moves.words, value_moves.words)
            KEY_FACTORS, VALUE_FACTORS = key_moves.factors, value_moves.factors
        total_rows = fragments.total_rows(2)
        list_block, position_of, address_of = list_keys(), key_position(), key_address(D * 2)
        result = self.result
        PITCH, SUMS = result.pitch, result.sums
        write_rows = result.write(self.threads, variant.step_dtype, sinks=SINKS)
        LOG2, NOTHING, HIDDEN = float32(LOG2_E), float32(NOTHING_SEEN), float32(float("-inf"))
        ROW_BYTES = D * 2

        @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
        def copy_chunks(to, source, exists, lane_chunk):
            """Starts to copy the thread's chunks of a row; zeros where it does not exist, and behind its end."""
            for along in range(0, PITCH_CHUNKS, LANES):
                nbytes = CHUNK if exists and lane_chunk + along < CHUNKS else 0
                ptx.cp_async_16(to + along * CHUNK, source + (lane_chunk + along) * CHUNK, nbytes)

        @cuda.jit(device=True, inline="always")
        def convert_chunks(to, source, exists, lane_chunk):
            """As `copy_chunks`, from bfloat16 to float16, whose largest number stands for all beyond."""
            X = cuda.local.array(PIECE, float32)
            for along in range(0, PITCH_CHUNKS, LANES):
                for i in range(PIECE):
                    X[i] = float32(0)
                if exists and lane_chunk + along < CHUNKS:
                    load_query(source + (lane_chunk + along) * CHUNK, X)
                for i in range(PIECE):
                    if X[i] > LARGEST:
                        X[i] = LARGEST
                    if X[i] < -LARGEST:
                        X[i] = -LARGEST
                store_piece(to + along * CHUNK, X)

        def copy_tile(chunk: Any) -> Any:
            """Return the copy of a tile of keys, or of values."""

            @cuda.jit(device=True, inline="always")
            def start(shared, keys, first, end, kv_head, behind_key, tail, token_stride):
                thread = ptx.thread_x()
                row, lane_chunk = thread // LANES, thread % LANES
                for i in range(K_STEPS):
                    number = int32(first + row + i * AT_ONCE)
                    # What does not exist reads nothing, but has an address all the same.
                    listed = min(number, int32(end - 1))
                    position = position_of(keys, listed)
                    if position >= keys.length:
                        source = tail + int64(position - keys.length) * token_stride
                    else:
                        source = address_of(keys, position, kv_head) + behind_key
                    copy_chunks(chunk(shared, int32(row + i * AT_ONCE), lane_chunk), source, number < end, lane_chunk)
                ptx.cp_async_commit()

            return start

        copy_K, copy_V = copy_tile(K_chunk), copy_tile(V_chunk)

        def tensor_decode(
            q, k, v, out, records, items, partials, partial_sums, slopes, sinks,
            q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token,
            out_head, tokens, q_heads, kv_heads, group, factor, cap,
        ):  # fmt: skip
            thread = ptx.thread_x()
            lane, row_warp, key_warp = thread & 31, (thread >> 5) // KEY_WARPS, (thread >> 5) % KEY_WARPS
            item, kv_head = items + ITEM_BYTES * int64(ptx.block_x()), ptx.block_y()
            record = records + RECORD_BYTES * int64(ptx.load_global_b32(item + ITEM_AT.sequence))
            first_row, all_rows = ptx.block_z() * ROWS, ptx.load_global_b32(record + RECORD_AT.queries) * group
            if first_row >= all_rows:
                return  # another record has more queries
            last_row = min(first_row + ROWS, all_rows) - 1
            entry = int64(ptx.load_global_b32(record + RECORD_AT.entry))
            first_query = ptx.load_global_b32(record + RECORD_AT.first_query)
            keys = list_block(record, Rows(int32(first_row // group), int32(last_row // group)))
            coded, code_begin = int32(0), int32(0)  # keys that are codes, and the position of the first of them
            if CODED:
                first_page = ptx.load_global_b32(record + RECORD_AT.first_page)
                coded = int32((ptx.load_global_b32(record + RECORD_AT.own_page) - first_page) * PAGE)
                code_begin = int32(keys.sink_tokens + first_page * PAGE)
            first = ptx.load_global_b32(item + ITEM_AT.first)
            end = min(ptx.load_global_b32(item + ITEM_AT.end), int32(coded + keys.count))
            shared = ptx.shared_memory(cuda.shared.array(0, types.int32, 128))
            q_own, out_own = q + entry * q_batch + first_query * q_token, out + first_query * out_token
            k_tail, v_tail = k + entry * k_batch + kv_head * k_head, v + entry * v_batch + kv_head * v_head
            values_behind = (int64(kv_heads) << keys.page_shift) * ROW_BYTES

            copied_row, lane_chunk = thread // LANES, thread % LANES
            for i in range(Q_STEPS):
                r = copied_row + i * AT_ONCE
                if r < ROWS:
                    row = min(first_row + r, last_row)
                    token = row // group
                    source = q_own + token * q_token + (kv_head * group + row - token * group) * q_head
                    to, exists = Q_chunk(shared, int32(r), lane_chunk), first_row + r <= last_row
                    if CONVERTED:
                        convert_chunks(to, source, exists, lane_chunk)
                    else:
                        copy_chunks(to, source, exists, lane_chunk)
            ptx.cp_async_commit()  # of its own, for a block whose rows see no key of the item has no other
            words = cuda.local.array(WORDS, int32)
            K_a, K_b = cuda.local.array(KEY_FACTORS, float32), cuda.local.array(KEY_FACTORS, float32)
            V_a, V_b = cuda.local.array(VALUE_FACTORS, float32), cuda.local.array(VALUE_FACTORS, float32)
            if CODED and first < min(coded, end):
                if AHEAD:
                    load_K(record, first, kv_head, kv_heads, words, K_a, K_b)
            elif first < end:
                copy_K(shared, keys, int32(first - coded), int32(end - coded), kv_head, int64(0), k_tail, k_token)

            S, O = cuda.local.array(SCORES, float32), cuda.local.array(OUTPUTS, float32)
            m, l, top = cuda.local.array(2, float32), cuda.local.array(2, float32), cuda.local.array(2, float32)
            row_tokens, row_slopes = cuda.local.array(2, int32), cuda.local.array(2, float32)
            for i in range(OUTPUTS):
                O[i] = float32(0)
            for half in range(2):
                m[half], l[half] = NOTHING, float32(0)
                row = min(first_row + 16 * row_warp + (lane >> 2) + 8 * half, last_row)
                row_tokens[half] = row // group
                if ALIBI:
                    head = kv_head * group + row - row // group * group
                    row_slopes[half] = ptx.load_global_f32(slopes + 4 * (entry * q_heads + head)) * LOG2
            Q_at = Q_chunk(shared, 16 * row_warp + (lane & 15), lane >> 4)
            K_at = K_chunk(shared, KEYS * key_warp + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1)
            V_at = V_chunk(shared, KEYS * key_warp + (lane & 15), lane >> 4)
            scale = float32(1) if SCORED else factor

            while first < end:
                listed, sinks_listed, begin = int32(first - coded), keys.sinks, keys.first
                if CODED and first < coded:
                    listed, sinks_listed, begin = first, int32(0), code_begin
                    if not AHEAD:
                        load_K(record, first, kv_head, kv_heads, words, K_a, K_b)
                    store_K(shared, words, K_a, K_b)
                    if AHEAD:
                        load_V(record, first, kv_head, kv_heads, words, V_a, V_b)
                ptx.cp_async_wait()
                cuda.syncthreads()  # K is there, and nobody reads V
                if not CODED or first >= coded:
                    copy_V(shared, keys, listed, int32(end - coded), kv_head, values_behind, v_tail, v_token)
                score_keys(Q_at, K_at, S, top)
                for column in range(COLUMNS):
                    number = int32(listed + KEYS * key_warp + 2 * (lane & 3) + 8 * (column // 2) + column % 2)
                    position = number if number < sinks_listed else number - sinks_listed + begin
                    behind = int32(position - keys.start)
                    for half in range(2):
                        at = column // 2 * 4 + half * 2 + column % 2
                        token = row_tokens[half]
                        score = S[at]
                        if SOFTCAP:
                            power = ptx.exp2(score * factor)
                            score = cap - float32(2) * cap * ptx.reciprocal(power + float32(1))
                        elif SCORED:
                            score = score * factor
                        if ALIBI:
                            score -= row_slopes[half] * float32(token - behind)
                        there = number - listed < end - first
                        S[at] = score if there and sees(keys, token, behind, position) else HIDDEN
                lane_maxima(S, top)
                if ptx.vote_any(outgrown(top, scale, m)):
                    raise_maxima(top, scale, m, l, O)
                if CODED and first < coded:
                    if not AHEAD:
                        load_V(record, first, kv_head, kv_heads, words, V_a, V_b)
                    store_V(shared, words, V_a, V_b)
                ptx.cp_async_wait()
                cuda.syncthreads()  # V is there, and nobody reads K
                first = int32(first + TILE)
                if CODED and first < min(coded, end):
                    if AHEAD:
                        load_K(record, first, kv_head, kv_heads, words, K_a, K_b)
                elif first < end:
                    copy_K(shared, keys, int32(first - coded), int32(end - coded), kv_head, int64(0), k_tail, k_token)
                add_weighted_values(V_at, S, scale, m, l, O)

            ptx.cp_async_wait()
            total_rows(l)
            cuda.syncthreads()  # nobody reads the tiles any more: the results have their place
            results = cuda.shared.array(0, float32)
            for half in range(2):
                r = key_warp * ROWS + 16 * row_warp + (lane >> 2) + 8 * half
                for column in range(OUTPUTS // 2):
                    element = 8 * (column // 2) + column % 2 + 2 * (lane & 3)
                    if element < D:
                        results[r * PITCH + element] = O[column // 2 * 4 + half * 2 + column % 2]
                if lane & 3 == 0:
                    results[SUMS + 2 * r], results[SUMS + 2 * r + 1] = m[half], l[half]
            cuda.syncthreads()
            partial = int64(ptx.load_global_b32(item + ITEM_AT.partial))
            place = BlockPlace(entry, partial, kv_head, group, first_row, last_row, tokens, q_heads)
            write_rows(results, place, out_own, out_batch, out_token, out_head, partials, partial_sums, sinks)

        return tensor_decode

"""Split-KV decode over pages of codes, on CUDA cores: codes are read as codes, and all sums are in float32.

As `vector_decode`: a block computes up to 4 query rows of one KV head over one share of the keys, lanes stand along a
key's elements, and each group of lanes runs an online softmax of its own. A warp takes a page, and a group of its lanes
successive tokens of that. No element is computed. With a x + b for an element (`codes`),

    by channel:  q.k = sum of (q a) x + sum of q b         q a and the second sum once for each page
    by token:    q.k = a (sum of q x) + b (sum of q)       over each group of a token's elements
    values:      O += (p a) x, and p b is summed apart     the elements of a lane are of one group

So a code costs a shift, a logical operation and a multiply-add. Behind the codes come the tokens in float16: sink
tokens, and the page that the queries stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import cuda, float32, int32, int64
from numba.cuda import types

from . import ptx
from .block_result import BlockPlace, BlockResult
from .codes import (
    CodeFormat,
    CodeShare,
    expand_codes,
    first_element,
    load_channel_factors,
    load_codes,
    load_token_factors,
    place_of_piece,
)
from .decode_score import score_row
from .decode_variant import DECODE_PARAMETERS, DecodeVariant
from .lane_groups import merge_lane_groups, sum_lanes
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
from .row_elements import IN_ORDER, PIECE, itemsize, load_elements
from .softmax import NOTHING_SEEN

__all__ = ["CodeDecode"]

_WARPS = 4
_MAX_ELEMENTS = 32  # of q and of O in a lane: 204 to 218 registers; twice as many spill
_TOKENS = 4  # of which a lane loads the codes at a time: 4 KiB a warp under way


@dataclass(frozen=True)
class CodeDecode:
    """The kernel, and how it is launched: grid (items, kv heads, row blocks).

    Rows of q, out and the step's k and v, which are float16, are aligned to 16 bytes. Nothing that it reads is written
    by the launch. Shares of keys begin and end at whole pages, and codes are finite.

    Attributes:
        variant: What it is specialised for; it has codes.
        rows: Query rows of a block.
    """

    variant: DecodeVariant
    rows: int

    threads = 32 * _WARPS

    @classmethod
    def of(cls, variant: DecodeVariant, rows: int) -> CodeDecode:
        """Return the kernel for so many query rows of a KV head."""
        most = _MAX_ELEMENTS // _share(variant).elements
        return cls(variant, min(most, 1 << (rows - 1).bit_length()))

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that registers must suffice for."""
        elements = self.rows * _share(self.variant).elements
        return 4 if elements <= 8 else 3 if elements <= 16 else 2  # with 16, at 4 blocks, up to 196 bytes are spilled

    @property
    def result(self) -> BlockResult:
        """How the warps' results meet."""
        return BlockResult(_WARPS, self.rows, self.variant.head_dim)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: results, and queries."""
        return self.result.nbytes + 4 * self.rows * self.variant.head_dim

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*DECODE_PARAMETERS.values())

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        variant, pages, share, R = self.variant, _pages(self.variant), _share(self.variant), self.rows
        SINKS, score_key, sees = variant.sinks, score_row(variant), sees_key(masked=variant.masked)
        D, E, LANES, HOLDERS, EVEN = (
            variant.head_dim, share.elements, share.lanes, share.holders, share.lanes == share.holders
        )  # fmt: skip
        PAGE, GROUPS = pages.page_size, 32 // LANES
        N = min(_TOKENS, max(1, PAGE // GROUPS))
        TILE, CODES = GROUPS * N, 2 * N
        OUT, SCORES, PIECES = R * E, R * N, R * D // PIECE
        BY_CHANNEL, KEY_GROUP, VALUE_GROUP = pages.key_group == 0, pages.key_group or D, pages.value_group
        KEY_BYTES, VALUE_BYTES, CODES_BYTES, ROW_BYTES = (
            pages.key_nbytes, pages.value_nbytes, pages.codes_nbytes, share.row_bytes
        )  # fmt: skip
        STEP_BYTES, FLOAT_BYTES = itemsize(variant.step_dtype), itemsize(variant.dtype)
        KEYS = 32 * _WARPS // LANES
        WARPS, THREADS = _WARPS, self.threads
        result = self.result
        PITCH, SUMS, QUERIES = result.pitch, result.sums, result.nbytes // 4
        NOTHING, HIDDEN = float32(NOTHING_SEEN), float32(float("-inf"))
        load, load_query = load_elements(share.floats, variant.dtype), load_elements(IN_ORDER, variant.step_dtype)
        load_row_codes, expand, first_of, place_of = (
            load_codes(share, range(N)), expand_codes(share), first_element(share), place_of_piece(share)
        )  # fmt: skip
        load_channels = load_channel_factors(pages, D, share.floats)
        load_key_factors = load_token_factors(pages, range(N), N, D // KEY_GROUP)
        load_value_factors = load_token_factors(pages, range(N), N, D // VALUE_GROUP)
        list_block, position_of, address_of = list_keys(), key_position(), key_address(D * FLOAT_BYTES)
        sum_group, merge_groups = sum_lanes(LANES), merge_lane_groups(LANES, R, E)
        write_rows = result.write(self.threads, variant.step_dtype, sinks=SINKS)

        def weigh(tokens: int) -> Any:
            """Return what makes weights of the scores of so many tokens, and rescales all sums to new maxima."""

            @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
            def make_weights(S, m, l, shift, O):
                for r in range(R):
                    top = m[r]
                    for n in range(tokens):
                        top = ptx.maximum(top, S[r * N + n])
                    faded = ptx.exp2(m[r] - top)
                    m[r], l[r], shift[r] = top, l[r] * faded, shift[r] * faded
                    for i in range(E):
                        O[r * E + i] *= faded
                    for n in range(tokens):
                        weight = ptx.exp2(S[r * N + n] - top)
                        S[r * N + n] = weight
                        l[r] += weight

            return make_weights

        weigh_tokens, weigh_one = weigh(N), weigh(1)

        def code_decode(
            q, k, v, out, records, items, partials, partial_sums, slopes, sinks,
            q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token,
            out_head, tokens, q_heads, kv_heads, group, factor, cap,
        ):  # fmt: skip
            thread = ptx.thread_x()
            warp, lane_group, own = thread >> 5, (thread & 31) // LANES, thread & (LANES - 1)
            item, kv_head = items + ITEM_BYTES * int64(ptx.block_x()), ptx.block_y()
            record = records + RECORD_BYTES * int64(ptx.load_global_b32(item + ITEM_AT.sequence))
            first_row, all_rows = ptx.block_z() * R, ptx.load_global_b32(record + RECORD_AT.queries) * group
            if first_row >= all_rows:
                return  # another record has more queries
            last_row = min(first_row + R, all_rows) - 1
            entry = int64(ptx.load_global_b32(record + RECORD_AT.entry))
            first_query = int64(ptx.load_global_b32(record + RECORD_AT.first_query))
            keys = list_block(record, Rows(int32(first_row // group), int32(last_row // group)))
            exists = EVEN or own < HOLDERS
            element = first_of(own)

            X, V = cuda.local.array(E, float32), cuda.local.array(E, float32)
            Q, O = cuda.local.array(OUT, float32), cuda.local.array(OUT, float32)
            m, l, shift = cuda.local.array(R, float32), cuda.local.array(R, float32), cuda.local.array(R, float32)
            S, aside = cuda.local.array(SCORES, float32), cuda.local.array(R, float32)
            K_codes, V_codes = cuda.local.array(CODES, int32), cuda.local.array(CODES, int32)
            K_a, K_b = cuda.local.array(N, float32), cuda.local.array(N, float32)
            V_a, V_b = cuda.local.array(N, float32), cuda.local.array(N, float32)
            channel_a, channel_b = cuda.local.array(E, float32), cuda.local.array(E, float32)

            # Queries go to shared memory, so that a lane's lie at the same distance from the next lane's.
            shared = cuda.shared.array(0, float32)
            piece = thread
            while piece < PIECES:
                r = piece // (D // PIECE)
                column = (piece - r * (D // PIECE)) * PIECE
                row = min(first_row + r, last_row)
                token = row // group
                head = kv_head * group + row - token * group
                load_query(
                    q + entry * q_batch + (first_query + token) * q_token + head * q_head + column * STEP_BYTES, O
                )  # fmt: skip
                holder, at = place_of(column)
                for i in range(PIECE):
                    shared[QUERIES + r * D + (at + i) * HOLDERS + holder] = O[i]
                piece += THREADS
            cuda.syncthreads()
            for i in range(E):
                X[i] = V[i] = channel_a[i] = channel_b[i] = float32(0)
            for n in range(N):
                K_a[n] = K_b[n] = V_a[n] = V_b[n] = float32(0)
                K_codes[2 * n] = K_codes[2 * n + 1] = V_codes[2 * n] = V_codes[2 * n + 1] = 0
            for r in range(R):
                m[r], l[r], shift[r], aside[r] = NOTHING, float32(0), float32(0), float32(0)
                for i in range(E):
                    O[r * E + i] = Q[r * E + i] = float32(0)
                    if exists:
                        Q[r * E + i] = shared[QUERIES + r * D + i * HOLDERS + own]
                    aside[r] += Q[r * E + i]

            first, end = ptx.load_global_b32(item + ITEM_AT.first), ptx.load_global_b32(item + ITEM_AT.end)
            first_page = ptx.load_global_b32(record + RECORD_AT.first_page)
            own_page = ptx.load_global_b32(record + RECORD_AT.own_page)
            coded = (own_page - first_page) * PAGE
            table = ptx.load_global_b64(record + RECORD_AT.code_table)
            slots = ptx.load_global_b32(record + RECORD_AT.code_slots)
            page, last_page = first_page + first // PAGE + warp, first_page + min(end, coded) // PAGE
            while page < last_page:
                address = ptx.load_global_b64(table + 8 * int64(page % slots))
                key_codes = address + kv_head * int64(KEY_BYTES)
                value_codes = address + kv_heads * int64(KEY_BYTES) + kv_head * int64(VALUE_BYTES)
                if BY_CHANNEL:
                    if exists:
                        load_channels(key_codes + CODES_BYTES + 2 * element, channel_a, channel_b)
                    for r in range(R):
                        aside[r] = float32(0)
                        for i in range(E):
                            if exists:
                                Q[r * E + i] = shared[QUERIES + r * D + i * HOLDERS + own]
                            aside[r] += Q[r * E + i] * channel_b[i]
                            Q[r * E + i] *= channel_a[i]
                tile = 0
                while tile < PAGE:
                    inside = tile + lane_group * N
                    there = inside < PAGE
                    if there and exists:
                        load_row_codes(key_codes + inside * ROW_BYTES + own * 8, K_codes)
                        load_row_codes(value_codes + inside * ROW_BYTES + own * 8, V_codes)
                        load_value_factors(
                            value_codes + CODES_BYTES + 2 * (element // VALUE_GROUP * PAGE + inside), V_a, V_b
                        )  # fmt: skip
                        if not BY_CHANNEL:
                            load_key_factors(
                                key_codes + CODES_BYTES + 2 * (element // KEY_GROUP * PAGE + inside), K_a, K_b
                            )  # fmt: skip
                    behind = keys.sink_tokens + page * PAGE + inside - keys.start
                    for n in range(N):
                        expand(K_codes[2 * n], K_codes[2 * n + 1], X)
                        for r in range(R):
                            dot = float32(0)
                            for i in range(E):
                                dot += Q[r * E + i] * X[i]
                            if BY_CHANNEL:
                                dot += aside[r]
                            else:
                                dot = K_a[n] * dot + K_b[n] * aside[r]
                            dot = sum_group(dot)
                            token, score = score_key(
                                dot, min(first_row + r, last_row), behind + n, kv_head, group, slopes, entry, q_heads,
                                factor, cap,
                            )  # fmt: skip
                            S[r * N + n] = score if there and behind + n > token - keys.window else HIDDEN
                    weigh_tokens(S, m, l, shift, O)
                    for n in range(N):
                        expand(V_codes[2 * n], V_codes[2 * n + 1], X)
                        for r in range(R):
                            weight = S[r * N + n] * V_a[n]
                            shift[r] += S[r * N + n] * V_b[n]
                            for i in range(E):
                                O[r * E + i] += weight * X[i]
                    tile += TILE
                page += WARPS

            # The tokens in float16.
            if BY_CHANNEL and exists:
                for r in range(R):
                    for i in range(E):
                        Q[r * E + i] = shared[QUERIES + r * D + i * HOLDERS + own]
            number = max(first - coded, 0) + thread // LANES
            end = min(end - coded, keys.count)
            while number - thread // LANES < end:
                there = number < end
                position = position_of(keys, number)
                if there and exists:
                    if position >= keys.length:
                        token = int64(position - keys.length)
                        key = k + entry * k_batch + token * k_token + kv_head * k_head + FLOAT_BYTES * element
                        value = v + entry * v_batch + token * v_token + kv_head * v_head + FLOAT_BYTES * element
                    else:
                        key = address_of(keys, position, kv_head) + FLOAT_BYTES * element
                        value = key + kv_heads * int64(PAGE * D * FLOAT_BYTES)
                    load(key, X)
                    load(value, V)
                behind = position - keys.start
                for r in range(R):
                    dot = float32(0)
                    for i in range(E):
                        dot += Q[r * E + i] * X[i]
                    dot = sum_group(dot)
                    token, score = score_key(
                        dot, min(first_row + r, last_row), behind, kv_head, group, slopes, entry, q_heads, factor, cap
                    )  # fmt: skip
                    S[r * N] = score if there and sees(keys, token, behind, position) else HIDDEN
                weigh_one(S, m, l, shift, O)
                for r in range(R):
                    for i in range(E):
                        O[r * E + i] += S[r * N] * V[i]
                number += KEYS
            for r in range(R):
                for i in range(E):
                    O[r * E + i] += shift[r]

            # The groups of a warp, by shuffles; then the warps, through shared memory.
            merge_groups(m, l, O)
            if (thread & 31) < LANES:
                for r in range(R):
                    if exists:
                        for i in range(E):
                            shared[(warp * R + r) * PITCH + element + i // PIECE * 16 + i % PIECE] = O[r * E + i]
                    if own == 0:
                        shared[SUMS + 2 * (warp * R + r)] = m[r]
                        shared[SUMS + 2 * (warp * R + r) + 1] = l[r]
            cuda.syncthreads()
            partial = int64(ptx.load_global_b32(item + ITEM_AT.partial))
            place = BlockPlace(entry, partial, kv_head, group, first_row, last_row, tokens, q_heads)
            own_out = out + first_query * out_token
            write_rows(shared, place, own_out, out_batch, out_token, out_head, partials, partial_sums, sinks)

        return code_decode


def _pages(variant: DecodeVariant) -> CodeFormat:
    assert variant.codes is not None
    return variant.codes


def _share(variant: DecodeVariant) -> CodeShare:
    return CodeShare(variant.head_dim, _pages(variant).bits)

"""Split-KV decode on CUDA cores ("Flash-Decoding", Dao et al., 2023): every sum in float32, any mix of dtypes.

A block computes up to 8 query rows of one KV head over one share of the keys. Lanes stand along a key's elements, as
many keys side by side as a warp has room for; each group of lanes runs an online softmax of its own over every
n-th key, and all of them are merged at the end:

    s = q.k;  m = max(m, s), O and l rescaled;  l += exp(s - m);  O += exp(s - m) v

One row reads every key once and does 4 operations for each element that it reads, so that memory is the bound; tensor
cores would compute 15 rows of zeros beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import cuda, float32, int32, int64
from numba.cuda import types

from . import ptx
from .block_result import BlockPlace, BlockResult
from .decode_score import score_row
from .decode_variant import DECODE_PARAMETERS, DecodeVariant
from .lane_groups import merge_lane_groups, sum_lanes
from .paged_keys import ITEM_AT, ITEM_BYTES, RECORD_BYTES, Rows, key_address, key_position, list_keys, sees_key
from .row_elements import RowShare, itemsize, load_elements, round_elements
from .softmax import NOTHING_SEEN

__all__ = ["MAX_ROWS", "VectorDecode"]

_WARPS = 4
MAX_ROWS = 8
"""Rows of a block: at a head dim of 256, q and O of 8 take 128 registers."""


@dataclass(frozen=True)
class VectorDecode:
    """The kernel, and how it is launched: grid (items, kv heads, row blocks).

    Rows of q, out and the step's k and v are aligned to 16 bytes and padded to a multiple of 8 elements, as pages are.
    Nothing that it reads is written by the launch. An item whose result is the whole one has a key for every row.

    Attributes:
        variant: What it is specialised for.
        rows: Query rows of a block, 1 to `MAX_ROWS`.
    """

    variant: DecodeVariant
    rows: int

    threads = 32 * _WARPS

    @classmethod
    def of(cls, variant: DecodeVariant, rows: int) -> VectorDecode:
        """Return the kernel for so many query rows of a KV head."""
        return cls(variant, min(MAX_ROWS, 1 << (rows - 1).bit_length()))

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that registers must suffice for."""
        return 4 if self.rows * self.share.elements <= 16 else 3 if self.rows * self.share.elements <= 32 else 2

    @property
    def result(self) -> BlockResult:
        """How the warps' results meet."""
        return BlockResult(_WARPS, self.rows, self.variant.head_dim)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.result.nbytes

    @property
    def share(self) -> RowShare:
        """How lanes share a row."""
        return RowShare.of(self.variant.head_dim, self.variant.dtype)

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*DECODE_PARAMETERS.values())

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        variant, share, R = self.variant, self.share, self.rows
        SINKS, score_key, sees = variant.sinks, score_row(variant), sees_key(masked=variant.masked)
        D, CHUNK, LANES, E, EVEN, CHUNKS = (
            variant.head_dim, share.chunk, share.lanes, share.elements, share.even, share.chunks
        )  # fmt: skip
        MIXED = variant.dtype != variant.step_dtype
        ROW_BYTES, CHUNK_BYTES = D * itemsize(variant.dtype), CHUNK * itemsize(variant.dtype)
        STEP_CHUNK_BYTES = CHUNK * itemsize(variant.step_dtype)
        KEYS = 32 * _WARPS // LANES
        OUT = R * E
        result = self.result
        PITCH, SUMS = result.pitch, result.sums
        NOTHING = float32(NOTHING_SEEN)
        load, load_step, round_step = (
            load_elements(share, variant.dtype), load_elements(share, variant.step_dtype),
            round_elements(share, variant.dtype),
        )  # fmt: skip
        list_block, position_of, address_of = list_keys(), key_position(), key_address(ROW_BYTES)
        sum_group, merge_groups = sum_lanes(LANES), merge_lane_groups(LANES, R, E)
        write_rows = result.write(self.threads, variant.step_dtype, sinks=SINKS)

        def vector_decode(
            q, k, v, out, records, items, partials, partial_sums, slopes, sinks,
            q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token,
            out_head, tokens, q_heads, kv_heads, group, factor, cap,
        ):  # fmt: skip
            thread = ptx.thread_x()
            warp, own = thread >> 5, thread & (LANES - 1)
            item, kv_head = items + ITEM_BYTES * int64(ptx.block_x()), ptx.block_y()
            first_row, all_rows = ptx.block_z() * R, tokens * group
            last_row = min(first_row + R, all_rows) - 1
            sequence = int64(ptx.load_global_b32(item + ITEM_AT.sequence))
            rows = Rows(int32(first_row // group), int32(last_row // group))
            keys = list_block(records + RECORD_BYTES * sequence, rows)
            end = min(ptx.load_global_b32(item + ITEM_AT.end), keys.count)
            exists = EVEN or own < CHUNKS

            K, V = cuda.local.array(E, float32), cuda.local.array(E, float32)
            Q, O = cuda.local.array(OUT, float32), cuda.local.array(OUT, float32)
            m, l = cuda.local.array(R, float32), cuda.local.array(R, float32)
            for i in range(E):
                K[i] = V[i] = float32(0)
            for r in range(R):
                row = min(first_row + r, last_row)
                token = row // group
                if exists:
                    load_step(
                        q + sequence * q_batch + token * q_token + (kv_head * group + row - token * group) * q_head
                        + own * STEP_CHUNK_BYTES, K
                    )  # fmt: skip
                for i in range(E):
                    Q[r * E + i] = K[i]
                    O[r * E + i] = float32(0)
                m[r], l[r] = NOTHING, float32(0)

            number = ptx.load_global_b32(item + ITEM_AT.first) + thread // LANES
            while number - thread // LANES < end:
                there = number < end
                position = position_of(keys, number)
                if there and exists:
                    if position >= keys.length:
                        token = int64(position - keys.length)
                        key = k + sequence * k_batch + token * k_token + kv_head * k_head + own * STEP_CHUNK_BYTES
                        value = v + sequence * v_batch + token * v_token + kv_head * v_head + own * STEP_CHUNK_BYTES
                        load_step(key, K)
                        load_step(value, V)
                        if MIXED:
                            round_step(K)
                            round_step(V)
                    else:
                        key = address_of(keys, position, kv_head) + own * CHUNK_BYTES
                        load(key, K)
                        load(key + (int64(kv_heads) << keys.page_shift) * ROW_BYTES, V)
                elif not there:
                    for i in range(E):
                        V[i] = float32(0)
                behind = position - keys.start
                for r in range(R):
                    dot = float32(0)
                    for i in range(E):
                        dot += Q[r * E + i] * K[i]
                    dot = sum_group(dot)
                    row = min(first_row + r, last_row)
                    token, score = score_key(
                        dot, row, behind, kv_head, group, slopes, sequence, q_heads, factor, cap
                    )  # fmt: skip
                    if there and sees(keys, token, behind, position):
                        top = ptx.maximum(m[r], score)
                        faded, weight = ptx.exp2(m[r] - top), ptx.exp2(score - top)
                        m[r], l[r] = top, l[r] * faded + weight
                        for i in range(E):
                            O[r * E + i] = O[r * E + i] * faded + weight * V[i]
                number += KEYS

            # The groups of a warp, by shuffles; then the warps, through shared memory.
            merge_groups(m, l, O)
            shared = cuda.shared.array(0, float32)
            if (thread & 31) < LANES:
                for r in range(R):
                    if exists:
                        for i in range(E):
                            column = i // CHUNK * (LANES * CHUNK) + own * CHUNK + i % CHUNK
                            if column < D:
                                shared[(warp * R + r) * PITCH + column] = O[r * E + i]
                    if own == 0:
                        shared[SUMS + 2 * (warp * R + r)] = m[r]
                        shared[SUMS + 2 * (warp * R + r) + 1] = l[r]
            cuda.syncthreads()
            partial = int64(ptx.load_global_b32(item + ITEM_AT.partial))
            place = BlockPlace(sequence, partial, kv_head, group, first_row, last_row, tokens, q_heads)
            write_rows(shared, place, out, out_batch, out_token, out_head, partials, partial_sums, sinks)

        return vector_decode

"""Register-tiled micro-kernels over quantized keys and values: codes become float32 in the register, never in memory.

A row of codes goes in blocks of BLOCK elements. Of 8 bits each, they lie in order; of 4 bits, byte i of a block holds
element i below and element i + 16 above, so that a vector of bytes splits into two vectors of elements without a
shuffle. Codes are unsigned; scales and offsets are the caller's (`codes.py`).
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from . import emit
from .emit import F32, I32, I64, LANES, VECTOR
from .intrinsics import Emitter, choice, instruction
from .jit import native
from .micro import ROWS_TOGETHER, counted_loop, horizontal_sums, strided
from .target import TARGET
from .vector import FloatVector

__all__ = [
    "BLOCK",
    "ROWS_PER_WEIGHT",
    "load_codes",
    "load_high_codes",
    "load_low_codes",
    "score_codes",
    "score_scaled_codes",
    "store_codes",
    "weigh_codes",
]

BLOCK = 32
_BLOCK_VECTORS = BLOCK // LANES
_VECTOR_BYTES = 4 * LANES

# Rows that share a block of values, once it is unpacked: their sums take half of the registers (32 or 16).
ROWS_PER_WEIGHT = min(4, (16 if TARGET.rows == 8 else 8) // _BLOCK_VECTORS)
_WIDE_BLOCKS = 2 if LANES == 16 else 1

# Bytes from a code to the one that is prefetched a second time.
_SOON = 4096


def _bytes(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    loaded = emit.load_at(builder, address, ir.VectorType(ir.IntType(8), LANES), align=1)
    return builder.zext(loaded, ir.VectorType(I32, LANES))


def _low(builder: ir.IRBuilder, two: ir.Value) -> ir.Value:
    if LANES == 16:
        return _number(builder, two)
    return builder.sitofp(builder.and_(two, emit.constant(15, two.type)), VECTOR)


def _high(builder: ir.IRBuilder, two: ir.Value) -> ir.Value:
    shifted = builder.lshr(two, emit.constant(4, two.type))
    return _number(builder, shifted) if LANES == 16 else builder.sitofp(shifted, VECTOR)


def _number(builder: ir.IRBuilder, lanes: ir.Value) -> ir.Value:
    """What each lane's lowest four bits count: AVX-512's vpermps looks it up, without a mask and a conversion."""
    kind = ir.FunctionType(VECTOR, [VECTOR, lanes.type])
    look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    return builder.call(look_up, [ir.Constant(VECTOR, [float(i) for i in range(16)]), lanes])


def _unpack(builder: ir.IRBuilder, address: ir.Value, bits: int) -> list[ir.Value]:
    """The block of codes at an address as float32 vectors, in the order of the elements."""
    count = _BLOCK_VECTORS * bits // 8
    loaded = [_bytes(builder, emit.offset(builder, address, i * LANES)) for i in range(count)]
    if bits == 8:
        return [builder.sitofp(vector, VECTOR) for vector in loaded]
    return [_low(builder, two) for two in loaded] + [_high(builder, two) for two in loaded]


def _prefetch(builder: ir.IRBuilder, at: ir.Value, ahead: ir.Value) -> None:
    """Ask for what is wanted next, and once more for what is wanted soon.

    Codes are read faster than memory gives them, and what is asked for while much is under way seems to be forgotten:
    asked once, a head's page takes 1,660 ns in int8 and 1,025 in int4, not 1,440 and 860 (an AVX-512 Xeon).
    """
    emit.prefetch(builder, builder.add(at, ahead))
    emit.prefetch(builder, emit.offset(builder, at, _SOON))


def _score_block(bits: int, rows: int, scaled: bool) -> Emitter:
    """scores[row, key] = start[row] + sum over elements of q[row] * code[key], for `rows` rows and LANES / rows keys.

    `start` are vectors whose lanes are to be summed. With `scaled`, there are none, and a block's part counts as often
    as the float32 at `scales[block >> shift, key]` says. Keys past `last` repeat key `last`.
    """
    keys = LANES // rows

    def score(
        builder: ir.IRBuilder,
        k: ir.Value,
        k_stride: ir.Value,
        last: ir.Value,
        ahead: ir.Value,
        q: ir.Value,
        q_row: ir.Value,
        blocks: ir.Value,
        start: ir.Value,
        scales: ir.Value,
        scales_row: ir.Value,
        shift: ir.Value,
        scores: ir.Value,
        scores_row: ir.Value,
    ) -> None:
        key_at = []
        for key in range(keys):
            wanted = ir.Constant(I64, key)
            index = builder.select(builder.icmp_signed("<", wanted, last), wanted, last)
            key_at.append(builder.add(k, builder.mul(index, k_stride)))
        q_rows = strided(builder, q, q_row, rows)
        if scaled:
            first = [emit.constant(0.0, VECTOR)] * rows
        else:
            first = [emit.load_at(builder, emit.offset(builder, start, i * _VECTOR_BYTES), VECTOR) for i in range(rows)]
        sums_before = [vector for vector in first for _ in range(keys)]
        with counted_loop(builder, blocks, sums_before) as (block, sums, following, totals):
            k_offset = builder.mul(block, ir.Constant(I64, BLOCK * bits // 8))
            q_offset = builder.mul(block, ir.Constant(I64, 4 * BLOCK))
            queries = [
                [
                    emit.load_at(builder, emit.offset(builder, at, i * _VECTOR_BYTES), VECTOR)
                    for i in range(_BLOCK_VECTORS)
                ]
                for at in (builder.add(at, q_offset) for at in q_rows)
            ]
            scale_at = builder.add(scales, builder.mul(builder.lshr(block, shift), scales_row))
            updated: dict[tuple[int, int], ir.Value] = {}
            for key in range(keys):
                at = builder.add(key_at[key], k_offset)
                _prefetch(builder, at, ahead)
                codes = _unpack(builder, at, bits)
                if scaled:
                    element = emit.load_at(builder, emit.offset(builder, scale_at, 4 * key), F32)
                    scale = emit.broadcast(builder, element)
                for row in range(rows):
                    total = sums[row * keys + key]
                    if scaled:
                        part = builder.fmul(queries[row][0], codes[0])
                        for query, code in zip(queries[row][1:], codes[1:], strict=True):
                            part = emit.multiply_add(builder, query, code, part)
                        total = emit.multiply_add(builder, part, scale, total)
                    else:
                        for query, code in zip(queries[row], codes, strict=True):
                            total = emit.multiply_add(builder, query, code, total)
                    updated[row, key] = total
            following += [updated[row, key] for row in range(rows) for key in range(keys)]
        result = horizontal_sums(builder, totals)
        for row, at in enumerate(strided(builder, scores, scores_row, rows)):
            part = emit.shuffle(builder, result, result, list(range(row * keys, (row + 1) * keys)))
            emit.store_at(builder, at, part)

    return score


def _value_block(bits: int, rows: int, blocks: int) -> Emitter:
    """out[row, :] += sum over keys of weights[row, key] * code[key, :], for `blocks` blocks of elements."""
    vectors = blocks * _BLOCK_VECTORS

    def weigh(
        builder: ir.IRBuilder,
        v: ir.Value,
        v_stride: ir.Value,
        ahead: ir.Value,
        weights: ir.Value,
        weights_row: ir.Value,
        keys: ir.Value,
        out: ir.Value,
        out_row: ir.Value,
    ) -> None:
        weight_rows = strided(builder, weights, weights_row, rows)
        places = [
            emit.offset(builder, at, j * _VECTOR_BYTES)
            for at in strided(builder, out, out_row, rows)
            for j in range(vectors)
        ]
        start = [emit.load_at(builder, at, VECTOR) for at in places]
        with counted_loop(builder, keys, start) as (key, sums, following, totals):
            v_at = builder.add(v, builder.mul(key, v_stride))
            _prefetch(builder, v_at, ahead)
            codes = [
                vector
                for block in range(blocks)
                for vector in _unpack(builder, emit.offset(builder, v_at, block * BLOCK * bits // 8), bits)
            ]
            weight_offset = builder.mul(key, ir.Constant(I64, 4))
            for row, at in enumerate(weight_rows):
                weight = emit.broadcast(builder, emit.load_at(builder, builder.add(at, weight_offset), F32))
                following += [
                    emit.multiply_add(builder, weight, codes[j], sums[row * vectors + j]) for j in range(vectors)
                ]
        for at, total in zip(places, totals, strict=True):
            emit.store_at(builder, at, total)

    return weigh


def _load(unpack: Any) -> Any:
    return instruction(FloatVector, (types.int64,), lambda builder, at: unpack(builder, _bytes(builder, at)))


load_codes = _load(lambda builder, codes: builder.sitofp(codes, VECTOR))  # LANES codes of 8 bits as float32
load_low_codes, load_high_codes = _load(_low), _load(_high)  # the lower and upper halves of LANES bytes


def _store_codes(builder: ir.IRBuilder, address: ir.Value, codes: ir.Value) -> None:
    whole = builder.fptosi(codes, ir.VectorType(I32, LANES))
    emit.store_at(builder, address, builder.trunc(whole, ir.VectorType(ir.IntType(8), LANES)), align=1)


# Whole numbers below 256, as LANES bytes.
store_codes = instruction(types.void, (types.int64, FloatVector), _store_codes)


_SCORED = tuple(product((8, 4), (1, 2, ROWS_TOGETHER)))
score_block, score_scaled_block = (
    choice({kind: _score_block(*kind, scaled) for kind in _SCORED}, 13) for scaled in (False, True)
)
_WEIGHED = tuple(product((8, 4), sorted({1, 2, ROWS_PER_WEIGHT})))
weigh_block, weigh_wide_block = (
    choice({kind: _value_block(*kind, blocks) for kind in _WEIGHED}, 8) for blocks in (1, _WIDE_BLOCKS)
)


@native
def score_codes(bits, rows, k, k_stride, last, ahead, q, q_row, blocks, start, scores, scores_row):
    """Scores of LANES / rows keys without scales, for 1, 2 or ROWS_TOGETHER rows; see `_score_block`."""
    score_block(bits, rows, k, k_stride, last, ahead, q, q_row, blocks, start, 0, 0, 0, scores, scores_row)


@native
def score_scaled_codes(
    bits, rows, k, k_stride, last, ahead, q, q_row, blocks, scales, scales_row, shift, scores, scores_row
):
    """Scores of LANES / rows keys, each block times its scale, for 1, 2 or ROWS_TOGETHER rows; see `_score_block`."""
    score_scaled_block(
        bits, rows, k, k_stride, last, ahead, q, q_row, blocks, 0, scales, scales_row, shift, scores, scores_row
    )


@native
def weigh_codes(bits, rows, v, v_stride, ahead, weights, weights_row, count, out, out_row, blocks):
    """out[row] += sum of weights[row, key] * code[key] over `count` keys and `blocks` blocks.

    There are 1, 2 or ROWS_PER_WEIGHT rows.
    """
    block = 0
    while block < blocks:
        at, to = v + block * BLOCK * bits // 8, out + block * 4 * BLOCK
        if block + _WIDE_BLOCKS <= blocks:
            weigh_wide_block(bits, rows, at, v_stride, ahead, weights, weights_row, count, to, out_row)
            block += _WIDE_BLOCKS
        else:
            weigh_block(bits, rows, at, v_stride, ahead, weights, weights_row, count, to, out_row)
            block += 1

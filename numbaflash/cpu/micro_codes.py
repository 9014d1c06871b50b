"""Register-tiled micro-kernels over quantized keys and values, in integers: codes of 4 or 8 bits, without a sign.

What they are multiplied with, queries and weights, comes in rows of 16-bit integers with a sign ("words"). Products are
added in pairs to 32 bits, exactly: one instruction for two products a lane, where float32 takes two conversions and two
multiply-adds. No sum overflows, for a head has at most 256 elements and a page at most 256 tokens: 256 * 255 * 32767 is
less than 2^31.

A row of codes goes in blocks of BLOCK elements. Of 8 bits each, they lie in order; of 4 bits, byte i of a block holds
element i below and element i + 16 above, so that a vector of bytes splits into two vectors of elements without a
shuffle.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from . import emit
from .emit import F32, I16, I32, I64, LANES, VECTOR
from .intrinsics import Emitter, choice, instruction
from .jit import native
from .micro import ROWS_TOGETHER, counted_loop, horizontal_sums, strided
from .target import TARGET
from .vector import FloatVector

__all__ = [
    "BLOCK",
    "MAX_WORD",
    "ROWS_PER_WEIGHT",
    "STEP_BYTES",
    "load_codes",
    "load_high_codes",
    "load_low_codes",
    "score_codes",
    "store_codes",
    "store_words",
    "weigh_codes",
    "word_of_element",
    "words_of_codes",
]

BLOCK = 32
MAX_WORD = 32767
STEP_BYTES = 2 * LANES  # of keys, which become one vector of words, or two
_HALF_BLOCK = BLOCK // 2
_BLOCK_VECTORS = BLOCK // LANES
_VECTOR_BYTES = 4 * LANES

_I8 = ir.IntType(8)
_SUMS = ir.VectorType(I32, LANES)
_WORDS = ir.VectorType(I16, 2 * LANES)

# Rows that share a block of values, once it is unpacked: their sums take half of the registers (32 or 16).
ROWS_PER_WEIGHT = min(4, (16 if TARGET.rows == 8 else 8) // _BLOCK_VECTORS)
_WIDE_BLOCKS = 2 if LANES == 16 else 1

# What is wanted a page from now waits in the L2 cache: asking for it in L1 is slower by some 6 % (an AVX-512 Xeon).
_PREFETCH_TO = 2


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


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    """Lane i of the total plus a[2i] * b[2i] + a[2i + 1] * b[2i + 1]: one instruction of AVX512-VNNI, two before it."""
    if TARGET.is_x86:
        name = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}[LANES]
        kind = ir.FunctionType(_SUMS, [_WORDS, _WORDS])
        return builder.add(total, builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b]))
    for first in (0, 1):
        lanes = list(range(first, 2 * LANES, 2))
        total = builder.add(
            total, builder.mul(*(builder.sext(emit.shuffle(builder, x, x, lanes), _SUMS) for x in (a, b)))
        )
    return total


def _split(builder: ir.IRBuilder, words: ir.Value, bits: int) -> list[ir.Value]:
    """The elements of bytes that were widened to words: themselves, or all lower ones, then all upper ones."""
    if bits == 8:
        return [words]
    return [builder.and_(words, emit.constant(15, _WORDS)), builder.lshr(words, emit.constant(4, _WORDS))]


def _element_of(byte: int, vector: int, bits: int) -> int:
    """The element of a row that a byte holds, in the `vector`-th of those that `_split` makes."""
    return byte if bits == 8 else byte // _HALF_BLOCK * BLOCK + byte % _HALF_BLOCK + vector * _HALF_BLOCK


def _score_block(bits: int, rows: int) -> Emitter:
    """sums[row, key] = q[row] . code[key], as float32, for `rows` rows of words and LANES / rows keys.

    Keys go in `steps` of STEP_BYTES. Those past `last` repeat key `last`.
    """
    keys, vectors = LANES // rows, 8 // bits

    def score(
        builder: ir.IRBuilder,
        k: ir.Value,
        k_stride: ir.Value,
        last: ir.Value,
        ahead: ir.Value,
        q: ir.Value,
        q_row: ir.Value,
        steps: ir.Value,
        sums: ir.Value,
        sums_row: ir.Value,
    ) -> None:
        key_at = [k]
        for key in range(1, keys):
            exists = builder.icmp_signed("<=", ir.Constant(I64, key), last)
            key_at.append(builder.add(key_at[-1], builder.select(exists, k_stride, ir.Constant(I64, 0))))
        q_rows = strided(builder, q, q_row, rows)
        start = [emit.constant(0, _SUMS)] * LANES
        with counted_loop(builder, steps, start) as (step, before, following, totals):
            k_offset = builder.mul(step, ir.Constant(I64, STEP_BYTES))
            q_offset = builder.mul(step, ir.Constant(I64, vectors * _VECTOR_BYTES))
            queries = [
                [emit.load_at(builder, emit.offset(builder, at, i * _VECTOR_BYTES), _WORDS) for i in range(vectors)]
                for at in (builder.add(at, q_offset) for at in q_rows)
            ]
            updated: dict[tuple[int, int], ir.Value] = {}
            for key in range(keys):
                at = builder.add(key_at[key], k_offset)
                emit.prefetch(builder, builder.add(at, ahead), _PREFETCH_TO)
                stored = emit.load_at(builder, at, ir.VectorType(_I8, STEP_BYTES), align=1)
                codes = _split(builder, builder.zext(stored, _WORDS), bits)
                for row in range(rows):
                    total = before[row * keys + key]
                    for query, code in zip(queries[row], codes, strict=True):
                        total = _multiply_add(builder, query, code, total)
                    updated[row, key] = total
            following += [updated[row, key] for row in range(rows) for key in range(keys)]
        result = builder.sitofp(horizontal_sums(builder, totals), VECTOR)
        for row, at in enumerate(strided(builder, sums, sums_row, rows)):
            part = emit.shuffle(builder, result, result, list(range(row * keys, (row + 1) * keys)))
            emit.store_at(builder, at, part)

    return score


def _pairs(
    builder: ir.IRBuilder, tokens: list[ir.Value], nbytes: int, bits: int
) -> tuple[list[ir.Value], list[list[int]]]:
    """The elements of two tokens in turns, as words, and which elements each vector has.

    Bytes are interleaved within 128 bits, for which there is one instruction, so elements come out of order.
    """
    first, second = (emit.load_at(builder, at, ir.VectorType(_I8, nbytes), align=1) for at in tokens)
    span = min(_HALF_BLOCK, nbytes)
    vectors, elements = [], []
    for half in range(nbytes // LANES):
        part = span * LANES // nbytes
        own = [at + i for at in range(half * part, nbytes, span) for i in range(part)]
        both = emit.shuffle(builder, first, second, [lane for byte in own for lane in (byte, nbytes + byte)])
        words = _split(builder, builder.zext(both, _WORDS), bits)
        vectors += words
        elements += [[_element_of(byte, i, bits) for byte in own] for i in range(len(words))]
    return vectors, elements


def _in_order(builder: ir.IRBuilder, vectors: list[ir.Value], elements: list[list[int]]) -> list[ir.Value]:
    """Sort vectors by the elements that they have; those of a result come from two of them at most."""
    place = {element: (n, lane) for n, own in enumerate(elements) for lane, element in enumerate(own)}
    ordered = []
    for at in range(0, len(place), LANES):
        sources = [place[element] for element in range(at, at + LANES)]
        a, b = min(sources)[0], max(sources)[0]
        ordered.append(emit.shuffle(builder, vectors[a], vectors[b], [lane + LANES * (n != a) for n, lane in sources]))
    return ordered


def _value_block(bits: int, rows: int, blocks: int) -> Emitter:
    """out[row, :] += factor[row] * sum over keys of weights[row, key] * code[key, :], for `blocks` blocks of elements.

    Keys go by two; behind an odd number of them there must be a weight of 0.
    """
    vectors, nbytes = blocks * _BLOCK_VECTORS, blocks * BLOCK * bits // 8
    pair_bytes = min(2 * LANES, nbytes)

    def weigh(
        builder: ir.IRBuilder,
        v: ir.Value,
        v_stride: ir.Value,
        ahead: ir.Value,
        weights: ir.Value,
        weights_row: ir.Value,
        keys: ir.Value,
        factors: ir.Value,
        factors_row: ir.Value,
        out: ir.Value,
        out_row: ir.Value,
    ) -> None:
        one, two = ir.Constant(I64, 1), ir.Constant(I64, 2)
        last = builder.sub(keys, one)
        weight_rows = strided(builder, weights, weights_row, rows)
        elements: list[list[int]] = []
        start = [emit.constant(0, _SUMS)] * (rows * vectors)
        with counted_loop(builder, builder.lshr(builder.add(keys, one), one), start) as (pair, sums, following, totals):
            key = builder.mul(pair, two)
            first = builder.add(v, builder.mul(key, v_stride))
            has_second = builder.icmp_signed("<", key, last)
            tokens = [first, builder.add(first, builder.select(has_second, v_stride, ir.Constant(I64, 0)))]
            for at in tokens:
                emit.prefetch(builder, builder.add(at, ahead), _PREFETCH_TO)
            codes: list[ir.Value] = []
            for at in range(0, nbytes, pair_bytes):
                words, own = _pairs(builder, [emit.offset(builder, token, at) for token in tokens], pair_bytes, bits)
                codes += words
                elements += [[_element_of(at, 0, bits) + element for element in vector] for vector in own]
            for row_at in weight_rows:
                two_weights = emit.load_at(builder, builder.add(row_at, builder.mul(pair, ir.Constant(I64, 4))), I32)
                weight = builder.bitcast(emit.broadcast(builder, two_weights), _WORDS)
                row = len(following)
                following += [_multiply_add(builder, weight, code, sums[row + j]) for j, code in enumerate(codes)]
        factor_at = strided(builder, factors, factors_row, rows)
        for row, out_at in enumerate(strided(builder, out, out_row, rows)):
            factor = emit.broadcast(builder, emit.load_at(builder, factor_at[row], F32))
            own_totals = _in_order(builder, totals[row * vectors : (row + 1) * vectors], elements)
            for j, total in enumerate(own_totals):
                at = emit.offset(builder, out_at, j * _VECTOR_BYTES)
                product = builder.sitofp(total, VECTOR)
                emit.store_at(
                    builder, at, emit.multiply_add(builder, product, factor, emit.load_at(builder, at, VECTOR))
                )

    return weigh


def _load(unpack: Any) -> Any:
    return instruction(FloatVector, (types.int64,), lambda builder, at: unpack(builder, _bytes(builder, at)))


load_codes = _load(lambda builder, codes: builder.sitofp(codes, VECTOR))  # LANES codes of 8 bits as float32
load_low_codes, load_high_codes = _load(_low), _load(_high)  # the lower and upper halves of LANES bytes


def _store_whole(bits: int) -> Any:
    def emitter(builder: ir.IRBuilder, address: ir.Value, numbers: ir.Value) -> None:
        whole = builder.fptosi(numbers, _SUMS)
        emit.store_at(builder, address, builder.trunc(whole, ir.VectorType(ir.IntType(bits), LANES)), align=1)

    return instruction(types.void, (types.int64, FloatVector), emitter)


store_codes = _store_whole(8)  # LANES whole numbers below 256, as bytes
store_words = _store_whole(16)  # LANES whole numbers up to MAX_WORD, and their negatives


_SCORED = tuple(product((8, 4), (1, 2, ROWS_TOGETHER)))
score_codes_block = choice({kind: _score_block(*kind) for kind in _SCORED}, 9)
_WEIGHED = tuple(product((8, 4), sorted({1, 2, ROWS_PER_WEIGHT})))
weigh_block, weigh_wide_block = (
    choice({kind: _value_block(*kind, blocks) for kind in _WEIGHED}, 10) for blocks in (1, _WIDE_BLOCKS)
)


@native
def words_of_codes(elements, bits):
    """How many words a query has for so many elements of a key, those that its last step reads too far included."""
    return (elements * bits // 8 + STEP_BYTES - 1) // STEP_BYTES * (STEP_BYTES * 8 // bits)


@native
def word_of_element(element, bits):
    """Where a query's words have what belongs to the LANES elements of a key from `element` on."""
    if bits == 8:
        return element
    byte = element // BLOCK * _HALF_BLOCK + element % _HALF_BLOCK
    return byte // STEP_BYTES * 2 * STEP_BYTES + element % BLOCK // _HALF_BLOCK * STEP_BYTES + byte % STEP_BYTES


@native
def score_codes(bits, rows, k, k_stride, count, ahead, q, q_row, words, sums, sums_row):
    """sums[row, key] = q[row] . code[key], as float32, for 1, 2 or ROWS_TOGETHER rows of words and `count` keys.

    Where the keys' elements end within a step, the words behind them must be 0, and what lies behind the keys must be
    there to be read. Up to LANES sums past `count` are overwritten.
    """
    steps = words * bits // (8 * STEP_BYTES)
    for n in range(0, count, LANES // rows):
        keys, to = k + n * k_stride, sums + 4 * n
        score_codes_block(bits, rows, keys, k_stride, count - 1 - n, ahead, q, q_row, steps, to, sums_row)


@native
def weigh_codes(
    bits, rows, v, v_stride, ahead, weights, weights_row, count, factors, factors_row, out, out_row, blocks
):
    """out[row] += factor[row] * sum of weights[row, key] * code[key] over `count` keys and `blocks` blocks.

    There are 1, 2 or ROWS_PER_WEIGHT rows of words; behind an odd number of them lies a 0.
    """
    block = 0
    while block < blocks:
        at, to = v + block * BLOCK * bits // 8, out + block * 4 * BLOCK
        if block + _WIDE_BLOCKS <= blocks:
            weigh_wide_block(
                bits, rows, at, v_stride, ahead, weights, weights_row, count, factors, factors_row, to, out_row
            )
            block += _WIDE_BLOCKS
        else:
            weigh_block(bits, rows, at, v_stride, ahead, weights, weights_row, count, factors, factors_row, to, out_row)
            block += 1

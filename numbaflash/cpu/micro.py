"""Register-tiled micro-kernels: loops whose accumulators all stay in vector registers, emitted as LLVM IR.

Prefill computes with query rows in the lanes ("panels" of query rows, transposed): a key's or value's element is
broadcast against them, so that softmax needs no horizontal operation and K needs no transposition. Decode has too few
rows for that; its lanes run over head_dim, straight over the rows of K and V as they lie in memory.

Addresses and strides are int64 bytes. No element is ever summed in another order than its own row's: what one row of a
tile holds never changes the bits of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types

from . import emit
from .emit import BFLOAT16, BOOL, F32, FLOAT16, FLOAT32, I64, LANES, VECTOR
from .intrinsics import Emitter, choice, instruction
from .jit import native
from .target import TARGET

__all__ = [
    "PANEL_VECTORS",
    "ROWS_TOGETHER",
    "TILE_ROWS",
    "accumulate_panel",
    "accumulate_panel_skipping_zeros",
    "counted_loop",
    "horizontal_sums",
    "multiply_panel",
    "score_keys",
    "strided",
    "transpose_block",
    "transpose_rows",
    "weigh_values",
    "widen_vector",
]

PANEL_VECTORS = 3
TILE_ROWS = TARGET.rows
VECTOR_BYTES = 4 * LANES


@contextmanager
def counted_loop(
    builder: ir.IRBuilder, steps: ir.Value, start: list[ir.Value]
) -> Iterator[tuple[ir.Value, list[Any], list[ir.Value], list[Any]]]:
    """Emit `for step in range(steps)`; yields (step, values carried in, list to fill with values carried out, results).

    Where `steps` is 0 the results are the start values.
    """
    before = builder.block
    body = builder.append_basic_block("body")
    after = builder.append_basic_block("after")
    zero = ir.Constant(I64, 0)
    builder.cbranch(builder.icmp_signed(">", steps, zero), body, after)
    builder.position_at_end(after)
    results = [builder.phi(value.type) for value in start]
    builder.position_at_end(body)
    step = builder.phi(I64)
    step.add_incoming(zero, before)
    carried = [builder.phi(value.type) for value in start]
    for phi, value in zip(carried, start, strict=True):
        phi.add_incoming(value, before)
    following: list[ir.Value] = []
    yield step, carried, following, results
    next_step = builder.add(step, ir.Constant(I64, 1))
    step.add_incoming(next_step, builder.block)
    for phi, result, first, value in zip(carried, results, start, following, strict=True):
        phi.add_incoming(value, builder.block)
        result.add_incoming(first, before)
        result.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", next_step, steps), body, after)
    builder.position_at_end(after)


def strided(builder: ir.IRBuilder, base: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
    """The addresses of `count` things that lie `stride` bytes apart."""
    return [builder.add(base, builder.mul(stride, ir.Constant(I64, i))) if i else base for i in range(count)]


# ---- prefill: lanes are query rows ------------------------------------------------------------------------------


def _panel_product(vectors: int, accumulate: bool, skip_zeros: bool = False) -> Emitter:
    """C[i, :] = sum over k of A[i, k] * B[k, :], for TILE_ROWS rows i and `vectors` vectors of lanes.

    With `accumulate`, C[i, :] = C[i, :] * factor + sum, and there is a last operand, where the factors lie: the online
    softmax's rescaling costs no pass of its own. With `skip_zeros`, a B[k, lane] of 0 takes nothing from A, be that NaN
    or infinite.
    """

    def multiply(
        builder: ir.IRBuilder,
        a: ir.Value,
        a_row: ir.Value,
        a_step: ir.Value,
        b: ir.Value,
        b_step: ir.Value,
        steps: ir.Value,
        c: ir.Value,
        c_row: ir.Value,
        factor: ir.Value | None = None,
    ) -> None:
        a_rows = strided(builder, a, a_row, TILE_ROWS)
        zero = emit.constant(0.0, VECTOR)
        start = [zero] * (TILE_ROWS * vectors)
        with counted_loop(builder, steps, start) as (step, sums, following, totals):
            b_at = builder.add(b, builder.mul(step, b_step))
            a_offset = builder.mul(step, a_step)
            row = [emit.load_at(builder, emit.offset(builder, b_at, j * VECTOR_BYTES), VECTOR) for j in range(vectors)]
            nothing = [builder.fcmp_ordered("==", value, zero) for value in row] if skip_zeros else []
            for i in range(TILE_ROWS):
                element = emit.broadcast(builder, emit.load_at(builder, builder.add(a_rows[i], a_offset), F32))
                for j in range(vectors):
                    total = sums[i * vectors + j]
                    more = emit.multiply_add(builder, element, row[j], total)
                    following.append(builder.select(nothing[j], total, more) if skip_zeros else more)
        factors = [
            emit.load_at(builder, emit.offset(builder, factor, j * VECTOR_BYTES), VECTOR)
            for j in range(vectors if accumulate else 0)
        ]
        for i, c_at in enumerate(strided(builder, c, c_row, TILE_ROWS)):
            for j in range(vectors):
                at = emit.offset(builder, c_at, j * VECTOR_BYTES)
                value = totals[i * vectors + j]
                if accumulate:
                    value = emit.multiply_add(builder, emit.load_at(builder, at, VECTOR), factors[j], value)
                emit.store_at(builder, at, value)

    return multiply


_VECTORS = range(1, PANEL_VECTORS + 1)

# C = A B for a panel of so many vectors, and C = C * factor + A B, be `factor` the address of a vector for each; see
# `_panel_product`.
multiply_panel = choice({(n,): _panel_product(n, accumulate=False) for n in _VECTORS}, 8)
accumulate_panel = choice({(n,): _panel_product(n, accumulate=True) for n in _VECTORS}, 9)
# For one vector, where B may hold zeros that take nothing from A.
accumulate_panel_skipping_zeros = instruction(
    types.void, (types.int64,) * 9, _panel_product(1, accumulate=True, skip_zeros=True)
)


# ---- decode: lanes run over head_dim ----------------------------------------------------------------------------

# Query heads that share a KV head go through the micro-kernels by fours, so that a vector of K or V, once loaded and
# widened, serves four rows; those that remain by two, or alone.
ROWS_TOGETHER = 4
_VALUE_VECTORS = 4 if TARGET.rows == 8 else 2


def _merged(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, span: int) -> ir.Value:
    """Halve the sums that x and y hold, each spread over `span` lanes, into one vector of twice as many sums."""
    lanes = range(LANES)
    if span > 4:  # whole 128-bit lanes move
        first = [i for i in lanes if i % span < span // 2]
        low = [*first, *(LANES + i for i in first)]
        high = [i + span // 2 for i in low]
    else:  # within each 128-bit lane: two elements of x, then two of y
        low = [[0, 1], [0, 2]][span == 2]
        high = [[2, 3], [1, 3]][span == 2]
        low, high = (
            [at + i for at in range(0, LANES, 4) for source in (0, LANES) for i in (source + p for p in picks)]
            for picks in (low, high)
        )
    halves = emit.shuffle(builder, x, y, low), emit.shuffle(builder, x, y, high)
    return builder.fadd(*halves) if x.type == VECTOR else builder.add(*halves)


def _merged_labels(x: list[int], y: list[int], span: int) -> list[int]:
    """The order in which `_merged` leaves the sums."""
    if span > 4:
        return [*x, *y]
    per_lane = 4 // span
    return [label for at in range(0, len(x), per_lane) for label in (*x[at : at + per_lane], *y[at : at + per_lane])]


def horizontal_sums(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """A vector whose lane i is the sum of the lanes of vectors[i]: a transposition that adds, log2(LANES) deep.

    The vectors are all float32, or all 32-bit integers.
    """
    order = _reduced_order([[i] for i in range(LANES)])
    level = [vectors[order.index(i)] for i in range(LANES)]
    span = LANES
    while len(level) > 1:
        level = [_merged(builder, x, y, span) for x, y in zip(level[::2], level[1::2], strict=True)]
        span //= 2
    return level[0]


def _reduced_order(level: list[list[int]]) -> list[int]:
    span = LANES
    while len(level) > 1:
        level = [_merged_labels(x, y, span) for x, y in zip(level[::2], level[1::2], strict=True)]
        span //= 2
    return level[0]


def _score_block(dtype: int, rows: int) -> Emitter:
    """scores[row, key] = q[row] . k[key] for `rows` rows and LANES / rows keys; keys past `last` repeat key `last`."""
    keys = LANES // rows

    def score(
        builder: ir.IRBuilder,
        k: ir.Value,
        k_stride: ir.Value,
        last: ir.Value,
        ahead: ir.Value,
        q: ir.Value,
        q_row: ir.Value,
        steps: ir.Value,
        scores: ir.Value,
        scores_row: ir.Value,
    ) -> None:
        key_at = []
        for key in range(keys):
            wanted = ir.Constant(I64, key)
            index = builder.select(builder.icmp_signed("<", wanted, last), wanted, last)
            key_at.append(builder.add(k, builder.mul(index, k_stride)))
        q_rows = strided(builder, q, q_row, rows)
        start = [emit.constant(0.0, VECTOR)] * LANES
        with counted_loop(builder, steps, start) as (step, sums, following, totals):
            element = ir.Constant(I64, LANES * (4 if dtype == FLOAT32 else 2))
            k_offset = builder.mul(step, element)
            q_offset = builder.mul(step, ir.Constant(I64, VECTOR_BYTES))
            queries = [emit.load_at(builder, builder.add(at, q_offset), VECTOR) for at in q_rows]
            updated: dict[tuple[int, int], ir.Value] = {}
            for key in range(keys):
                at = builder.add(key_at[key], k_offset)
                emit.prefetch(builder, builder.add(at, ahead))
                vector = emit.load_widened(builder, at, dtype)
                for row in range(rows):
                    updated[row, key] = emit.multiply_add(builder, queries[row], vector, sums[row * keys + key])
            following += [updated[row, key] for row in range(rows) for key in range(keys)]
        result = horizontal_sums(builder, totals)
        for row, at in enumerate(strided(builder, scores, scores_row, rows)):
            part = emit.shuffle(builder, result, result, list(range(row * keys, (row + 1) * keys)))
            emit.store_at(builder, at, part)

    return score


def _value_block(dtype: int, rows: int, vectors: int) -> Emitter:
    """out[row, :] += sum over keys of weights[row, key] * v[key, :], for `vectors` vectors of head_dim."""

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
            emit.offset(builder, at, j * VECTOR_BYTES)
            for at in strided(builder, out, out_row, rows)
            for j in range(vectors)
        ]
        start = [emit.load_at(builder, at, VECTOR) for at in places]
        with counted_loop(builder, keys, start) as (key, sums, following, totals):
            v_at = builder.add(v, builder.mul(key, v_stride))
            nbytes = LANES * (4 if dtype == FLOAT32 else 2)
            for line in range(0, vectors * nbytes, 64):
                emit.prefetch(builder, builder.add(emit.offset(builder, v_at, line), ahead))
            values = [emit.load_widened(builder, emit.offset(builder, v_at, j * nbytes), dtype) for j in range(vectors)]
            weight_offset = builder.mul(key, ir.Constant(I64, 4))
            for row, at in enumerate(weight_rows):
                weight = emit.broadcast(builder, emit.load_at(builder, builder.add(at, weight_offset), F32))
                following += [
                    emit.multiply_add(builder, weight, values[j], sums[row * vectors + j]) for j in range(vectors)
                ]
        for at, total in zip(places, totals, strict=True):
            emit.store_at(builder, at, total)

    return weigh


_KINDS = tuple(product((FLOAT32, FLOAT16, BFLOAT16), (1, 2, ROWS_TOGETHER)))
score_block = choice({kind: _score_block(*kind) for kind in _KINDS}, 9)
weigh_block, weigh_wide_block = (
    choice({kind: _value_block(*kind, vectors) for kind in _KINDS}, 8) for vectors in (1, _VALUE_VECTORS)
)


@native
def score_keys(dtype, rows, k, k_stride, count, ahead, q, q_row, steps, scores, scores_row):
    """scores[row, key] = q[row] . k[key] for `rows` (1, 2 or ROWS_TOGETHER) rows and `count` keys.

    q is float32, padded with zeros to `steps` whole vectors; k holds as many elements of `dtype`. Up to LANES scores
    past `count` are overwritten.
    """
    for key in range(0, count, LANES // rows):
        last, to = count - 1 - key, scores + 4 * key
        score_block(dtype, rows, k + key * k_stride, k_stride, last, ahead, q, q_row, steps, to, scores_row)


@native
def weigh_values(dtype, rows, v, v_stride, ahead, weights, weights_row, count, out, out_row, steps):
    """out[row] += sum of weights[row, key] * v[key] over `count` keys, for `steps` vectors of head_dim.

    There are 1, 2 or ROWS_TOGETHER rows.
    """
    nbytes = LANES * (4 if dtype == FLOAT32 else 2)
    step = 0
    while step < steps:
        at, to = v + step * nbytes, out + step * VECTOR_BYTES
        if step + _VALUE_VECTORS <= steps:
            weigh_wide_block(dtype, rows, at, v_stride, ahead, weights, weights_row, count, to, out_row)
            step += _VALUE_VECTORS
        else:
            weigh_block(dtype, rows, at, v_stride, ahead, weights, weights_row, count, to, out_row)
            step += 1


# ---- between the two layouts ------------------------------------------------------------------------------------


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of LANES vectors."""
    rows = list(rows)
    half = LANES // 2
    while half:  # swap the off-diagonal quarters of each square of 2 * half
        for i in range(LANES):
            if i & half == 0:
                a, b = rows[i], rows[i + half]
                lanes = range(LANES)
                rows[i] = emit.shuffle(builder, a, b, [x + LANES - half if x & half else x for x in lanes])
                rows[i + half] = emit.shuffle(builder, a, b, [x + LANES if x & half else x + half for x in lanes])
        half //= 2
    return rows


def _transpose(
    builder: ir.IRBuilder, source: ir.Value, source_row: ir.Value, target: ir.Value, target_row: ir.Value
) -> None:
    rows = [emit.load_at(builder, at, VECTOR) for at in strided(builder, source, source_row, LANES)]
    for at, row in zip(strided(builder, target, target_row, LANES), _transposed(builder, rows), strict=True):
        emit.store_at(builder, at, row)


def _widen_vector(dtype: int) -> Emitter:
    return lambda builder, source, target: emit.store_at(builder, target, emit.load_widened(builder, source, dtype))


def _transpose_rows(dtype: int) -> Emitter:
    def transpose(builder: ir.IRBuilder, addresses: ir.Value, offset: ir.Value, target: ir.Value) -> None:
        rows = []
        for place in strided(builder, addresses, ir.Constant(I64, 8), LANES):
            at = builder.add(emit.load_at(builder, place, I64, 8), offset)
            rows.append(emit.load_widened(builder, at, dtype))
        for i, row in enumerate(_transposed(builder, rows)):
            emit.store_at(builder, emit.offset(builder, target, i * VECTOR_BYTES), row)

    return transpose


# Transpose a block of LANES x LANES float32: source, its row stride, target, its row stride; they may be the same.
transpose_block = instruction(types.void, (types.int64,) * 4, _transpose)

_DTYPES = (FLOAT32, FLOAT16, BFLOAT16, BOOL)

# Write LANES elements of a dtype as float32: source, target.
widen_vector = choice({(dtype,): _widen_vector(dtype) for dtype in _DTYPES}, 2)
# Transpose LANES elements each of LANES rows of a dtype, as float32: where the rows' addresses lie, bytes from those to
# the elements, and the target, a block without gaps.
transpose_rows = choice({(dtype,): _transpose_rows(dtype) for dtype in _DTYPES}, 3)

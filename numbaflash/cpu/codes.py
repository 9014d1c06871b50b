"""Attention to quantized runs: scores and weighted sums straight from the codes (`runs.Codes` says how they lie).

An element is scale * code + offset. No element is computed in decode: where a channel has one scale and one offset
for the page, they go into the query; where a group of a token has its own, the scale goes to its part of the score, or
into its weight, and the offset is added to the score, or to the output, once. So K and V cost one conversion and one
multiply-add an element, as in 16 bits.
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .jit import native
from .micro import ROWS_TOGETHER
from .micro_codes import (
    BLOCK,
    ROWS_PER_WEIGHT,
    load_codes,
    load_high_codes,
    load_low_codes,
    score_codes,
    score_scaled_codes,
    weigh_codes,
)
from .rows import VECTOR_BYTES
from .runs import K_HEAD_STRIDE, K_TOKEN_STRIDE, START, V_HEAD_STRIDE, V_TOKEN_STRIDE
from .vector import (
    LANES,
    add,
    fma,
    horizontal_sum,
    lane_numbers,
    less,
    load,
    load_float16,
    load_int,
    load_one_float16,
    mul,
    prefetch,
    splat,
    store,
    where,
)
from .walk import key_at, run_field, value_at

__all__ = [
    "CODES_SCRATCH",
    "SHIFTS_ROW",
    "add_shifts",
    "is_quantized",
    "score_quantized",
    "unpack_tokens",
    "weigh_quantized",
]

_MAX_PAGE = 256  # tokens
_MAX_GROUPS = MAX_HEAD_DIM // BLOCK
_TOKENS_ROW = 4 * (_MAX_PAGE + LANES)  # a float32 for each token of a page; loops overrun by a vector

# Where things lie in scratch memory.
_QUERIES = 0
_STARTS = _QUERIES + 4 * ROWS_TOGETHER * MAX_HEAD_DIM
_SCALES = _STARTS + ROWS_TOGETHER * VECTOR_BYTES
_OFFSETS = _SCALES + _MAX_GROUPS * _TOKENS_ROW
_WEIGHTS = _OFFSETS + _MAX_GROUPS * _TOKENS_ROW
CODES_SCRATCH = _WEIGHTS + ROWS_PER_WEIGHT * _TOKENS_ROW

# What a row's values have as offsets so far: a vector for each group, whose lanes are to be summed.
SHIFTS_ROW = _MAX_GROUPS * VECTOR_BYTES


@native
def is_quantized(task, run):
    """Whether a run holds codes."""
    return task.codes != 0 and load_int(task.codes + 16 * run) != 0


@native
def _key_parameters(task, run, kv_head, position):
    """Address of the scales of a run's keys; those of tokens begin at `position`."""
    at = load_int(task.codes + 16 * run) + kv_head * run_field(task, run, K_HEAD_STRIDE)
    return at if task.key_group == 0 else at + 2 * (position - run_field(task, run, START))


@native
def _value_parameters(task, run, kv_head, position):
    """Address of the scales of a run's values from `position` on."""
    at = load_int(task.codes + 16 * run + 8) + kv_head * run_field(task, run, V_HEAD_STRIDE)
    return at + 2 * (position - run_field(task, run, START))


@native
def _offsets(task, scales, scales_at, offsets_at):
    """A vector of offsets, which are stored or, where codes are symmetric, follow from the scales."""
    if task.symmetric != 0:
        return mul(scales, splat(np.float32(-8.0 if task.code_bits == 4 else -128.0)))
    return load_float16(scales_at + offsets_at)


@native
def _widen_parameters(task, parameters, groups, between, count, ahead, scales, offsets):
    """Lay out `count` scales and offsets of all groups, `between` bytes apart, as float32, _TOKENS_ROW apart."""
    for group in range(groups):
        for i in range(0, count, LANES):
            at = parameters + group * between + 2 * i
            prefetch(at + ahead)
            prefetch(at + groups * between + ahead)
            scale = load_float16(at)
            store(scales + group * _TOKENS_ROW + 4 * i, scale)
            store(offsets + group * _TOKENS_ROW + 4 * i, _offsets(task, scale, at, groups * between))


# ---- keys -------------------------------------------------------------------------------------------------------


@native
def score_quantized(task, run, kv_head, position, count, ahead, rows, queries, query_row, scores, row, scratch):
    """Scores of the `count` tokens of a quantized run from `position` on, for `rows` queries.

    Args:
        task: The call.
        run: A quantized run.
        kv_head: Its head.
        position: Of the first token.
        count: Tokens.
        ahead: Bytes from these keys to those that are wanted next.
        rows: Query rows, 1 or an even number.
        queries: Address of their float32 rows.
        query_row: Bytes between those.
        scores: Address of the first token's score; a vector past the last one may be overwritten.
        row: Bytes between rows of scores.
        scratch: CODES_SCRATCH bytes.
    """
    stride = run_field(task, run, K_TOKEN_STRIDE)
    keys, parameters = key_at(task, run, kv_head, position), _key_parameters(task, run, kv_head, position)
    scales, offsets = scratch + _SCALES, scratch + _OFFSETS
    blocks = task.head_dim // BLOCK
    by_channel = task.key_group == 0
    if by_channel:
        groups, group_shift = 0, 0
        _widen_parameters(task, parameters, 1, 2 * task.head_dim, task.head_dim, ahead, scales, offsets)
    else:
        groups, group_shift = task.head_dim // task.key_group, _log2(task.key_group // BLOCK)
        _widen_parameters(task, parameters, groups, 2 * task.page_size, count, ahead, scales, offsets)
    r = 0
    while r < rows:
        together = min(rows - r, ROWS_TOGETHER)
        q, to = queries + r * query_row, scores + r * row
        if by_channel:
            q = scratch + _QUERIES
            for i in range(together):
                query, start = queries + (r + i) * query_row, scratch + _STARTS + i * VECTOR_BYTES
                _scale_query(task.head_dim, query, scales, offsets, q + i * query_row, start)
        for n in range(0, count, LANES // together):
            at, last = keys + n * stride, count - 1 - n
            if by_channel:
                start = scratch + _STARTS
                score_codes(
                    task.code_bits, together, at, stride, last, ahead, q, query_row, blocks, start, to + 4 * n, row
                )
            else:
                score_scaled_codes(
                    task.code_bits,
                    together,
                    at,
                    stride,
                    last,
                    ahead,
                    q,
                    query_row,
                    blocks,
                    scales + 4 * n,
                    _TOKENS_ROW,
                    group_shift,
                    to + 4 * n,
                    row,
                )
        for i in range(0 if by_channel else together):
            _shift_by_groups(task, q + i * query_row, groups, count, offsets, to + i * row)
        r += together


@native
def _scale_query(head_dim, query, scales, offsets, target, start):
    """Write a query times its channels' scales, and its product with their offsets: a vector, whose lanes sum to it."""
    total = splat(np.float32(0))
    for at in range(0, 4 * head_dim, VECTOR_BYTES):
        q = load(query + at)
        store(target + at, mul(q, load(scales + at)))
        total = fma(q, load(offsets + at), total)
    store(start, total)


@native
def _shift_by_groups(task, query, groups, count, offsets, scores):
    """Add to each token's score, for each of its groups, the offset times the sum of the group's part of the query."""
    for group in range(groups):
        total = splat(np.float32(0))
        first = query + 4 * group * task.key_group
        for at in range(first, first + 4 * task.key_group, VECTOR_BYTES):
            total = add(total, load(at))
        part = splat(horizontal_sum(total))
        for i in range(0, 4 * count, VECTOR_BYTES):
            store(scores + i, fma(part, load(offsets + group * _TOKENS_ROW + i), load(scores + i)))


@native
def _log2(n):
    shift = 0
    while n > 1:
        n //= 2
        shift += 1
    return shift


# ---- values -----------------------------------------------------------------------------------------------------


@native
def weigh_quantized(
    task, run, kv_head, position, count, ahead, rows, exact, weights, row, out, out_row, shifts, scratch
):
    """Add the `count` values of a quantized run from `position` on, times their weights, to `rows` outputs.

    What their offsets add goes to `shifts`, SHIFTS_ROW bytes a row, for `add_shifts` to add once for many runs. Codes
    are finite, and so are their scales: a weight of 0 takes nothing from any of them. The rest is as in
    `score_quantized`.
    """
    stride = run_field(task, run, V_TOKEN_STRIDE)
    values, parameters = value_at(task, run, kv_head, position), _value_parameters(task, run, kv_head, position)
    groups, group_bytes = task.value_dim // task.value_group, task.value_group * task.code_bits // 8
    blocks = task.value_group // BLOCK
    scales, offsets, scaled = scratch + _SCALES, scratch + _OFFSETS, scratch + _WEIGHTS
    _widen_parameters(task, parameters, groups, 2 * task.page_size, count, ahead, scales, offsets)
    r = 0
    while r < rows:
        together = 1 if exact else min(rows - r, ROWS_PER_WEIGHT)
        for group in range(groups):
            below = group * _TOKENS_ROW
            for i in range(together):
                shift = shifts + (r + i) * SHIFTS_ROW + group * VECTOR_BYTES
                to = scaled + i * _TOKENS_ROW
                _scale_weights(weights + (r + i) * row, scales + below, offsets + below, count, to, shift)
            v, to = values + group * group_bytes, out + r * out_row + 4 * group * task.value_group
            weigh_codes(task.code_bits, together, v, stride, ahead, scaled, _TOKENS_ROW, count, to, out_row, blocks)
        r += together


@native
def _scale_weights(weights, scales, offsets, count, target, shift):
    """Write weights times scales, and add weights times offsets to the lanes of the vector at `shift`."""
    total = load(shift)
    for i in range(0, count, LANES):
        weight = load(weights + 4 * i)
        store(target + 4 * i, mul(weight, load(scales + 4 * i)))
        more = fma(weight, load(offsets + 4 * i), total)
        total = where(less(lane_numbers(), splat(np.float32(count - i))), more, total)
    store(shift, total)


@native
def add_shifts(task, rows, shifts, out, out_row):
    """Add what the offsets of all values make to `rows` outputs."""
    group_bytes = 4 * task.value_group
    for r in range(rows):
        for group in range(task.value_dim // task.value_group):
            shift = splat(horizontal_sum(load(shifts + r * SHIFTS_ROW + group * VECTOR_BYTES)))
            first = out + r * out_row + group * group_bytes
            for at in range(first, first + group_bytes, VECTOR_BYTES):
                store(at, add(load(at), shift))


# ---- prefill ----------------------------------------------------------------------------------------------------


@native
def unpack_tokens(task, run, kv_head, position, count, keys, k_row, values, v_row):
    """Write `count` keys and values of a quantized run from `position` on as float32 rows."""
    k, k_stride = key_at(task, run, kv_head, position), run_field(task, run, K_TOKEN_STRIDE)
    v, v_stride = value_at(task, run, kv_head, position), run_field(task, run, V_TOKEN_STRIDE)
    k_parameters = _key_parameters(task, run, kv_head, position)
    v_parameters = _value_parameters(task, run, kv_head, position)
    for n in range(count):
        if task.key_group == 0:
            _unpack_by_channels(task, k + n * k_stride, k_parameters, keys + n * k_row)
        else:
            _unpack_by_groups(
                task, k + n * k_stride, k_parameters + 2 * n, task.key_group, task.head_dim, keys + n * k_row
            )
        _unpack_by_groups(
            task, v + n * v_stride, v_parameters + 2 * n, task.value_group, task.value_dim, values + n * v_row
        )


@native
def _unpack_by_channels(task, codes, scales, target):
    for d in range(0, task.head_dim, LANES):
        at = scales + 2 * d
        scale = load_float16(at)
        offset = _offsets(task, scale, at, 2 * task.head_dim)
        store(target + 4 * d, fma(_codes_at(task, codes, d), scale, offset))


@native
def _unpack_by_groups(task, codes, scales, group_size, dim, target):
    between = 2 * task.page_size
    for group in range(dim // group_size):
        at = scales + group * between
        one = splat(load_one_float16(at))
        offset = _offset_of_group(task, one, at + dim // group_size * between)
        for d in range(group * group_size, (group + 1) * group_size, LANES):
            store(target + 4 * d, fma(_codes_at(task, codes, d), one, offset))


@native
def _offset_of_group(task, scales, offset_at):
    if task.symmetric != 0:
        return mul(scales, splat(np.float32(-8.0 if task.code_bits == 4 else -128.0)))
    return splat(load_one_float16(offset_at))


@native
def _codes_at(task, codes, element):
    """The LANES codes of a row from `element` on."""
    if task.code_bits == 8:
        return load_codes(codes + element)
    inside = element % BLOCK
    at = codes + element // BLOCK * (BLOCK // 2) + inside % (BLOCK // 2)
    return load_low_codes(at) if inside < BLOCK // 2 else load_high_codes(at)

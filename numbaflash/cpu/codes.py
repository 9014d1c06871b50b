"""Attention to quantized runs: scores and weighted sums straight from the codes (`runs.Codes` says how they lie).

An element is scale * code + offset. No element is computed in decode: where a channel has one scale and one offset
for the page, they go into the query; where a group of a token has its own, the scale goes to its part of the score, or
into its weight, and the offset is added to the score, or to the output, once. What is left is products with codes,
which are whole numbers: queries and weights become whole numbers too (`words.py`), and all is summed exactly
(`micro_codes.py`).
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .jit import native
from .micro import ROWS_TOGETHER
from .micro_codes import BLOCK, ROWS_PER_WEIGHT, score_codes, weigh_codes, words_of_codes
from .rows import VECTOR_BYTES, clear
from .runs import K_HEAD_STRIDE, K_TOKEN_STRIDE, START, V_HEAD_STRIDE, V_TOKEN_STRIDE
from .vector import (
    LANES,
    add,
    fma,
    horizontal_sum,
    load,
    load_float,
    load_float16,
    load_int,
    mul,
    prefetch,
    splat,
    store,
    store_float,
)
from .walk import key_at, run_field, value_at
from .words import (
    FACTOR,
    LACK,
    MAX_PAGE,
    REST_UNIT,
    ROUNDED_ROW,
    SHIFT,
    WORDS_ROW,
    has_rests,
    round_queries,
    round_weights,
)

__all__ = [
    "CODES_SCRATCH",
    "SHIFTS_ROW",
    "add_shifts",
    "is_quantized",
    "key_parameters",
    "offsets_of",
    "score_quantized",
    "value_parameters",
    "weigh_quantized",
]

_MAX_GROUPS = MAX_HEAD_DIM // BLOCK
_TOKENS_ROW = 4 * (MAX_PAGE + LANES)  # a float32 for each token of a page; loops overrun by a vector
_ROWS = 2 * ROWS_TOGETHER  # of words: as many rows, and their rests

# Where things lie in scratch memory.
_SCALES = 0
_OFFSETS = _SCALES + _MAX_GROUPS * _TOKENS_ROW
_WORDS = _OFFSETS + _MAX_GROUPS * _TOKENS_ROW
_SUMS = _WORDS + _ROWS * WORDS_ROW
_ROUNDED = _SUMS + ROWS_TOGETHER * _TOKENS_ROW
CODES_SCRATCH = _ROUNDED + ROWS_TOGETHER * ROUNDED_ROW

# What a row's values have as offsets so far: a vector for each group, whose lanes are to be summed.
SHIFTS_ROW = _MAX_GROUPS * VECTOR_BYTES


@native
def is_quantized(task, run):
    """Whether a run holds codes."""
    return task.codes != 0 and load_int(task.codes + 16 * run) != 0


@native
def key_parameters(task, run, kv_head, position):
    """Address of the scales of a run's keys; those of tokens begin at `position`."""
    at = load_int(task.codes + 16 * run) + kv_head * run_field(task, run, K_HEAD_STRIDE)
    return at if task.key_group == 0 else at + 2 * (position - run_field(task, run, START))


@native
def value_parameters(task, run, kv_head, position):
    """Address of the scales of a run's values from `position` on."""
    at = load_int(task.codes + 16 * run + 8) + kv_head * run_field(task, run, V_HEAD_STRIDE)
    return at + 2 * (position - run_field(task, run, START))


@native
def offsets_of(task, scales, scales_at, offsets_at):
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
            store(offsets + group * _TOKENS_ROW + 4 * i, offsets_of(task, scale, at, groups * between))


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
    keys, parameters = key_at(task, run, kv_head, position), key_parameters(task, run, kv_head, position)
    scales, offsets = scratch + _SCALES, scratch + _OFFSETS
    by_channel = task.key_group == 0
    groups = 1 if by_channel else task.head_dim // task.key_group
    elements = task.head_dim // groups
    if by_channel:
        _widen_parameters(task, parameters, 1, 2 * task.head_dim, task.head_dim, ahead, scales, offsets)
    else:
        _widen_parameters(task, parameters, groups, 2 * task.page_size, count, ahead, scales, offsets)
    words, sums, rounded = scratch + _WORDS, scratch + _SUMS, scratch + _ROUNDED
    in_row, parts = words_of_codes(elements, task.code_bits), 2 if has_rests(task) else 1
    if in_row > elements:
        clear(words, _ROWS * WORDS_ROW)
    r = 0
    while r < rows:
        together = min(rows - r, ROWS_TOGETHER // parts)
        for group in range(groups):
            code, first = keys + group * elements * task.code_bits // 8, queries + r * query_row + 4 * group * elements
            round_queries(task, together, elements, first, query_row, scales, offsets, words, rounded)
            both = together * parts
            score_codes(task.code_bits, both, code, stride, count, ahead, words, WORDS_ROW, in_row, sums, _TOKENS_ROW)
            rests = (both - together) * _TOKENS_ROW
            for i in range(together):
                own, term, to = sums + i * _TOKENS_ROW, rounded + i * ROUNDED_ROW, scores + (r + i) * row
                if by_channel:
                    _finish_scores(count, own, rests, term, to)
                else:
                    below = group * _TOKENS_ROW
                    _finish_scores_of_group(count, own, rests, term, scales + below, offsets + below, group == 0, to)
        r += together


@native
def _whole_sums(sums, rests, term):
    """A vector of sums of words, and what they lack: sums of the rests, `rests` bytes further, or a middle code's."""
    lack = splat(load_float(term + LACK)) if rests == 0 else mul(load(sums + rests), splat(REST_UNIT))
    return add(load(sums), lack)


@native
def _finish_scores(count, sums, rests, term, scores):
    """Turn sums of words into scores, where channels have scales."""
    factor, shift = splat(load_float(term + FACTOR)), splat(load_float(term + SHIFT))
    for i in range(0, 4 * count, VECTOR_BYTES):
        store(scores + i, fma(_whole_sums(sums + i, rests, term), factor, shift))


@native
def _finish_scores_of_group(count, sums, rests, term, scales, offsets, is_first, scores):
    """Turn sums of words into a group's part of the scores, where tokens have scales; the first sets, others add."""
    factor, shift = splat(load_float(term + FACTOR)), splat(load_float(term + SHIFT))
    for i in range(0, 4 * count, VECTOR_BYTES):
        product = mul(_whole_sums(sums + i, rests, term), factor)
        score = fma(product, load(scales + i), mul(shift, load(offsets + i)))
        store(scores + i, score if is_first else add(score, load(scores + i)))


# ---- values -----------------------------------------------------------------------------------------------------


@native
def weigh_quantized(task, run, kv_head, position, count, ahead, rows, weights, row, out, out_row, shifts, scratch):
    """Add the `count` values of a quantized run from `position` on, times their weights, to `rows` outputs.

    What their offsets add goes to `shifts`, SHIFTS_ROW bytes a row, for `add_shifts` to add once for many runs. Codes
    are finite, and so are their scales: a weight of 0 takes nothing from any of them. The rest is as in
    `score_quantized`.
    """
    stride = run_field(task, run, V_TOKEN_STRIDE)
    values, parameters = value_at(task, run, kv_head, position), value_parameters(task, run, kv_head, position)
    groups, group_bytes = task.value_dim // task.value_group, task.value_group * task.code_bits // 8
    blocks = task.value_group // BLOCK
    scales, offsets = scratch + _SCALES, scratch + _OFFSETS
    words, factors, bits = scratch + _WORDS, scratch + _ROUNDED + FACTOR, task.code_bits
    _widen_parameters(task, parameters, groups, 2 * task.page_size, count, ahead, scales, offsets)
    r = 0
    while r < rows:
        together = min(rows - r, ROWS_PER_WEIGHT)
        for group in range(groups):
            below, shift = group * _TOKENS_ROW, shifts + r * SHIFTS_ROW + group * VECTOR_BYTES
            own = weights + r * row
            round_weights(
                task,
                together,
                count,
                own,
                row,
                scales + below,
                offsets + below,
                words,
                shift,
                SHIFTS_ROW,
                scratch + _ROUNDED,
            )
            v, to = values + group * group_bytes, out + r * out_row + 4 * group * task.value_group
            weigh_codes(
                bits, together, v, stride, ahead, words, WORDS_ROW, count, factors, ROUNDED_ROW, to, out_row, blocks
            )
            if has_rests(task):
                rests = words + together * WORDS_ROW
                for i in range(together):
                    at = factors + i * ROUNDED_ROW
                    store_float(at, load_float(at) * REST_UNIT)
                weigh_codes(
                    bits, together, v, stride, 0, rests, WORDS_ROW, count, factors, ROUNDED_ROW, to, out_row, blocks
                )
        r += together


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
